"""Layers with windows of their own in vLLM: one page size for all, and the same distributions as Hugging Face."""

import numpy as np
import pytest

from dtr_deploy.engines.base import Workload
from dtr_deploy.hybrid.model import save_hybrid
from dtr_deploy.throughput.cache_bytes import CacheSize, cache_dtypes
from tests.tiny import tiny_backbone, tiny_hybrid

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-3  # as in test_parity
WINDOWS = ("gated_deltanet@16", None, "gla@0", "hedgehog", "jet@96", None, "gated_deltanet@0")


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_equals_hugging_face(serve, hugging_face_distributions, prompts, prefix_caching):
    model = tiny_hybrid("llama", WINDOWS, 64, 3, hidden=192)
    with serve(model, enable_prefix_caching=prefix_caching) as served:
        for tokens, ours in served.distributions(prompts, 6):
            difference = np.abs(ours - hugging_face_distributions(model, tokens)).max()
            assert difference <= TOLERANCE, f"prompt of {len(tokens) - 6} tokens: {difference:.2e}"


def test_pages_are_as_large_as_the_largest_window_needs(tmp_path):
    from dtr_vllm.sizing import sizing

    sizes = {}
    for name, layout in {"mixed": ("gla@0", None, "gla@96"), "small": ("gla@0", None, "gla@0")}.items():
        save_hybrid(tiny_hybrid("llama", layout, 64, 3, hidden=192), None, tmp_path / name)
        sizes[name] = sizing(tmp_path / name, tokens=(256,), dtype="float32", max_model_len=512)
    recurrent, rows = 2 * 32 * 32 * 4, 2 * 96 * 2 * 32 * 4  # 2 kv heads of 32; keys and values of 96 tokens
    assert sizes["small"].state_bytes == recurrent
    assert sizes["mixed"].state_bytes == recurrent + rows
    assert sizes["mixed"].page_bytes >= sizes["mixed"].state_bytes


def test_cache_bytes_of_the_cost_model_are_those_the_layers_ask_for(tmp_path):
    from dtr_vllm.sizing import sizing

    layout = ("gla@0", None, "gla", "hedgehog@8", None)
    save_hybrid(tiny_hybrid("llama", layout, 64, 3, hidden=192), None, tmp_path)
    found = sizing(tmp_path, tokens=(100,), dtype="bfloat16", max_model_len=512)
    size = CacheSize(tiny_backbone(layers=5).config, 64, *cache_dtypes("vllm", "bf16"), Workload(90, 10))
    assert size.token_bytes == found.kv_bytes_per_token
    assert size(layout) == 2 * 100 * found.kv_bytes_per_token + 3 * found.state_bytes
