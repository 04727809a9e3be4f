"""Exports for CUDA, held to what onnxruntime's CUDA kernels and onnxruntime-genai take; nothing is run."""

import json

import onnx
import pytest
from onnx import TensorProto

from dtr_kernels.forms import FORMS

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# Shared memory of one block that every GPU since compute capability 8.0 gives (8.6 and 8.9 give the least).
SHARED_BYTES = 99 * 1024
MODELS = pytest.mark.parametrize(
    ("family", "forms", "window", "precision"),
    [
        *((family, (None, form), 64, "fp16") for family in ("llama", "qwen2", "qwen3") for form in FORMS),
        ("llama", ("gla", "jet", None), 0, "fp16"),
        ("qwen2", (None, "gated_deltanet"), 64, "int4"),
        ("llama", (None, "jet"), 16, "int8"),
        ("qwen3", None, 64, "fp16"),
    ],
)


def types_of(graph):
    """Element type of every value that the graph declares."""
    declared = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)
    }
    return declared | {tensor.name: tensor.data_type for tensor in graph.initializer}


@MODELS
def test_graphs_are_valid_and_types_are_those_of_the_kernels(family, forms, window, precision, exported):
    _, folder = exported(family, forms, window, head_dim=64, precision=precision, provider="cuda")
    for name in ("model.onnx", "model_all_logits.onnx"):
        onnx.checker.check_model(str(folder / name))
        model = onnx.load(str(folder / name), load_external_data=False)
        assert {entry.domain: entry.version for entry in model.opset_import} == {"": 23, "com.microsoft": 1}
        assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
        types = types_of(model.graph)
        for value in (*model.graph.input, *model.graph.output):
            if value.name.startswith(("past.", "present.")) and value.name.endswith((".recurrent", ".conv")):
                assert types[value.name] == FLOAT, value.name
            elif value.name not in ("input_ids", "attention_mask"):
                assert types[value.name] == HALF, value.name
        operators = {node.op_type for node in model.graph.node}
        assert "GroupQueryAttention" in operators
        assert ("LinearAttention" in operators) == (forms is not None)
        for node in model.graph.node:
            tensors = [types[name] for name in (*node.input, *node.output) if name in types]
            if node.op_type == "LinearAttention":
                # One type for all: q, k, v, state, decay, beta, output, new state.
                assert set(tensors) == {FLOAT}, node.name
            elif node.op_type in ("Attention", "RMSNormalization", "RotaryEmbedding", "MatMul", "Concat"):
                assert len(set(tensors) - {TensorProto.INT64}) == 1, node.name
            elif node.op_type == "GroupQueryAttention":
                assert set(tensors) == {HALF, TensorProto.INT32}, node.name


@MODELS
def test_states_of_the_operator_fit_into_shared_memory(family, forms, window, precision, exported):
    """The CUDA kernel for prompts keeps the state, one key and one more vector there."""
    _, folder = exported(family, forms, window, head_dim=64, precision=precision, provider="cuda")
    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.input)}
    found = [shapes[node.input[3]][2:] for node in graph.node if node.op_type == "LinearAttention"]
    assert len(found) == sum(form is not None for form in forms or ())
    for keys, values in found:
        assert 4 * (keys * values + keys + max(keys, values)) <= SHARED_BYTES


@MODELS
def test_genai_is_asked_for_cuda(family, forms, window, precision, exported):
    _, folder = exported(family, forms, window, head_dim=64, precision=precision, provider="cuda")
    config = json.loads((folder / "genai_config.json").read_text())
    (options,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert list(options) == ["cuda"]
    # Shapes of the call are computed on the host in between, which a captured CUDA graph cannot.
    assert options["cuda"].get("enable_cuda_graph", "0") == "0"
    assert config["search"]["past_present_share_buffer"] is True
    inputs = config["model"]["decoder"]["inputs"]
    assert ("past_recurrent_names" in inputs) == (forms is not None)
