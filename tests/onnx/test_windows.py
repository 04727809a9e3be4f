"""Layers with windows of their own in one graph: scores, ragged batches, decoding and states, against Hugging Face."""

import numpy as np
import onnx
import pytest
import torch
from transformers import GenerationConfig

from dtr_deploy.engines.torch import TorchEngine

TOLERANCE = 2e-4  # as in test_parity
# The largest window neither first nor last, windows shorter than a convolution, none at all, and the model's own.
WINDOWS = ("jet@2", "gla@0", None, "gated_deltanet@40", "jet@0", "hedgehog", "gla@5")
NO_LARGEST_LAST = ("gated_deltanet@0", "jet@0", None)


def largest_difference(ours, theirs) -> float:
    return max(float(np.abs(a.logprobs - b.logprobs).max(initial=0)) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("forms", [WINDOWS, NO_LARGEST_LAST])
def test_scores_equal_hugging_face(forms, exported, engine, prompts):
    model, folder = exported("qwen3", forms, 16)
    texts = prompts(1, 2, 5, 6, 15, 16, 17, 39, 40, 41, 90)
    assert largest_difference(engine(folder).score(texts), TorchEngine(model).score(texts)) < TOLERANCE


def test_greedy_text_equals_hugging_face(exported, engine, prompts):
    """Prompts around every border, prefilled in pieces and decoded together."""
    model, folder = exported("qwen3", WINDOWS, 16)
    texts, new = prompts(3, 16, 47, 90), 24
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs = [model.generate(torch.tensor([text]), greedy)[0, len(text) :].tolist() for text in texts]
    assert engine(folder, prefill_chunk=32).generate(texts, new) == theirs


def test_states_have_the_largest_window_and_smaller_ones_keep_to_their_rows(exported):
    _, folder = exported("qwen3", WINDOWS, 16)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        for value in graph.input
        if "conv" in value.name
    }
    assert len(shapes) == 6 and all(shape == [40, 2 * 2 * 32] for shape in shapes.values())
    attentions = [node for node in graph.node if node.op_type == "Attention"]
    assert len(attentions) == 4  # two layers have no window
    # jet@2 carries the 3 rows of its convolution, jet@0 the same without keys, gla@5 its 5.
    padded = [node.name.split("/")[2] for node in graph.node if node.name.endswith("rows/present/Pad")]
    assert padded == ["layers.0", "layers.4", "layers.5", "layers.6"]
