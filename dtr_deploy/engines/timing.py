"""Times a workload on an engine that runs a batch at once and says when the first tokens were there."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from dtr_deploy.engines.base import Throughput, Workload

WARM_UP_OUTPUT = 4
"""Tokens decoded in the run that warms up."""

RunBatch = Callable[[list[list[int]], int], tuple[list[list[int]], float, float]]
"""(prompts of one length, new tokens) -> (new tokens of each, seconds until the first, seconds for the others)."""


class WorkloadTimer:
    """Remembers which sizes of batch an engine has run: each is run once before it counts, for caches and allocator.

    tokens: ids that prompts are drawn from, always in the same order.
    """

    def __init__(self, engine: str, precision: str, tokens: Sequence[int] | np.ndarray, run: RunBatch) -> None:
        self.engine, self.precision, self._tokens, self._run = engine, precision, np.asarray(tokens), run
        self._random = np.random.default_rng(0)
        self._warm: set[tuple[int, int]] = set()

    def measure(self, workload: Workload, repeats: int) -> Throughput:
        """Medians over `repeats` runs, each of fresh random prompts."""
        size = (workload.concurrency, workload.prompt)
        if size not in self._warm:
            self._run(self._prompts(size), min(workload.output, WARM_UP_OUTPUT))
            self._warm.add(size)
        rows = []
        for _ in range(repeats):
            prompts = self._prompts(size)
            began = time.perf_counter()
            _, prefill, decode = self._run(prompts, workload.output)
            rows.append((prefill, decode, time.perf_counter() - began))
        medians = (statistics.median(column) for column in zip(*rows, strict=True))
        return Throughput(self.engine, self.precision, workload, repeats, *medians)

    def _prompts(self, size: tuple[int, int]) -> list[list[int]]:
        return self._random.choice(self._tokens, size).tolist()
