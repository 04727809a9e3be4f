"""What an exported folder holds, and how an export fails."""

import importlib.metadata
import json

import onnx
import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.export.onnx import export_model, export_onnx
from dtr_deploy.export.onnx.forms.base import HeadLayout
from dtr_deploy.hybrid.model import save_hybrid
from tiny import tiny_hybrid, tiny_tokenizer


def graph_of(folder, name="model.onnx"):
    return onnx.load(str(folder / name), load_external_data=False).graph


def test_folder_is_complete_and_valid(exported):
    _, folder = exported()
    for name in ("model.onnx", "model_all_logits.onnx"):
        onnx.checker.check_model(str(folder / name))
    names = {path.name for path in folder.iterdir()}
    files = {"model.onnx", "model_all_logits.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"}
    assert files <= names and "model_all_logits.onnx.data" not in names
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["type"] == "llama"
    assert config["model"]["decoder"]["inputs"]["past_recurrent_names"] == "past.%d.recurrent"


def test_inputs_of_a_hybrid(exported):
    _, folder = exported()
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph_of(folder).input
    }
    assert shapes["past.1.recurrent"] == ["batch_size", 2, 32, 32]
    assert shapes["past.1.conv"] == ["batch_size", 64, 2 * 2 * 32]
    assert "past_key_values.0.key" in shapes and "past_key_values.1.key" not in shapes


@pytest.mark.parametrize(
    ("forms", "window", "recurrent", "conv"),
    (
        (("gla", "jet"), 64, [32, 32], [64, 128]),
        (("gla", "jet"), 2, [32, 32], [3, 128]),
        (("gla", "jet"), 0, [32, 32], [3, 64]),
        (("gla", "hedgehog"), 0, [64, 64], [1, 1]),
        (("hedgehog", "jet"), 0, [64, 64], [3, 64]),
    ),
)
def test_states_of_all_layers_have_the_shape_that_the_largest_form_needs(forms, window, recurrent, conv, exported):
    _, folder = exported("llama", (None, *forms), window)
    for values, prefix in ((graph_of(folder).input, "past"), (graph_of(folder).output, "present")):
        shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim][1:] for value in values}
        for layer in (1, 2):
            assert shapes[f"{prefix}.{layer}.recurrent"] == [2, *recurrent]
            assert shapes[f"{prefix}.{layer}.conv"] == conv


def test_small_projections_of_all_forms_stay_out_of_quantization(exported):
    _, folder = exported("llama", (None, "jet", "hedgehog"), precision="int4")
    matmuls = {node.name for node in graph_of(folder).node if node.op_type == "MatMul"}
    assert matmuls == {
        "/model/layers.1/attn/jet/gates/MatMul",
        "/model/layers.1/attn/jet/taps/down/MatMul",
        "/model/layers.1/attn/jet/taps/up/MatMul",
        "/model/layers.2/attn/hedgehog/maps/MatMul",
    }


def test_gates_stay_out_of_quantization(exported):
    _, folder = exported(precision="int4")
    matmuls = {node.name for node in graph_of(folder).node if node.op_type == "MatMul"}
    assert matmuls == {
        "/model/layers.1/attn/gated_deltanet/gates/MatMul",
        "/model/layers.2/attn/gla/decay_down/MatMul",
        "/model/layers.2/attn/gla/decay_up/MatMul",
        "/model/layers.3/attn/gated_deltanet/gates/MatMul",
    }


@pytest.mark.parametrize(("group", "padded"), ((1, 1), (2, 2), (3, 4), (4, 4), (7, 8), (8, 8), (16, 16)))
def test_query_heads_are_padded_for_the_fast_kernel(group, padded):
    layout = HeadLayout(q_heads=2 * group, kv_heads=2, head_dim=16)
    index, kept = layout.padded_index(), layout.kept_index()
    assert len(index) == 2 * padded
    assert [index[place] for place in kept] == list(range(2 * group))


def test_checkpoint_folder(tmp_path, exported, engine, prompts):
    """export_onnx of a saved checkpoint is export_model of the model in memory."""
    model, folder = exported()
    save_hybrid(model, tiny_tokenizer(), tmp_path / "hybrid")
    result = export_onnx(tmp_path / "hybrid", tmp_path / "onnx", "fp32")
    assert (result.window, result.linear_layers) == (64, 3)
    texts = prompts(20)
    ours, theirs = engine(tmp_path / "onnx").score(texts)[0], engine(folder).score(texts)[0]
    assert (ours.logprobs == theirs.logprobs).all()


def test_export_replaces_a_folder(tmp_path, exported):
    model, _ = exported()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "old").write_text("")
    export_model(model, tiny_tokenizer(), tmp_path / "onnx", "fp32")
    assert not (tmp_path / "onnx" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_failed_export_leaves_nothing(tmp_path, exported, monkeypatch):
    model, _ = exported()
    monkeypatch.setattr("onnx.checker.check_model", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(model, tiny_tokenizer(), tmp_path / "onnx", "fp32")
    assert list(tmp_path.iterdir()) == []


def test_model_is_not_modified(tmp_path):
    model = tiny_hybrid()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    export_model(model, tiny_tokenizer(), tmp_path / "onnx", "int4")
    assert model.config.to_dict() == config
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"precision": "int3"}, "int3.*fp32, fp16, int8, int4"),
        ({"execution_provider": "npu"}, "npu.*cpu, cuda"),
        ({"precision": "fp32", "execution_provider": "cuda"}, "fp32.*cuda.*fp16, int8, int4"),
    ),
)
def test_unknown_options(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_onnx(tmp_path, tmp_path / "onnx", **options)


def test_other_release_of_genai(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.19.1")
    with pytest.raises(UsageError, match=r"0\.19\.1 is installed, ONNX export needs 0\.18\.0"):
        export_onnx(tmp_path, tmp_path / "onnx")
