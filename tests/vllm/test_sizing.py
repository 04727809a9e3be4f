"""Blocks and bytes: what `dtr_vllm.sizing` says is what an engine allocates, and blocks stay small for known shapes."""

import pytest

from benchmarks.serving_memory import SHAPES, main, measure
from dtr_deploy.hybrid.model import save_hybrid
from dtr_kernels.forms import FORMS
from tests.tiny import tiny_backbone, tiny_hybrid

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_sizing_is_what_an_engine_allocates(serve, tmp_path, prefix_caching):
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    from dtr_vllm.sizing import sizing

    model = tiny_hybrid("llama", (None, "gated_deltanet", "hedgehog", "jet", None, "gla", "gla"), 64, 3, hidden=192)
    save_hybrid(model, None, tmp_path)
    size = sizing(tmp_path, (512, 2048), dtype="float32", enable_prefix_caching=prefix_caching)
    assert (size.linear_layers, size.attention_layers) == (5, 2)
    assert size.kv_bytes_per_token == 2 * 2 * 32 * 4  # keys and values, kv heads, dimensions, bytes
    assert size.state_bytes == 2 * 64 * 33 * 4 + 2 * 64 * 2 * 32 * 4  # hedgehog's, the largest, and its window
    for length, bytes_of_sequence in size.sequence_bytes.items():
        with serve(model, max_model_len=length, enable_prefix_caching=prefix_caching) as served:
            config, allocated = served.llm.llm_engine.vllm_config, served.scheduler.kv_cache_config
            assert config.cache_config.block_size == size.block_tokens
            assert len(allocated.kv_cache_groups) == size.groups
            assert {group.kv_cache_spec.page_size_bytes for group in allocated.kv_cache_groups} == {size.page_bytes}
            (pool,) = {tensor.size for tensor in allocated.kv_cache_tensors}  # they are views of one and the same pool
            per_sequence = pool / get_max_concurrency_for_kv_cache_config(config, allocated)
            assert bytes_of_sequence == pytest.approx(per_sequence)


def test_sizing_of_an_ordinary_backbone(serve, tmp_path):
    from dtr_vllm.sizing import describe, sizing

    tiny_backbone("llama").config.save_pretrained(tmp_path)
    size = sizing(tmp_path, (1024,), dtype="float32")
    assert (size.linear_layers, size.state_bytes, size.groups) == (0, 0, 1)
    assert size.sequence_bytes == {1024: 4 * 1024 * size.kv_bytes_per_token}
    assert "1,024 tokens      2.0 MiB a sequence" in describe(size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", SHAPES)
def test_blocks_of_known_shapes_stay_small(serve, model, form):
    """vLLM raises the attention block until its page holds a state, and caches prefixes in steps of a block."""
    limit = 384 if form == "hedgehog" else 256
    for window in (0, 64):
        assert measure(model, form, window, dtype="bfloat16").block_tokens <= limit


def test_table_on_the_command_line(serve, capsys):
    assert main(["--models", "Qwen2.5-1.5B", "--forms", "gla"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[-1].startswith("| Qwen2.5-1.5B | gla, window 64 | 256 | 192 |")


def test_mistakes_are_one_line(serve, tmp_path, capsys):
    from dtr_vllm import sizing

    assert sizing.main([str(tmp_path)]) == 1
    save_hybrid(tiny_hybrid("llama", (None, "gla"), 64, 3, hidden=192), None, tmp_path)
    assert sizing.main([str(tmp_path), "--dtype", "float32", "--mamba-ssm-cache-dtype", "float16"]) == 1
    # What saving the model prints is there, too.
    first, second = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sizing: ")]
    assert "no config.json there" in first and "a recurrent state in float16 is not supported" in second
