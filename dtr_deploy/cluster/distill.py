"""Stage 1 on a cluster: twins in groups, trained by teams of workers.

A team shares the passes of the teacher: sequences are dealt among its workers, each of which trains its own part of the
group's twins on all of them.

Twins do not influence one another, so a group computes what one process with all twins would, to the bit where workers
multiply as that process does. What a worker finished is written at once; a build that goes on trains the rest. A team
that loses a worker goes on, with another in its place, from what all of them had written last.
"""

from __future__ import annotations

import math
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.cluster.teams import Team
from dtr_deploy.cluster.workers import Source, Workers, load, use_cores
from dtr_deploy.distill.groups import Group, GroupedTwins
from dtr_deploy.distill.peers import meeting_place, members_of
from dtr_deploy.distill.stage import DistillResult, Progress, distill
from dtr_deploy.distill.trainer import DistillSettings

if TYPE_CHECKING:
    from torch import Tensor

MARK = ".visible"
"""A file in the run's folder with a number that a worker has to find there: then both see one file system."""
LOOK_SECONDS = 1.0
"""How often progress is asked for."""
Trained = tuple[dict[tuple[int, str], dict[str, "Tensor"]], dict[tuple[int, str], dict[str, Any]], int, float]
"""Of one group: weights and reports by (layer, form), tokens, seconds."""


class Tally:
    """How far each group is; lives in a process of its own."""

    def __init__(self) -> None:
        self.at: dict[Group, tuple[int, int, str]] = {}

    def tell(self, group: Group, done: int, steps: int, message: str) -> None:
        self.at[group] = done, steps, message

    def read(self) -> list[tuple[int, int, str]]:
        return list(self.at.values())


@dataclass(frozen=True)
class Asked:
    """What all groups are trained with. shared: the run's folder and the number in its `MARK`."""

    source: Source
    window: int
    settings: DistillSettings
    cpus: int
    shared: tuple[str, str]


class Member:
    """A worker of a team."""

    def __init__(self, asked: Asked, tally: Any) -> None:
        use_cores(asked.cpus)
        self.asked, self.tally, self.store = asked, tally, None

    def meet(self) -> tuple[str, int]:
        """Where the others find this one."""
        self.store, place = meeting_place(_address())
        return place

    def train(self, group: Group, rank: int, count: int, place: tuple[str, int], text: Sequence[Any]) -> Trained:
        """text: training sequences and held-out ones, in Ray's object store."""
        import ray

        from dtr_deploy.distill.stage import load_twins

        told = -math.inf

        def progress(done: int, steps: int, message: str) -> None:
            nonlocal told
            if time.monotonic() - told > 1 or done == steps:
                told = time.monotonic()
                self.tally.tell.remote(group, done, steps, message)

        asked = self.asked
        backbone, (sequences, held_out) = load(asked.source).model, ray.get(list(text))
        with _place(group, Path(asked.shared[0]), asked.shared[1]) as work:
            with members_of(rank, count, place, _address(), self.store) as peers:
                result = distill(
                    backbone, sequences, held_out, group.forms, group.layers, asked.window, asked.settings, work,
                    progress, peers=peers,
                )  # fmt: skip
            weights = load_twins(result.files)
            reports = {(report.layer, report.form): report.to_dict() for report in result.reports}
        return weights, reports, result.tokens, result.seconds


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
    asked = Asked(source, window, settings, workers.cpus, (str(folder), mark))
    # It may lie on a node that is lost; then it begins anew elsewhere.
    tally: Any = ray.remote(num_cpus=0, max_restarts=-1)(Tally).remote()  # type: ignore[attr-defined]
    # Their references lie in a list: Ray would put them in the place of arguments before a worker is there.
    text = [ray.put(sequences), ray.put(held_out)]
    left = twins.left(workers.count, twins_at_once, workers.team)
    groups = sum(map(len, left))
    keeping, stopped = threading.Lock(), threading.Event()

    def train(mine: list[Group]) -> None:
        team, finished = Team(workers, Member, (asked, tally), stopped), set[Group]()

        def attempt() -> None:
            while rest := [group for group in mine if group not in finished]:
                with keeping:
                    # What a member finished before another one was lost lies in its folder, if that is the run's.
                    finished.update(group for group in rest if twins.take(group))
                if some := [group for group in rest if group not in finished][: max(1, workers.places())]:
                    train_together(some)

        def train_together(some: list[Group]) -> None:
            with team.assembled(len(some)) as members:
                place = team.get(members[0].meet.remote()) if len(some) > 1 else ("", 0)
                calls = [
                    member.train.remote(group, rank, len(some), place, text)
                    for rank, (member, group) in enumerate(zip(members, some, strict=True))
                ]
                for rank, trained in team.results(calls):
                    with keeping:
                        twins.keep(some[rank], *trained)
                    finished.add(some[rank])

        team.insist(attempt)

    def look() -> None:
        try:
            at = ray.get(tally.read.remote())
        except ray.exceptions.RayActorError:
            return
        if at:
            steps = at[0][1]
            waiting = "" if len(at) == groups else f", {groups - len(at)} groups wait"
            progress(sum(done for done, _, _ in at), steps * groups, at[-1][2] + waiting)

    try:
        with ThreadPoolExecutor(max(1, len(left))) as threads:
            running: set[Future[None]] = {threads.submit(train, some) for some in left}
            try:
                while running:
                    done, running = wait(running, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
                    look()
                    for future in done:
                        future.result()
            except BaseException:
                stopped.set()
                raise
    finally:
        ray.kill(tally)
    (folder / MARK).unlink(missing_ok=True)
    return twins.finish()


def _address() -> str:
    """Of this machine, as the others of the cluster reach it."""
    import ray

    return str(ray.util.get_node_ip_address())


@contextmanager
def _place(group: Group, folder: Path, mark: str) -> Iterator[Path]:
    """Where a worker keeps what is half-way: in the run's folder, where the worker that takes over finds it, or, if it
    does not see that, in one of its own."""
    if (folder / MARK).is_file() and (folder / MARK).read_text() == mark:
        yield group.folder(folder)
        return
    with tempfile.TemporaryDirectory(prefix="dtr-twins-") as scratch:
        yield Path(scratch)
