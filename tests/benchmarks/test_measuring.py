"""Rounds, memory and step timers: what is counted, and for whom."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.contenders.base import Contender, Ready, directions
from benchmarks.machine import Limits
from benchmarks.memory import peak_bytes
from benchmarks.problem import SHAPES, Inputs, Problem
from benchmarks.rounds import Effort, Timer, Timing, measure
from benchmarks.run import TIMED, UNAVAILABLE, WRONG, solve
from benchmarks.stage_timing import StepTimes

LIMITS = Limits(100.0, 10.0, 8.0)
ONCE = Effort(rounds=1, sample_seconds=0.0)


class Clock(Timer):
    """A timer of a machine on which every call takes a known time; it records who was timed, in which order."""

    def __init__(self, seconds: dict[object, float]) -> None:
        super().__init__("cpu")
        self.known, self.order = seconds, []

    def seconds(self, call, calls: int) -> float:
        self.order.append((call, calls))
        return self.known[call]


def test_every_contender_is_timed_once_a_round() -> None:
    calls = {"a": lambda: 1, "b": lambda: 2, "c": lambda: 3}
    clock = Clock({call: 0.01 for call in calls.values()})
    timings = measure(calls, clock, Effort(rounds=5, sample_seconds=0.04))
    rounds = clock.order[3:]  # the first are the sizes of samples
    assert all({call for call, _ in rounds[i : i + 3]} == set(calls.values()) for i in range(0, 15, 3))
    assert {count for _, count in rounds} == {4}
    assert all(sorted(timing.samples) == [0, 1, 2, 3, 4] for timing in timings.values())
    assert len({tuple(call for call, _ in rounds[i : i + 3]) for i in range(0, 15, 3)}) > 1, "one order all along"


def test_a_slow_contender_gets_fewer_rounds_but_one() -> None:
    calls = {"fast": lambda: 1, "slow": lambda: 2, "slowest": lambda: 3}
    clock = Clock(dict(zip(calls.values(), (0.1, 2.0, 100.0), strict=True)))
    timings = measure(calls, clock, Effort(rounds=8, sample_seconds=0.0, budget_seconds=8.0))
    assert {name: len(timing.samples) for name, timing in timings.items()} == {"fast": 8, "slow": 4, "slowest": 1}


def test_ratios_are_of_the_same_round() -> None:
    # The machine is ten times slower in round 1: the ratio of medians would be 0.2, or 5.
    mine, baseline = Timing({0: 2.0, 1: 20.0, 2: 2.0}, 1), Timing({0: 1.0, 1: 10.0}, 1)
    assert mine.ratio_to(baseline) == 2.0
    assert (mine.median, mine.low, mine.high) == (2.0, 2.0, 20.0)


def test_a_contender_that_computes_something_else_is_not_timed() -> None:
    problem = Problem(SHAPES["tiny"], 20)

    def scaled(factor: float):
        def prepare(inputs: Inputs) -> Ready:
            from dtr_kernels.operator import linear_attention

            def call():
                return linear_attention(
                    inputs.q.float() * factor,
                    inputs.k.float(),
                    inputs.v.float(),
                    rule="gated_delta",
                    log_decay=inputs.log_decay.float(),
                    beta=inputs.beta.float(),
                    state=inputs.state.float(),
                )

            return Ready(call, lambda result: {"out": result[0], "state": result[1]}, "float32")

        return prepare

    def broken(inputs: Inputs) -> Ready:
        raise RuntimeError("head size 32 is not supported\nand more")

    candidates = [
        Contender("right", "rule", scaled(1.0), directions("forward")),
        Contender("wrong", "rule", scaled(1.1), directions("forward")),
        Contender("broken", "rule", broken, directions("forward")),
    ]
    rows = {row.contender: row for row in solve(problem, ONCE, LIMITS, "right", candidates=candidates)}
    assert [rows[name].status for name in ("right", "wrong", "broken")] == [TIMED, WRONG, UNAVAILABLE]
    assert rows["right"].ratio == 1.0 and rows["right"].error < 1e-5
    assert rows["right"].share_of_limit == pytest.approx(rows["right"].gflops / LIMITS.gflops)
    assert rows["wrong"].seconds is None and 0.05 < rows["wrong"].error < 0.2
    assert rows["broken"].reason == "RuntimeError: head size 32 is not supported"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the kernel's high-water mark")
@pytest.mark.slow
def test_peak_memory_is_that_of_the_call() -> None:
    """Softmax attention of the window keeps a known number of logits; twice the tokens take twice the memory."""
    short, long = (peak_bytes(Problem(SHAPES["tiny"], length, "backward"), "ours chunked") for length in (2048, 4096))
    # The largest tensors are chunks of 64 x 64 for each of 6 query and 2 kv heads, float32: at least one is alive.
    assert long > 4096 // 64 * 64 * 64 * 8 * 4
    assert 1.8 < long / short < 2.2


def test_a_failing_memory_process_gives_its_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho first >&2\necho the reason >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(RuntimeError, match=r"^the reason$"):
        peak_bytes(Problem(SHAPES["tiny"], 16, "backward"), "ours chunked")


def test_step_parts_do_not_count_twice_and_set_up_is_no_step() -> None:
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    times = StepTimes(lambda: now[0])
    with times.part("teacher"):
        spend(50)  # calibration
    spend(7)
    times.step_done()
    with times.part("teacher"):
        spend(1)
        with times.part("forward"):
            spend(2)
    with times.part("backward"):
        spend(4)
    spend(8)
    times.step_done()
    (step,) = times.steps
    assert step == {"teacher": 3, "forward": 0, "backward": 4, "optimizer": 0, "other": 8, "total": 15}
    assert times.seen == {"teacher", "backward"}


def test_cold_calls_write_the_flush_buffer_outside_the_timing() -> None:
    timer = Timer("cpu", flush_bytes=4096)
    seen: list[float] = []
    timer.seconds(lambda: seen.append(timer._flush[0].item()), 3)
    assert seen == [1.0, 2.0, 3.0]
    assert torch.equal(timer._flush, torch.full((1024,), 3.0))
