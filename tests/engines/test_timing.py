"""The timer: what counts, what only warms up, and that every run is served fresh prompts of the workload's size."""

import pytest

from dtr_deploy.engines.base import Workload
from dtr_deploy.engines.timing import WorkloadTimer


class FakeEngine:
    """Its n-th run takes n seconds to the first token and 10 n for the others."""

    def __init__(self):
        self.calls = []

    def run(self, prompts, new_tokens):
        self.calls.append((prompts, new_tokens))
        n = len(self.calls)
        return [[0] * new_tokens for _ in prompts], float(n), 10.0 * n


def test_first_run_of_a_size_only_warms_up():
    engine = FakeEngine()
    timer = WorkloadTimer("fake", "fp32", range(5, 100), engine.run)
    first = timer.measure(Workload(8, 32, 2), 3)
    assert [new for _, new in engine.calls] == [4, 32, 32, 32]
    assert (first.prefill_seconds, first.decode_seconds) == (3.0, 30.0)  # medians of runs 2, 3 and 4
    again = timer.measure(Workload(8, 2, 2), 1)  # the same size of batch is warm already
    assert len(engine.calls) == 5 and again.prefill_seconds == 5.0
    timer.measure(Workload(16, 2, 2), 1)
    assert len(engine.calls) == 7


def test_prompts_are_fresh_of_the_right_size_and_from_the_given_tokens():
    engine = FakeEngine()
    WorkloadTimer("fake", "fp32", [7, 9], engine.run).measure(Workload(64, 4, 3), 2)
    seen = [prompts for prompts, _ in engine.calls]
    assert all(len(prompts) == 3 and {len(p) for p in prompts} == {64} for prompts in seen)
    assert {token for prompts in seen for p in prompts for token in p} == {7, 9}
    assert seen[1] != seen[2]


def test_result_names_engine_workload_and_repeats():
    result = WorkloadTimer("fake", "int4", [1], FakeEngine().run).measure(Workload(2, 3), 2)
    assert (result.engine, result.precision, result.workload, result.repeats) == ("fake", "int4", Workload(2, 3), 2)
    assert result.end_to_end_seconds == pytest.approx(0.0, abs=0.5)  # measured here, not taken from the run
