"""What a search found, and how: the `search` part of report.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.search.objective import Visit
from dtr_deploy.search.shrinkage import Shrinkage
from dtr_deploy.search.statistics import Interval
from dtr_deploy.throughput.measure import Comparison
from dtr_deploy.throughput.performance import Performance


@dataclass(frozen=True)
class SplitScores:
    """Backbone and hybrid on one split.

    loss: paired interval of backbone minus hybrid. tasks: task -> (base, hybrid).
    """

    base: Interval
    hybrid: Interval
    loss: Interval
    tasks: Mapping[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": self.base.to_dict(),
            "hybrid": self.hybrid.to_dict(),
            "loss": self.loss.to_dict(),
            "tasks": {name: {"base": base, "hybrid": hybrid} for name, (base, hybrid) in self.tasks.items()},
        }


@dataclass(frozen=True)
class SearchResult:
    """The chosen layout with the evidence for it.

    scores: split -> scores, for "search", "confirm" and "test" (the last was looked at once, and decided nothing).
    measured: backbone and hybrid on the target engine, for the recipe's workload; None if the backbone itself was
    chosen. performance: of the layout, its times as measured. missed: a phrase for each target that was not reached.
    shrinkage: by how much the loss of the layout chosen on the search split was expected to rise on new items, and did.
    frontier: layouts visited that no other beats in both score and speedup, slowest first. m_best: the best-scoring
    layout of the committed path; m_opt: the one with most layers replaced within the score's bounds (the two results of
    arXiv 2601.11667); None if no layer was replaced. walked_back: layouts that failed on the confirm split. trials,
    layer_forwards, seconds: of scoring and screening, those remembered from an interrupted run included; seconds do not
    include throughput.
    """

    layout: Layout
    strategy: str
    scores: Mapping[str, SplitScores]
    measured: Comparison | None
    performance: Performance
    missed: list[str]
    shrinkage: Shrinkage
    frontier: list[Visit]
    m_best: Visit | None
    m_opt: Visit | None
    steps: list[dict[str, Any]]
    walked_back: list[Layout]
    trials: int
    layer_forwards: int
    seconds: float
    throughput: dict[str, Any]

    @property
    def replaced(self) -> int:
        return replaced(self.layout)

    @property
    def speedup(self) -> float:
        """Measured end-to-end tokens per second over the backbone's."""
        return 1.0 if self.measured is None else self.measured.speedup

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "strategy": self.strategy,
            "layout": list(self.layout),
            "replaced": self.replaced,
            "scores": {split: scores.to_dict() for split, scores in self.scores.items()},
            "speedup": self.speedup,
            "measured": None if self.measured is None else self.measured.to_dict(),
            "performance": self.performance.to_dict(),
            "missed": self.missed,
            "shrinkage": self.shrinkage.to_dict(),
            "frontier": [visit.to_dict() for visit in self.frontier],
            "m_best": None if self.m_best is None else self.m_best.to_dict(),
            "m_opt": None if self.m_opt is None else self.m_opt.to_dict(),
            "steps": self.steps,
            "walked_back": [list(layout) for layout in self.walked_back],
            "trials": self.trials,
            "layer_forwards": self.layer_forwards,
            "seconds": self.seconds,
            "throughput": self.throughput,
        }
