"""A fake engine on a clock of its own: exact times by layout, drift over the run, and a log of what was called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.hybrid.layout import Layout


class FakeServer:
    """`seconds(layout) -> (prefill, decode)` of one run; `drift` is how much slower the machine gets with every run;
    `disturbed`: numbers of the runs that take twice as long."""

    def __init__(
        self,
        seconds: Callable[[Layout], tuple[float, float]],
        drift: float = 0.0,
        disturbed: Collection[int] = (),
    ) -> None:
        self.seconds, self.drift, self.disturbed = seconds, drift, disturbed
        self.runs: list[Layout] = []
        self.opened: list[Layout] = []
        self.open_now = self.most_open = 0

    @contextmanager
    def __call__(self, layout: Layout) -> Iterator[FakeEngine]:
        self.opened.append(layout)
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        try:
            yield FakeEngine(self, layout)
        finally:
            self.open_now -= 1


class FakeEngine:
    name, precision = "fake", "fp32"

    def __init__(self, server: FakeServer, layout: Layout) -> None:
        self.server, self.layout = server, layout

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        slow = 1.0 + self.server.drift * len(self.server.runs)
        slow *= 2.0 if len(self.server.runs) in self.server.disturbed else 1.0
        self.server.runs.append(self.layout)
        prefill, decode = (slow * part for part in self.server.seconds(self.layout))
        return Throughput(self.name, self.precision, workload, repeats, prefill, decode, prefill + decode)

    def score(self, prompts):
        raise AssertionError("throughput needs no scores")

    def generate(self, prompts, max_new_tokens):
        raise AssertionError("throughput needs no text")

    def close(self) -> None:
        return None
