"""The served graph gives the logits of each row's last token; the graph for scores gives all of them."""

import shutil

import numpy as np
import onnx
import onnxruntime
import pytest

from dtr_deploy.engines.genai import GenaiEngine
from dtr_deploy.engines.torch import TorchEngine
from dtr_deploy.errors import UsageError

SERVED, SCORING = "model.onnx", "model_all_logits.onnx"
HEAD_DIM = 32  # of tiny models
LENGTHS = (1, 7, 64, 65, 130)
# A batched product sums a row in another order than a product of one row: 1e-6 of logits around 10.
TOLERANCE = 1e-4
LINEAR_LAST, FULL_LAST = (None, "gated_deltanet", "jet"), ("gla", "hedgehog", None)
# (family, forms): a backbone, and hybrids whose last layer is linear or not.
MODELS = pytest.mark.parametrize(
    ("family", "forms"), [(f, forms) for f in ("llama", "qwen2", "qwen3") for forms in (None, LINEAR_LAST, FULL_LAST)]
)


def session_of(folder, name):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])


def logits_of_calls(session, calls):
    """Logits of every call (ids, mask of the call), states passed on from call to call; KV caches start with room."""
    capacity = sum(ids.shape[1] for ids, _ in calls)
    rows = len(calls[0][0])
    states = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            is_kv = value.name.startswith("past_key_values")
            shape = [value.shape[1], capacity, HEAD_DIM] if is_kv else value.shape[1:]
            states[value.name] = np.zeros([rows, *shape], np.float32)
    mask, found = np.zeros((rows, 0), np.int64), []
    for ids, real in calls:
        mask = np.concatenate([mask, real], 1)
        names = [value.name for value in session.get_outputs()]
        outputs = dict(
            zip(names, session.run(names, {"input_ids": ids, "attention_mask": mask, **states}), strict=True)
        )
        found.append(outputs["logits"])
        states = {
            name: outputs[name.replace("past_key_values.", "present.").replace("past.", "present.")] for name in states
        }
    return found


def padded(texts):
    lengths = np.array([len(text) for text in texts])
    ids = np.zeros((len(texts), lengths.max()), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
    return ids, (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)


@MODELS
def test_logits_of_a_ragged_batch_are_those_of_each_last_token(family, forms, exported, prompts):
    _, folder = exported(family, forms)
    texts = prompts(*LENGTHS)
    ids, mask = padded(texts)
    step = np.array(prompts(*[1] * len(texts)), np.int64), np.ones((len(texts), 1), np.int64)
    served = logits_of_calls(session_of(folder, SERVED), [(ids, mask), step])
    every = logits_of_calls(session_of(folder, SCORING), [(ids, mask), step])
    assert served[0].shape == (len(texts), 1, every[0].shape[2]) and every[0].shape[1] == max(LENGTHS)
    last = every[0][np.arange(len(texts)), np.array(LENGTHS) - 1]
    np.testing.assert_allclose(served[0][:, 0], last, atol=TOLERANCE)
    assert served[1].shape == every[1].shape
    np.testing.assert_allclose(served[1], every[1], atol=TOLERANCE)


@MODELS
def test_prompt_in_pieces(family, forms, exported, prompts):
    _, folder = exported(family, forms)
    ids = np.array(prompts(131), np.int64)
    calls = [(ids[:, a:b], np.ones((1, b - a), np.int64)) for a, b in ((0, 64), (64, 65), (65, 131))]
    served = logits_of_calls(session_of(folder, SERVED), calls)
    every = logits_of_calls(session_of(folder, SCORING), calls)
    for ours, theirs in zip(served, every, strict=True):
        np.testing.assert_allclose(ours[:, 0], theirs[:, -1], atol=TOLERANCE)


@pytest.mark.parametrize("precision", ("fp32", "fp16", "int8", "int4"))
@pytest.mark.parametrize("forms", (None, LINEAR_LAST, FULL_LAST))
def test_both_graphs_read_one_file_of_weights(precision, forms, exported):
    _, folder = exported("llama", forms, precision=precision)
    served, scoring = (onnx.load(str(folder / name), load_external_data=False).graph for name in (SERVED, SCORING))
    weights = [
        {tensor.name: [(entry.key, entry.value) for entry in tensor.external_data] for tensor in graph.initializer}
        for graph in (served, scoring)
    ]
    assert weights[0] == weights[1] and all(weights[0].values())
    assert (folder / SCORING).stat().st_size < (folder / SERVED).stat().st_size
    added = {node.name for node in served.node} - {node.name for node in scoring.node}
    names = {name for name in added if not name.startswith(("/model/call/", "/model/constant_nodes/"))}
    assert names == {
        "/model/last_token/index/Sub",
        "/model/last_token/index/Unsqueeze",
        "/model/last_token/root_input/GatherND",
        "/model/last_token/skip_input/GatherND",
    }
    assert {node.name for node in scoring.node} < {node.name for node in served.node}


@pytest.mark.parametrize("name", (SERVED, SCORING))
def test_written_shapes_are_those_that_onnx_infers(name, exported):
    """onnxruntime plans memory by the shapes in the file. Operators of com.microsoft are not inferred."""
    _, folder = exported("llama", LINEAR_LAST)
    model = onnx.load(str(folder / name))
    written = {value.name: shape_of(value) for value in (*model.graph.value_info, *model.graph.output)}
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    fixed = [
        (value.name, ours, theirs)
        for value in inferred
        for ours, theirs in zip(written.get(value.name, []), shape_of(value), strict=False)
        if isinstance(ours, int) and isinstance(theirs, int)
    ]
    assert len(fixed) > 30
    assert [entry for entry in fixed if entry[1] != entry[2]] == []
    assert written["logits"][1] == (1 if name == SERVED else "sequence_length")
    hidden = [shape for value, shape in written.items() if value.startswith("/model/layers.2/mlp/")]
    assert len(hidden) == 6 and {shape[1] for shape in hidden} == {written["logits"][1]}


def shape_of(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("forms", (None, LINEAR_LAST, FULL_LAST))
def test_ragged_batch_under_genai(forms, exported, prompts):
    """genai pads on the right and takes the logits of one position as they are."""
    import onnxruntime_genai

    model, folder = exported("qwen2", forms)
    texts = prompts(*LENGTHS)
    ids, _ = padded(texts)
    genai_model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(genai_model)
    length = max(LENGTHS) + 8
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(texts), do_sample=False)
    generator = onnxruntime_genai.Generator(genai_model, parameters)
    generator.append_tokens(ids.astype(np.int32))
    for _ in range(8):
        generator.generate_next_token()
    for row, expected in enumerate(TorchEngine(model).generate(texts, 8)):
        end = expected.index(0) if 0 in expected else 8  # genai ends a row at the pad token
        assert generator.get_sequence(row)[ids.shape[1] :].tolist()[:end] == expected[:end]


@pytest.mark.parametrize("chunk", (16, 2048))
def test_engine_generates_and_scores(chunk, exported, engine, prompts):
    model, folder = exported("llama", FULL_LAST)
    texts = prompts(*LENGTHS)
    subject = engine(folder, prefill_chunk=chunk)
    assert subject.generate(texts, 5) == TorchEngine(model).generate(texts, 5)
    for ours, theirs in zip(subject.score(texts), TorchEngine(model).score(texts), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-4)


def test_folder_without_the_graph_for_scores(tmp_path, exported, engine, prompts):
    _, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    (tmp_path / "onnx" / SCORING).unlink()
    subject, texts = engine(tmp_path / "onnx"), prompts(20)
    assert subject.generate(texts, 3) == engine(folder).generate(texts, 3)
    with pytest.raises(UsageError, match=r"no model_all_logits\.onnx.*export the model again"):
        subject.score(texts)


def test_folder_of_an_earlier_release(tmp_path, exported, engine, prompts):
    """Its one graph gives all logits."""
    _, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    (tmp_path / "onnx" / SCORING).rename(tmp_path / "onnx" / SERVED)
    subject, texts = engine(tmp_path / "onnx"), prompts(20, 70)
    assert subject.generate(texts, 3) == engine(folder).generate(texts, 3)
    for ours, theirs in zip(subject.score(texts), engine(folder).score(texts), strict=True):
        assert (ours.logprobs == theirs.logprobs).all()
    assert GenaiEngine(tmp_path / "onnx", "fp32", threads=1).generate(texts, 3) == subject.generate(texts, 3)
