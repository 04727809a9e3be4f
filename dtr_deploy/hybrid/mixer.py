"""The linear mixer that takes the place of a layer's attention in the Hugging Face model.

It owns what the teacher had (projections with their biases, QK-norm, rotary embedding), so that weights are inherited
name by name, and a form that does the rest.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dtr_deploy.hybrid.layout import parse_entry
from dtr_kernels.compiled import rows
from dtr_kernels.compiled.library import disabled
from dtr_kernels.conv import dynamic_conv
from dtr_kernels.forms import FormConfig, make_form
from dtr_kernels.operator import linear_attention
from dtr_kernels.window import window_attention

# Indices of a linear layer's states in transformers' cache; as many as `HybridConfigMixin.number_of_conv_states` says.
RECURRENT, WINDOW, CONV = 0, 1, 2


def form_config(config: Any, window: int) -> FormConfig:
    """Sizes of a mixer of a Llama, Qwen2 or Qwen3 configuration."""
    return FormConfig(
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        window=window,
    )


class HybridMixer(nn.Module):
    """Linear attention with a layer's inherited projections, and a softmax window mixed in if the form has one.

    Args:
        teacher: the attention module it replaces; its projections and norms are shared, not copied.
        config: the model's configuration.
        form: the form's name, or FORM@WINDOW (`hybrid.layout`).
        window: tokens of the softmax branch, 0 for none, where `form` does not name them.
        layer_idx: index in the cache.
    """

    def __init__(self, teacher: nn.Module, config: Any, form: str, window: int, layer_idx: int) -> None:
        super().__init__()
        form, window = parse_entry(form, window)
        self.layer_idx = layer_idx
        self.sizes = form_config(config, window)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            getattr(teacher, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.q_norm: nn.Module | None = getattr(teacher, "q_norm", None)
        self.k_norm: nn.Module | None = getattr(teacher, "k_norm", None)
        self.form = make_form(form, self.sizes)
        # Which implementation of the operator computes; "reference" is the token loop in float64. Parity sets it.
        self.backend = "auto"

    def project(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """hidden_states [B,T,hidden], position_embeddings = cos, sin [B or 1,T,D] -> q [B,T,Hq,D], k, v [B,T,Hkv,D],
        normalised (Qwen3) and rotated as the teacher does."""
        c = self.sizes
        q = self.q_proj(hidden_states).unflatten(-1, (c.num_heads, c.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (c.num_kv_heads, c.head_dim))
        v = self.v_proj(hidden_states).unflatten(-1, (c.num_kv_heads, c.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = position_embeddings
        if rows.fits(q, k, cos, sin):
            dtype = torch.promote_types(q.dtype, cos.dtype)  # as below; under autocast q is narrow and cos is not
            return rows.rotary(q, cos, sin).to(dtype), rows.rotary(k, cos, sin).to(dtype), v
        q, k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
        return q, k, v

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B,T,hidden]; attention_mask [B,T], 1 = token, or None; -> ([B,T,hidden], None)."""
        # Another backend is there to check the kernels, so nothing around the operator may use them either.
        with disabled(self.backend not in ("auto", "compiled", "triton")):
            q, k, v = self.project(hidden_states, position_embeddings)
            states = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            mask = None if attention_mask is None else attention_mask.bool()
            # Autocast is for the large projections: decays, states and norms stay in float32.
            with torch.autocast(hidden_states.device.type, enabled=False):
                out = self._attend(q, k, v, hidden_states, states, mask)
        return self.o_proj(out), None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor, states: Any, mask: Tensor | None
    ) -> Tensor:
        """Linear branch and window, [B,T,Hq*D] in the input's dtype; `states` is its cache layer."""
        started = states is not None and states.is_recurrent_states_initialized[RECURRENT]
        taps, values, conv = self.form.taps(hidden_states), v, None
        if taps is not None:
            values, conv = dynamic_conv(v, taps, past=states.recurrent_states[CONV] if started else None, mask=mask)
        op = self.form.operands(q, k, values, hidden_states)
        if mask is not None:
            op = _masked(op, mask)
        if self.backend == "reference":
            op = op._replace(**{name: x.double() for name, x in op._asdict().items() if x is not None})
        out, recurrent = linear_attention(
            op.q,
            op.k,
            op.v,
            rule=self.form.rule,
            log_decay=op.log_decay,
            beta=op.beta,
            scale=self.form.scale,
            state=states.recurrent_states[RECURRENT] if started else None,
            backend=self.backend,
        )
        out, window = self.form.readout(out, hidden_states), None
        if self.sizes.window:
            out, window = window_attention(
                q,
                k,
                v,
                window=self.sizes.window,
                past=states.recurrent_states[WINDOW] if started else None,
                mask=mask,
                rest=self.form.rest(out),
                return_past=states is not None,
            )
        if states is not None:
            _store(states, {RECURRENT: recurrent, WINDOW: window, CONV: conv})
        return out.to(hidden_states.dtype).flatten(-2)


def _masked(op: Any, mask: Tensor) -> Any:
    """Operands under which a padding token leaves the state as it was: no decay, no key, no write."""
    m = mask[..., None].to(op.k.dtype)
    decay = op.log_decay
    if decay is not None:
        decay = decay * (m if decay.ndim == 3 else m[..., None])
    return op._replace(k=op.k * m[..., None], log_decay=decay, beta=None if op.beta is None else op.beta * m)


def _store(states: Any, values: Mapping[int, Tensor | None]) -> None:
    """Write a layer's states, by index, into transformers' cache layer."""
    for index, value in values.items():
        if value is not None:
            if index == RECURRENT:
                states.device, states.dtype = value.device, value.dtype  # reorder_cache needs the device
            states.update_recurrent_state(value, index)
        states.has_previous_state[index] = True


def own_parameters(mixer: HybridMixer, weights: Mapping[str, Tensor] | None = None) -> None:
    """Give the mixer projections and norms of its own in place of those it shares with its teacher.

    weights: by name as in `mixer.state_dict()`, used as they are if they lie on the teacher's device; None copies the
        teacher's.
    """
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
        shared = getattr(mixer, name)
        if shared is None:
            continue
        own = copy.copy(shared)
        own._parameters = {
            key: None
            if p is None
            else nn.Parameter(weights[f"{name}.{key}"].to(p.device) if weights else p.detach().clone())
            for key, p in shared._parameters.items()
        }
        setattr(mixer, name, own)
