"""The teacher's forward pass with bfloat16 products, for CPUs: half the time of the same pass under autocast.

Autocast converts every weight and every product's input again and again, and leaves norms and rotary embedding as
chains of passes through memory. Here weights are converted once, q, k, v and gate, up are one product each, and norms
and rotary embedding are one pass. Rounding is where autocast has it: products in bfloat16, residual stream, norms and
rotary embedding in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_deploy.distill.teacher import Activations
from dtr_kernels.compiled import rows
from dtr_kernels.window import window_attention

NARROW = torch.bfloat16
# Above, the window's scratch memory leaves the second-level cache.
LONGEST_WINDOW = 2048


class NarrowTeacher:
    """Layers 0 .. last of a Llama, Qwen2 or Qwen3 backbone. Holds bfloat16 copies of their products' weights."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        self.model, self.layers = model, layers
        self.blocks = [_Block(layer, model.config) for layer in model.model.layers[: max(layers) + 1]]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this pass computes what the model computes: see `_Block` for what it knows."""
        weight = model.model.embed_tokens.weight
        return (
            rows.fits(weight)
            and weight.dtype == torch.float32
            and not any(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers)
        )

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Activations:
        """tokens [B,T]; as `teacher.attention_activations`, outputs in bfloat16."""
        body = self.model.model
        hidden = body.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        where = body.rotary_emb(hidden, positions)
        inputs, outputs = {}, {}
        for index, block in enumerate(self.blocks):
            normed = _norm(hidden, block.layer.input_layernorm, torch.float32)
            attended = block.attention(normed, where)
            if index in self.layers:
                inputs[index], outputs[index] = normed, attended
            if index + 1 < len(self.blocks):
                hidden = hidden + attended
                hidden = hidden + block.mlp(_norm(hidden, block.layer.post_attention_layernorm, NARROW))
        return Activations(inputs, outputs, where)


class _Block:
    """One decoder layer: causal attention with optional biases and QK-norm, and a gated MLP."""

    def __init__(self, layer: Any, config: Any) -> None:
        self.layer, self.config = layer, config
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _packed(attention.o_proj)
        self.gate_up = _packed(mlp.gate_proj, mlp.up_proj)
        self.down = _packed(mlp.down_proj)

    def attention(self, normed: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        attention, config = self.layer.self_attn, self.config
        kv_size = config.num_key_value_heads * attention.head_dim
        q, k, v = F.linear(normed.to(NARROW), *self.qkv).split(
            [config.num_attention_heads * attention.head_dim, kv_size, kv_size], -1
        )
        q, k, v = (x.unflatten(-1, (-1, attention.head_dim)) for x in (q, k, v))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = (rows.rotary(x, *where).to(NARROW) for x in (q, k))
        length = q.shape[1]
        if length <= LONGEST_WINDOW:
            # Full attention is a window as long as the sequence; torch's kernel takes three times as long.
            out, _ = window_attention(q, k, v, window=length, scale=attention.scaling, return_past=False)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=True)
            out = out.transpose(1, 2)
        return F.linear(out.flatten(2), *self.out)

    def mlp(self, normed: Tensor) -> Tensor:
        gate, up = F.linear(normed, *self.gate_up).chunk(2, -1)
        return F.linear(self.layer.mlp.act_fn(gate) * up, *self.down)


def _norm(hidden: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """RMS norm: the read-out of one head as wide as the model."""
    return rows.readout(hidden[..., None, :], norm.weight[None], norm.variance_epsilon, dtype).squeeze(-2)


def _packed(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of projections of one input, one below the other, in bfloat16."""
    weight = torch.cat([p.weight.detach() for p in projections]).to(NARROW)
    if all(p.bias is None for p in projections):
        return weight, None
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias.detach() for p in projections]
    return weight, torch.cat(biases).to(NARROW)
