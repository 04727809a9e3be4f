"""One problem from operands to rows: prepare every contender, hold it to the oracle, time those that pass."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contenders import contenders
from benchmarks.contenders.base import Contender, Ready, Unavailable
from benchmarks.machine import Limits
from benchmarks.memory import peak_bytes
from benchmarks.oracle import TOLERANCES, Oracle, relative_error
from benchmarks.problem import DTYPES, Inputs, Problem, decode_bytes, flops
from benchmarks.rounds import Effort, Timer, Timing, measure

TIMED, WRONG, UNAVAILABLE = "timed", "wrong", "unavailable"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One contender on one problem; README.md describes the fields. None: not measured, and `reason` says why."""

    shape: str
    direction: str
    rule: str
    length: int
    sequences: int
    contender: str
    computes: str
    status: str
    reason: str = ""
    dtype: str = ""
    error: float | None = None
    oracle: str = ""
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    rounds: int = 0
    calls_a_round: int = 0
    ratio: float | None = None
    baseline: str = ""
    gflops: float | None = None
    gb_per_second: float | None = None
    share_of_limit: float | None = None
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def solve(
    problem: Problem,
    effort: Effort,
    limits: Limits,
    baseline: str,
    only: Sequence[str] = (),
    memory: bool = True,
    progress: Progress = lambda text: None,
    candidates: Sequence[Contender] | None = None,
) -> list[Row]:
    """Rows of one problem, in the contenders' order.

    baseline: name of the contender that ratios are to; where it was not timed there are none.
    only: parts of names; contenders that have none of them, and are not the baseline, are left out.
    memory: measure the peak of the backward direction, in processes of their own.
    """
    chosen = [
        c
        for c in (contenders(problem) if candidates is None else candidates)
        if not only or c.name == baseline or any(part in c.name for part in only)
    ]
    inputs = Inputs(problem)
    oracle = Oracle(inputs)
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for contender in chosen:
        progress(f"{contender.name}: check")
        rows[contender.name], ready = _checked(contender, inputs, oracle)
        if ready is not None and rows[contender.name].status == TIMED:
            calls[contender.name] = ready.call
    timings = measure(calls, Timer(problem.device, effort.flush_bytes), effort, progress)
    del oracle, calls, ready
    gc.collect()
    for name, timing in timings.items():
        peak, reason = None, ""
        if memory and problem.direction == "backward":
            progress(f"{name}: memory")
            try:
                peak = peak_bytes(problem, name)
            except Exception as error:
                reason = f"memory not measured: {first_line(error)}"
        rows[name] = _timed(rows[name], problem, timing, timings.get(baseline), baseline, limits, peak, reason)
    return list(rows.values())


def _checked(contender: Contender, inputs: Inputs, oracle: Oracle) -> tuple[Row, Ready | None]:
    """The contender's row so far, and what to time if its answer is right."""
    problem = inputs.problem
    fields: dict[str, Any] = {
        "shape": problem.shape.name,
        "direction": problem.direction,
        "rule": problem.rule,
        "length": problem.length,
        "sequences": problem.sequences,
        "contender": contender.name,
        "computes": contender.computes,
    }
    try:
        ready = contender.prepare(inputs)
        found = ready.convert(ready.call())
    except Unavailable as error:
        return Row(**fields, status=UNAVAILABLE, reason=str(error)), None
    except Exception as error:
        # Another library's failure is that row's result; the other rows are still wanted.
        return Row(**fields, status=UNAVAILABLE, reason=f"{type(error).__name__}: {first_line(error)}"), None
    fields["dtype"] = ready.dtype
    truth, fields["oracle"] = oracle.truth(contender.computes)
    try:
        fields["error"] = relative_error(found, truth)
    except ValueError as error:
        return Row(**fields, status=WRONG, reason=f"not timed: {error}"), None
    tolerance = TOLERANCES[ready.dtype]
    if not fields["error"] <= tolerance:
        reason = f"not timed: its error is above {tolerance:g}, it computes something else"
        return Row(**fields, status=WRONG, reason=reason), None
    return Row(**fields, status=TIMED), ready


def _timed(
    row: Row,
    problem: Problem,
    timing: Timing,
    baseline: Timing | None,
    baseline_name: str,
    limits: Limits,
    peak: int | None,
    reason: str,
) -> Row:
    work: dict[str, float | None] = {"gflops": None, "gb_per_second": None}
    if problem.direction == "decode":
        size = DTYPES[row.dtype].itemsize
        speed = decode_bytes(problem, row.computes, size) / timing.median * 1e-9
        work["gb_per_second"], limit = speed, limits.gb_per_second
    else:
        speed = flops(problem, row.computes) / timing.median * 1e-9
        work["gflops"], limit = speed, limits.gflops
    return Row(
        **{
            **row.to_dict(),
            "reason": reason,
            "seconds": timing.median,
            "seconds_low": timing.low,
            "seconds_high": timing.high,
            "rounds": len(timing.samples),
            "calls_a_round": timing.calls,
            "ratio": timing.ratio_to(baseline) if baseline else None,
            "baseline": baseline_name if baseline else "",
            **work,
            "share_of_limit": speed / limit,
            "peak_bytes": peak,
        }
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def drift(before: Limits, after: Limits) -> float:
    """The largest relative change between two measurements of the same limits: how quiet the machine was."""
    pairs = zip(before.to_dict().values(), after.to_dict().values(), strict=True)
    return max(abs(a - b) / statistics.mean((a, b)) for a, b in pairs)
