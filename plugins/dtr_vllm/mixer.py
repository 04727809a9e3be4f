"""The linear mixer in vLLM: a replaced layer's projections, QK-norm and RoPE around a form and its state page.

The form is the module that the Hugging Face hybrid runs; the operators here are its serving forms, over pages.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from dtr_deploy.hybrid.layout import Entry
from dtr_kernels.conv import dynamic_conv_packed, dynamic_conv_step
from dtr_kernels.forms import Form, make_form
from dtr_kernels.gpu import on_gpu
from dtr_kernels.operator import GPU_POOL_DTYPES, linear_attention_packed, linear_attention_step
from dtr_kernels.pack_plan import products_of
from dtr_kernels.window import window_attention_packed, window_attention_step
from dtr_vllm.families import FAMILIES
from dtr_vllm.layout import StatePage, local_sizes, page_size
from dtr_vllm.metadata import DtrBackend, DtrMetadata, Prefills


class LinearMixer(nn.Module, MambaBase):
    """The attention module of a replaced layer: projections, QK-norm and RoPE around a form and its state page.

    vLLM sees the state as one row of bytes per sequence and layer (`StatePage`). The window branch keeps token p in row
    p % W of its ring and the convolution its last rows oldest first, so a page copied as it is (prefix caching) stays
    right.
    """

    def __init__(self, vllm_config: VllmConfig, entry: Entry, prefix: str) -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        family = FAMILIES[config.model_type]
        sizes = local_sizes(config, entry.window, get_tensor_model_parallel_world_size())
        self.layer_name, self.dtype = prefix, vllm_config.model_config.dtype
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
        self.form = make_form(entry.form, sizes)
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
        self.step_plan = self.form.bind_step(self.state, self.dtype)  # weights are loaded by now

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.unflatten(-1, (self.num_heads, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (self.num_kv_heads, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        out = torch.empty_like(q)
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
        CUDA graphs), and all of them without metadata (vLLM's memory profile), become zeros.
        """
        all_metadata = get_forward_context().attn_metadata
        if all_metadata is None:
            out.zero_()
            return
        assert isinstance(all_metadata, dict)
        step: DtrMetadata = all_metadata[self.layer_name]
        decodes = step.num_decode_tokens
        tokens = decodes + step.num_prefill_tokens
        q, heads_out = q.view(-1, self.num_heads, self.head_dim), out.view(-1, self.num_heads, self.head_dim)
        k, v = k.view(-1, self.num_kv_heads, self.head_dim), v.view(-1, self.num_kv_heads, self.head_dim)
        if tokens < len(q):
            out[tokens:].zero_()
        if decodes:
            rows = slice(decodes)
            slots = _decode_slots(step)
            self._decode(slots, q[rows], k[rows], v[rows], hidden[rows], positions[rows], heads_out[rows])
        if step.prefills is not None:
            rows = slice(decodes, tokens)
            heads_out[rows] = self._prefill(step.prefills, q[rows], k[rows], v[rows], hidden[rows], out.dtype)

    def _decode(
        self,
        slots: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """One token a sequence: q [R, Hq, D], k, v [R, Hkv, D] -> the heads' output, out [R, Hq, D]."""
        form, state = self.form, self.state
        if self.step_plan is not None:
            form.step(self.step_plan, q, k, v, hidden, slots=slots, positions=positions, out=out)
            return
        taps = form.taps(hidden)
        values = v if taps is None else dynamic_conv_step(v, taps, pool=state["conv"], slots=slots)
        if on_gpu(q) and form.step_gates() is not None and state["recurrent"].dtype in GPU_POOL_DTYPES:
            from dtr_kernels.triton import mixer_step

            mixer_step(form, state, q, k, v, values, hidden, slots=slots, positions=positions, out=out)
            return
        o = form.operands(q, k, values, hidden)
        linear = linear_attention_step(
            o.q,
            o.k,
            o.v,
            rule=form.rule,
            log_decay=o.log_decay,
            beta=o.beta,
            scale=form.scale,
            pool=state["recurrent"],
            slots=slots,
        )
        heads = form.readout(linear, hidden)
        if self.window:
            heads = window_attention_step(
                q,
                k,
                v,
                window=self.window,
                scale=self.head_dim**-0.5,
                ring_k=state["window_k"],
                ring_v=state["window_v"],
                slots=slots,
                positions=positions,
                rest=form.rest(heads),
            )
        out.copy_(heads)

    def _prefill(
        self,
        prefills: Prefills,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Ragged prompts, or further chunks of them: q [N, Hq, D], k, v [N, Hkv, D] -> the heads' output [N, Hq, D]."""
        form, state, taps = self.form, self.state, self.form.taps(hidden)
        slots, borders = prefills.slots, prefills.cu_seqlens
        started = prefills.start > 0  # pages are never cleared: others start from zeros
        values = v
        if taps is not None:
            values = dynamic_conv_packed(
                v, taps, pool=state["conv"], slots=slots, cu_seqlens=borders, has_initial_state=started
            )
        o = form.operands(q, k, values, hidden)
        linear = linear_attention_packed(
            o.q,
            o.k,
            o.v,
            rule=form.rule,
            log_decay=o.log_decay,
            beta=o.beta,
            scale=form.scale,
            pool=state["recurrent"],
            slots=slots,
            cu_seqlens=borders,
            has_initial_state=started,
            products=products_of(q.dtype),
            plan=prefills.plan,
        )
        heads = form.readout(linear, hidden)
        if self.window:
            heads = window_attention_packed(
                q,
                k,
                v,
                window=self.window,
                scale=self.head_dim**-0.5,
                ring_k=state["window_k"],
                ring_v=state["window_v"],
                slots=slots,
                cu_seqlens=borders,
                start=prefills.start,
                rest=form.rest(heads),
                plan=prefills.plan,
            )
        return heads.to(dtype)


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
