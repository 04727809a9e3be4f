"""Predicts a layout's time from how many layers of which form it has. Pure arithmetic: measuring is in `measure`.

Time does not depend on weights nor, on the engines served, on which layers are replaced. All times here are *ratios*
to the backbone measured in the same minutes, so that a machine that slows down between two measurements does not bend
the curve. Per form, the ratio is a monotone piecewise-linear curve over the number of replaced layers; a layout with
several forms takes the mean of their curves at its total count, weighted by its counts, which is exact where time is
a sum over layers. What is not a sum enters as one more term each, `cost x count(layout)`, whose coefficient is fitted
along: vLLM's cache groups, each of which costs a metadata build a step, and layers whose state is smaller than the
model's largest, which ONNX Runtime pads in every call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtr_deploy.engines.base import Throughput
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.layout import counts as form_counts

GroupCount = Callable[[Layout], int]
"""Layout -> how many KV-cache groups the engine makes of it."""

PaddedCount = Callable[[Layout], float]
"""Layout -> how many of its layers have a state that is padded; 0 for layouts of one entry."""


def layout_of_counts(num_layers: int, counts: Mapping[str, int]) -> Layout:
    """A layout with these counts, forms spread evenly over the depth: the one that is measured for all of its kind."""
    names = [form for form, count in sorted(counts.items()) for _ in range(count)]
    if len(names) > num_layers:
        raise ValueError(f"{len(names)} layers to replace, but the model has {num_layers}")
    layout: list[str | None] = [None] * num_layers
    # Bresenham's line: replaced layer k of K sits at floor((k + 1/2) L / K), which never repeats for K <= L.
    for k, name in enumerate(sorted(names, key=_spread(names))):
        layout[(2 * k + 1) * num_layers // (2 * len(names))] = name
    return tuple(layout)


@dataclass(frozen=True)
class CurvePoint:
    """Times of one layout over those of the backbone in the same rounds (1.0: equally long)."""

    layout: Layout
    prefill: float
    decode: float


@dataclass(frozen=True)
class CostModel:
    """Fitted curves. `predict` gives time ratios, `speedup` end-to-end tokens per second over the backbone's.

    base: the backbone's seconds, which the ratios are of. group_cost, padded_cost: (prefill, decode), time ratio per
    cache group above the backbone's, and per padded layer.
    """

    base: Throughput
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]  # form -> counts, prefill ratios, decode ratios
    group_cost: tuple[float, float] = (0.0, 0.0)
    groups: GroupCount | None = None
    padded_cost: tuple[float, float] = (0.0, 0.0)
    padded: PaddedCount | None = None

    @classmethod
    def fit(
        cls,
        base: Throughput,
        points: Sequence[CurvePoint],
        groups: GroupCount | None = None,
        padded: PaddedCount | None = None,
    ) -> CostModel:
        """Curves from points of one form each, the cost of padding from the others; the backbone is the point (1, 1)
        of every curve."""
        single = [point for point in points if len(form_counts(point.layout)) == 1]
        if not single:
            raise ValueError("a cost model needs at least one measured layout besides the backbone")
        group_cost = (0.0, 0.0) if groups is None else _fit_group_cost(single, groups)
        curves = {}
        for form in sorted({form for point in single for form in form_counts(point.layout)}):
            on_curve: dict[int, list[tuple[float, float]]] = {0: [(1.0, 1.0)]}
            for point in single:
                count = form_counts(point.layout).get(form, 0)
                if count:
                    extra = 0 if groups is None else groups(point.layout) - groups((None,) * len(point.layout))
                    times = (point.prefill - group_cost[0] * extra, point.decode - group_cost[1] * extra)
                    on_curve.setdefault(count, []).append(times)
            counts = np.array(sorted(on_curve))
            medians = np.array([np.median(on_curve[count], axis=0) for count in counts])
            curves[form] = (counts, _monotone(medians[:, 0]), _monotone(medians[:, 1]))
        model = cls(base, curves, group_cost, groups)
        mixed = [point for point in points if len(form_counts(point.layout)) > 1]
        if padded is None or not mixed:
            return model
        return replace(model, padded_cost=_fit_padded_cost(model, mixed, padded), padded=padded)

    def predict(self, layout: Layout) -> tuple[float, float]:
        """(prefill, decode) time over the backbone's. Raises `KeyError` for a form that was not measured."""
        counts = form_counts(layout)
        total = sum(counts.values())
        if not total:
            return 1.0, 1.0
        extra = 0 if self.groups is None else self.groups(layout) - self.groups((None,) * len(layout))
        ratios = []
        for part in (0, 1):
            ratio = sum(
                count / total * _interpolate(total, self.curves[form][0], self.curves[form][1 + part])
                for form, count in counts.items()
            )
            padded = self.padded(layout) if self.padded else 0.0
            ratios.append(ratio + self.group_cost[part] * extra + self.padded_cost[part] * padded)
        return ratios[0], ratios[1]

    def speedup(self, layout: Layout) -> float:
        prefill, decode = self.predict(layout)
        before, after = self.base.prefill_seconds, self.base.decode_seconds
        return (before + after) / (before * prefill + after * decode)


def _spread(names: Sequence[str]) -> Callable[[str], float]:
    """A sort key, called once per name in order, that spreads several forms evenly over one another."""
    total = Counter(names)
    seen: Counter[str] = Counter()

    def key(name: str) -> float:
        seen[name] += 1
        return (seen[name] - 0.5) / total[name]

    return key


def _interpolate(count: int, counts: np.ndarray, ratios: np.ndarray) -> float:
    """Linear between points and along the last segment beyond them (counts start at 0, so never before)."""
    end = int(np.clip(np.searchsorted(counts, count), 1, len(counts) - 1))
    slope = (ratios[end] - ratios[end - 1]) / (counts[end] - counts[end - 1])
    return float(ratios[end] + slope * (count - counts[end]))


def _monotone(ratios: np.ndarray) -> np.ndarray:
    """Isotonic regression that keeps the first value, rising or falling with the last: noise must not make a dent.

    Pool adjacent violators, least squares; the first value is exactly 1 by definition and is not pooled.
    """
    if len(ratios) < 3:
        return ratios
    sign = 1.0 if ratios[-1] >= ratios[0] else -1.0
    blocks: list[list[float]] = []  # [mean, size]
    for value in np.maximum(sign * (ratios[1:] - ratios[0]), 0.0):
        blocks.append([float(value), 1.0])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * size) / (blocks[-1][1] + size), blocks[-1][1] + size]
    pooled = np.concatenate([np.full(int(size), mean) for mean, size in blocks])
    return np.concatenate([ratios[:1], ratios[0] + sign * pooled])


def _fit_group_cost(points: Sequence[CurvePoint], groups: GroupCount) -> tuple[float, float]:
    """Least squares of `ratio - 1 = slope[form] x count + cost x (groups - backbone's groups)`; never negative.

    0.0 where the points cannot tell the two apart (fewer points than unknowns, or groups in step with counts).
    """
    forms = sorted({form for point in points for form in form_counts(point.layout)})
    rows = np.array(
        [
            [form_counts(p.layout).get(form, 0) for form in forms]
            + [groups(p.layout) - groups((None,) * len(p.layout))]
            for p in points
        ],
        dtype=np.float64,
    )
    if len(points) < rows.shape[1] or np.linalg.matrix_rank(rows) < rows.shape[1]:
        return 0.0, 0.0
    ratios = np.array([[p.prefill - 1, p.decode - 1] for p in points])
    cost = np.linalg.lstsq(rows, ratios, rcond=None)[0][-1]
    return max(float(cost[0]), 0.0), max(float(cost[1]), 0.0)


def _fit_padded_cost(model: CostModel, points: Sequence[CurvePoint], padded: PaddedCount) -> tuple[float, float]:
    """Least squares of what the model misses at these points against their padded layers; never negative."""
    counts = np.array([padded(point.layout) for point in points], dtype=np.float64)
    if not counts.any():
        return 0.0, 0.0
    missed = np.array([np.subtract((point.prefill, point.decode), model.predict(point.layout)) for point in points])
    prefill, decode = np.maximum(counts @ missed / (counts @ counts), 0.0)
    return float(prefill), float(decode)
