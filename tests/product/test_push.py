"""`dtr-deploy push`, as a person runs it, against a hub on this machine that speaks the Hub's own HTTP API."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, snapshot_download

from dtr_deploy.errors import UsageError
from dtr_deploy.export.hub import finished_report
from dtr_deploy.export.model_card import write_model_card
from dtr_deploy.report.page import PAGE, page
from dtr_deploy.report.schema import REPORT, Report
from dtr_deploy.run_dir import MANIFEST, RunDir
from tests.product.fake_hub import TOKEN, FakeHub, fake_hub
from tests.product.reports import full_report

REPO = "me/small-hybrid"


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as running:
        yield running


def proven_report() -> Report:
    report = full_report()
    report.parity = [
        report.parity[0].model_copy(update={"engine": engine, "precision": precision, "passed": True})
        for engine, precision in (("vllm", "bf16"), ("ort", "int4"), ("ort", "fp32"))
    ]
    return report


def finished_run(folder: Path, save: Callable[[Path], Any] | None = None, report: Report | None = None) -> RunDir:
    """A run as a build leaves it; `save` writes the checkpoint, by default files of a few bytes."""
    run, report = RunDir(folder), report or proven_report()

    def checkpoint(path: Path) -> tuple[list[Path], dict[str, Any]]:
        if save is not None:
            save(path)
        else:
            (path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
            (path / "config.json").write_text('{"model_type": "dtr_llama"}\n')
            (path / "tokenizer.json").write_text("{}")
        return [path], {}

    def onnx(path: Path) -> tuple[list[Path], dict[str, Any]]:
        (path / "model.onnx").write_bytes(b"\x08\x07" + path.name.encode())
        (path / "genai_config.json").write_text(f'"{path.name}"')
        return [path], {}

    def reports(path: Path) -> tuple[list[Path], dict[str, Any]]:
        (path / REPORT).write_bytes(report.to_json())
        (path / PAGE).write_text(page(report))
        return [path / REPORT, path / PAGE, write_model_card(report, path / "hybrid")], {}

    run.stage("hybrid", "h", checkpoint, folder="hybrid")
    run.stage("base", "b", onnx, folder="base/checkpoint")
    run.stage("onnx int4", "o", onnx, folder="onnx/int4")
    run.stage("onnx fp32", "o", onnx, folder="onnx/fp32")
    run.stage("onnx int8", "o", onnx, folder="onnx/int8")  # of an earlier recipe: not in the report's parity
    run.stage("parity", "p", lambda _: ([], {"rows": []}))
    run.stage("report", "r", reports)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return finished_run(tmp_path / "runs" / "small")


def push(hub: FakeHub, run: RunDir, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with this hub as HF_ENDPOINT; keywords change its environment."""
    own = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(run.path.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        **environment,
    }
    command = [sys.executable, "-m", "dtr_deploy", "push", str(run.path), *arguments]
    return subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """stderr of a push that failed: one line, and no traceback."""
    assert done.returncode == 1, done
    assert done.stderr.startswith("dtr-deploy: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def files_under(folder: Path, prefix: str = "") -> dict[str, bytes]:
    found = (file for file in folder.rglob("*") if file.is_file())
    return {prefix + file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def expected(run: RunDir, *onnx: str, report: bool = True) -> dict[str, bytes]:
    """What the repository has to hold, read from the run's folder."""
    files = files_under(run.path / "hybrid")
    for precision in onnx:
        files |= files_under(run.path / "onnx" / precision, f"onnx/{precision}/")
    return files | ({name: (run.path / name).read_bytes() for name in (REPORT, PAGE)} if report else {})


def without_git(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


# --- what arrives


def test_everything_arrives_in_one_commit(hub: FakeHub, run: RunDir) -> None:
    wanted = expected(run, "int4")
    (run.path / "hybrid" / "notes.txt").write_text("not of the build")
    (run.path / "onnx" / "int4" / "old.onnx").write_text("not of the build")
    done = push(hub, run, REPO, "--onnx", "int4", "--private", "--message", "first")
    assert done.returncode == 0 and not done.stderr, done
    assert without_git(hub.files(REPO)) == wanted
    (commit,) = hub.pushes(REPO)
    assert commit.message == "first" and hub.repositories[REPO].private
    weights = {hashlib.sha256(wanted[path]).hexdigest() for path in ("model.safetensors", "onnx/int4/model.onnx")}
    assert set(hub.objects) == weights
    assert f"published: {hub.url}/{REPO}\n" in done.stdout and f"vllm serve {REPO}\n" in done.stdout


def test_a_name_alone_is_the_accounts_own_and_public(hub: FakeHub, run: RunDir) -> None:
    done = push(hub, run, "small-hybrid", "--no-report")
    assert f"vllm serve {REPO}\n" in done.stdout, done
    assert without_git(hub.files(REPO)) == expected(run, report=False)
    assert not hub.repositories[REPO].private


def test_a_second_push_of_the_same_makes_no_commit(hub: FakeHub, run: RunDir) -> None:
    push(hub, run, REPO, "--onnx", "int4")
    done = push(hub, run, REPO, "--onnx", "int4")
    assert done.returncode == 0 and f"nothing has changed: {hub.url}/{REPO}\n" in done.stdout and not done.stderr
    assert len(hub.pushes(REPO)) == 1
    assert push(hub, run, REPO, "--onnx", "fp32").returncode == 0  # the same weights: what is there stays
    assert len(hub.pushes(REPO)) == 2 and without_git(hub.files(REPO)) == expected(run, "int4", "fp32")


def test_another_checkpoint_leaves_nothing_of_the_earlier_one(hub: FakeHub, run: RunDir) -> None:
    old = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "onnx/fp32/model.onnx", "report.html")
    kept = {"LICENSE": b"mine", "assets/adapter.safetensors": b"mine", "onnx/README.md": b"mine"}
    hub.make(REPO, **dict.fromkeys(old, b"old"), **kept)
    done = push(hub, run, REPO, "--no-report")
    assert without_git(hub.files(REPO)) == expected(run, report=False) | kept, done
    assert len(hub.pushes(REPO)) == 1 and all(f"removed: {path}, " in done.stdout for path in old)


def test_a_branch_is_made_and_main_left_alone(hub: FakeHub, run: RunDir) -> None:
    for count in (1, 1):
        done = push(hub, run, REPO, "--revision", "int4/first")
        assert without_git(hub.files(REPO, "int4/first")) == expected(run), done
        assert len(hub.pushes(REPO, "int4/first")) == count and not hub.pushes(REPO)
    assert f"/{REPO}/tree/int4/first\n" in done.stdout and f"vllm serve {REPO} --revision int4/first\n" in done.stdout


def test_a_pull_request_to_a_repository_of_others(hub: FakeHub, run: RunDir) -> None:
    hub.make("others/model")
    done = push(hub, run, "others/model", "--create-pr")
    assert done.returncode == 0 and not hub.pushes("others/model"), done
    assert without_git(hub.files("others/model", "refs/pr/1")) == expected(run)
    assert f"published: {hub.url}/others/model/discussions/1\n" in done.stdout
    assert "vllm serve others/model --revision refs/pr/1\n" in done.stdout


def test_a_dry_run_lists_and_sends_nothing(hub: FakeHub, run: RunDir) -> None:
    done = push(hub, run, REPO, "--onnx", "int4", "--dry-run", HF_TOKEN="")
    assert done.returncode == 0 and hub.requests == [], done
    listed = {line.split()[-1] for line in done.stdout.splitlines()[:-1]}
    assert listed == set(expected(run, "int4")) and "  10.0 KiB  model.safetensors\n" in done.stdout
    assert f"would upload {len(listed)} files" in done.stdout


def test_a_model_comes_back_as_it_went(hub: FakeHub, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dtr_deploy.hybrid.model import save_hybrid  # this import also teaches transformers the architecture
    from tests.tiny import tiny_hybrid, tiny_tokenizer

    model, tokenizer = tiny_hybrid(), tiny_tokenizer()
    run = finished_run(tmp_path / "runs" / "tiny", lambda path: save_hybrid(model, tokenizer, path))
    assert push(hub, run, REPO, "--private").returncode == 0
    folder = snapshot_download(REPO, endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache")
    assert files_under(Path(folder)).keys() == hub.files(REPO).keys()
    again = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("Round trip", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    card = ModelCard.load(Path(folder) / "README.md")
    assert card.data.eval_results[0].metric_value == proven_report().scores["test"].tasks["recall"].hybrid


# --- what is refused before anything is sent


@pytest.mark.parametrize("file", ["hybrid/model.safetensors", "hybrid/README.md", "onnx/int4/model.onnx", REPORT])
def test_a_corrupted_file_is_never_sent(hub: FakeHub, run: RunDir, file: str) -> None:
    content = (run.path / file).read_bytes()
    (run.path / file).write_bytes(content.replace(b"4", b"5", 1))  # of the same size, and the report still JSON
    message = refused(push(hub, run, REPO, "--onnx", "int4"))
    assert f"{file}: corrupted, its sha256" in message and hub.requests == []


def test_an_unfinished_run(run: RunDir) -> None:
    def says(words: str) -> None:
        with pytest.raises(UsageError, match=words) as caught:
            finished_report(RunDir(run.path))
        assert "\n" not in str(caught.value)

    assert finished_report(run) == proven_report()
    manifest, report = (run.path / MANIFEST).read_text(), run.path / REPORT
    later = json.loads(manifest)
    later["stages"]["onnx fp32"]["finished"] = (datetime.now(UTC) + timedelta(hours=1)).isoformat(timespec="seconds")
    (run.path / MANIFEST).write_text(json.dumps(later))
    says(r"stage onnx fp32 was made again after report\.json")
    del later["stages"]["hybrid"]
    (run.path / MANIFEST).write_text(json.dumps(later))
    says("not finished, stage hybrid is to be done; `dtr-deploy build` finishes it")
    (run.path / MANIFEST).write_text(manifest)
    report.write_bytes(full_report().to_json())
    says(r"parity has not passed \(genai bf16\)")
    report.write_bytes(proven_report().model_copy(update={"parity": []}).to_json())
    says("no engine was compared")
    report.unlink()
    says("no report yet; `dtr-deploy build` writes it")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a/b/c"], "REPO_ID 'a/b/c': not the id of a repository; accepted: OWNER/NAME"),
        (["me/two--dashes"], "accepted: OWNER/NAME"),
        ([REPO, "--onnx", "int8"], "--onnx int8: not in this run; accepted: int4, fp32"),
        ([REPO, "--create-pr", "--revision", "x"], "--create-pr: proposes a change to the branch main"),
        ([REPO, "--message", " "], "--message: is empty"),
    ],
)
def test_wrong_arguments_ask_nobody(hub: FakeHub, run: RunDir, arguments: list[str], says: str) -> None:
    assert says in refused(push(hub, run, *arguments)) and hub.requests == []


def test_a_run_that_another_process_works_on(hub: FakeHub, run: RunDir) -> None:
    with run.lock():
        assert "is working on this run" in refused(push(hub, run, REPO))
    assert hub.requests == []


# --- what the hub or the network refuses


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"HF_TOKEN": ""}, "HF_TOKEN: no token; accepted: one that may write, there or stored by `hf auth login`"),
        ({"HF_TOKEN": "hf_wrong"}, "(401: Invalid credentials in Authorization header); accepted: a valid token"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "HF_ENDPOINT: http://127.0.0.1:9 cannot be reached ("),
        ({"HF_ENDPOINT": "nonsense"}, "HF_ENDPOINT: nonsense cannot be reached ("),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE: is set"),
    ],
)
def test_token_and_network(hub: FakeHub, run: RunDir, environment: dict[str, str], says: str) -> None:
    assert says in refused(push(hub, run, REPO, **environment)) and REPO not in hub.repositories


@pytest.mark.parametrize(
    ("pattern", "status", "says"),
    [
        ("/create", 404, f"REPO_ID {REPO}: not found on http"),
        ("/create", 400, f"REPO_ID {REPO}: the hub refused the upload"),
        ("/preupload/", 403, f"REPO_ID {REPO}: the token may not write there (403: as the test wants it)"),
        ("/lfs/", 403, f"REPO_ID {REPO}: the token may not write there (403: as the test wants it)"),
        ("/commit/", 500, "answered 500: as the test wants it; nothing was committed, try again later"),
    ],
)
def test_refusals_at_every_step(hub: FakeHub, run: RunDir, pattern: str, status: int, says: str) -> None:
    hub.fails = {pattern: status}
    assert says in refused(push(hub, run, REPO, "--onnx", "int4"))
    assert REPO not in hub.repositories or not hub.pushes(REPO)
    hub.fails = {}
    assert push(hub, run, REPO, "--onnx", "int4").returncode == 0
    assert without_git(hub.files(REPO)) == expected(run, "int4") and len(hub.pushes(REPO)) == 1


def test_repositories_of_others(hub: FakeHub, run: RunDir) -> None:
    assert "REPO_ID others/new: the token may not write there (403: You don't have the rights" in refused(
        push(hub, run, "others/new")
    )
    hub.make("others/model")
    assert "--create-pr proposes a change" in refused(push(hub, run, "others/model"))
    assert not hub.pushes("others/model")


def test_a_public_repository_does_not_become_private_by_an_option(hub: FakeHub, run: RunDir) -> None:
    hub.make(REPO)
    assert f"--private: {REPO} exists and is public; accepted: another REPO_ID" in refused(
        push(hub, run, REPO, "--private")
    )
    assert not hub.pushes(REPO) and not hub.objects


def test_a_revision_that_is_no_branch(hub: FakeHub, run: RunDir) -> None:
    assert f"--revision refs/pr/7: not in {REPO} (404" in refused(push(hub, run, REPO, "--revision", "refs/pr/7"))


def test_debug_shows_where(hub: FakeHub, run: RunDir) -> None:
    done = push(hub, run, REPO, "--debug", HF_TOKEN="hf_wrong")
    assert "Traceback" in done.stderr and TOKEN not in done.stderr and "hf_wrong" not in done.stderr
