"""A recurrent state stored in bfloat16: the pages shrink, the tokens' distributions hardly change."""

import numpy as np
import pytest

from tests.tiny import tiny_hybrid
from tests.vllm.reference import log_probabilities, mean_kl, random_prompts

pytestmark = pytest.mark.vllm

NEW_TOKENS = 24


def kl_and_state_bytes(serve, model, prompts, **options):
    """Mean KL from the Hugging Face hybrid in float32 over generated positions, and a layer's bytes of state."""
    from vllm.v1.kv_cache_interface import MambaSpec

    with serve(model, **options) as served:
        groups = served.scheduler.kv_cache_config.kv_cache_groups
        (spec,) = {group.kv_cache_spec for group in groups if isinstance(group.kv_cache_spec, MambaSpec)}
        results = served.distributions(prompts, NEW_TOKENS)
    rows = [(log_probabilities(model, tokens)[:-1][-NEW_TOKENS:], ours[-NEW_TOKENS:]) for tokens, ours in results]
    return mean_kl(*(np.concatenate(part) for part in zip(*rows, strict=True))), spec.state_content_size_bytes


@pytest.mark.parametrize("form", ["gated_deltanet", "gla", "jet"])
def test_state_in_bfloat16(serve, form):
    """Its error has to stay below that of running the whole model in bfloat16, which users accept."""
    model = tiny_hybrid("llama", (None, form, form), 0, 3, hidden=192)
    prompts = random_prompts([1, 64, 200, 333], seed=61)
    exact, full_bytes = kl_and_state_bytes(serve, model, prompts)
    narrow, half_bytes = kl_and_state_bytes(serve, model, prompts, mamba_ssm_cache_dtype="bfloat16")
    model_in_bfloat16, _ = kl_and_state_bytes(serve, model, prompts, dtype="bfloat16")
    convolution = 3 * 2 * 32 * 4 if form == "jet" else 0  # rows of v, in the model's dtype
    state = 2 * 32 * 32  # kv heads, key and value dimensions
    assert (full_bytes, half_bytes) == (4 * state + convolution, 2 * state + convolution)
    assert exact < 1e-7  # both sides in float32: a KL of about 1e-8 is what rounding leaves
    assert 10 * exact < narrow < model_in_bfloat16


def test_hedgehog_keeps_float32(serve):
    """A sum over all tokens cannot be kept in 8 bits: the flag changes nothing for it."""
    model = tiny_hybrid("llama", (None, "hedgehog"), 0, 3, hidden=192)
    prompts = random_prompts([200], seed=67)
    exact, full_bytes = kl_and_state_bytes(serve, model, prompts)
    asked, same_bytes = kl_and_state_bytes(serve, model, prompts, mamba_ssm_cache_dtype="bfloat16")
    assert full_bytes == same_bytes and max(exact, asked) < 1e-7
