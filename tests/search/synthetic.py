"""Scorers and costs with a known answer: each swap has a planted harm, the score falls with the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.search.objective import Screening
from dtr_deploy.search.problem import Candidate
from dtr_deploy.tasks.base import TaskScore
from dtr_deploy.throughput.measure import Comparison

WORKLOAD = Workload(4096, 512)


class PlantedEvaluator:
    """Two tasks. `harm[candidate]` = (items lost of "labels", items lost of "recall") when that layer is replaced
    alone.

    Losses of layers add, item by item: the first so many items turn from 1 to 0. `seen[candidate]` is what screening
    shows (kl, recall margin lost); by default the true harm. `calls` lists the layouts computed, for counting.
    """

    def __init__(
        self,
        layers: int,
        harm: Mapping[tuple[int, str], tuple[int, int]],
        items: int = 1000,
        seen: Mapping[tuple[int, str], tuple[float, float]] | None = None,
        confirm_factor: float = 1.0,
        interaction: Callable[[Layout], int] | None = None,
    ) -> None:
        self.layers, self.items, self.confirm_factor = layers, items, confirm_factor
        self.harm = {Candidate(*key): value for key, value in harm.items()}
        self.seen = {Candidate(*key): value for key, value in (seen or {}).items()}
        self.interaction = interaction
        self.candidates: Sequence[Candidate] = list(self.harm)
        self.weights = (1.0, 1.0)
        self.layer_forwards = 0
        self.calls: list[tuple[str, Layout, str]] = []

    def score(self, layout: Layout, split: str) -> list[TaskScore]:
        self.calls.append(("score", layout, split))
        self.layer_forwards += self.layers
        lost = np.sum([self.harm[c] for c in self._swaps(layout)], axis=0) if replaced(layout) else np.zeros(2)
        if self.interaction is not None:
            lost = lost + self.interaction(layout)
        if split == "confirm":
            lost = lost * self.confirm_factor
        return [self._task(name, split, int(n)) for name, n in zip(("labels", "recall"), lost, strict=True)]

    def screen(self, layout: Layout) -> Screening:
        self.calls.append(("screen", layout, "search"))
        self.layer_forwards += self.layers
        shown = [
            self.seen.get(c, (self.harm[c][0] / self.items, self.harm[c][1] / self.items)) for c in self._swaps(layout)
        ]
        kl, margin = np.sum(shown, axis=0) if shown else (0.0, 0.0)
        return Screening(layout, float(kl), 10.0 + float(kl), {"recall": -1.0 - float(margin)})

    def fingerprint(self, kind: str, split: str) -> str:
        return f"planted-{kind}-{split}"

    def _swaps(self, layout: Layout) -> list[Candidate]:
        return [Candidate(layer, form) for layer, form in enumerate(layout) if form is not None]

    def _task(self, name: str, split: str, lost: int) -> TaskScore:
        lost = min(max(lost, 0), self.items)
        items = np.ones(self.items)
        items[:lost] = 0
        return TaskScore(name, split, items, items - 1.0 - lost / 7)


class LinearCost:
    """Time falls by `saving` of the backbone's for each replaced layer. Keeps what it was asked to measure."""

    def __init__(self, saving: float = 0.02, ratio: Callable[[Layout], float] | None = None) -> None:
        self.ratio = ratio or (lambda layout: 1.0 - saving * replaced(layout))
        self.measured: list[Layout] = []

    def predicted_speedup(self, layout: Layout) -> float:
        return 1.0 / self.ratio(layout)

    def speedup(self, layout: Layout) -> float:
        return 1.0 / self.ratio(layout)

    def measure(self, layout: Layout) -> Comparison:
        self.measured.append(layout)
        ratio = self.ratio(layout)
        base = Throughput("fake", "fp32", WORKLOAD, 1, 2.0, 3.0, 5.0)
        hybrid = Throughput("fake", "fp32", WORKLOAD, 1, 2.0 * ratio, 3.0 * ratio, 5.0 * ratio)
        return Comparison(layout, base, hybrid, ratio, ratio, 1.0 / ratio)

    def to_dict(self) -> dict[str, object]:
        return {"fake": True}
