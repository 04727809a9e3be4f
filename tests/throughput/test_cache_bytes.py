"""Cache sizes against formulas and against the arrays an ONNX Runtime runner holds; tests/vllm has vLLM's own."""

import pytest

from dtr_deploy.engines.base import Workload
from dtr_deploy.throughput.cache_bytes import CacheSize, cache_dtypes
from tests.tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer

HEADS, DIM = 2, 32  # kv heads of the tiny model, and their size
WORKLOAD = Workload(90, 10, 3)
LAYOUT = ("gla@0", None, "gla", "hedgehog@8", None)


def size(engine, precision, workload=WORKLOAD):
    return CacheSize(tiny_backbone(layers=5).config, 64, *cache_dtypes(engine, precision), workload)


def test_the_backbone_has_keys_and_values_only():
    assert size("vllm", "bf16")((None,) * 5) == 3 * 5 * 100 * 2 * HEADS * DIM * 2
    assert size("ort", "int4")((None,) * 5) == 3 * 5 * 100 * 2 * HEADS * DIM * 4
    assert size("ort", "fp16")((None,) * 5) == 3 * 5 * 100 * 2 * HEADS * DIM * 2


def test_a_state_is_what_its_form_and_window_need():
    recurrent, row = HEADS * DIM * DIM * 4, 2 * HEADS * DIM * 2
    assert size("vllm", "bf16").state_bytes("gla@0") == recurrent
    assert size("vllm", "bf16").state_bytes("gla") == recurrent + 64 * row
    assert size("vllm", "bf16").state_bytes("gated_deltanet@300") == recurrent + 300 * row
    assert size("ort", "fp16").state_bytes("gla") == recurrent + 64 * 2 * row  # rows stay float32 there


def test_all_linear_layers_are_as_large_as_the_largest():
    cost = size("vllm", "bf16")
    kv = 2 * 100 * 2 * HEADS * DIM * 2
    assert cost.padded(LAYOUT) == 2 and cost.padded(("gla", None, "gla")) == cost.padded((None,)) == 0
    assert cost(LAYOUT) == 3 * (kv + 3 * max(map(cost.state_bytes, ("gla", "hedgehog@8"))))


@pytest.mark.parametrize("layout", [(None,) * 5, ("gla@0", None, "gla", None, "gated_deltanet@8")])
def test_equals_what_an_onnx_runtime_runner_holds(tmp_path, layout):
    from dtr_deploy.engines.ort_runner import OrtRunner
    from dtr_deploy.export.onnx import export_model

    model = tiny_hybrid("llama", layout, 64) if any(layout) else tiny_backbone(layers=5)
    export_model(model, tiny_tokenizer(), tmp_path / "fp32", "fp32")
    runner = OrtRunner(tmp_path / "fp32", slots=3, capacity=100, threads=1)
    assert size("ort", "fp32")(layout) == 3 * runner.bytes_per_slot
