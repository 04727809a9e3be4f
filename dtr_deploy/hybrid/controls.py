"""Controls that a linear form is compared with: layers without attention, and layers with the teacher's window alone.

A hybrid shows what its linear branches are worth only beside the same layers without them. Controls run like any model
of transformers, `generate` and caches included; they are measured, not exported. Padding has to be on the right, where
causal attention does not see it.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

from torch import Tensor, nn
from transformers import Cache

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import Layout, entries
from dtr_deploy.hybrid.mixer import HybridMixer
from dtr_kernels.window import window_attention

Control = Literal["no_op", "window_only"]
CONTROLS: tuple[Control, ...] = ("no_op", "window_only")


class NoAttention(nn.Module):
    """In place of a layer's attention: zeros, so that only the residual stream and the MLP are left."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, past_key_values: Cache | None = None, **_: Any) -> tuple[Tensor, None]:
        """hidden_states [B,T,hidden] -> (zeros [B,T,hidden], None)."""
        if past_key_values is not None:
            # Layer 0's cache says how many tokens a sequence has, so it has to grow here too: one number a token.
            place = hidden_states.new_zeros(*hidden_states.shape[:2], 1)[:, None]
            past_key_values.update(place, place, self.layer_idx)
        return hidden_states.new_zeros(hidden_states.shape), None


class WindowAttention(nn.Module):
    """The teacher's own softmax attention, its weights shared, over a token and the `window` - 1 before it."""

    def __init__(self, teacher: nn.Module, config: Any, window: int, layer_idx: int) -> None:
        super().__init__()
        # A mixer's projections, QK-norm and rotary embedding are the teacher's; its form is not used.
        self.window, self.layer_idx = window, layer_idx
        self.inherited = HybridMixer(teacher, config, "gated_deltanet", window, layer_idx)
        del self.inherited.form

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B,T,hidden] -> ([B,T,hidden], None)."""
        q, k, v = self.inherited.project(hidden_states, position_embeddings)
        new = q.shape[1]
        if past_key_values is not None:
            keys, values = past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            # Only what the window of the first new token reaches is looked at.
            near = min(keys.shape[2], new + self.window - 1)
            k, v = keys[:, :, -near:].transpose(1, 2), values[:, :, -near:].transpose(1, 2)
            q = nn.functional.pad(q, (0, 0, 0, 0, near - new, 0))
        out = window_attention(q, k, v, window=self.window, return_past=False)[0]
        return self.inherited.o_proj(out[:, -new:].flatten(-2)), None


def make_control(backbone: Any, layout: Layout, control: Control, window: int) -> Any:
    """`backbone` with the layers that `layout` replaces turned into a control; everything else is shared with it.

    layout: as of a hybrid; which form an entry names does not matter. window: tokens, of entries that name none; used
        by "window_only" only.
    Raises `UsageError` for a layout that does not fit, an unknown control, or a window below 1 where one is needed.
    """
    layers = backbone.model.layers
    if len(layout) != len(layers):
        raise UsageError(f"layout has {len(layout)} entries, the model has {len(layers)} layers")
    if control not in CONTROLS:
        raise UsageError(f"control {control!r}: accepted are {', '.join(CONTROLS)}")
    chosen = []
    for index, (layer, entry) in enumerate(zip(layers, entries(layout, window), strict=True)):
        attention: nn.Module
        if entry is None:
            attention = layer.self_attn
        elif control == "no_op":
            attention = NoAttention(index)
        elif entry.window < 1:
            raise UsageError(f"window_only needs a window of 1 token or more, layer {index} has {entry.window}")
        else:
            attention = WindowAttention(layer.self_attn, backbone.config, entry.window, index)
        chosen.append(layer if entry is None else _with(layer, self_attn=attention.train(backbone.training)))
    return _with(backbone, model=_with(backbone.model, layers=nn.ModuleList(chosen)))


def _with(module: Any, **children: nn.Module) -> Any:
    """`module` with other children, everything else the same objects."""
    changed = copy.copy(module)
    changed._modules = {**module._modules, **children}
    return changed
