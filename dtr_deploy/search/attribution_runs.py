"""Raw results of single swaps by attribution: what the screening and the first items of the score would say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.search.attribution import Answers, Attribution, Divergences, RowDivergences, Swap, pieces, tokens_of
from dtr_deploy.search.forward import LayerPool
from dtr_deploy.search.task_runs import Head, RawResult
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.request_task import Part
from dtr_deploy.tasks.scoring import ScoringBatch

SAMPLES = 3
"""Draws of every token for the divergence: with four sequences its standard error is about 40% of it, and harms of
layers differ by a factor of a hundred."""


class Unit(NamedTuple):
    """One batch of what is run. kind: DIVERGENCE, RECALL or PRICED; task: which one of the kind."""

    kind: str
    task: int
    batch: int


DIVERGENCE, RECALL, PRICED = "divergence", "recall", "priced"

UnitResult = Answers | RowDivergences
RunUnits = Callable[[Layout, Sequence[Swap], Sequence[Unit]], Iterator[tuple[int, UnitResult]]]
"""Runs units in any order; yields each one's number among those given, and its result."""


class AttributionRuns:
    """divergence, with its reference; recall, priced: parts of likelihood tasks, those of the screening and of the
    score."""

    def __init__(
        self,
        pool: LayerPool,
        products: torch.dtype,
        head: Head,
        divergence: Divergence,
        recall: Sequence[tuple[str, Part]],
        priced: Sequence[Part],
    ) -> None:
        self.divergence = divergence
        self.recall = [(name, pieces(part.batches), len(part.requests)) for name, part in recall]
        self.priced = [(pieces(part.batches), len(part.requests)) for part in priced]
        self.attribution = Attribution(pool, products, head)

    def units(self, priced: bool) -> list[Unit]:
        """Everything there is to run."""
        kinds = [(DIVERGENCE, [self.divergence.batches()]), (RECALL, [batches for _, batches, _ in self.recall])]
        if priced:
            kinds.append((PRICED, [batches for batches, _ in self.priced]))
        return [
            Unit(kind, task, batch)
            for kind, tasks in kinds
            for task, batches in enumerate(tasks)
            for batch in range(len(batches))
        ]

    def run_unit(self, start: Layout, swaps: Sequence[Swap], unit: Unit) -> UnitResult:
        """One batch there and back."""
        if unit.kind == DIVERGENCE:
            batch, states = self.divergence.batches()[unit.batch], self.divergence.teacher_reads()[unit.batch]
            return self.attribution.divergences_of(start, swaps, batch, states, SAMPLES, (0, unit.batch))
        batches, count = self.recall[unit.task][1:] if unit.kind == RECALL else self.priced[unit.task]
        return self.attribution.answers_of(start, swaps, batches[unit.batch], tokens_of(batches, count))

    def cost(self, unit: Unit) -> float:
        """About what it takes, next to other units: tokens, times passes."""
        if unit.kind == DIVERGENCE:
            return float((1 + SAMPLES) * self.divergence.batches()[unit.batch].tokens)
        batches, _ = self.recall[unit.task][1:] if unit.kind == RECALL else self.priced[unit.task]
        return 2.0 * batches[unit.batch].tokens

    def run_units(
        self, start: Layout, swaps: Sequence[Swap], units: Sequence[Unit]
    ) -> Iterator[tuple[int, UnitResult]]:
        """`RunUnits`, here."""
        for number, unit in enumerate(units):
            yield number, self.run_unit(start, swaps, unit)

    def run(
        self,
        start: Layout,
        layouts: Sequence[Layout],
        priced: bool,
        progress: Callable[[int, int], None] | None = None,
        run_units: RunUnits | None = None,
    ) -> list[RawResult]:
        """Of each layout: `start` itself, or `start` with one layer changed.

        Arrays are those of a score's first part (with `priced`), log-probabilities being estimates and everything else
        the start's; scalars those of a screening, `recall` holding log-probabilities of requests. progress: called with
        (batches done, batches). run_units: where batches are run (here).
        """
        units = self.units(priced)
        swaps = sorted({change for layout in layouts if (change := changed(start, layout)) is not None}, key=_order)
        rows = [-1 if layout == start else swaps.index(_known(start, layout)) for layout in layouts]
        found: dict[Unit, Any] = {}
        for number, result in (run_units or self.run_units)(start, swaps, units):
            found[units[number]] = result
            if progress is not None:
                progress(len(found), len(units))

        def together(kind: str, task: int) -> list[Any]:
            return [found[unit] for unit in units if (unit.kind, unit.task) == (kind, task)]

        divergence = Divergences.of(together(DIVERGENCE, 0))
        results = [
            RawResult({}, 0.0, {"kl": divergence.before if row < 0 else float(divergence.after[row]), "recall": {}})
            for row in rows
        ]
        for task, (name, _, _) in enumerate(self.recall):
            answers = Answers.of(together(RECALL, task))
            for row, raw in zip(rows, results, strict=True):
                raw.scalars["recall"][name] = _of(answers, row).tolist()
        for task, (batches, count) in enumerate(self.priced if priced else ()):
            answers = Answers.of(together(PRICED, task))
            for row, raw in zip(rows, results, strict=True):
                arrays = _arrays(answers, row, batches, count)
                raw.arrays |= {f"{task}.{name}": array for name, array in arrays.items()}
        for raw in results:
            raw.layer_forwards = sum(result.layer_forwards for result in found.values()) / len(results)
        return results


def changed(start: Layout, layout: Layout) -> Swap | None:
    """The one layer in which `layout` differs from `start`, and what it has there; None if it does not differ.

    Raises ValueError if it differs in more.
    """
    differ = [index for index, (a, b) in enumerate(zip(start, layout, strict=True)) if a != b]
    if len(differ) > 1:
        raise ValueError(f"layouts differ in layers {differ}, attribution is for one")
    return (differ[0], layout[differ[0]]) if differ else None


def _known(start: Layout, layout: Layout) -> Swap:
    change = changed(start, layout)
    assert change is not None
    return change


def _order(change: Swap) -> tuple[int, str]:
    return change[0], change[1] or ""


def _of(answers: Answers, row: int) -> np.ndarray:
    return (answers.before if row < 0 else answers.after[row]).numpy()


def _arrays(answers: Answers, row: int, batches: Sequence[ScoringBatch], count: int) -> dict[str, np.ndarray]:
    """As `task_runs.request_arrays`. Whether decoding would write an answer is not estimated: never."""
    lengths = np.zeros(count, dtype=np.int64)
    for batch in batches:
        np.add.at(lengths, batch.requests.numpy(), 1)
    return {"log_probs": _of(answers, row), "greedy": np.zeros(len(lengths), dtype=bool), "lengths": lengths}


def fits(parts: Sequence[Any]) -> bool:
    """Whether all parts (None: of a task that cannot be dealt) can be estimated, and cheaply."""
    return all(part is not None and Attribution.fits(part.batches) for part in parts)
