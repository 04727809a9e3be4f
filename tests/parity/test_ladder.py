"""The ladder's bounds and bookkeeping, with engines whose distance is set by hand."""

import numpy as np
import pytest

from dtr_deploy.errors import ParityFailed
from dtr_deploy.parity.ladder import FP32_TOLERANCE, KL_FLOOR, KL_RATIO, Rung, climb, gate, judge
from dtr_deploy.parity.metrics import Distance
from tests.parity.fakes import VOCABULARY, FakeEngine

PROMPTS = [list(np.random.default_rng(n).integers(0, VOCABULARY, n)) for n in (1, 2, 9, 40)]


def measured(dlogprob: float = 0.0, kl: float = 0.0) -> Distance:
    return Distance(prompts=4, positions=48, max_abs_dlogprob=dlogprob, mean_kl=kl, greedy_agreement=1.0)


@pytest.mark.parametrize(
    ("dlogprob", "passes"), [(0.0, True), (FP32_TOLERANCE, True), (FP32_TOLERANCE * 1.001, False), (np.inf, False)]
)
def test_fp32_is_bounded_by_the_largest_difference(dlogprob: float, passes: bool) -> None:
    row = judge("vllm", "fp32", measured(dlogprob), None)
    assert row.passed is passes and row.limit == FP32_TOLERANCE and row.base_kl is None
    assert row.tokens == 52


@pytest.mark.parametrize(
    ("kl", "base_kl", "passes"),
    [
        (0.015, 0.010, True),
        (0.0151, 0.010, False),
        (0.001, 0.010, True),
        (KL_RATIO * KL_FLOOR, 0.0, True),  # both equal to the reference but for rounding
        (2 * KL_RATIO * KL_FLOOR, 0.0, False),
        (np.inf, 0.010, False),
        (0.001, np.inf, False),  # an engine that breaks the backbone proves nothing
    ],
)
def test_reduced_precision_is_bounded_by_the_backbone(kl: float, base_kl: float, passes: bool) -> None:
    assert judge("ort", "int4", measured(10.0, kl), measured(kl=base_kl)).passed is passes


def test_reduced_precision_without_the_backbone_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="needs the backbone"):
        judge("ort", "int4", measured(), None)


def test_climb_compares_hybrids_with_the_hybrid_and_backbones_with_the_backbone() -> None:
    engines: list[FakeEngine] = []

    def opener(precision: str, noise: float):
        def open_engine() -> FakeEngine:
            assert all(engine.closed for engine in engines), "two engines open at once"
            engines.append(FakeEngine(precision, noise))
            return engines[-1]

        return open_engine

    reference, base_reference = FakeEngine(), FakeEngine()
    rungs = [
        Rung("loop", "fp32", opener("fp32", 0.0), max_length=9),
        Rung("vllm", "fp32", opener("fp32", 0.1)),
        Rung("ort", "int4", opener("int4", 0.2), base=opener("int4", 0.2)),
        Rung("vllm", "bf16", opener("bf16", 0.2), base=opener("bf16", 0.1)),
    ]
    rows = climb(reference, base_reference, rungs, PROMPTS)
    assert [(row.engine, row.precision, row.passed) for row in rows] == [
        ("loop", "fp32", True),
        ("vllm", "fp32", False),
        ("ort", "int4", True),
        ("vllm", "bf16", False),  # twice the noise is four times the KL
    ]
    assert [row.prompts for row in rows] == [3, 4, 4, 4]
    assert rows[2].base_kl == pytest.approx(rows[2].mean_kl)
    assert rows[3].base_kl is not None and rows[3].mean_kl == pytest.approx(4 * rows[3].base_kl, rel=0.2)
    assert all(engine.closed for engine in engines) and not reference.closed
    assert reference.scored == base_reference.scored == PROMPTS  # once, however many rungs


def test_an_engine_that_fails_is_closed() -> None:
    class Failing(FakeEngine):
        def score(self, prompts):
            raise RuntimeError("out of memory")

    engine = Failing()
    with pytest.raises(RuntimeError, match="out of memory"):
        climb(FakeEngine(), None, [Rung("vllm", "fp32", lambda: engine)], PROMPTS)
    assert engine.closed


def test_the_gate_names_every_failure() -> None:
    good = judge("torch cached", "fp32", measured(1e-5), None)
    bad = judge("vllm", "fp32", measured(0.5), None)
    worse = judge("ort", "int4", measured(1.0, 0.3), measured(kl=0.1))
    gate([good])
    with pytest.raises(ParityFailed) as caught:
        gate([good, bad, worse])
    message = str(caught.value)
    assert caught.value.exit_code == 3 and "\n" not in message
    assert "2 of 3" in message and "vllm fp32: largest |dlogprob| 5.00e-01 > 1e-03" in message
    assert "ort int4: mean KL 3.00e-01 > 1.50e-01" in message and "torch" not in message
