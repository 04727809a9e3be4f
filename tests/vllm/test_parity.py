"""vLLM computes what the Hugging Face hybrid computes: every family, form, window and group size, in float32."""

import numpy as np
import pytest

from dtr_kernels.forms import FORMS
from tests.tiny import tiny_hybrid

pytestmark = pytest.mark.vllm

# The engines differ in the order of float32 sums only. Logits of these models are about 10 wide; 1e-3 is a hundred
# roundings of such a value, and the difference a wrong token, border or stale state makes is 0.1 and more.
TOLERANCE = 1e-3
NEW_TOKENS = 6
MIXED = (None, "gated_deltanet", "hedgehog", "jet", None, "gla")


def assert_same(served, reference, model, prompts):
    for tokens, ours in served.distributions(prompts, NEW_TOKENS):
        theirs = reference(model, tokens)
        assert ours.shape == theirs.shape
        difference = np.abs(ours - theirs).max()
        assert difference <= TOLERANCE, f"prompt of {len(tokens) - NEW_TOKENS} tokens: {difference:.2e}"


@pytest.mark.parametrize("group", [1, 3, 4])
@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_combination(serve, hugging_face_distributions, prompts, family, form, window, group):
    # Qwen2 in vLLM takes the head size from hidden_size, so it has to be heads times head_dim (32).
    model = tiny_hybrid(family, (None, form, form), window, group, hidden=2 * group * 32)
    with serve(model) as served:
        assert_same(served, hugging_face_distributions, model, prompts)


@pytest.mark.parametrize("group", [2, 5, 6, 7, 8])
@pytest.mark.parametrize("window", [0, 64])
def test_other_group_sizes(serve, hugging_face_distributions, prompts, window, group):
    """Kernels are compiled for some group sizes and loop over others."""
    model = tiny_hybrid("llama", (None, "gated_deltanet", "hedgehog"), window, group, hidden=2 * group * 32)
    with serve(model) as served:
        assert_same(served, hugging_face_distributions, model, prompts)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_all_forms_in_one_model(serve, hugging_face_distributions, prompts, family):
    model = tiny_hybrid(family, MIXED, 64, 3, hidden=192)
    with serve(model) as served:
        assert_same(served, hugging_face_distributions, model, prompts)


def test_no_layer_replaced(serve, hugging_face_distributions, prompts):
    """The first step of a search: a hybrid checkpoint that is still all attention."""
    model = tiny_hybrid("llama", (None, None), 64, 3, hidden=192)
    with serve(model) as served:
        assert_same(served, hugging_face_distributions, model, prompts)
