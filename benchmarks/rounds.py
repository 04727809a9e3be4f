"""Timing in interleaved rounds: every contender once a round, so that what else the machine does meets all alike."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SETTLE_SECONDS = 0.005
"""Pause before a contender's turn: threads of the one before it spin for a while after their last call."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    rounds: samples of each contender. sample_seconds: a sample repeats short calls until it is about this long.
    budget_seconds: a contender whose rounds would take longer gets fewer of them, one at least.
    flush_bytes: memory written before every call, outside the timing, so that operands come from memory and not from a
        cache; 0 leaves them where the call before left them.
    """

    rounds: int = 7
    sample_seconds: float = 0.02
    budget_seconds: float = 20.0
    flush_bytes: int = 0


@dataclass(frozen=True)
class Timing:
    """samples: round -> seconds of one call, the mean within the round's sample. calls: in a sample."""

    samples: dict[int, float]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples.values())

    @property
    def low(self) -> float:
        return min(self.samples.values())

    @property
    def high(self) -> float:
        return max(self.samples.values())

    def ratio_to(self, baseline: Timing) -> float:
        """Median over the rounds that both took part in of own time / the baseline's time in the same round."""
        common = sorted(self.samples.keys() & baseline.samples.keys())
        if not common:
            return self.median / baseline.median
        return statistics.median(self.samples[r] / baseline.samples[r] for r in common)


class Timer:
    """Times calls on a device; a GPU's work is waited for at both ends of a sample."""

    def __init__(self, device: str, flush_bytes: int = 0) -> None:
        self._cuda = device == "cuda"
        self._flush = torch.zeros(flush_bytes // 4, device=device) if flush_bytes else None

    def seconds(self, call: Call, calls: int) -> float:
        """Mean seconds of `calls` calls one after another."""
        if self._flush is None:
            self._wait()
            began = time.perf_counter()
            for _ in range(calls):
                call()
            self._wait()
            return (time.perf_counter() - began) / calls
        total = 0.0
        for _ in range(calls):
            self._flush.add_(1)
            self._wait()
            began = time.perf_counter()
            call()
            self._wait()
            total += time.perf_counter() - began
        return total / calls

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def measure(
    calls: Mapping[str, Call], timer: Timer, effort: Effort, progress: Callable[[str], None] = lambda name: None
) -> dict[str, Timing]:
    """Time every contender in rounds; the order within a round is drawn anew, so that nobody always follows the same
    other. Contenders have been called before (they were checked), so that nothing is loaded or compiled here."""
    sizes = {}
    for name, call in calls.items():
        progress(name)
        call()
        one = max(timer.seconds(call, 1), 1e-9)
        repeated = max(1, math.ceil(effort.sample_seconds / one))
        affordable = max(1, int(effort.budget_seconds / (one * repeated)))
        sizes[name] = (repeated, min(effort.rounds, affordable))
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for turn in range(effort.rounds):
        shuffle.shuffle(order)
        for name in order:
            repeated, rounds = sizes[name]
            # A contender with fewer rounds takes part in some that are spread over the run, the first among them.
            if turn and turn * rounds // effort.rounds == (turn - 1) * rounds // effort.rounds:
                continue
            progress(name)
            time.sleep(SETTLE_SECONDS)
            calls[name]()
            samples[name][turn] = timer.seconds(calls[name], repeated)
    return {name: Timing(found, sizes[name][0]) for name, found in samples.items()}
