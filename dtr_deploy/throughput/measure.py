"""Measures layouts against the backbone on a serving engine, calibrates the cost model, checks it, and remembers.

An engine is opened by a factory, `layout -> context manager of an Engine`, so that this module knows no engine.
Backbone and hybrids are timed in alternation within one run and compared round by round: the speed of a shared
machine drifts by more than one replaced layer is worth, and a ratio taken within a round does not see it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from dtr_deploy.engines.base import Engine, Throughput, Workload
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.layout import counts as form_counts
from dtr_deploy.search.ledger import Ledger, Trial, TrialKey, TrialResult
from dtr_deploy.throughput.cost_model import CostModel, CurvePoint, GroupCount, layout_of_counts

EngineFactory = Callable[[Layout], AbstractContextManager[Engine]]
"""Opens the engine that would serve a layout; start weights do, since throughput does not depend on them."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, message)."""

TOLERANCE = 0.05
"""Largest relative error of predicted throughput up to which predictions stand in for measurements."""


@dataclass(frozen=True)
class Comparison:
    """One layout beside the backbone. Medians of each, and medians of the ratios taken within a round.

    prefill_ratio, decode_ratio: hybrid's seconds over the backbone's. speedup: hybrid's end-to-end tokens per second
    over the backbone's.
    """

    layout: Layout
    base: Throughput
    hybrid: Throughput
    prefill_ratio: float
    decode_ratio: float
    speedup: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": list(self.layout),
            "base": self.base.to_dict(),
            "hybrid": self.hybrid.to_dict(),
            "prefill_ratio": self.prefill_ratio,
            "decode_ratio": self.decode_ratio,
            "speedup": self.speedup,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        return cls(
            tuple(data["layout"]),
            Throughput.from_dict(data["base"]),
            Throughput.from_dict(data["hybrid"]),
            data["prefill_ratio"],
            data["decode_ratio"],
            data["speedup"],
        )


def compare_with_base(
    factory: EngineFactory,
    layouts: Sequence[Layout],
    workload: Workload,
    repeats: int,
    max_open: int = 2,
    progress: Progress | None = None,
) -> Iterator[Comparison]:
    """Time every layout and the backbone `repeats` times each, alternating; yields each layout when it is finished.

    At most `max_open` engines are open at once. With 2 or more the backbone stays open and `max_open - 1` layouts share
    its rounds; every second round runs backwards, which cancels a steady drift. With 1 (an engine that cannot be
    opened twice) the backbone is opened anew before each layout, and the medians of the two are compared.
    """
    if repeats < 1 or max_open < 1:
        raise ValueError(f"repeats and max_open must be at least 1 (got {repeats} and {max_open})")
    if not layouts:
        return
    base_layout: Layout = (None,) * len(layouts[0])
    total = len(layouts)
    if max_open == 1:
        for done, layout in enumerate(layouts):
            _report(progress, done, total, layout)
            with factory(base_layout) as base:
                base_runs = [base.throughput(workload, repeats)]
            with factory(layout) as hybrid:
                yield _compare(layout, base_runs, [hybrid.throughput(workload, repeats)], repeats)
        return
    with factory(base_layout) as base:
        for start in range(0, total, max_open - 1):
            group = layouts[start : start + max_open - 1]
            with ExitStack() as stack:
                _report(progress, start, total, group[0])
                engines = [base, *(stack.enter_context(factory(layout)) for layout in group)]
                runs: list[list[Throughput]] = [[] for _ in engines]
                for round_number in range(repeats):
                    order = range(len(engines)) if round_number % 2 == 0 else reversed(range(len(engines)))
                    for index in order:
                        runs[index].append(engines[index].throughput(workload, 1))
            for layout, hybrid_runs in zip(group, runs[1:], strict=True):
                yield _compare(layout, runs[0], hybrid_runs, repeats)


class ThroughputMeter:
    """`compare_with_base`, remembered in the ledger: layouts with the same counts are measured once, by one stand-in.

    inputs: hash of what the numbers depend on besides layout and workload (backbone, engine, precision, versions).
    """

    kind = "throughput"

    def __init__(
        self,
        factory: EngineFactory,
        workload: Workload,
        ledger: Ledger,
        inputs: str,
        repeats: int = 3,
        max_open: int = 2,
        progress: Progress | None = None,
    ) -> None:
        self.factory, self.workload, self.ledger, self.inputs = factory, workload, ledger, inputs
        self.repeats, self.max_open, self.progress = repeats, max_open, progress

    def compare(self, layouts: Sequence[Layout]) -> list[Comparison]:
        """One comparison per layout, in order; only those not in the ledger are measured, together."""
        stand_ins = [layout_of_counts(len(layout), form_counts(layout)) for layout in layouts]
        missing = [s for s in dict.fromkeys(stand_ins) if self._stored(s) is None]
        measured = compare_with_base(self.factory, missing, self.workload, self.repeats, self.max_open, self.progress)
        for comparison in measured:
            seconds = self.repeats * (comparison.base.end_to_end_seconds + comparison.hybrid.end_to_end_seconds)
            self.ledger.record(self._key(comparison.layout), TrialResult(comparison.to_dict()), seconds)
        comparisons = []
        for stand_in in stand_ins:
            trial = self._stored(stand_in)
            assert trial is not None
            comparisons.append(Comparison.from_dict(trial.scalars))
        return comparisons

    def _stored(self, layout: Layout) -> Trial | None:
        return self.ledger.find(self._key(layout))

    def _key(self, layout: Layout) -> TrialKey:
        return TrialKey(self.kind, layout, str(self.workload), self.inputs)


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
    """What the search asks about throughput: predictions while the checked model is trusted, measurements if not."""

    def __init__(self, meter: ThroughputMeter, model: CostModel, checks: Sequence[Check], tolerance: float) -> None:
        self.meter, self.model, self.checks, self.tolerance = meter, model, list(checks), tolerance

    @property
    def largest_relative_error(self) -> float:
        """Over the checks, of end-to-end tokens per second."""
        return max((check.error for check in self.checks), default=0.0)

    @property
    def trusted(self) -> bool:
        return self.largest_relative_error <= self.tolerance

    def predicted_speedup(self, layout: Layout) -> float:
        """By the model, trusted or not: for looking ahead over many layouts."""
        return self.model.speedup(layout)

    def speedup(self, layout: Layout) -> float:
        """What decisions rest on: end-to-end tokens per second over the backbone's."""
        if self.trusted or not form_counts(layout):
            return self.model.speedup(layout)
        return self.measure(layout).speedup

    def measure(self, layout: Layout) -> Comparison:
        """Measured (or remembered) comparison of the layout's counts with the backbone."""
        return self.meter.compare([layout])[0]

    def to_dict(self) -> dict[str, Any]:
        """For report.json: the curves, the checks, and whether the search could rely on them."""
        return {
            "workload": self.meter.workload.to_dict(),
            "curves": {
                form: [
                    {"replaced": int(count), "prefill_ratio": float(prefill), "decode_ratio": float(decode)}
                    for count, prefill, decode in zip(*curve, strict=True)
                ]
                for form, curve in self.model.curves.items()
            },
            "group_cost": {"prefill": self.model.group_cost[0], "decode": self.model.group_cost[1]},
            "checks": [check.to_dict() for check in self.checks],
            "largest_relative_error": self.largest_relative_error,
            "trusted": self.trusted,
        }


def calibrate(
    meter: ThroughputMeter,
    num_layers: int,
    replaceable: Mapping[str, int],
    fit_at: Sequence[float] | None = None,
    check_at: Sequence[float] = (0.5,),
    groups: GroupCount | None = None,
    tolerance: float = TOLERANCE,
) -> CalibratedCost:
    """Measure a curve over counts, fit the cost model, check it elsewhere.

    replaceable: form -> how many layers can have it. fit_at, check_at: fractions of these. Default `fit_at`: all layers
    replaced, and with `groups` (costs that are not a sum over layers) a quarter and three quarters besides. Checks with
    several forms mix them in equal parts. A model that fails its check is fitted to the checked layouts too and
    checked once more, at other counts; if it fails again, the result measures instead of predicting.
    """
    if not replaceable or min(replaceable.values()) < 1:
        raise ValueError("calibrate: every form needs at least one layer that can have it")
    if fit_at is None:
        fit_at = (1.0,) if groups is None else (0.25, 0.75, 1.0)
    # Engines keep count of tokens by a layer with full attention, so one always stays.
    replaceable = {form: min(count, num_layers - 1) for form, count in replaceable.items()}
    fitted = _layouts(num_layers, [{form: _part(n, at)} for form, n in replaceable.items() for at in fit_at])
    checked = _checks(num_layers, replaceable, check_at, besides=fitted)
    comparisons = dict(zip([*fitted, *checked], meter.compare([*fitted, *checked]), strict=True))
    model = CostModel.fit(comparisons[fitted[0]].base, [_point(comparisons[layout]) for layout in fitted], groups)
    cost = CalibratedCost(meter, model, [_check(model, comparisons[layout]) for layout in checked], tolerance)
    if cost.trusted:
        return cost
    middle = [{form: _part(n, at)} for form, n in replaceable.items() for at in check_at]
    fitted = list(dict.fromkeys([*fitted, *_layouts(num_layers, middle)]))
    rechecked = _checks(num_layers, replaceable, (0.25, 0.75), besides=fitted)
    comparisons |= dict(zip([*fitted, *rechecked], meter.compare([*fitted, *rechecked]), strict=True))
    model = CostModel.fit(comparisons[fitted[0]].base, [_point(comparisons[layout]) for layout in fitted], groups)
    # With one form the first checks are now part of the fit; with several they were mixtures and check it still.
    checks = [_check(model, comparisons[layout]) for layout in [*checked, *rechecked] if layout not in fitted]
    return CalibratedCost(meter, model, checks or cost.checks, tolerance)


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


def _point(comparison: Comparison) -> CurvePoint:
    return CurvePoint(comparison.layout, comparison.prefill_ratio, comparison.decode_ratio)


def _check(model: CostModel, comparison: Comparison) -> Check:
    prefill, decode = model.predict(comparison.layout)
    return Check(
        comparison.layout,
        model.speedup(comparison.layout),
        comparison.speedup,
        abs(prefill / comparison.prefill_ratio - 1),
        abs(decode / comparison.decode_ratio - 1),
    )


def _compare(
    layout: Layout, base_runs: Sequence[Throughput], hybrid_runs: Sequence[Throughput], repeats: int
) -> Comparison:
    pairs = list(zip(base_runs, hybrid_runs, strict=True))
    has_decode = all(base.decode_seconds > 0 for base, _ in pairs)  # a workload of one output token has none
    return Comparison(
        layout,
        _medians(base_runs, repeats),
        _medians(hybrid_runs, repeats),
        statistics.median(hybrid.prefill_seconds / base.prefill_seconds for base, hybrid in pairs),
        statistics.median(hybrid.decode_seconds / base.decode_seconds for base, hybrid in pairs) if has_decode else 1.0,
        statistics.median(base.end_to_end_seconds / hybrid.end_to_end_seconds for base, hybrid in pairs),
    )


def _medians(runs: Sequence[Throughput], repeats: int) -> Throughput:
    return Throughput(
        runs[0].engine,
        runs[0].precision,
        runs[0].workload,
        repeats,
        statistics.median(run.prefill_seconds for run in runs),
        statistics.median(run.decode_seconds for run in runs),
        statistics.median(run.end_to_end_seconds for run in runs),
    )


def _report(progress: Progress | None, done: int, total: int, layout: Layout) -> None:
    if progress is not None:
        counts = ", ".join(f"{count} {form}" for form, count in form_counts(layout).items()) or "backbone"
        progress(done, total, f"measuring throughput with {counts}")
