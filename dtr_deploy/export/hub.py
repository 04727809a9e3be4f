"""Publish a finished run on the Hugging Face hub: the checkpoint with its card, and what was asked for besides.

Through `huggingface_hub`, with its own ways to log in (`HF_TOKEN`, `hf auth login`) and to name another hub
(`HF_ENDPOINT`). Everything goes into one commit, so that a repository is never half new.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr_deploy.errors import DtrError, UsageError
from dtr_deploy.report.schema import REPORT, read_report
from dtr_deploy.run_dir import RunDir

PAGE = "report.html"


@dataclass(frozen=True)
class Pushed:
    """url: of the commit, or of the pull request. files: path in the repository -> bytes."""

    url: str
    files: dict[str, int]


def files_to_push(run: RunDir, onnx: Sequence[str] = (), report: bool = True) -> dict[str, Path]:
    """Path in the repository -> file, of a run that is finished and unchanged since.

    Raises `UsageError` for a run without a report or with a failed parity row, for an artefact that is not what the
    build wrote, and for a precision that was not exported.
    """
    if not (run.path / REPORT).is_file():
        raise UsageError(f"{run.path}: not finished (no {REPORT}); `dtr-deploy build` goes on with it")
    if failed := [row for row in read_report(run.path / REPORT).parity if not row.passed]:
        raise UsageError(f"{run.path}: parity failed ({failed[0].engine} {failed[0].precision}); it is not published")
    for stage in run.stages:
        run.check_artefacts(stage)
    hybrid = run.path / "hybrid"
    found = {file.relative_to(hybrid).as_posix(): file for file in sorted(hybrid.rglob("*")) if file.is_file()}
    for precision in onnx:
        folder = run.path / "onnx" / precision
        if not folder.is_dir():
            there = sorted(path.name for path in (run.path / "onnx").glob("*")) or ["none"]
            raise UsageError(f"--onnx {precision}: the run has no such export; accepted: {', '.join(there)}")
        found |= {
            f"onnx/{precision}/{file.relative_to(folder).as_posix()}": file
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
    if report:
        found |= {name: run.path / name for name in (REPORT, PAGE) if (run.path / name).is_file()}
    return found


def push(
    files: dict[str, Path],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "",
    create_pr: bool = False,
) -> Pushed:
    """Commit `files` to the model repository `repo_id`, which is made if it is not there; nothing changed, no commit.

    private: of a repository that is made now. revision: a branch, made if it is not there.
    Raises `UsageError` in one line where the hub refuses or is not reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    with _one_line(repo_id):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, str(file)) for name, file in files.items()],
            commit_message=message or "dtr-deploy: hybrid model",
            revision=revision,
            create_pr=create_pr,
        )
    return Pushed(done.pr_url or done.commit_url, {name: file.stat().st_size for name, file in files.items()})


@contextmanager
def _one_line(repo_id: str) -> Iterator[None]:
    """What goes wrong with a hub, as one line that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

    login = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        yield
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} names no repository; accepted: OWNER/NAME of letters, digits, -, _ and ."
        ) from error
    except LocalTokenNotFoundError as error:
        raise UsageError(f"{repo_id}: no token for the hub; {login}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons: dict[int, str] = {
            401: f"the hub does not know you; {login}",
            403: f"your token may not write there; {login}",
            404: "no such repository or branch, or your token may not see it",
            409: "the hub has another commit under way, or the branch has moved; try again",
        }
        said = (error.server_message or str(error)).strip().splitlines()[0]
        raise UsageError(f"{repo_id}: {reasons.get(status, f'the hub answered {status}: {said}')}") from error
    except ValueError as error:
        raise UsageError(f"{repo_id}: the hub does not take the files ({_first(error)})") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise DtrError(f"{repo_id}: the hub was not reached, or not to the end ({_first(error)}); try again") from error


def _first(error: BaseException) -> Any:
    """The first line of what lies at the bottom of an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
