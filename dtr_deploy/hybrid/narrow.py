"""Parts of Llama, Qwen2 and Qwen3 decoder layers with bfloat16 products, for CPUs: half the time of autocast.

Autocast converts every weight and every product's input again and again, and leaves norms and rotary embedding as
chains of passes through memory. Here weights are converted once, q, k, v and gate, up are one product each, and norms
and rotary embedding are one pass. Rounding is where autocast has it: products in bfloat16, residual stream, norms and
rotary embedding in float32. What attends is the caller's: the teacher's pass in `distill`, the search's in `search`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.compiled import rows

NARROW = torch.bfloat16


def fits(model: Any) -> bool:
    """Whether these parts compute what the layers of `model` (float32 weights, on a CPU, no sliding window) compute."""
    weight = model.model.embed_tokens.weight
    return (
        rows.fits(weight)
        and weight.dtype == torch.float32
        and not any(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers)
    )


class Projections:
    """bfloat16 copies of what surrounds a layer's attention: q, k, v as one product, and the output projection.

    attention: a teacher's attention module or a `HybridMixer`; both have projections, and QK-norm if the family does.
    """

    def __init__(self, attention: Any, head_dim: int) -> None:
        self.attention, self.head_dim = attention, head_dim
        self.sizes = [p.weight.shape[0] for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        self.qkv = _packed(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _packed(attention.o_proj)

    def project(self, normed: Tensor, where: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """normed [B,T,hidden], where = cos, sin [1 or B,T,D] -> q [B,T,Hq,D], k [B,T,Hkv,D] with QK-norm and rotary
        embedding, float32, and v [B,T,Hkv,D] bfloat16."""
        q, k, v = F.linear(normed.to(NARROW), *self.qkv).split(self.sizes, -1)
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if getattr(self.attention, "q_norm", None) is not None:
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        return rows.rotary(q, *where), rows.rotary(k, *where), v

    def output(self, attended: Tensor) -> Tensor:
        """[...,Hq*D] bfloat16 -> [...,hidden] bfloat16."""
        return F.linear(attended, *self.out)


class Mlp:
    """bfloat16 copies of a gated MLP: gate and up as one product."""

    def __init__(self, mlp: Any) -> None:
        self.act = mlp.act_fn
        self.gate_up = _packed(mlp.gate_proj, mlp.up_proj)
        self.down = _packed(mlp.down_proj)

    def __call__(self, normed: Tensor) -> Tensor:
        """[...,hidden] bfloat16 -> [...,hidden] bfloat16."""
        gate, up = F.linear(normed, *self.gate_up).chunk(2, -1)
        return F.linear(self.act(gate) * up, *self.down)


def rms_norm(hidden: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """RMS norm of [...,hidden], in `dtype` (float32 or bfloat16): the read-out of one head as wide as the model."""
    return rows.readout(hidden[..., None, :], norm.weight[None], norm.variance_epsilon, dtype).squeeze(-2)


def _packed(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of projections of one input, one below the other, in bfloat16."""
    weight = torch.cat([p.weight.detach() for p in projections]).to(NARROW)
    if all(p.bias is None for p in projections):
        return weight, None
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias.detach() for p in projections]
    return weight, torch.cat(biases).to(NARROW)
