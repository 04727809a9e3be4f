"""How sure one may be of scores and of their differences.

The combined score is the weighted mean of the tasks' means. Items are the sampling units; tasks, and within them
strata of fixed size (context lengths, subtasks), are part of the design, so errors add over independent (task, stratum)
groups and the bootstrap draws within them. Two models are compared item by item on the same items: their difference is
far more certain than either score, because hard items are hard for both.

Two kinds of interval: the percentile bootstrap for what is reported, and `cautious_difference` for what is decided on
few items, where a bootstrap of differences that happen to be all equal would be sure of nothing less than everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from dtr_deploy.search.resampling import RESAMPLES, Group, drawn_means
from dtr_deploy.tasks.base import TaskScore


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


def cautious_difference(
    candidate: Sequence[TaskScore], base: Sequence[TaskScore], weights: Sequence[float], *, confidence: float = 0.95
) -> Interval:
    """Paired interval of combined(candidate) - combined(base) for decisions, sound from one item a task on.

    For items in [0, 1]. Agresti and Min (Simple improved confidence intervals for comparing matched proportions,
    Statistics in Medicine 24, 2005, 729-740): two pairs are added to each task, half a pair won, half a pair lost and
    one tied, and the normal interval of the result is taken. Three items that all agree then prove little. Strata are
    pooled, for they may hold an item each; that can only widen the interval.
    """
    groups = _difference_groups(candidate, base, weights, "per_item", pooled=True)
    estimate = variance = 0.0
    for group in groups:
        count = group.values.size + 2
        mean = float(group.values.sum()) / count
        spread = (float((group.values**2).sum()) + 1) / count - mean**2
        estimate += group.share * mean
        variance += group.share**2 * spread / count
    error = float(np.sqrt(variance))
    reach = error * float(stats.norm.ppf((1 + confidence) / 2))
    return Interval(estimate, estimate - reach, estimate + reach, error, confidence)


def margin_standard_error(candidate: Sequence[TaskScore], base: Sequence[TaskScore], weights: Sequence[float]) -> float:
    """Standard error of the difference of weighted mean margins, nats, strata pooled; infinite for a single item."""
    return _standard_error(_difference_groups(candidate, base, weights, "margins", pooled=True))


def items_needed(score: TaskScore, standard_error: float) -> int:
    """Items at which the standard error of this task's mean falls to `standard_error`, judging by the items seen."""
    if standard_error <= 0:
        raise ValueError(f"standard_error must be > 0, got {standard_error}")
    return int(np.ceil(score.per_item.var(ddof=1) / standard_error**2)) if score.per_item.size > 1 else 2


def _difference_groups(
    candidate: Sequence[TaskScore],
    base: Sequence[TaskScore],
    weights: Sequence[float],
    field: str,
    pooled: bool = False,
) -> list[Group]:
    if len(candidate) != len(base):
        raise ValueError(f"{len(candidate)} scores against {len(base)}: both models need the same tasks")
    differences = []
    for ours, theirs in zip(candidate, base, strict=True):
        key = (ours.task, ours.split, ours.per_item.size, ours.strata)
        if key != (theirs.task, theirs.split, theirs.per_item.size, theirs.strata):
            raise ValueError(f"{ours.task} ({ours.split}) and {theirs.task} ({theirs.split}) are not of the same items")
        differences.append(getattr(ours, field) - getattr(theirs, field))
    return _groups(candidate, weights, differences, pooled)


def _groups(
    scores: Sequence[TaskScore], weights: Sequence[float], values: Sequence[np.ndarray], pooled: bool = False
) -> list[Group]:
    """Groups of the tasks with a weight above 0; a stratum's share of its task is its share of the items."""
    if len(scores) != len(weights) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(weights)} weights: need as many, and at least one")
    total = float(sum(weights))
    if min(weights) < 0 or total <= 0:
        raise ValueError(f"weights must be >= 0 and not all 0, got {list(weights)}")
    groups = []
    for score, weight, items in zip(scores, weights, values, strict=True):
        names = np.asarray(score.strata if score.strata and not pooled else ("",) * items.size)
        for name in dict.fromkeys(names.tolist()):
            members = items[names == name]
            groups.append(Group(members, weight / total * members.size / items.size))
    return [group for group in groups if group.share > 0]


def _standard_error(groups: list[Group]) -> float:
    if any(group.values.size < 2 for group in groups):
        return float("inf")
    return float(np.sqrt(sum(group.share**2 * group.values.var(ddof=1) / group.values.size for group in groups)))


def _interval(groups: list[Group], confidence: float, resamples: int, seed: int) -> Interval:
    estimate = float(sum(group.share * group.values.mean() for group in groups))
    error = _standard_error(groups)
    if error == float("inf"):
        return Interval(estimate, float("-inf"), float("inf"), error, confidence)
    if error == 0:  # every item says the same: nothing to draw
        return Interval(estimate, estimate, estimate, error, confidence)
    # Percentile, not BCa: differences of 0/1 scores are mostly 0, where BCa's corrections divide by almost nothing.
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn_means(groups, resamples, seed), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high), error, confidence)
