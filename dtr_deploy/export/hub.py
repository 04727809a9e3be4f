"""A finished run on the Hugging Face Hub: the checkpoint with its card, the ONNX exports asked for and the report.

Only files that the run's manifest names are sent, after their sha256 was checked, and all of them in one commit, so
that the repository never holds half of a run: huggingface_hub's `upload_folder` splits a large folder into several
commits, `create_commit` does not. Token, endpoint and offline mode are huggingface_hub's own (HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from dtr_deploy import __version__
from dtr_deploy.errors import UsageError
from dtr_deploy.progress import Progress
from dtr_deploy.report.schema import REPORT, Report, read_report
from dtr_deploy.run_dir import RunDir

WRITTEN = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|onnx/(fp32|fp16|int8|int4)/.+|report\.(json|html)"
)
"""Names in a repository that belong to one checkpoint, and would be wrong beside another."""


@dataclass(frozen=True)
class Upload:
    """A file of a run, and its path in the repository."""

    file: Path
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Destination:
    """Where a run goes. private: of a repository that is made; one that exists has to be private then."""

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = f"Upload with dtr-deploy {__version__}"

    def check(self) -> None:
        """Raise `UsageError` for what the Hub would not take; asks nobody."""
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError:
            raise UsageError(
                f"REPO_ID {self.repo_id!r}: not the id of a repository; accepted: OWNER/NAME, or NAME alone for your "
                "own account, of letters, digits, -, _ and . (at most 96, no -- or .., no .git at the end)"
            ) from None
        if not self.message.strip():
            raise UsageError("--message: is empty; accepted: a line of text, or leave it out")
        if self.create_pr and self.revision is not None:
            raise UsageError("--create-pr: proposes a change to the branch main; accepted: without --revision")


@dataclass(frozen=True)
class Pushed:
    """repo_id: with its owner. url: of the repository, branch or pull request. revision: None for main.

    changed: False if the repository held all of it already. removed: paths of an earlier checkpoint, now gone.
    """

    repo_id: str
    url: str
    revision: str | None
    changed: bool
    removed: tuple[str, ...]


def finished_report(run: RunDir) -> Report:
    """The report of a run that is finished and proven. Raises `UsageError` for any other."""
    report = read_report(run.path / REPORT)
    stages, again = run.stages, "`dtr-deploy build` finishes it"
    for name in ("hybrid", "parity", "report"):
        if name not in stages:
            raise UsageError(f"{run.path}: not finished, stage {name} is to be done; {again}")
    newer = [name for name, stage in stages.items() if stage.finished > stages["report"].finished]
    if newer:
        raise UsageError(f"{run.path}: not finished, stage {newer[0]} was made again after {REPORT}; {again}")
    failed = [f"{row.engine} {row.precision}" for row in report.parity if not row.passed]
    failed += [f"lm-eval {row.task}" for row in report.lm_eval if not row.passed]
    if failed or not report.parity:
        raise UsageError(
            f"{run.path}: parity has not passed ({', '.join(failed) or 'no engine was compared'}); {again}"
        )
    return report


def checked_uploads(
    run: RunDir, report: Report, onnx: Sequence[str], with_report: bool, progress: Progress
) -> list[Upload]:
    """What is to be uploaded, each file compared with the manifest. onnx: precisions, each proven by the report.

    Raises `UsageError` for a precision that the run does not have, and for a file that is missing or corrupted.
    """
    proven = [row.precision for row in report.parity if row.engine == "ort"]
    for precision in onnx:
        if precision not in proven or f"onnx {precision}" not in run.stages:
            raise UsageError(
                f"--onnx {precision}: not in this run; accepted: {', '.join(proven) or 'none, it has none'}"
            )
    stages = ["hybrid", *(f"onnx {precision}" for precision in dict.fromkeys(onnx)), "report"]
    found: list[Upload] = []
    with progress.bar("checking files", total=len(stages)) as bar:
        for stage in stages:
            run.check_artefacts(stage)
            bar.advance(1, note=stage)
            for name, artefact in run.stages[stage].artefacts.items():
                path = name.removeprefix("hybrid/")
                if path != name or stage != "report" or with_report:
                    found.append(Upload(run.path / name, path, artefact.bytes, artefact.sha256))
    return sorted(found, key=lambda upload: upload.path)


def push(uploads: Sequence[Upload], to: Destination, progress: Progress) -> Pushed:
    """Upload in one commit; makes repository and branch if they are not there.

    Where another checkpoint was, what belonged to it and is not replaced (its shards, ONNX folders and report) goes in
    the same commit. Raises `UsageError`, one line, for everything the Hub or the network refuses.
    """
    to.check()
    token = get_token()
    if token is None:
        raise UsageError("HF_TOKEN: no token; accepted: one that may write, there or stored by `hf auth login`")
    api = HfApi(token=token, library_name="dtr-deploy", library_version=__version__)
    with _one_line(to):
        # None: an organisation may have its own default for new repositories
        repo_id = api.create_repo(to.repo_id, private=to.private or None, exist_ok=True).repo_id
        if to.private and not api.model_info(repo_id).private:
            raise UsageError(
                f"--private: {repo_id} exists and is public; accepted: another REPO_ID, or make it private on its page"
            )
        remote = _remote_files(api, repo_id, to)
        stale = _stale(remote, uploads)
        head = api.model_info(repo_id, revision=to.revision).sha
        # Strings, not open files: huggingface_hub then chooses Xet or LFS, and reads a file again after a retry.
        operations = [CommitOperationAdd(upload.path, str(upload.file)) for upload in uploads]
        size = size_text(sum(upload.bytes for upload in uploads))
        progress.line(f"uploading {len(uploads)} files, {size}, to {api.endpoint}/{repo_id}")
        with progress.bar("upload"):
            commit = api.create_commit(
                repo_id,
                [*operations, *(CommitOperationDelete(path) for path in stale)],
                commit_message=to.message,
                revision=to.revision,
                create_pr=to.create_pr,
            )
    url = f"{api.endpoint}/{repo_id}" + (f"/tree/{to.revision}" if to.revision else "")
    return Pushed(
        repo_id=repo_id,
        url=commit.pr_url or url,
        revision=commit.pr_revision or to.revision,
        changed=commit.oid != head,
        removed=tuple(stale),
    )


def _remote_files(api: HfApi, repo_id: str, to: Destination) -> dict[str, str | None]:
    """path -> sha256 (None for small files, which git keeps itself) on the branch, which is made if it is missing."""
    try:
        tree = list(api.list_repo_tree(repo_id, recursive=True, revision=to.revision))
    except RevisionNotFoundError:
        if to.revision is None or to.revision.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=to.revision, exist_ok=True)
        tree = list(api.list_repo_tree(repo_id, recursive=True, revision=to.revision))
    return {entry.path: entry.lfs.sha256 if entry.lfs else None for entry in tree if isinstance(entry, RepoFile)}


def _stale(remote: dict[str, str | None], uploads: Sequence[Upload]) -> list[str]:
    """Paths of an earlier checkpoint that these files do not replace. None if the weights are the same ones."""
    ours = {upload.path: upload.sha256 for upload in uploads}
    weights = {path: sha256 for path, sha256 in ours.items() if re.fullmatch(r"[^/]+\.safetensors", path)}
    if all(remote.get(path) == sha256 for path, sha256 in weights.items()):
        return []
    return sorted(path for path in remote if path not in ours and WRITTEN.fullmatch(path))


# --- errors


@contextmanager
def _one_line(to: Destination) -> Iterator[None]:
    """Turn what huggingface_hub raises into one `UsageError`."""
    try:
        yield
    except UsageError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UsageError(_explain(error, to)) from error


def _explain(error: BaseException, to: Destination) -> str:
    endpoint = constants.ENDPOINT
    chain = list(_chain(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in chain):
        return "HF_HUB_OFFLINE: is set, so nothing can be uploaded; accepted: unset or 0"
    answer = next((cause for cause in chain if isinstance(cause, HfHubHTTPError)), None)
    if answer is None:
        if any(isinstance(cause, HTTPError) for cause in chain):
            reason = _line(chain[-1]) or type(chain[-1]).__name__
            return f"HF_ENDPOINT: {endpoint} cannot be reached ({reason}); check the network; accepted: a hub's address"
        return f"REPO_ID {to.repo_id}: the upload failed ({_line(error)}); nothing was committed, try again"
    status, said = answer.response.status_code, _line(answer.server_message or "")
    reason = f"{status}: {said}" if said else str(status)
    if status == 401:
        return (
            f"HF_TOKEN: {endpoint} does not take the token for {to.repo_id} ({reason}); accepted: a valid token that "
            "may write, there or stored by `hf auth login`"
        )
    if status == 403:
        return (
            f"REPO_ID {to.repo_id}: the token may not write there ({reason}); accepted: a repository of yours or of an "
            "organisation where you may write; --create-pr proposes a change to another's"
        )
    if isinstance(answer, RevisionNotFoundError):
        return f"--revision {to.revision}: not in {to.repo_id} ({reason}); accepted: a branch, which is made if missing"
    if status == 404:
        return f"REPO_ID {to.repo_id}: not found on {endpoint} ({reason}); accepted: OWNER/NAME of an owner that exists"
    if status == 400 and isinstance(error, ValueError):  # the model card, or the request, in the hub's own words
        return f"REPO_ID {to.repo_id}: the hub refused the upload ({_line(error)})"
    return f"REPO_ID {to.repo_id}: {endpoint} answered {reason}; nothing was committed, try again later"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(text: object) -> str:
    return " ".join(str(text).split())


def size_text(size: int) -> str:
    """`1.2 MiB`: a size for a person."""
    value, units = float(size), ["bytes", "KiB", "MiB", "GiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"
