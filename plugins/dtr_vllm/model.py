"""Hybrids of full and linear attention for vLLM: Llama, Qwen2 and Qwen3.

Layers that kept full attention are vLLM's own decoder layers. A replaced layer keeps the family's projections, biases,
QK-norm, RoPE and MLP, and has a form of `dtr_kernels` in the place of attention (`dtr_vllm.mixer`).
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.llama import LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from dtr_deploy.hybrid.layout import Entry
from dtr_vllm.cpu_seeds import keep_seeds_out_of_partial_prefills
from dtr_vllm.families import FAMILIES
from dtr_vllm.layer_parts import add_norm, gated_mlp
from dtr_vllm.layout import page_size
from dtr_vllm.mixer import MIXER_OP, LinearMixer
from dtr_vllm.startup import refuse_unsupported, requested_state_dtype


class LinearDecoderLayer(nn.Module):
    """A decoder layer whose attention was replaced."""

    def __init__(self, vllm_config: VllmConfig, entry: Entry, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = LinearMixer(vllm_config, entry, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=getattr(config, "mlp_bias", False),
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_states, residual = add_norm(self.input_layernorm, hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = add_norm(self.post_attention_layernorm, hidden_states, residual)
        return gated_mlp(self.mlp, hidden_states), residual


def decoder_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Layer `prefix` of the layout: vLLM's own decoder layer of the family, or the one with a form."""
    config = vllm_config.model_config.hf_config
    entry = config.entries[extract_layer_index(prefix)]
    if entry is None:
        return FAMILIES[config.model_type].full_attention_layer(vllm_config, prefix)
    return LinearDecoderLayer(vllm_config, entry, prefix)


class DtrForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """vLLM's Llama around the layout's layers. Embedding, final norm, head and loading are the same in all families."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse_unsupported(vllm_config)
        if current_platform.is_cpu():
            keep_seeds_out_of_partial_prefills()
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops and MIXER_OP not in compilation.splitting_ops:
            # Piecewise CUDA graphs are cut at attention operators; this is one.
            compilation.splitting_ops.append(MIXER_OP)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=decoder_layer)  # type: ignore[arg-type]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """The page as a row of bytes, and an empty part that only carries the dtype below."""
        return ((page_size(vllm_config),), (0,))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """Bytes, and what the recurrent state in them is stored in. On CPUs with AVX512-BF16 vLLM sets
        `--mamba-ssm-cache-dtype` back to float32 unless the second of two dtypes here is the one asked for."""
        return (torch.int8, STR_DTYPE_TO_TORCH_DTYPE[requested_state_dtype(vllm_config)])

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return (get_temporal_copy_spec,)


class DtrLlamaForCausalLM(DtrForCausalLM):
    """Llama with replaced layers (model_type "dtr_llama")."""


class DtrQwen2ForCausalLM(DtrForCausalLM):
    """Qwen2 with replaced layers (model_type "dtr_qwen2"): biases on q, k and v."""


class DtrQwen3ForCausalLM(DtrForCausalLM):
    """Qwen3 with replaced layers (model_type "dtr_qwen3"): RMS norm on the heads of q and k before RoPE."""
