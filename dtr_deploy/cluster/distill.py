"""Stage 1 on a cluster: twins in groups, each group trained by one worker from its own pass of the teacher.

Twins do not influence one another, so a group computes what one process with all twins would, to the bit where workers
multiply as that process does. What a group finished is written at once; a build that goes on trains the rest.
"""

from __future__ import annotations

import math
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.cluster.workers import Source, Workers, load, results, use_cores
from dtr_deploy.distill.groups import Group, GroupedTwins
from dtr_deploy.distill.stage import DistillResult, Progress, distill
from dtr_deploy.distill.trainer import DistillSettings

if TYPE_CHECKING:
    from torch import Tensor

MARK = ".visible"
"""A file in the run's folder with a number that a worker has to find there: then both see one file system."""


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
    twins_at_once: int | None = None,
) -> DistillResult:
    """`distill.stage.distill` by the workers of a cluster; the same files and reports."""
    import ray

    twins = GroupedTwins(folder, layers, forms)
    if (found := twins.finished()) is not None:
        return found
    mark = secrets.token_hex(16)
    (folder / MARK).write_text(mark)
    left = twins.left(workers.count, twins_at_once)
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
            twins.keep(left[number], weights, reports, tokens, seconds)
    finally:
        ray.kill(tally)
    (folder / MARK).unlink(missing_ok=True)
    return twins.finish()


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
        yield group.folder(folder)
        return
    with tempfile.TemporaryDirectory(prefix="dtr-twins-") as scratch:
        yield Path(scratch)
