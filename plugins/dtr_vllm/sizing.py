"""What vLLM will allocate for a checkpoint, asked of vLLM and of the layers themselves: no weights, no engine.

    python -m dtr_vllm.sizing FOLDER --dtype bfloat16 --tokens 1024 8192 32768

The model is built without storage, its layers name their caches, and vLLM's own code makes blocks, groups and bytes of
them, as it does when an engine starts. A config.json is enough.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dtr_deploy.errors import UsageError

TOKENS = (1024, 8192, 32768)


@dataclass(frozen=True)
class Sizing:
    """Caches of one checkpoint on one rank."""

    block_tokens: int
    """Tokens of an attention block, which is also the step in which prefixes are cached."""
    groups: int
    """Groups of layers that share block tables; each costs a metadata build a step."""
    linear_layers: int
    attention_layers: int
    state_bytes: int
    """One sequence's state in one linear layer; 0 without linear layers."""
    page_bytes: int
    """What the allocator gives a layer for it: the page of an attention block."""
    kv_bytes_per_token: int
    """Keys and values of one token in one attention layer."""
    sequence_bytes: dict[int, int]
    """Length of a sequence in tokens -> bytes it takes from the pool, padding included."""


def sizing(folder: str | Path, tokens: tuple[int, ...] = TOKENS, **engine_options: Any) -> Sizing:
    """Size the checkpoint `folder`, a hybrid or an ordinary backbone, for sequences of these lengths.

    engine_options: those of `vllm.LLM`, such as dtype, mamba_ssm_cache_dtype, enable_prefix_caching.

    Raises:
        UsageError: the options are refused for hybrids.
    """
    import dtr_vllm

    dtr_vllm.register()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts, resolve_kv_cache_layout
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

    options = {"skip_tokenizer_init": True, "load_format": "dummy", "enforce_eager": True, **engine_options}
    config = EngineArgs(model=str(folder), **options).create_engine_config()
    with _layers(config) as layers:
        current_platform.update_block_size_for_backend(config)
        specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
        backends = {layer.get_attn_backend() for layer in layers.values()}
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(config, [layouts], specs.values())
    states = [spec for spec in specs.values() if isinstance(spec, MambaSpec)]
    caches = [spec for spec in specs.values() if isinstance(spec, FullAttentionSpec)]
    groups = kv_cache_utils.get_kv_cache_groups(config, specs)
    sequences = {}
    for length in tokens:
        config.model_config.max_model_len = length
        sequences[length] = kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)
    return Sizing(
        block_tokens=config.cache_config.block_size,
        groups=len(groups),
        linear_layers=len(states),
        attention_layers=len(caches),
        state_bytes=max((spec.state_content_size_bytes for spec in states), default=0),
        page_bytes=caches[0].page_size_bytes,
        kv_bytes_per_token=caches[0].page_size_bytes // caches[0].block_size,
        sequence_bytes=sequences,
    )


@contextmanager
def _layers(config: Any) -> Iterator[dict[str, Any]]:
    """The model's layers that have a cache, by name, built on the meta device in a world of one process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    # vLLM keeps rotary embeddings for the next model; one without storage must not be among them.
    no_ropes = patch.dict(rotary_embedding._ROPE_DICT, clear=True)
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config), no_ropes:
        init_distributed_environment(1, 0, f"file://{scratch}/store", 0, "gloo")
        try:
            ensure_model_parallel_initialized(1, 1)
            with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
                initialize_model(config)
            context = config.compilation_config.static_forward_context
            yield {name: layer for name, layer in context.items() if isinstance(layer, AttentionLayerBase)}
        finally:
            cleanup_dist_env_and_memory()


def describe(size: Sizing) -> str:
    """`Sizing` in words."""
    kib = 1024
    lines = [
        f"layers              {size.attention_layers} attention, {size.linear_layers} linear, in {size.groups} groups",
        f"attention block     {size.block_tokens} tokens",
        f"page                {size.page_bytes / kib:,.1f} KiB a layer",
        f"state               {size.state_bytes / kib:,.1f} KiB a sequence and linear layer",
        f"keys and values     {size.kv_bytes_per_token / kib:,.2f} KiB a token and attention layer",
    ]
    for length, count in size.sequence_bytes.items():
        lines.append(f"{length:>7,} tokens      {count / 2**20:,.1f} MiB a sequence")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dtr_vllm.sizing", description="What vLLM will allocate.")
    parser.add_argument("folder", help="checkpoint; its config.json is enough")
    parser.add_argument("--dtype", default="auto", help="of the model")
    parser.add_argument("--mamba-ssm-cache-dtype", default="auto", help="of the recurrent state")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of keys and values")
    parser.add_argument("--no-enable-prefix-caching", dest="prefix_caching", action="store_false")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="lengths of sequences")
    chosen = parser.parse_args(arguments)
    if min(chosen.tokens) < 1:
        parser.error("argument --tokens: accepted are 1 or more")
    if not (Path(chosen.folder) / "config.json").is_file():
        print(f"sizing: {chosen.folder}: no config.json there", file=sys.stderr)
        return 1
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        size = sizing(
            chosen.folder,
            tuple(chosen.tokens),
            dtype=chosen.dtype,
            mamba_ssm_cache_dtype=chosen.mamba_ssm_cache_dtype,
            kv_cache_dtype=chosen.kv_cache_dtype,
            enable_prefix_caching=chosen.prefix_caching,
        )
    except UsageError as error:
        print(f"sizing: {error}", file=sys.stderr)
        return 1
    print(describe(size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
