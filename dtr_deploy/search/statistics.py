"""How sure one may be of scores and of their differences.

The combined score is the weighted mean of the tasks' means. Items are the sampling units; tasks, and within them
strata of fixed size (context lengths, subtasks), are part of the design, so errors add over independent (task, stratum)
groups and the bootstrap draws within them. Two models are compared item by item on the same items: their difference is
far more certain than either score, because hard items are hard for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from dtr_deploy.tasks.base import TaskScore

RESAMPLES = 2000
"""The error of a 95% interval's ends from this many draws is about 5% of the interval's half width."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval [low, high] and its standard error."""

    estimate: float
    low: float
    high: float
    standard_error: float
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True)
class _Group:
    """Items of one (task, stratum): their values [n], and the share of the combined score that their mean has."""

    values: np.ndarray
    share: float


def score_interval(
    scores: Sequence[TaskScore],
    weights: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of the combined score of one model."""
    return _interval(_groups(scores, weights, [score.per_item for score in scores]), confidence, resamples, seed)


def difference_interval(
    candidate: Sequence[TaskScore],
    base: Sequence[TaskScore],
    weights: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Paired interval of combined(candidate) - combined(base), both scored on the same items.

    The statistic is linear, so drawing pairs is drawing per-item differences. Raises ValueError when the two are not
    scores of the same tasks, splits and numbers of items.
    """
    return _interval(_difference_groups(candidate, base, weights, "per_item"), confidence, resamples, seed)


def margin_difference_interval(
    candidate: Sequence[TaskScore],
    base: Sequence[TaskScore],
    weights: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """As `difference_interval`, of the weighted mean margins (nats)."""
    return _interval(_difference_groups(candidate, base, weights, "margins"), confidence, resamples, seed)


def standard_error(scores: Sequence[TaskScore], weights: Sequence[float]) -> float:
    """Standard error of the combined score; infinite while a weighted group has a single item."""
    return _standard_error(_groups(scores, weights, [score.per_item for score in scores]))


def difference_standard_error(
    candidate: Sequence[TaskScore], base: Sequence[TaskScore], weights: Sequence[float]
) -> float:
    """Standard error of combined(candidate) - combined(base), paired item by item."""
    return _standard_error(_difference_groups(candidate, base, weights, "per_item"))


def items_needed(score: TaskScore, standard_error: float) -> int:
    """Items at which the standard error of this task's mean falls to `standard_error`, judging by the items seen."""
    if standard_error <= 0:
        raise ValueError(f"standard_error must be > 0, got {standard_error}")
    return int(np.ceil(score.per_item.var(ddof=1) / standard_error**2)) if score.per_item.size > 1 else 2


def _difference_groups(
    candidate: Sequence[TaskScore], base: Sequence[TaskScore], weights: Sequence[float], field: str
) -> list[_Group]:
    if len(candidate) != len(base):
        raise ValueError(f"{len(candidate)} scores against {len(base)}: both models need the same tasks")
    differences = []
    for ours, theirs in zip(candidate, base, strict=True):
        key = (ours.task, ours.split, ours.per_item.size, ours.strata)
        if key != (theirs.task, theirs.split, theirs.per_item.size, theirs.strata):
            raise ValueError(f"{ours.task} ({ours.split}) and {theirs.task} ({theirs.split}) are not of the same items")
        differences.append(getattr(ours, field) - getattr(theirs, field))
    return _groups(candidate, weights, differences)


def _groups(scores: Sequence[TaskScore], weights: Sequence[float], values: Sequence[np.ndarray]) -> list[_Group]:
    """Groups of the tasks with a weight above 0; a stratum's share of its task is its share of the items."""
    if len(scores) != len(weights) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(weights)} weights: need as many, and at least one")
    total = float(sum(weights))
    if min(weights) < 0 or total <= 0:
        raise ValueError(f"weights must be >= 0 and not all 0, got {list(weights)}")
    groups = []
    for score, weight, items in zip(scores, weights, values, strict=True):
        names = np.asarray(score.strata if score.strata else ("",) * items.size)
        for name in dict.fromkeys(names.tolist()):
            members = items[names == name]
            groups.append(_Group(members, weight / total * members.size / items.size))
    return [group for group in groups if group.share > 0]


def _standard_error(groups: list[_Group]) -> float:
    if any(group.values.size < 2 for group in groups):
        return float("inf")
    return float(np.sqrt(sum(group.share**2 * group.values.var(ddof=1) / group.values.size for group in groups)))


def _interval(groups: list[_Group], confidence: float, resamples: int, seed: int) -> Interval:
    shares = [group.share for group in groups]
    estimate = float(sum(share * group.values.mean() for share, group in zip(shares, groups, strict=True)))
    error = _standard_error(groups)
    drawn = [group for group in groups if group.values.size > 1 and np.ptp(group.values) > 0]
    if error == float("inf"):
        return Interval(estimate, float("-inf"), float("inf"), error, confidence)
    if not drawn:  # every item says the same: nothing to draw
        return Interval(estimate, estimate, estimate, error, confidence)

    constant = estimate - sum(group.share * group.values.mean() for group in drawn)

    def statistic(*samples: np.ndarray, axis: int = -1) -> np.ndarray:
        return constant + sum(
            group.share * sample.mean(axis=axis) for group, sample in zip(drawn, samples, strict=True)
        )

    # Percentile, not BCa: differences of 0/1 scores are mostly 0, where BCa's corrections divide by almost nothing.
    # Groups are independent samples, so scipy draws within each; the batch keeps memory below about 100 MB.
    largest = max(group.values.size for group in drawn)
    result = stats.bootstrap(
        [group.values for group in drawn],
        statistic,
        n_resamples=resamples,
        batch=max(1, 10_000_000 // largest),
        vectorized=True,
        paired=False,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Interval(
        estimate, float(result.confidence_interval.low), float(result.confidence_interval.high), error, confidence
    )
