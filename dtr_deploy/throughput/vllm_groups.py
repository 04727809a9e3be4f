"""How many KV-cache groups vLLM makes of a layout, asked of vLLM itself, without starting an engine.

vLLM packs layers into groups of equal size, and every group costs a metadata build a step: 28 attention and 2 linear
layers make 15 groups, 15 and 15 make 2. The rules change between releases, so nothing is derived here. Optional:
without vLLM, or with a release whose internals moved, there is no count, and the cost model does without one.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.throughput.cost_model import GroupCount


def vllm_group_count(kv_heads: int, head_dim: int, state_bytes: int, max_model_len: int) -> GroupCount | None:
    """Layout -> number of groups, or None if vLLM cannot be asked here.

    kv_heads, head_dim: of the backbone's attention. state_bytes: of one sequence's state in one linear layer (all
    linear layers keep theirs in pages of one and the same size). max_model_len: tokens.
    """

    @cache
    def count(layers: int, linear: int) -> int:
        return _count_groups(layers, linear, kv_heads, head_dim, state_bytes, max_model_len)

    try:
        count(4, 2)
    except (ImportError, AttributeError, TypeError, KeyError):
        return None
    return lambda layout: _of(layout, count)


def _of(layout: Layout, count: Any) -> int:
    return count(len(layout), replaced(layout))


def _count_groups(layers: int, linear: int, kv_heads: int, head_dim: int, state_bytes: int, max_model_len: int) -> int:
    """vLLM's own grouping on a stub of its configuration: float32 KV in blocks as large as a state page."""
    import torch
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec
    from vllm.v1.kv_cache_layout import KVCacheLayout

    layout = KVCacheLayout["LBNHC"]
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        cache_config=SimpleNamespace(
            mamba_cache_mode="align",
            get_resolved_kv_cache_layout=lambda: layout,
            num_gpu_blocks_override=None,
            prefix_cache_retention_interval=0,
        ),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, tensor_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )
    sizes = {"num_kv_heads": kv_heads, "head_size": head_dim, "dtype": torch.float32}
    token_bytes = FullAttentionSpec(block_size=1, **sizes).page_size_bytes
    # vLLM grows the attention block until its page holds a linear layer's state, in steps of 16 tokens.
    block = 16 * -(-state_bytes // (16 * token_bytes))
    attention = FullAttentionSpec(block_size=block, **sizes)
    state = MambaSpec(
        block_size=block,
        shapes=((state_bytes,),),
        dtypes=(torch.int8,),
        page_size_padded=attention.page_size_bytes,
        mamba_cache_mode="align",
    )
    names = [f"model.layers.{index}.self_attn" for index in range(layers)]
    specs = {name: state if index < linear else attention for index, name in enumerate(names)}
    return len(kv_cache_utils.get_kv_cache_groups(config, specs))
