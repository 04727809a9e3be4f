"""What the search is after, and what it compares: scores of layouts, the decision about one, the choice among many.

An `Objective` knows three numbers of a recipe: the speedup to reach, the score that may be lost, and what to maximise
within these bounds. It does not know how scores or throughput come about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dtr_deploy.errors import TargetNotMet
from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.search.statistics import difference_standard_error
from dtr_deploy.tasks.base import TaskScore, combined

Goal = Literal["throughput", "score", "frontier"]

_ROUNDING = 1e-9
"""Slack of a comparison between two means of the same items: far below one item's share, far above float64 error."""


@dataclass(frozen=True)
class LayoutScore:
    """All tasks of one layout on one split; `combined` is the weighted mean of the tasks' means."""

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

    recall: task -> mean margin, nats per answer token, of every recall task screened.
    """

    layout: Layout
    kl: float
    perplexity: float
    recall: Mapping[str, float] = field(default_factory=dict)

    def harm_beyond(self, before: Screening, divergence_weight: float) -> float:
        """What a swap costs on top of `before`, in nats: `divergence_weight` x added KL + recall lost.

        Recall *gained* counts nothing: a margin that happens to rise must not pay for a worse model.
        """
        lost = sum(max(0.0, before.recall[task] - margin) for task, margin in self.recall.items())
        return divergence_weight * (self.kl - before.kl) + lost


@dataclass(frozen=True)
class Loss:
    """What a layout loses against the backbone, from the same items. `tasks`: of each task, unweighted.

    standard_error: of the paired difference of the combined scores; infinite where a group has a single item.
    """

    combined: float
    standard_error: float
    tasks: Mapping[str, float]

    @classmethod
    def between(cls, base: LayoutScore, candidate: LayoutScore) -> Loss:
        means = {
            before.task: float(np.mean(before.per_item - after.per_item))
            for before, after in zip(base.tasks, candidate.tasks, strict=True)
        }
        return cls(
            float(np.average(list(means.values()), weights=base.weights)),
            difference_standard_error(candidate.tasks, base.tasks, base.weights),
            means,
        )

    @classmethod
    def none(cls, base: LayoutScore) -> Loss:
        """The backbone's loss against itself."""
        return cls(0.0, 0.0, {task.task: 0.0 for task in base.tasks})

    def to_dict(self) -> dict[str, Any]:
        error = self.standard_error if math.isfinite(self.standard_error) else None
        return {"loss": self.combined, "standard_error": error, "task_losses": dict(self.tasks)}


@dataclass(frozen=True)
class Visit:
    """A layout scored on the search split. speedup: end-to-end tokens per second over the backbone's."""

    layout: Layout
    score: float
    margin: float
    loss: Loss
    speedup: float
    passes: bool

    @property
    def replaced(self) -> int:
        return replaced(self.layout)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": list(self.layout),
            "replaced": self.replaced,
            "score": self.score,
            **self.loss.to_dict(),
            "speedup": self.speedup,
            "passes": self.passes,
        }


@dataclass(frozen=True)
class Objective:
    """Bounds and what to maximise within them.

    speedup: the measured throughput must be at least this many times the backbone's (None: no bound).
    max_score_loss: the combined score may fall by this much, absolute, on the search split and again on the confirm
    split (None: no bound). max_task_loss: the same for every task alone, so that one task's gain cannot pay for
    another's collapse (None: no bound). max_replaced: at most so many layers.
    goal "throughput": replace while the loss stays within bounds and throughput improves; then the speedup must have
    been reached. "score": replace no more than the speedup takes. "frontier": replace as long as there is a
    candidate, whatever it costs, and choose the fastest layout within the bounds.
    """

    speedup: float | None = None
    max_score_loss: float | None = None
    max_task_loss: float | None = None
    max_replaced: int | None = None
    goal: Goal = "throughput"

    def __post_init__(self) -> None:
        if self.goal == "score" and self.speedup is None:
            raise ValueError("goal 'score' needs a speedup to reach")
        if self.goal == "throughput" and self.max_score_loss is None and self.max_task_loss is None:
            raise ValueError("goal 'throughput' needs max_score_loss or max_task_loss")

    def passes(self, loss: Loss) -> bool:
        """Whether a loss (point estimate over paired items) is within the bounds."""
        if self.max_score_loss is not None and loss.combined > self.max_score_loss + _ROUNDING:
            return False
        return self.max_task_loss is None or max(loss.tasks.values()) <= self.max_task_loss + _ROUNDING

    def fast_enough(self, speedup: float) -> bool:
        return self.speedup is None or speedup >= self.speedup

    def done(self, visit: Visit) -> bool:
        """Whether the search need not go on from this layout."""
        if self.max_replaced is not None and visit.replaced >= self.max_replaced:
            return True
        return self.goal == "score" and visit.replaced > 0 and self.fast_enough(visit.speedup)

    def choose(self, visits: Sequence[Visit]) -> Visit:
        """The best of the layouts visited (the backbone itself among them, so there always is one)."""
        within = [visit for visit in visits if visit.passes]
        if self.goal == "score":
            fast = [visit for visit in within if self.fast_enough(visit.speedup)]
            if fast:
                return max(fast, key=lambda visit: (visit.score, visit.margin, visit.speedup))
        return max(within, key=lambda visit: (visit.speedup, visit.score, visit.margin))


def pareto(visits: Sequence[Visit]) -> list[Visit]:
    """The visits that no other beats in both score and speedup, slowest first; one of equals."""
    best: list[Visit] = []
    for visit in sorted(visits, key=lambda v: (-v.speedup, -v.score, -v.margin, v.replaced)):
        if not best or visit.score > best[-1].score:
            best.append(visit)
    return best[::-1]


class InfeasibleTarget(TargetNotMet):
    """No layout is fast enough at a score that is good enough. `frontier`: what was reached, slowest first."""

    def __init__(self, message: str, frontier: Sequence[Visit], result: Any = None) -> None:
        super().__init__(message)
        self.frontier = list(frontier)
        self.result = result
