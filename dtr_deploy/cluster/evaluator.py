"""Stage 2 on a cluster: scores, screenings and attribution, batch by batch on many replicas.

A replica is a `ModelEvaluator` in a worker. Batches of a part of a split always go to the same replicas, which keep
hidden states of them between layers. Where there are more replicas than batches, several layouts are dealt too,
neighbours in the tree together. A replica that is lost is made again and repeats what it was doing; if there is no room
for it any more, the others go on without it. Results are written down by the process that searches, so nothing else is
lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dtr_deploy.cluster.workers import RETRIES, Lost, Source, Workers, dispatched, load, results, use_cores
from dtr_deploy.errors import DtrError, UsageError
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.model import Twins
from dtr_deploy.search.attribution import Swap
from dtr_deploy.search.attribution_runs import Unit, UnitResult
from dtr_deploy.search.evaluator import Finished
from dtr_deploy.search.model_evaluator import ModelEvaluator
from dtr_deploy.search.objective import Screening
from dtr_deploy.search.problem import BatchProgress, Candidate
from dtr_deploy.search.shares import Share
from dtr_deploy.tasks.base import Split, Task, TaskScore
from dtr_deploy.tasks.divergence import Divergence

PATIENCE_SECONDS = 30.0
"""How long a node that is gone may take to come back, before a search goes on without it."""
ANSWER_SECONDS = 600.0
"""How long what a replica is doing, or its start, may take it before it answers."""
Call = tuple[int, str, tuple[Any, ...]]
"""A replica's number, a method of `Replica`, its arguments."""


@dataclass(frozen=True)
class _Job:
    """A call of `method` for each share of something, by replica `first` and those after it. layouts: by number. of:
    what the method is told besides."""

    method: str
    layouts: list[int]
    shares: Sequence[Share]
    first: int
    of: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Made:
    """What a replica is made from: `ModelEvaluator`'s arguments, twins as numpy arrays."""

    source: Source
    twins: Mapping[tuple[int, str], Mapping[str, np.ndarray]]
    window: int
    tasks: Sequence[Task]
    divergence: Divergence
    recall: Sequence[Task]
    models_hash: str
    precision: str
    cpus: int


class Replica:
    """A `ModelEvaluator` in a worker."""

    def __init__(self, reference: bytes) -> None:
        """reference: to a `Made` in Ray's object store, pickled."""
        import ray

        made: Made = ray.get(ray.cloudpickle.loads(reference))
        use_cores(made.cpus)
        # Arrays from the object store are shared and cannot be written.
        twins = {key: {n: torch.from_numpy(x.copy()) for n, x in twin.items()} for key, twin in made.twins.items()}
        self.evaluator = ModelEvaluator(
            load(made.source).model,
            twins,
            made.window,
            made.tasks,
            made.divergence,
            made.recall,
            made.models_hash,
            precision=made.precision,
        )

    def arithmetic(self) -> str:
        """What its numbers depend on besides the models."""
        return self.evaluator.arithmetic

    def score(self, layouts: Sequence[Layout], split: Split, part: int, share: Share) -> list[Finished]:
        return list(self.evaluator.score_part(layouts, split, part, share))

    def screen(self, layouts: Sequence[Layout], share: Share) -> list[Finished]:
        return list(self.evaluator.screen_share(layouts, share))

    def attribute(self, start: Layout, swaps: Sequence[Swap], unit: Unit) -> UnitResult:
        return self.evaluator.attribute_unit(start, swaps, unit)


class ClusterEvaluator:
    """`Evaluator` by replicas of `local`, which itself runs no model.

    Raises `UsageError` where workers would compute in different precisions.
    """

    def __init__(self, workers: Workers, source: Source, local: ModelEvaluator, twins: Twins, precision: str) -> None:
        import ray

        self.workers, self.local, self.losses = workers, local, 0
        arrays = {key: {n: x.detach().cpu().numpy() for n, x in twin.items()} for key, twin in twins.items()}
        made = Made(
            source,
            arrays,
            local.pool.window,
            local.tasks,
            local.divergence,
            local.recall,
            local.models_hash,
            precision,
            workers.cpus,
        )
        # A replica that is made again needs it again, so it is held here; Ray, which would hold an argument, tells the
        # user with each replica that it may be lost.
        self._made = ray.put(made)
        reference, replica = ray.cloudpickle.dumps(self._made), workers.actor(Replica)
        self.replicas = [replica.remote(reference) for _ in range(workers.count)]
        try:
            found = self._arithmetics()
        except BaseException:
            self.close()
            raise
        if len(found) > 1:
            self.close()
            raise UsageError(
                f"cluster: its workers compute differently ({', '.join(sorted(found))}); name search.precision, "
                "or take nodes of one kind"
            )
        local.arithmetic = found.pop()

    def _arithmetics(self) -> set[str]:
        """Of all replicas, once they are made."""
        while True:
            try:
                return {text for _, text in self._run([(n, "arithmetic", ()) for n in range(len(self.replicas))])}
            except Lost:
                self._go_on_with_fewer()

    def close(self) -> None:
        """Give the workers back."""
        import ray

        for replica in self.replicas:
            ray.kill(replica)
        self.replicas = []

    def __enter__(self) -> ClusterEvaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- what runs models

    def score(self, wanted: Sequence[tuple[Layout, int]], split: Split) -> Iterator[Finished]:
        """See `Evaluator`."""
        yield from self._insist(len(wanted), lambda some: self._score([wanted[number] for number in some], split))

    def _score(self, wanted: Sequence[tuple[Layout, int]], split: Split) -> Iterator[Finished]:
        parts, count = sorted({part for _, part in wanted}), len(self.replicas)
        jobs = []
        for part in parts:
            shares = self.local.shares(split, part, count)
            mine = [number for number, (_, its) in enumerate(wanted) if its == part]
            for place, some in enumerate(self._dealt([wanted[n][0] for n in mine], len(parts) * len(shares))):
                first = (part + place * self.local.parts(split)) * len(shares)
                jobs.append(_Job("score", [mine[index] for index in some], shares, first, (split, part)))
        for job, found, number in self._joint([layout for layout, _ in wanted], jobs):
            yield self.local.joined(split, job.of[1], job.shares, found, number)

    def screen(self, layouts: Sequence[Layout]) -> Iterator[Finished]:
        """See `Evaluator`."""
        yield from self._insist(len(layouts), lambda some: self._screen([layouts[number] for number in some]))

    def _screen(self, layouts: Sequence[Layout]) -> Iterator[Finished]:
        shares = self.local.screening_shares(len(self.replicas))
        jobs = [
            _Job("screen", some, shares, place * len(shares))
            for place, some in enumerate(self._dealt(layouts, len(shares)))
        ]
        for job, found, number in self._joint(layouts, jobs):
            yield self.local.joined_screen(job.shares, found, number)

    def _joint(self, layouts: Sequence[Layout], jobs: Sequence[_Job]) -> Iterator[tuple[_Job, list[Finished], int]]:
        """(job, results of a layout on its shares, the layout's number) as soon as all shares are there. Seconds are
        those of the search, in which replicas work side by side."""
        asked = [(job, number) for job in jobs for number in range(len(job.shares))]
        calls: list[Call] = [
            (
                (job.first + number) % len(self.replicas),
                job.method,
                ([layouts[index] for index in job.layouts], *job.of, job.shares[number]),
            )
            for job, number in asked
        ]
        busy = len({worker for worker, _, _ in calls})
        there: dict[int, dict[int, list[Finished]]] = {}
        for call, found in self._run(calls):
            job, number = asked[call]
            shares = there.setdefault(id(job), {})
            shares[number] = [
                replace(done, seconds=done.seconds / busy) for done in sorted(found, key=lambda done: done.number)
            ]
            if len(shares) == len(job.shares):
                for place, index in enumerate(job.layouts):
                    yield job, [shares[share][place] for share in range(len(job.shares))], index

    def attribute(
        self, start: Layout, layouts: Sequence[Layout], priced: bool, progress: BatchProgress | None = None
    ) -> Iterator[Finished]:
        """See `Evaluator`."""
        return self.local.attribute(start, layouts, priced, progress, self._units)

    def _units(self, start: Layout, swaps: Sequence[Swap], units: Sequence[Unit]) -> Iterator[tuple[int, UnitResult]]:
        """The largest first, each to the replica that is free first."""
        costs = self.local.attribution_costs(units)
        order = sorted(range(len(units)), key=lambda number: -costs[number])
        while order:
            methods = [replica.attribute for replica in self.replicas]
            try:
                for number, found in dispatched(
                    methods, [(number, (start, swaps, units[number])) for number in order], self._watch()
                ):
                    order.remove(number)
                    yield number, found
            except Lost:
                self._go_on_with_fewer()

    def _dealt(self, layouts: Sequence[Layout], taken: int) -> list[list[int]]:
        """Numbers of layouts, dealt among the replicas that there are for each of `taken` pieces of work, neighbours
        together."""
        order = sorted(range(len(layouts)), key=lambda number: [form or "" for form in layouts[number]])
        count = min(len(order), max(1, len(self.replicas) // taken))
        size = math.ceil(len(order) / count)
        return [order[first : first + size] for first in range(0, len(order), size)]

    def _run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """(number of the call, its result) as they end."""
        asked = [getattr(self.replicas[n], method).remote(*arguments) for n, method, arguments in calls]
        yield from results(asked, self._watch())

    # --- when a node does not come back

    def _insist(self, count: int, run: Callable[[list[int]], Iterator[Finished]]) -> Iterator[Finished]:
        """Results of so many things, asked for by their numbers, until all are there."""
        left = list(range(count))
        while left:
            asked = list(left)
            try:
                for done in run(asked):
                    left.remove(asked[done.number])
                    yield replace(done, number=asked[done.number])
            except Lost:
                self._go_on_with_fewer()

    def _watch(self) -> Callable[[], None]:
        """To be called now and then: raises `Lost` when there is no room for all replicas, and has not been for some
        time."""
        missing_since: float | None = None

        def look() -> None:
            nonlocal missing_since
            if self.workers.places() >= len(self.replicas):
                missing_since = None
            elif missing_since is None:
                missing_since = time.monotonic()
            elif time.monotonic() - missing_since > PATIENCE_SECONDS:
                raise Lost

        return look

    def _go_on_with_fewer(self) -> None:
        """Keep the replicas that answer, those among them that were made again. Raises `DtrError` if none does, or when
        this happens too often."""
        import ray

        self.losses += 1
        if self.losses > RETRIES * self.workers.count:
            raise DtrError(f"cluster: workers were lost {self.losses} times")
        calls = {replica.arithmetic.remote(): replica for replica in self.replicas}
        answers: list[Any] = []
        until = time.monotonic() + ANSWER_SECONDS
        # How much room there is may be known late, and falls then.
        while len(answers) < min(len(calls), max(1, self.workers.places())) and time.monotonic() < until:
            answers, _ = ray.wait(list(calls), num_returns=len(calls), timeout=1.0)
        for call, replica in calls.items():
            if call not in answers:
                ray.kill(replica)
        self.replicas = [calls[call] for call in answers]
        if not self.replicas:
            raise DtrError("cluster: no worker is left; the same command goes on when there are some")

    # --- what does not

    @property
    def layers(self) -> int:
        return self.local.layers

    @property
    def candidates(self) -> Sequence[Candidate]:
        return self.local.candidates

    @property
    def weights(self) -> tuple[float, ...]:
        return self.local.weights

    @property
    def attributable(self) -> bool:
        return self.local.attributable

    def parts(self, split: Split) -> int:
        return self.local.parts(split)

    def interpret(
        self, split: Split, raw: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
    ) -> list[TaskScore]:
        return self.local.interpret(split, raw)

    def screening(self, layout: Layout, scalars: Mapping[str, Any]) -> Screening:
        return self.local.screening(layout, scalars)

    def fingerprint(self, kind: str, split: Split, part: int = 0) -> str:
        return self.local.fingerprint(kind, split, part)
