"""Raw results of single swaps by attribution: what the screening and the first items of the score would say of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.search.attribution import Answers, Attribution, Swap, pieces
from dtr_deploy.search.forward import LayerPool
from dtr_deploy.search.task_runs import Head, RawResult
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.request_task import Part
from dtr_deploy.tasks.scoring import ScoringBatch

SAMPLES = 3
"""Draws of every token for the divergence: with four sequences its standard error is about 40% of it, and harms of
layers differ by a factor of a hundred."""


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
        self.pool, self.products, self.head = pool, products, head

    def run(
        self, start: Layout, layouts: Sequence[Layout], priced: bool, progress: Callable[[int, int], None] | None = None
    ) -> list[RawResult]:
        """Of each layout: `start` itself, or `start` with one layer changed.

        Arrays are those of a score's first part (with `priced`), log-probabilities being estimates and everything else
        the start's; scalars those of a screening, `recall` holding log-probabilities of requests. progress: called with
        (batches done, batches).
        """
        tasks = list(self.priced) if priced else []
        split = [*(batches for _, batches, _ in self.recall), *(batches for batches, _ in tasks)]
        total, done = len(self.divergence.batches()) + sum(map(len, split)), 0

        def on_batch() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        attribution = Attribution(self.pool, self.products, self.head, on_batch)
        swaps = sorted({change for layout in layouts if (change := changed(start, layout)) is not None}, key=_order)
        rows = [-1 if layout == start else swaps.index(_known(start, layout)) for layout in layouts]
        found = attribution.divergences(
            start, swaps, self.divergence.batches(), self.divergence.teacher_reads(), SAMPLES
        )
        work = found.layer_forwards
        results = [
            RawResult({}, 0.0, {"kl": found.before if row < 0 else float(found.after[row]), "recall": {}})
            for row in rows
        ]
        for name, batches, count in self.recall:
            answers = attribution.answers(start, swaps, batches, count)
            work += answers.layer_forwards
            for row, result in zip(rows, results, strict=True):
                result.scalars["recall"][name] = _of(answers, row).tolist()
        for number, (batches, count) in enumerate(tasks):
            answers = attribution.answers(start, swaps, batches, count)
            work += answers.layer_forwards
            for row, result in zip(rows, results, strict=True):
                arrays = _arrays(answers, row, batches, count)
                result.arrays |= {f"{number}.{name}": array for name, array in arrays.items()}
        for result in results:
            result.layer_forwards = work / len(results)
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
