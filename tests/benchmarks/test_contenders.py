"""Every adapter gives its implementation the problem it says it does: results are those of float64 token loops."""

import importlib.util
import math

import pytest
import torch

from benchmarks.contenders import contenders, gpu, ours
from benchmarks.contenders.base import Unavailable
from benchmarks.oracle import TOLERANCES, Oracle, relative_error
from benchmarks.problem import Inputs, Problem, Shape, attended, decode_bytes, flops
from dtr_kernels import operator

# Three query heads a kv head, so that padding to four and repeating by three both show. vLLM's kernel wants 64.
SMALL = Shape("small", 6, 2, 64)


def problem(**changes) -> Problem:
    return Problem(**{"shape": SMALL, "length": 70, "window": 16, **changes})


def errors(asked: Problem) -> tuple[dict[str, tuple[float, str]], dict[str, str]]:
    """Error and dtype of contenders that answered, reasons of those that did not."""
    inputs = Inputs(asked)
    oracle = Oracle(inputs)
    found, refused = {}, {}
    for contender in contenders(asked):
        try:
            ready = contender.prepare(inputs)
        except Unavailable as reason:
            refused[contender.name] = str(reason)
            continue
        error = relative_error(ready.convert(ready.call()), oracle.truth(contender.computes)[0])
        found[contender.name] = (error, ready.dtype)
    return found, refused


@pytest.mark.parametrize("direction", ["forward", "backward", "decode"])
def test_adapters_agree_with_the_token_loop(direction: str) -> None:
    pytest.importorskip("onnxruntime")
    found, refused = errors(problem(direction=direction, sequences=3 if direction == "decode" else 1))
    expected = {"ours auto", "ours chunked", "ours recurrent", "window 16 alone", "torch SDPA, full attention"}
    if direction != "backward":
        expected |= {"gated_deltanet, window 0", "gated_deltanet, window 16", "transformers recurrent"}
        expected |= {"onnxruntime", "onnxruntime, 4 query heads a kv head"}
    expected |= {
        "forward": {"ours packed over a pool", "transformers chunk"},
        "backward": {"transformers chunk"},
        "decode": {"ours step over a pool"},
    }[direction]
    assert expected <= found.keys(), refused
    for name, (error, dtype) in found.items():
        # float32 over 70 tokens; bfloat16 keeps 8 bits
        assert error < (1e-5 if dtype == "float32" else 2e-2), (name, error)


@pytest.mark.parametrize("rule", ["linear", "gated", "delta"])
def test_other_rules_and_decays_a_key(rule: str) -> None:
    pytest.importorskip("onnxruntime")
    found, refused = errors(problem(rule=rule, per_key=rule == "gated"))
    assert {"ours chunked", "onnxruntime, 4 query heads a kv head"} <= found.keys()
    assert all(error < 1e-5 for error, _ in found.values()), found
    assert "gated_delta" in refused["transformers chunk"]


def test_gradients_of_long_sequences_use_an_oracle_that_is_held_to_the_loop() -> None:
    inputs = Inputs(problem(length=300, direction="backward"))
    truth, method = Oracle(inputs).truth("rule")
    assert "chunked" in method
    # A derivative of its own: the loss along a direction, by central differences through the token loop.
    direction = torch.randn(inputs.k.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    oracle, step = Oracle(inputs), 1e-5

    def loss(k: torch.Tensor) -> float:
        out, _ = oracle._rule(inputs.q, k, inputs.v, inputs.log_decay, inputs.beta, inputs.state)
        return (out * inputs.cotangent).sum().item()

    slope = (loss(inputs.k + step * direction) - loss(inputs.k - step * direction)) / (2 * step)
    assert math.isclose(slope, (truth["d_k"] * direction).sum().item(), rel_tol=1e-6)


def test_operands_are_the_same_numbers_in_every_dtype() -> None:
    inputs = Inputs(problem())
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.beta, inputs.state):
        assert tensor is not None
        assert torch.equal(tensor, tensor.bfloat16().double())
    assert torch.equal(inputs.log_decay, inputs.log_decay.float().double())


def test_an_error_is_seen_wherever_it_is() -> None:
    truth = {"out": torch.ones(2, 3, dtype=torch.float64), "state": torch.full((4,), 2.0, dtype=torch.float64)}
    wrong = {"out": torch.ones(2, 3), "state": torch.tensor([2.0, 2.0, 2.5, 2.0])}
    assert relative_error(wrong, truth) == 0.25
    assert relative_error({"out": torch.full((2, 3), float("nan"))}, truth) == float("inf")
    with pytest.raises(ValueError, match="shape"):
        relative_error({"out": torch.ones(3, 2)}, truth)
    with pytest.raises(ValueError, match="nothing"):
        relative_error({}, truth)
    assert TOLERANCES["float32"] < TOLERANCES["bfloat16"] < 0.25


def test_work_is_counted_by_definition() -> None:
    forward = problem(length=10)
    # one decay (1), S^T k (2) and the write (2) of 64 x 64 for 2 kv heads, the readout (2) for 6 query heads
    assert flops(forward, "rule") == 10 * 64 * 64 * (2 * 5 + 6 * 2)
    assert flops(problem(length=10, rule="linear"), "rule") == 10 * 64 * 64 * (2 * 2 + 6 * 2)
    assert flops(problem(length=10, direction="backward"), "rule") == 3 * flops(forward, "rule")
    for length, window in ((1, 4), (3, 4), (4, 4), (9, 4), (9, 0)):
        pairs = sum(min(t + 1, window or length) for t in range(length))
        assert attended(length, window) == pairs
    decode = problem(direction="decode", sequences=3)
    vectors = 4 * 3 * 64 * (6 + 2 + 2 + 6)
    assert decode_bytes(decode, "rule", 4) == 2 * 4 * 3 * 2 * 64 * 64 + vectors
    assert decode_bytes(decode, "softmax", 4) == 2 * 4 * 3 * 71 * 2 * 64 + vectors


@pytest.mark.skipif(importlib.util.find_spec("fla") is not None, reason="flash-linear-attention is installed")
def test_a_contender_that_is_not_installed_says_so() -> None:
    rows = [contender for contender in gpu.contenders() if contender.name.startswith("fla")]
    assert rows
    for contender in rows:
        gla = contender.name.endswith("gla")
        inputs = Inputs(problem(rule="gated" if gla else "gated_delta", per_key=gla))
        with pytest.raises(Unavailable, match=r"fla.*is not importable"):
            contender.prepare(inputs)


def test_a_backend_that_cannot_run_keeps_its_row_with_the_operators_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, backend: str, **__):
        raise ValueError(f"backend {backend!r} cannot run here: no compiler")

    rows = {contender.name: contender for contender in ours.contenders("cpu")}
    monkeypatch.setattr(operator, "available_backends", lambda device: ("recurrent",))
    monkeypatch.setattr(ours, "linear_attention", refuse)
    with pytest.raises(Unavailable, match="'chunked' cannot run here: no compiler"):
        rows["ours chunked"].prepare(Inputs(problem()))
    rows["ours recurrent"].prepare(Inputs(problem()))
