"""Block sizes and bytes a sequence that vLLM gives base and hybrid, for the shapes of known models; no weights needed.

    python -m benchmarks.serving_memory
    python -m benchmarks.serving_memory --models Qwen2.5-1.5B --forms gated_deltanet --window 0

Every number comes from vLLM and from the plugin's own layers (`dtr_vllm.sizing`). Every second layer is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_kernels.forms import FORMS

if TYPE_CHECKING:
    from dtr_vllm.sizing import Sizing

# Family, layers, hidden and intermediate size, query heads, kv heads, head size; from their published configurations.
SHAPES: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "SmolLM2-135M": ("llama", 30, 576, 1536, 9, 3, 64),
    "Qwen2.5-1.5B": ("qwen2", 28, 1536, 8960, 12, 2, 128),
    "Qwen3-1.7B": ("qwen3", 28, 2048, 6144, 16, 8, 128),
    "Llama-3.2-3B": ("llama", 28, 3072, 8192, 24, 8, 128),
    "Llama-3.1-8B": ("llama", 32, 4096, 14336, 32, 8, 128),
}
VOCABULARY = 1024  # does not matter for caches
TOKENS = (1024, 8192, 32768)


def write_config(folder: Path, model: str, form: str | None, window: int) -> None:
    """config.json of a model with these shapes, every second layer replaced by `form`; None: the backbone itself."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    from dtr_deploy.hybrid.config import hybrid_config

    family, layers, hidden, intermediate, heads, kv_heads, head_dim = SHAPES[model]
    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max(TOKENS),
        architectures=[family.capitalize() + "ForCausalLM"],
    )
    if form is not None:
        config = hybrid_config(config, tuple(None if layer % 2 == 0 else form for layer in range(layers)), window)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def measure(model: str, form: str | None, window: int, **engine_options: Any) -> Sizing:
    """`dtr_vllm.sizing.sizing` of these shapes."""
    from dtr_vllm.sizing import sizing

    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), model, form, window)
        return sizing(folder, TOKENS, **engine_options)


def row(model: str, form: str | None, window: int, size: Sizing) -> list[str]:
    mib = [f"{count / 2**20:,.1f}" for count in size.sequence_bytes.values()]
    state = f"{size.state_bytes / 1024:,.0f}" if form else ""
    name = f"{form}, window {window}" if form and window else form or "none (base)"
    return [model, name, f"{size.block_tokens}", state, f"{size.page_bytes / 1024:,.0f}", *mib]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--mamba-ssm-cache-dtype", default="auto")
    chosen = parser.parse_args(arguments)
    if chosen.window < 0:
        parser.error("argument --window: accepted are tokens, 0 for none")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    header = ["shapes of", "form", "block", "state KiB", "page KiB", *(f"MiB at {length:,}" for length in TOKENS)]
    print("\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header))))
    for model in chosen.models:
        for form in (None, *chosen.forms):
            size = measure(
                model, form, chosen.window, dtype=chosen.dtype, mamba_ssm_cache_dtype=chosen.mamba_ssm_cache_dtype
            )
            print(f"| {' | '.join(row(model, form, chosen.window, size))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
