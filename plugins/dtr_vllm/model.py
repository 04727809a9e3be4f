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

from dtr_kernels.forms import FORMS
from dtr_vllm.families import FAMILIES
from dtr_vllm.layout import page_size
from dtr_vllm.mixer import MIXER_OP, LinearMixer


class LinearDecoderLayer(nn.Module):
    """A decoder layer whose attention was replaced."""

    def __init__(self, vllm_config: VllmConfig, form_name: str, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = LinearMixer(vllm_config, form_name, f"{prefix}.self_attn")
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
        if residual is None:
            residual = hidden_states
            hidden_states = self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


def decoder_layer(vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Layer `prefix` of the layout: vLLM's own decoder layer of the family, or the one with a form."""
    config = vllm_config.model_config.hf_config
    form_name = config.forms[extract_layer_index(prefix)]
    if form_name is None:
        return FAMILIES[config.model_type].full_attention_layer(vllm_config, prefix)
    return LinearDecoderLayer(vllm_config, form_name, prefix)


class DtrForCausalLM(LlamaForCausalLM, HasInnerState, IsHybrid, SupportsMambaPrefixCaching):
    """vLLM's Llama around the layout's layers. Embedding, final norm, head and loading are the same in all families."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse_unsupported(vllm_config)
        compilation = vllm_config.compilation_config
        if compilation.splitting_ops and MIXER_OP not in compilation.splitting_ops:
            # Piecewise CUDA graphs are cut at attention operators; this is one.
            compilation.splitting_ops.append(MIXER_OP)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=decoder_layer)  # type: ignore[arg-type]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        return ((page_size(vllm_config),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, ...]:
        return (get_temporal_copy_spec,)


class DtrLlamaForCausalLM(DtrForCausalLM):
    """Llama with replaced layers (model_type "dtr_llama")."""


class DtrQwen2ForCausalLM(DtrForCausalLM):
    """Qwen2 with replaced layers (model_type "dtr_qwen2"): biases on q, k and v."""


class DtrQwen3ForCausalLM(DtrForCausalLM):
    """Qwen3 with replaced layers (model_type "dtr_qwen3"): RMS norm on the heads of q and k before RoPE."""


def refuse_unsupported(vllm_config: VllmConfig) -> None:
    """Stop, with one line, what would compute wrong tokens or what nothing here has been tested with.

    Raises:
        ValueError: the first unsupported option found, and what to do instead.
    """
    config = vllm_config.model_config.hf_config
    config.check_dtr()
    for layer, form in enumerate(config.forms):
        if form is not None and form not in FORMS:
            raise ValueError(f"config.json: dtr.forms[{layer}] is {form!r}: accepted are null, {', '.join(FORMS)}")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    if vllm_config.speculative_config is not None:
        raise ValueError(
            "dtr_vllm: speculative decoding is not supported, rejected tokens would stay in the state of linear "
            "layers: start without --speculative-config"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "dtr_vllm: LoRA is not supported on hybrids: start without --enable-lora, or merge the adapter into the "
            "backbone before distilling"
        )
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise ValueError(
            "dtr_vllm: context parallelism is not supported: leave --decode-context-parallel-size and "
            "--prefill-context-parallel-size at 1"
        )
    if vllm_config.cache_config.use_replayssm:
        raise ValueError("dtr_vllm: ReplaySSM is for Mamba2 layers: start without --use-replayssm")
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"dtr_vllm: --tensor-parallel-size {ranks} does not fit {heads} query and {kv_heads} kv heads: it must "
            "divide the query heads, and divide the kv heads or be a multiple of them"
        )
    if config.model_type == "dtr_qwen3" and config.attention_bias:
        raise ValueError("dtr_vllm: Qwen3 with attention_bias is not supported: vLLM's Qwen3 has no output bias")
