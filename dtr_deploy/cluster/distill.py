"""Stage 1 on a cluster: twins in groups, each group trained by one worker from its own pass of the teacher.

Twins do not influence one another, so a group computes what one process with all twins would, to the bit where workers
multiply as that process does. What a group finished is written at once; a build that goes on trains the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtr_deploy.cluster.workers import Source, Workers, load, results, use_cores
from dtr_deploy.distill.evaluate import TwinReport
from dtr_deploy.distill.files import twin_file, write_safetensors, write_text
from dtr_deploy.distill.stage import SUMMARY, DistillResult, Progress, distill
from dtr_deploy.distill.trainer import DistillSettings

if TYPE_CHECKING:
    from torch import Tensor

TWIN_PASSES = 3.0
"""What training a twin takes over the teacher's pass through one layer. A rough guess, forward and twice as much back:
it decides how layers are shared out, not what is computed."""
MARK = ".visible"
"""A file in the run's folder with a number that a worker has to find there: then both see one file system."""


HALF_WAY = "group-"
"""Folders of groups that are being trained, where workers see the run's folder."""


class Group(NamedTuple):
    """Twins that one worker trains: every form in every layer."""

    layers: tuple[int, ...]
    forms: tuple[str, ...]

    @property
    def keys(self) -> list[tuple[int, str]]:
        return [(layer, form) for layer in self.layers for form in self.forms]


def groups(layers: Sequence[int], forms: Sequence[str], workers: int) -> list[Group]:
    """At most `workers` groups of about equal work. Neighbouring layers go together, since a teacher's pass ends at the
    last one of its group; where there are more workers than layers, forms are split too."""
    layers = sorted(layers)
    split = min(len(forms), max(1, workers // len(layers)))
    shares = [tuple(forms[number::split]) for number in range(split)]
    return [
        Group(tuple(some), share)
        for share in shares
        for some in _runs_of_layers(layers, TWIN_PASSES * len(share), max(1, workers // split))
    ]


def _runs_of_layers(layers: Sequence[int], twins: float, count: int) -> list[list[int]]:
    """At most `count` runs of neighbours, the dearest as cheap as can be. A run costs the teacher's layers up to its
    last one, and `twins` for each of its own."""
    count = min(count, len(layers))
    low, high = 0.0, layers[-1] + 1 + twins * len(layers)
    best = [list(layers)]
    for _ in range(40):  # bisection of the dearest run's cost
        allowed = (low + high) / 2
        runs = _fill(layers, twins, allowed)
        if runs is not None and len(runs) <= count:
            best, high = runs, allowed
        else:
            low = allowed
    return best


def _fill(layers: Sequence[int], twins: float, allowed: float) -> list[list[int]] | None:
    """Runs that each cost at most `allowed`, as few as there can be; None if one layer alone costs more."""
    runs: list[list[int]] = [[]]
    for layer in layers:
        if runs[-1] and layer + 1 + twins * (len(runs[-1]) + 1) > allowed:
            runs.append([])
        runs[-1].append(layer)
        if layer + 1 + twins * len(runs[-1]) > allowed:
            return None
    return runs


class Tally:
    """How far each group is; lives in a process of its own."""

    def __init__(self) -> None:
        self.at: dict[int, tuple[int, int, str]] = {}

    def tell(self, group: int, done: int, steps: int, message: str) -> None:
        self.at[group] = done, steps, message

    def read(self) -> dict[int, tuple[int, int, str]]:
        return self.at


def distill_on(
    workers: Workers,
    source: Source,
    sequences: Tensor,
    held_out: Tensor,
    forms: Sequence[str],
    layers: Sequence[int],
    window: int,
    settings: DistillSettings,
    folder: Path,
    progress: Progress = lambda done, total, message: None,
) -> DistillResult:
    """`distill.stage.distill` by the workers of a cluster; the same files and reports."""
    import ray

    keys = [(layer, form) for layer in sorted(layers) for form in forms]
    files = {key: twin_file(folder, *key) for key in keys}
    if (folder / SUMMARY).is_file() and all(file.is_file() for file in files.values()):
        return _read(folder, files)
    folder.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(16)
    (folder / MARK).write_text(mark)
    unfinished = [key for key in keys if not (files[key].is_file() and _note(folder, key).is_file())]
    left = _left(unfinished, forms, workers.count)
    tally: Any = ray.remote(num_cpus=0)(Tally).remote()  # type: ignore[attr-defined]
    train, shared = workers.task(_train), [ray.put(sequences), ray.put(held_out)]
    calls = [
        train.remote(source, *shared, group, window, settings, workers.cpus, (str(folder), mark), tally, number)
        for number, group in enumerate(left)
    ]

    def look() -> None:
        at = list(ray.get(tally.read.remote()).values())
        if at:
            steps = at[0][1]
            waiting = "" if len(at) == len(left) else f", {len(left) - len(at)} groups wait"
            progress(sum(done for done, _, _ in at), steps * len(left), at[-1][2] + waiting)

    try:
        for number, (weights, reports, tokens, seconds) in results(calls, look):
            for key in left[number].keys:
                write_safetensors(files[key], weights[key], {})
                note = {"report": reports[key], "tokens": tokens, "seconds": seconds / len(left[number].keys)}
                write_text(_note(folder, key), json.dumps(note))
    finally:
        ray.kill(tally)
    notes = [json.loads(_note(folder, key).read_text()) for key in keys]
    summary = {
        "tokens": notes[0]["tokens"],
        "seconds": sum(note["seconds"] for note in notes),
        "reports": [note["report"] for note in notes],
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1))
    for file in [folder / MARK, *(_note(folder, key) for key in keys)]:
        file.unlink(missing_ok=True)
    for half_way in folder.glob(f"{HALF_WAY}*"):
        shutil.rmtree(half_way)
    return _read(folder, files)


def _left(keys: Sequence[tuple[int, str]], forms: Sequence[str], workers: int) -> list[Group]:
    """Groups of the unfinished twins: layers that lack the same forms are dealt together."""
    lacking: dict[tuple[str, ...], list[int]] = {}
    for layer in sorted({layer for layer, _ in keys}):
        lacking.setdefault(tuple(form for form in forms if (layer, form) in keys), []).append(layer)
    share = max(1, workers // max(1, len(lacking)))
    return [group for some, layers in lacking.items() for group in groups(layers, some, share)]


def _note(folder: Path, key: tuple[int, str]) -> Path:
    return twin_file(folder, *key).with_suffix(".json")


def _read(folder: Path, files: dict[tuple[int, str], Path]) -> DistillResult:
    saved = json.loads((folder / SUMMARY).read_text())
    reports = [TwinReport.from_dict(report) for report in saved["reports"]]
    return DistillResult(reports, files, saved["tokens"], saved["seconds"])


def _train(
    source: Source,
    sequences: Tensor,
    held_out: Tensor,
    group: Group,
    window: int,
    settings: DistillSettings,
    cpus: int,
    shared: tuple[str, str],
    tally: Any,
    number: int,
) -> tuple[dict[tuple[int, str], dict[str, Tensor]], dict[tuple[int, str], dict[str, Any]], int, float]:
    """One group, in a worker: weights and reports by (layer, form), tokens, seconds."""
    from dtr_deploy.distill.stage import load_twins

    use_cores(cpus)
    told = -math.inf

    def progress(done: int, steps: int, message: str) -> None:
        nonlocal told
        if time.monotonic() - told > 1 or done == steps:
            told = time.monotonic()
            tally.tell.remote(number, done, steps, message)

    backbone, text = load(source).model, (sequences, held_out)
    with _place(group, Path(shared[0]), shared[1]) as work:
        result = distill(backbone, *text, group.forms, group.layers, window, settings, work, progress)
        weights = load_twins(result.files)
        reports = {(report.layer, report.form): report.to_dict() for report in result.reports}
    return weights, reports, result.tokens, result.seconds


@contextmanager
def _place(group: Group, folder: Path, mark: str) -> Iterator[Path]:
    """Where a worker keeps what is half-way: in the run's folder, where the worker that takes over finds it, or, if it
    does not see that, in one of its own."""
    if (folder / MARK).is_file() and (folder / MARK).read_text() == mark:
        yield folder / f"{HALF_WAY}{hashlib.sha256(repr(group).encode()).hexdigest()[:16]}"
        return
    with tempfile.TemporaryDirectory(prefix="dtr-twins-") as scratch:
        yield Path(scratch)
