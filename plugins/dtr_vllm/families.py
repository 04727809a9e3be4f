"""How the three families differ: biases, QK-norm, and vLLM's decoder layer for layers that kept attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer


@dataclass(frozen=True)
class Family:
    """How a family's projections differ from the others', and vLLM's decoder layer for layers that kept attention."""

    full_attention_layer: Callable[[VllmConfig, str], nn.Module]
    qkv_bias: Callable[[Any], bool]
    output_bias: Callable[[Any], bool]
    qk_norm: bool = False


def _qwen_layer(layer: type[nn.Module]) -> Callable[[VllmConfig, str], nn.Module]:
    def build(vllm_config: VllmConfig, prefix: str) -> nn.Module:
        return layer(
            config=vllm_config.model_config.hf_config,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )

    return build


FAMILIES = {
    "dtr_llama": Family(
        lambda vllm_config, prefix: LlamaDecoderLayer(vllm_config, prefix),
        qkv_bias=lambda config: config.attention_bias,
        output_bias=lambda config: config.attention_bias,
    ),
    "dtr_qwen2": Family(_qwen_layer(Qwen2DecoderLayer), qkv_bias=lambda config: True, output_bias=lambda config: False),
    "dtr_qwen3": Family(
        _qwen_layer(Qwen3DecoderLayer),
        qkv_bias=lambda config: config.attention_bias,
        output_bias=lambda config: False,
        qk_norm=True,
    ),
}
