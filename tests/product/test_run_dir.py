"""A run's folder: finished stages are skipped, unfinished ones resume, and damage is noticed. References are plain
files and hashlib; processes are killed for real."""

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.run_dir import MANIFEST, RunDir, file_sha256, sources_digest, stage_key, write_atomically
from dtr_deploy.run_lock import is_disk_full, run_lock


class Work:
    """A stage that writes one file and counts how often it ran."""

    def __init__(self, run: RunDir, content: str = "weights", fails: bool = False) -> None:
        self.run, self.content, self.fails, self.calls = run, content, fails, 0
        self.found: list[str] = []

    def __call__(self, folder: Path) -> tuple[Iterable[Path], dict[str, Any]]:
        self.calls += 1
        self.found = sorted(file.name for file in folder.iterdir())
        (folder / "a.safetensors").write_text(self.content)
        if self.fails:
            raise RuntimeError("killed")
        return [folder / "a.safetensors"], {"layers": 3}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "name")


def test_a_finished_stage_is_recorded_and_skipped(run: RunDir) -> None:
    work = Work(run)
    run.stage("distill", "key", work, folder="distilled")
    again = RunDir(run.path)  # as another process would open it
    record = again.stage("distill", "key", work, folder="distilled")
    assert work.calls == 1
    assert record.result == {"layers": 3} and record.seconds >= 0
    assert record.artefacts["distilled/a.safetensors"].sha256 == hashlib.sha256(b"weights").hexdigest()
    manifest = json.loads((run.path / MANIFEST).read_text())
    assert manifest["stages"]["distill"]["artefacts"]["distilled/a.safetensors"]["bytes"] == 7
    assert "python" in manifest["versions"]


def test_another_key_runs_it_again_in_an_empty_folder(run: RunDir) -> None:
    run.stage("distill", "key", Work(run), folder="distilled")
    work = Work(run, "other weights")
    run.stage("distill", "other key", work, folder="distilled")
    assert work.calls == 1 and work.found == []


def test_a_stopped_stage_finds_what_it_had_written(run: RunDir) -> None:
    with pytest.raises(RuntimeError):
        run.stage("distill", "key", Work(run, fails=True), folder="distilled")
    assert "distill" not in run.stages
    work = Work(run)
    record = RunDir(run.path).stage("distill", "key", work, folder="distilled")
    assert work.found == ["a.safetensors"]
    assert record.seconds >= RunDir(run.path).spent("distill", "key") > 0  # both attempts


def test_a_missing_artefact_runs_the_stage_again(run: RunDir) -> None:
    work = Work(run)
    run.stage("distill", "key", work, folder="distilled")
    (run.path / "distilled" / "a.safetensors").unlink()
    run.stage("distill", "key", work, folder="distilled")
    assert work.calls == 2


@pytest.mark.parametrize("content", ["weighty", "weights and more", ""])
def test_a_corrupted_artefact_is_one_line(run: RunDir, content: str) -> None:
    run.stage("distill", "key", Work(run), folder="distilled")
    file = run.path / "distilled" / "a.safetensors"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"a\.safetensors: corrupted, its sha256") as caught:
        RunDir(run.path).stage("distill", "key", Work(run), folder="distilled")
    assert "\n" not in str(caught.value) and "delete the file" in str(caught.value)
    with pytest.raises(UsageError, match="corrupted"):
        RunDir(run.path).check_artefacts("distill")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 99}'])
def test_a_damaged_manifest_is_one_line(run: RunDir, content: str) -> None:
    run.stage("distill", "key", Work(run))
    (run.path / MANIFEST).write_text(content)
    with pytest.raises(UsageError, match=r"manifest\.json: ") as caught:
        RunDir(run.path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run of dtr-deploy"):
        RunDir(tmp_path, create=False)


def test_keys_and_digests() -> None:
    assert stage_key("a", {"x": 1, "y": 2}) == stage_key("a", {"y": 2, "x": 1}) != stage_key("a", {"x": 1, "y": 3})
    assert stage_key("a", "b") != stage_key("ab")


def test_sources_digest_sees_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    before = sources_digest([folder])
    assert before == sources_digest([folder])
    (folder / "a.txt").write_text("two")
    assert sources_digest([folder]) != before
    assert file_sha256(folder / "a.txt") == hashlib.sha256(b"two").hexdigest()


# --- atomic writes


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.json"
    write_atomically(file, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_atomically(file, b"new")
    assert is_disk_full(caught.value)
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    """The child dies after writing half of the new content, where a plain write would have destroyed the file."""
    file = tmp_path / "manifest.json"
    write_atomically(file, b"old")
    child = (
        "import os, signal, pathlib; from dtr_deploy import run_dir\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run_dir.write_atomically(pathlib.Path({str(file)!r}), b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", child]).returncode == -signal.SIGKILL
    assert file.read_bytes() == b"old"


# --- the lock


def test_two_builds_of_one_run_refuse(run: RunDir) -> None:
    refused = pytest.raises(UsageError, match=rf"process {os.getpid()} is working on this run")
    with run.lock(), refused, RunDir(run.path).lock():
        raise AssertionError("both hold the lock")
    with run.lock():
        pass
    assert not (run.path / "lock").exists()


def test_the_lock_of_a_live_process_counts(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    child = (
        "import sys, pathlib; from dtr_deploy.run_lock import run_lock\n"
        f"with run_lock(pathlib.Path({str(file)!r})):\n    print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=f"process {process.pid} "), run_lock(file):
        raise AssertionError("both hold the lock")
    process.kill()
    process.communicate()
    with run_lock(file):  # kill -9 leaves the file behind, and it is no obstacle
        assert file.read_text() == f"{os.getpid()}\n"


def test_the_stale_lock_of_a_dead_process_whose_child_lives_on(tmp_path: Path) -> None:
    """A child inherits the kernel's lock; the process id in the file says that its owner is gone."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    file = tmp_path / "lock"
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, f"{dead.pid}\n".encode())
    with run_lock(file):
        assert file.read_text() == f"{os.getpid()}\n"
    os.close(handle)


# --- a full disk, however a library says it


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'), True),
        (RuntimeError("database or disk is full"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("shapes do not fit"), False),
    ],
)
def test_what_a_full_disk_looks_like(error: Exception, full: bool) -> None:
    assert is_disk_full(error) is full
    wrapped = RuntimeError("export failed")
    wrapped.__cause__ = error
    assert is_disk_full(wrapped) is full
    assert not is_disk_full(None)
