"""Hybrids of full and linear attention for vLLM: Llama, Qwen2 and Qwen3.

Layers that kept full attention are vLLM's own decoder layers. A replaced layer keeps the family's projections, biases,
QK-norm, RoPE and MLP, and has a form of `dtr_kernels` in the place of attention: the code the Hugging Face hybrid runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, get_temporal_copy_spec
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsMambaPrefixCaching
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from dtr_kernels.forms import FORMS, Form, Operands, make_form
from dtr_kernels.operator import linear_attention_packed, linear_attention_step
from dtr_kernels.window import window_attention_packed, window_attention_step
from dtr_vllm.layout import StatePage, local_sizes, page_size
from dtr_vllm.metadata import DtrBackend, DtrMetadata


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


class LinearMixer(nn.Module, MambaBase):
    """The attention module of a replaced layer: projections, QK-norm and RoPE around a form and its state page.

    vLLM sees the state as one row of bytes per sequence and layer (`StatePage`). The window branch keeps token p in row
    p % W of its ring, so a page copied as it is (prefix caching) stays right.
    """

    def __init__(self, vllm_config: VllmConfig, form_name: str, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        family = FAMILIES[config.model_type]
        sizes = local_sizes(config, get_tensor_model_parallel_world_size())
        self.layer_name = prefix
        self.num_heads, self.num_kv_heads, self.head_dim = sizes.num_heads, sizes.num_kv_heads, sizes.head_dim
        self.window = sizes.window
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            self.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=family.qkv_bias(config),
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            bias=family.output_bias(config),
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if family.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps) if family.qk_norm else None
        self.rotary_emb = get_rope(
            self.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.form = make_form(form_name, sizes)
        shard_form_weights(self.form, config.num_key_value_heads)

        self.page = StatePage.of(self.form, vllm_config)
        self.page_bytes = page_size(vllm_config)
        self.kv_cache = (torch.tensor([]),)
        layers = vllm_config.compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    # What MambaBase asks for. Any `mamba_type` serves: the backend is named here, and the copy functions are per model.
    mamba_type = MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self) -> type[DtrBackend]:
        return DtrBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        (pages,) = self.kv_cache
        self.state = self.page.views(pages)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        out = torch.zeros_like(q)
        torch.ops.vllm.dtr_linear_mixer(q, k, v, hidden_states, positions, out, self.layer_name)
        out, _ = self.o_proj(out)
        return out

    def mix(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """The form over the tokens of this step, written to `out`; reads and writes the state pages.

        q, out [N, Hq*D], k, v [N, Hkv*D], hidden [N, hidden], positions [N]. Rows past the step's tokens (padding of
        CUDA graphs) are left as they are. Without metadata (vLLM's memory profile) nothing happens.
        """
        all_metadata = get_forward_context().attn_metadata
        if all_metadata is None:
            return
        assert isinstance(all_metadata, dict)
        step: DtrMetadata = all_metadata[self.layer_name]
        tokens = step.num_decode_tokens + step.num_prefill_tokens
        hidden = hidden[:tokens]
        q = q[:tokens].unflatten(-1, (self.num_heads, self.head_dim))
        k = k[:tokens].unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = v[:tokens].unflatten(-1, (self.num_kv_heads, self.head_dim))

        linear = self._linear(step, self.form.operands(q, k, v, hidden))
        window = self._window(step, q, k, v, positions) if self.window else None
        mixed = self.form.mix(self.form.readout(linear, hidden), window)
        out[:tokens] = mixed.flatten(-2).to(out.dtype)

    def _linear(self, step: DtrMetadata, operands: Operands) -> torch.Tensor:
        """The operator's outputs [N, Hq, D] float32: one step for the decodes, then the packed prefills."""
        rule, scale, pool = self.form.rule, self.form.scale, self.state["recurrent"]
        decodes, outs = step.num_decode_tokens, []
        if decodes:
            q, k, v, log_decay, beta = _rows(operands, slice(decodes))
            slots = _decode_slots(step)
            outs.append(
                linear_attention_step(
                    q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, pool=pool, slots=slots
                )
            )
        if step.prefills is not None:
            q, k, v, log_decay, beta = _rows(operands, slice(decodes, None))
            outs.append(
                linear_attention_packed(
                    q,
                    k,
                    v,
                    rule=rule,
                    log_decay=log_decay,
                    beta=beta,
                    scale=scale,
                    pool=pool,
                    slots=step.prefills.slots,
                    cu_seqlens=step.prefills.cu_seqlens,
                    has_initial_state=step.prefills.start > 0,  # pages are never cleared: others start from zeros
                )
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _window(
        self, step: DtrMetadata, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Softmax attention over the last W tokens, [N, Hq, D] in q's dtype."""
        window, scale = self.window, self.head_dim**-0.5
        ring_k, ring_v = self.state["window_k"], self.state["window_v"]
        decodes, outs = step.num_decode_tokens, []
        if decodes:
            outs.append(
                window_attention_step(
                    q[:decodes],
                    k[:decodes],
                    v[:decodes],
                    window=window,
                    scale=scale,
                    ring_k=ring_k,
                    ring_v=ring_v,
                    slots=_decode_slots(step),
                    positions=positions[:decodes],
                )
            )
        if step.prefills is not None:
            outs.append(
                window_attention_packed(
                    q[decodes:],
                    k[decodes:],
                    v[decodes:],
                    window=window,
                    scale=scale,
                    ring_k=ring_k,
                    ring_v=ring_v,
                    slots=step.prefills.slots,
                    cu_seqlens=step.prefills.cu_seqlens,
                    start=step.prefills.start,
                )
            )
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _rows(o: Operands, rows: slice) -> Operands:
    decay, beta = (x if x is None else x[rows] for x in (o.log_decay, o.beta))
    return Operands(o.q[rows], o.k[rows], o.v[rows], decay, beta)


def _decode_slots(step: DtrMetadata) -> torch.Tensor:
    """[decodes] pages of the decoding sequences; 0, vLLM's null page, in rows that pad a CUDA graph."""
    assert step.state_indices_tensor_d is not None
    return step.state_indices_tensor_d[: step.num_decode_tokens, 0]


def shard_form_weights(form: Form, total_kv_heads: int) -> None:
    """Give the form's parameters weight loaders that take this tensor-parallel rank's heads from the checkpoint.

    Query heads are split evenly. kv heads too, or each is repeated on neighbouring ranks when there are more ranks than
    kv heads, as QKVParallelLinear does. Parameters the form does not list in SHARD are replicated.
    """
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    pieces = {"q": rank, "kv": rank // max(1, ranks // total_kv_heads)}
    for name, parameter in form.named_parameters():
        if name in form.SHARD:
            heads, dim = form.SHARD[name]
            set_weight_attrs(parameter, {"weight_loader": _piece_loader(dim, pieces[heads])})


def _piece_loader(dim: int, piece: int) -> Callable[[nn.Parameter, torch.Tensor], None]:
    def load(parameter: nn.Parameter, weight: torch.Tensor) -> None:
        size = parameter.shape[dim]
        default_weight_loader(parameter, weight.narrow(dim, piece * size, size))

    return load


def dtr_linear_mixer(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.mix(q, k, v, hidden_states, positions, out)


# An operator of its own: to torch.compile the reads and writes of state pages are one opaque step.
direct_register_custom_op(op_name="dtr_linear_mixer", op_func=dtr_linear_mixer, mutates_args=["out"])
MIXER_OP = "vllm::dtr_linear_mixer"


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
