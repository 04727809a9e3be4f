"""What the search is after, and what it compares: scores of layouts, the decision about one, the choice among many.

An `Objective` knows the bounds of a recipe and what to maximise within them. It does not know how scores or
throughput come about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dtr_deploy.errors import TargetNotMet
from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.search.statistics import Interval, cautious_difference, difference_interval
from dtr_deploy.search.targets import Targets
from dtr_deploy.tasks.base import TaskScore, combined
from dtr_deploy.throughput.performance import Performance

Goal = Literal["throughput", "score", "frontier"]
Bound = Literal["estimate", "upper"]

NO_TARGETS = Targets()

_ROUNDING = 1e-9
"""Slack of a comparison between two means of the same items: far below one item's share, far above float64 error."""


@dataclass(frozen=True)
class LayoutScore:
    """All tasks of one layout on one split, or on some parts of it; `combined`: weighted mean of the tasks' means."""

    layout: Layout
    split: str
    tasks: tuple[TaskScore, ...]
    weights: tuple[float, ...]

    @property
    def combined(self) -> float:
        return combined(self.tasks, self.weights)

    @property
    def margin(self) -> float:
        """Weighted mean of the tasks' mean margins, nats: breaks ties between equal scores."""
        return float(np.average([task.mean_margin for task in self.tasks], weights=self.weights))


@dataclass(frozen=True)
class Screening:
    """A layout's cheap scores, for ranking only. kl: nats per token from the teacher on held-out text.

    recall: task -> mean margin, nats per answer token, of every recall task screened. perplexity: None where it was not
    looked at.
    """

    layout: Layout
    kl: float
    perplexity: float | None
    recall: Mapping[str, float] = field(default_factory=dict)

    def harm_beyond(self, before: Screening, divergence_weight: float) -> float:
        """What a swap costs on top of `before`, in nats: `divergence_weight` x added KL + recall lost.

        Recall *gained* counts nothing: a margin that happens to rise must not pay for a worse model.
        """
        return divergence_weight * (self.kl - before.kl) + self.recall_lost(before)

    def recall_lost(self, before: Screening) -> float:
        """Nats of margin lost against `before`, over the recall tasks."""
        return sum(max(0.0, before.recall[task] - margin) for task, margin in self.recall.items())


@dataclass(frozen=True)
class Estimate:
    """What attribution says of a layout: its screening, and its score on the first part of the items (margins only,
    whether items are right is not estimated), if that was asked for."""

    screening: Screening
    score: LayoutScore | None


@dataclass(frozen=True)
class Loss:
    """What a layout loses against the backbone, from the same items. `tasks`: of each task, unweighted.

    standard_error: of the paired difference of the combined scores; infinite where a group has a single item.
    interval: paired bootstrap, two-sided. upper, task_uppers: one-sided confidence bounds of the combined loss and of
    every task's (`statistics.cautious_difference`).
    """

    combined: float
    standard_error: float
    tasks: Mapping[str, float]
    interval: Interval | None = None
    upper: float = math.inf
    task_uppers: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def between(cls, base: LayoutScore, candidate: LayoutScore, confidence: float = 0.95) -> Loss:
        pairs = list(zip(base.tasks, candidate.tasks, strict=True))
        interval = difference_interval(base.tasks, candidate.tasks, base.weights, confidence=confidence)
        one_sided = 2 * confidence - 1  # a two-sided interval of this much has its upper end where a bound wants it

        def upper(befores: Sequence[TaskScore], afters: Sequence[TaskScore], weights: Sequence[float]) -> float:
            return cautious_difference(befores, afters, weights, confidence=one_sided).high

        return cls(
            interval.estimate,
            interval.standard_error,
            {before.task: float(np.mean(before.per_item - after.per_item)) for before, after in pairs},
            interval,
            upper(base.tasks, candidate.tasks, base.weights),
            {before.task: upper([before], [after], [1.0]) for before, after in pairs},
        )

    @classmethod
    def none(cls, base: LayoutScore, confidence: float = 0.95) -> Loss:
        """The backbone's loss against itself."""
        nothing = {task.task: 0.0 for task in base.tasks}
        return cls(0.0, 0.0, nothing, Interval(0.0, 0.0, 0.0, 0.0, confidence), 0.0, nothing)

    def to_dict(self) -> dict[str, Any]:
        known = self.interval is not None and math.isfinite(self.standard_error)
        return {
            "loss": self.combined,
            "standard_error": self.standard_error if math.isfinite(self.standard_error) else None,
            "interval": [self.interval.low, self.interval.high] if known and self.interval else None,
            "upper": self.upper if math.isfinite(self.upper) else None,
            "task_losses": dict(self.tasks),
        }


@dataclass(frozen=True)
class Visit:
    """A layout scored on the whole search split. passes: the loss is within the objective's bounds."""

    layout: Layout
    score: float
    margin: float
    loss: Loss
    performance: Performance
    passes: bool

    @property
    def replaced(self) -> int:
        return replaced(self.layout)

    @property
    def speedup(self) -> float:
        """End-to-end tokens per second over the backbone's."""
        return self.performance.speedup

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": list(self.layout),
            "replaced": self.replaced,
            "score": self.score,
            **self.loss.to_dict(),
            **self.performance.to_dict(),
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Objective:
    """Bounds and what to maximise within them.

    targets: what the layout chosen has to reach when served. max_score_loss: the combined score may fall by this much,
    absolute, on the search split and again on the confirm split (None: no bound). max_task_loss: the same for every
    task alone, so that one task's gain cannot pay for another's collapse (None: no bound). bound: what has to be within
    these, the estimate of the loss or its upper confidence bound. max_replaced: at most so many layers.
    goal "throughput": replace while the loss stays within bounds and throughput improves; then the targets must have
    been reached. "score": replace no more than the targets take. "frontier": replace as long as there is a candidate,
    whatever it costs, and choose the fastest layout within the bounds.
    """

    targets: Targets = NO_TARGETS
    max_score_loss: float | None = None
    max_task_loss: float | None = None
    max_replaced: int | None = None
    goal: Goal = "throughput"
    bound: Bound = "estimate"

    def __post_init__(self) -> None:
        if self.goal == "score" and not self.targets.given:
            raise ValueError("goal 'score' needs a target to reach")
        if self.goal == "throughput" and self.max_score_loss is None and self.max_task_loss is None:
            raise ValueError("goal 'throughput' needs max_score_loss or max_task_loss")

    def passes(self, loss: Loss) -> bool:
        """Whether a loss over paired items is within the bounds."""
        estimate = self.bound == "estimate"
        tasks = loss.tasks if estimate else loss.task_uppers
        return self.within(loss.combined if estimate else loss.upper, max(tasks.values(), default=0.0))

    def within(self, combined_loss: float, largest_task_loss: float) -> bool:
        """Whether these two numbers are within the bounds."""
        return bool(self.within_many(np.array([combined_loss]), np.array([largest_task_loss]))[0])

    def within_many(self, combined_loss: np.ndarray, largest_task_loss: np.ndarray) -> np.ndarray:
        """`within` of each pair: bool [V] from float [V] and [V]."""
        most = math.inf if self.max_score_loss is None else self.max_score_loss + _ROUNDING
        most_task = math.inf if self.max_task_loss is None else self.max_task_loss + _ROUNDING
        return (combined_loss <= most) & (largest_task_loss <= most_task)

    def burden(self, performance: Performance) -> float:
        """What every replaced layer is to lower: the distance from the targets (goal "score"), else time."""
        return self.targets.shortfall(performance) if self.goal == "score" else 1.0 / performance.speedup

    def done(self, visit: Visit) -> bool:
        """Whether the search need not go on from this layout."""
        if self.max_replaced is not None and visit.replaced >= self.max_replaced:
            return True
        return self.goal == "score" and visit.replaced > 0 and self.targets.met(visit.performance)

    def choose(self, visits: Sequence[Visit]) -> Visit:
        """The best of the layouts visited (the backbone itself among them, so there always is one)."""
        index = self.choose_index(
            np.array([visit.passes for visit in visits]),
            np.array([self.targets.shortfall(visit.performance) for visit in visits]),
            np.array([visit.speedup for visit in visits]),
            np.array([visit.score for visit in visits]),
            np.array([visit.margin for visit in visits]),
        )
        return visits[index]

    def choose_index(
        self, passes: np.ndarray, shortfall: np.ndarray, speedup: np.ndarray, score: np.ndarray, margin: np.ndarray
    ) -> int:
        """`choose` on the numbers alone, each [V]; at least one must pass. Of equals the first.

        Where no layout that passes reaches the targets, the one that comes nearest.
        """
        met = passes & (shortfall <= 1 + _ROUNDING)
        if met.any():
            order = (score, margin, speedup) if self.goal == "score" else (speedup, score, margin)
            return _first_best(met, *order)
        return _first_best(passes, -shortfall, score, margin)


def _first_best(allowed: np.ndarray, *keys: np.ndarray) -> int:
    """Index of the lexicographically largest keys among the allowed ones."""
    left = np.flatnonzero(allowed)
    for key in keys:
        left = left[key[left] == key[left].max()]
    return int(left[0])


def pareto(visits: Sequence[Visit]) -> list[Visit]:
    """The visits that no other beats in both score and speedup, slowest first; one of equals."""
    best: list[Visit] = []
    for visit in sorted(visits, key=lambda v: (-v.speedup, -v.score, -v.margin, v.replaced)):
        if not best or visit.score > best[-1].score:
            best.append(visit)
    return best[::-1]


class InfeasibleTarget(TargetNotMet):
    """No layout reaches the targets at a score that is good enough. `frontier`: what was reached, slowest first."""

    def __init__(self, message: str, frontier: Sequence[Visit], result: Any = None) -> None:
        super().__init__(message)
        self.frontier = list(frontier)
        self.result = result
