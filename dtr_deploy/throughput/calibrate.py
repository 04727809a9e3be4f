"""Calibrates the cost model on a few measured layouts, checks it on others, and says what the search may rely on.

How many layouts are measured for k entries: one each, with every layer that can have it replaced, and one mixture to
check; where costs are no sum over layers (`groups`) two more of the first entry, since what they add (a metadata build
for each cache group) is the same for all; where states differ in size (`padded`) one more mixture. All of them share
the backbone's rounds. A model that fails its check costs k + 2 more.

What is no sum over layers and still needs no term: kernels differ in speed by how many query heads share a kv head,
which is the same in all layers of a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.layout import counts as form_counts
from dtr_deploy.throughput.cost_model import CostModel, CurvePoint, GroupCount, PaddedCount, layout_of_counts
from dtr_deploy.throughput.measure import Comparison, ThroughputMeter
from dtr_deploy.throughput.performance import Performance

TOLERANCE = 0.05
"""Largest relative error of predicted throughput up to which predictions stand in for measurements."""

RECENT = 2
"""Checks that decide whether the model is trusted: the last ones, since what is measured later improves the fit."""

CacheBytes = Callable[[Layout], int]
"""Layout -> bytes of keys, values and states of all requests of the workload; see `cache_bytes.CacheSize`."""


@dataclass(frozen=True)
class Check:
    """The cost model beside a measurement that it was not fitted to. Relative errors, |predicted / measured - 1|."""

    layout: Layout
    predicted_speedup: float
    measured_speedup: float
    prefill_error: float
    decode_error: float

    @property
    def error(self) -> float:
        return abs(self.predicted_speedup / self.measured_speedup - 1)

    def to_dict(self) -> dict[str, Any]:
        return {
            "counts": form_counts(self.layout),
            "predicted_speedup": self.predicted_speedup,
            "measured_speedup": self.measured_speedup,
            "error": self.error,
            "prefill_error": self.prefill_error,
            "decode_error": self.decode_error,
        }


class CalibratedCost:
    """What the search asks about speed and memory: predictions while the checked model is trusted, else measurements.

    Times are ratios to the backbone, predicted or measured, times the backbone's median seconds in the calibration: so
    layouts measured on a slow afternoon compare with others.

    Every layout measured because the model was not trusted is one more check, and then one more point of the fit, until
    the model has foretold `RECENT` of them in a row. comparisons: what the model was fitted to and checked on.
    """

    def __init__(
        self,
        meter: ThroughputMeter,
        model: CostModel,
        checks: Sequence[Check],
        tolerance: float,
        cache_bytes: CacheBytes,
        comparisons: Mapping[Layout, Comparison] | None = None,
    ) -> None:
        self.meter, self.model, self.checks, self.tolerance = meter, model, list(checks), tolerance
        self.cache_bytes, self.comparisons = cache_bytes, dict(comparisons or {})

    @property
    def largest_relative_error(self) -> float:
        """Over the checks, of end-to-end tokens per second."""
        return max((check.error for check in self.checks), default=0.0)

    @property
    def trusted(self) -> bool:
        return all(check.error <= self.tolerance for check in self.checks[-RECENT:])

    def predicted(self, layout: Layout) -> Performance:
        """By the model, trusted or not: for looking ahead over many layouts."""
        prefill, decode = self.model.predict(layout)
        return self._performance(layout, self.model.speedup(layout), prefill, decode)

    def performance(self, layout: Layout) -> Performance:
        """What decisions rest on: the model where it is trusted, else a measurement."""
        if self.trusted or not form_counts(layout):
            return self.predicted(layout)
        found = self.measure(layout)
        self._learn(found)
        return self._performance(layout, found.speedup, found.prefill_ratio, found.decode_ratio)

    def _learn(self, found: Comparison) -> None:
        if found.layout in self.comparisons:
            return
        self.checks.append(check(self.model, found))
        self.comparisons[found.layout] = found
        self.model = fit(self.comparisons, self.comparisons, self.model.groups, self.model.padded)

    def predicted_speedup(self, layout: Layout) -> float:
        """`predicted(layout).speedup`."""
        return self.predicted(layout).speedup

    def speedup(self, layout: Layout) -> float:
        """`performance(layout).speedup`."""
        return self.performance(layout).speedup

    def _performance(self, layout: Layout, speedup: float, prefill: float, decode: float) -> Performance:
        """From ratios of seconds. All requests of a workload start at once and end at once: the first token is there
        when all prompts are through, and each further step gives one token to each."""
        base = self.model.base
        steps = base.workload.output - 1
        token = base.decode_seconds * decode / steps if steps else 0.0
        return Performance(speedup, base.prefill_seconds * prefill, token, self.cache_bytes(layout))

    def measure(self, layout: Layout) -> Comparison:
        """Measured (or remembered) comparison of the layout's counts with the backbone."""
        return self.meter.compare([layout])[0]

    def to_dict(self) -> dict[str, Any]:
        """For report.json: the curves, the checks, and whether the search could rely on them."""
        return {
            "workload": self.meter.workload.to_dict(),
            "base": self.model.base.to_dict(),
            "curves": {
                form: [
                    {"replaced": int(count), "prefill_ratio": float(prefill), "decode_ratio": float(decode)}
                    for count, prefill, decode in zip(*curve, strict=True)
                ]
                for form, curve in self.model.curves.items()
            },
            "group_cost": {"prefill": self.model.group_cost[0], "decode": self.model.group_cost[1]},
            "padded_cost": {"prefill": self.model.padded_cost[0], "decode": self.model.padded_cost[1]},
            "checks": [check.to_dict() for check in self.checks],
            "largest_relative_error": self.largest_relative_error,
            "trusted": self.trusted,
        }


def calibrate(
    meter: ThroughputMeter,
    num_layers: int,
    replaceable: Mapping[str, int],
    cache_bytes: CacheBytes,
    fit_at: Sequence[float] | None = None,
    check_at: Sequence[float] = (0.5,),
    groups: GroupCount | None = None,
    padded: PaddedCount | None = None,
    tolerance: float = TOLERANCE,
) -> CalibratedCost:
    """Measure a curve over counts, fit the cost model, check it elsewhere.

    replaceable: entry -> how many layers can have it. fit_at, check_at: fractions of these, ascending; the first entry
    is measured at all of `fit_at`, the others at the last. Default `fit_at`: all layers replaced, and with `groups`
    (costs that are not a sum over layers) a quarter and three quarters besides. Checks with several entries mix them in
    equal parts. A model that fails its check is fitted to the checked layouts too and checked once more, at other
    counts; if it fails again, the result measures instead of predicting, until that has mended the fit.
    """
    if not replaceable or min(replaceable.values()) < 1:
        raise ValueError("calibrate: every form needs at least one layer that can have it")
    if fit_at is None:
        fit_at = (1.0,) if groups is None else (0.25, 0.75, 1.0)
    # Engines keep count of tokens by a layer with full attention, so one always stays.
    replaceable = {form: min(count, num_layers - 1) for form, count in replaceable.items()}
    fractions = {form: fit_at[-1:] if place else fit_at for place, form in enumerate(replaceable)}
    fitted = _layouts(num_layers, [{form: _part(n, at)} for form, n in replaceable.items() for at in fractions[form]])
    if padded is not None:
        fitted += [layout for layout in _checks(num_layers, replaceable, fit_at[-1:], besides=fitted) if padded(layout)]
    checked = _checks(num_layers, replaceable, check_at, besides=fitted)
    comparisons = dict(zip([*fitted, *checked], meter.compare([*fitted, *checked]), strict=True))
    model = fit(comparisons, fitted, groups, padded)
    checks = [check(model, comparisons[layout]) for layout in checked]
    cost = CalibratedCost(meter, model, checks, tolerance, cache_bytes, comparisons)
    if cost.trusted:
        return cost
    middle = [{form: _part(n, at)} for form, n in replaceable.items() for at in check_at]
    fitted = list(dict.fromkeys([*fitted, *_layouts(num_layers, middle)]))
    rechecked = _checks(num_layers, replaceable, (0.25, 0.75), besides=fitted)
    comparisons |= dict(zip([*fitted, *rechecked], meter.compare([*fitted, *rechecked]), strict=True))
    model = fit(comparisons, fitted, groups, padded)
    # With one form the first checks are now part of the fit; with several they were mixtures and check it still.
    checks = [check(model, comparisons[layout]) for layout in [*checked, *rechecked] if layout not in fitted]
    return CalibratedCost(meter, model, checks or cost.checks, tolerance, cache_bytes, comparisons)


def fit(
    comparisons: Mapping[Layout, Comparison],
    layouts: Iterable[Layout],
    groups: GroupCount | None,
    padded: PaddedCount | None,
) -> CostModel:
    """The cost model of these of the layouts compared; the backbone's seconds are its medians over all of them."""
    bases = [comparison.base for comparison in comparisons.values()]
    base = replace(
        bases[0],
        prefill_seconds=statistics.median(base.prefill_seconds for base in bases),
        decode_seconds=statistics.median(base.decode_seconds for base in bases),
        end_to_end_seconds=statistics.median(base.end_to_end_seconds for base in bases),
    )
    points = [CurvePoint(c.layout, c.prefill_ratio, c.decode_ratio) for c in map(comparisons.__getitem__, layouts)]
    return CostModel.fit(base, points, groups, padded)


def check(model: CostModel, comparison: Comparison) -> Check:
    """The model beside a comparison."""
    prefill, decode = model.predict(comparison.layout)
    return Check(
        comparison.layout,
        model.speedup(comparison.layout),
        comparison.speedup,
        abs(prefill / comparison.prefill_ratio - 1),
        abs(decode / comparison.decode_ratio - 1),
    )


def _part(count: int, fraction: float) -> int:
    return max(1, round(fraction * count))


def _layouts(num_layers: int, counts: Sequence[Mapping[str, int]]) -> list[Layout]:
    return list(dict.fromkeys(layout_of_counts(num_layers, c) for c in counts))


def _checks(
    num_layers: int, replaceable: Mapping[str, int], fractions: Sequence[float], besides: Sequence[Layout]
) -> list[Layout]:
    """Mixtures of all forms in equal parts at these fractions, without those that are in the fit."""
    mixtures = [
        {form: max(1, _part(count, at) // len(replaceable)) for form, count in replaceable.items()} for at in fractions
    ]
    fitting = [counts for counts in mixtures if sum(counts.values()) < num_layers]
    return [layout for layout in _layouts(num_layers, fitting) if layout not in besides]
