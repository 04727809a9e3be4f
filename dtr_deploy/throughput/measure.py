"""Measures layouts against the backbone on a serving engine, and remembers.

An engine is opened by a factory, `layout -> context manager of an Engine`, so that this module knows no engine.
Backbone and hybrids are timed in alternation within one run and compared round by round: the speed of a shared
machine drifts by more than one replaced layer is worth, and a ratio taken within a round does not see it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

from dtr_deploy.engines.base import Engine, Throughput, Workload
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.layout import counts as form_counts
from dtr_deploy.search.ledger import Ledger, Trial, TrialKey, TrialResult
from dtr_deploy.throughput.cost_model import layout_of_counts

EngineFactory = Callable[[Layout], AbstractContextManager[Engine]]
"""Opens the engine that would serve a layout; start weights do, since throughput does not depend on them."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, message)."""

AGREEMENT, PATIENCE = 0.03, 3
"""A round counts if its speedup is within this share of the median of all rounds; rounds are made until as many count
as were asked for, but no more than so many times as many. One round that something else disturbed then costs a few
more, where it would bend a median of two or three."""


@dataclass(frozen=True)
class Comparison:
    """One layout beside the backbone. Medians of each, and medians of the ratios taken within a round.

    prefill_ratio, decode_ratio: hybrid's seconds over the backbone's. speedup: hybrid's end-to-end tokens per second
    over the backbone's. errors: of "prefill", "decode" and "speedup", the standard error of the median, relative; {} of
    a single round.
    """

    layout: Layout
    base: Throughput
    hybrid: Throughput
    prefill_ratio: float
    decode_ratio: float
    speedup: float
    errors: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {
            "layout": list(self.layout),
            "base": self.base.to_dict(),
            "hybrid": self.hybrid.to_dict(),
            "prefill_ratio": self.prefill_ratio,
            "decode_ratio": self.decode_ratio,
            "speedup": self.speedup,
            "errors": dict(self.errors),
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
            data.get("errors", {}),
        )


def compare_with_base(
    factory: EngineFactory,
    layouts: Sequence[Layout],
    workload: Workload,
    repeats: int,
    max_open: int = 2,
    progress: Progress | None = None,
) -> Iterator[Comparison]:
    """Time every layout and the backbone in alternation, until `repeats` rounds agree (`AGREEMENT`); yields each layout
    when it is finished.

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
                yield _compare(layout, base_runs, [hybrid.throughput(workload, repeats)])
        return
    with factory(base_layout) as base:
        for start in range(0, total, max_open - 1):
            group = layouts[start : start + max_open - 1]
            with ExitStack() as stack:
                _report(progress, start, total, group[0])
                engines = [base, *(stack.enter_context(factory(layout)) for layout in group)]
                runs: list[list[Throughput]] = [[] for _ in engines]
                for round_number in range(PATIENCE * repeats):
                    order = range(len(engines)) if round_number % 2 == 0 else reversed(range(len(engines)))
                    for index in order:
                        runs[index].append(engines[index].throughput(workload, 1))
                    more = round_number + 1 - repeats  # by two, one each way
                    if more >= 0 and more % 2 == 0 and all(_agreeing(runs[0], own) >= repeats for own in runs[1:]):
                        break
            for layout, hybrid_runs in zip(group, runs[1:], strict=True):
                yield _compare(layout, runs[0], hybrid_runs)


def stand_in_of(layout: Layout) -> Layout:
    """The layout that is measured for all with the same counts."""
    return layout_of_counts(len(layout), form_counts(layout))


class ThroughputMeter:
    """`compare_with_base`, remembered in the ledger: layouts with the same counts are measured once, by one stand-in.

    inputs: hash of what the numbers depend on besides layout and workload (backbone, engine, precision, versions).
    stand_in: of a layout, the one to measure; the identity measures each as it is. compare: who measures.
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
        stand_in: Callable[[Layout], Layout] = stand_in_of,
        compare: Callable[..., Iterator[Comparison]] = compare_with_base,
    ) -> None:
        self.factory, self.workload, self.ledger, self.inputs = factory, workload, ledger, inputs
        self.repeats, self.max_open, self.progress, self.stand_in = repeats, max_open, progress, stand_in
        self._compare_with_base = compare

    def compare(self, layouts: Sequence[Layout]) -> list[Comparison]:
        """One comparison per layout, in order; only those not in the ledger are measured, together."""
        stand_ins = [self.stand_in(layout) for layout in layouts]
        missing = [s for s in dict.fromkeys(stand_ins) if self._stored(s) is None]
        how = self.workload, self.repeats, self.max_open, self.progress
        for comparison in self._compare_with_base(self.factory, missing, *how):
            a_round = comparison.base.end_to_end_seconds + comparison.hybrid.end_to_end_seconds
            seconds = comparison.base.repeats * a_round
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


def _agreeing(base_runs: Sequence[Throughput], hybrid_runs: Sequence[Throughput]) -> int:
    """How many rounds lie within `AGREEMENT` of the median round."""
    pairs = zip(base_runs, hybrid_runs, strict=True)
    ratios = [base.end_to_end_seconds / hybrid.end_to_end_seconds for base, hybrid in pairs]
    median = statistics.median(ratios)
    return sum(abs(ratio / median - 1) <= AGREEMENT for ratio in ratios)


def _compare(layout: Layout, base_runs: Sequence[Throughput], hybrid_runs: Sequence[Throughput]) -> Comparison:
    pairs = list(zip(base_runs, hybrid_runs, strict=True))
    has_decode = all(base.decode_seconds > 0 for base, _ in pairs)  # a workload of one output token has none
    ratios = {
        "prefill": [hybrid.prefill_seconds / base.prefill_seconds for base, hybrid in pairs],
        "decode": [hybrid.decode_seconds / base.decode_seconds if has_decode else 1.0 for base, hybrid in pairs],
        "speedup": [base.end_to_end_seconds / hybrid.end_to_end_seconds for base, hybrid in pairs],
    }
    return Comparison(
        layout,
        _medians(base_runs),
        _medians(hybrid_runs),
        statistics.median(ratios["prefill"]),
        statistics.median(ratios["decode"]),
        statistics.median(ratios["speedup"]),
        {part: _median_error(values) for part, values in ratios.items()} if len(pairs) > 1 else {},
    )


def _median_error(values: Sequence[float]) -> float:
    """Relative standard error of the median of `values`, for noise that is normal but for outliers: from the median
    absolute deviation, so that one disturbed round does not count for all."""
    median = statistics.median(values)
    deviation = statistics.median(abs(value - median) for value in values) / NormalDist().inv_cdf(0.75)
    return math.sqrt(math.pi / 2) * deviation / math.sqrt(len(values)) / median


def _medians(runs: Sequence[Throughput]) -> Throughput:
    return Throughput(
        runs[0].engine,
        runs[0].precision,
        runs[0].workload,
        sum(run.repeats for run in runs),
        statistics.median(run.prefill_seconds for run in runs),
        statistics.median(run.decode_seconds for run in runs),
        statistics.median(run.end_to_end_seconds for run in runs),
    )


def _report(progress: Progress | None, done: int, total: int, layout: Layout) -> None:
    if progress is not None:
        counts = ", ".join(f"{count} {form}" for form, count in form_counts(layout).items()) or "backbone"
        progress(done, total, f"measuring throughput with {counts}")
