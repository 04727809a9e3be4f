"""Parts of Llama, Qwen2 and Qwen3 decoder layers without a gradient, for CPUs, with products in bfloat16 or float32.

Autocast converts every weight and every product's input again and again, and leaves norms and rotary embedding as
chains of passes through memory. Here norms and rotary embedding are one pass, and for products in bfloat16 weights are
converted once, q, k, v and gate, up as one product each. Rounding is where autocast has it: products in bfloat16,
residual stream, norms and rotary embedding in float32. Products in float32 use the model's own weights, uncopied and
apart. What attends is the caller's: the teacher's pass in `distill`, the search's in `search`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtr_kernels.compiled import rows

PRODUCTS = (torch.bfloat16, torch.float32)


def fits(model: Any, products: torch.dtype) -> bool:
    """Whether these parts compute what the layers of `model` (float32 weights, on a CPU, no sliding window) compute."""
    weight = model.model.embed_tokens.weight
    return (
        products in PRODUCTS
        and rows.fits(weight)
        and all(layer.self_attn.q_proj.weight.device == weight.device for layer in model.model.layers)
        and weight.dtype == torch.float32
        and not any(getattr(layer.self_attn, "sliding_window", None) for layer in model.model.layers)
    )


class Product:
    """Projections of one input: copies in `dtype`, one below the other, or their own weights if those are in it."""

    def __init__(self, dtype: torch.dtype, *projections: nn.Linear) -> None:
        self.dtype = dtype
        self.sizes = [len(projection.weight) for projection in projections]
        self.parts: list[tuple[Tensor, Tensor | None]]
        if all(projection.weight.dtype == dtype for projection in projections):
            self.parts = [(p.weight.detach(), None if p.bias is None else p.bias.detach()) for p in projections]
        else:
            self.parts = [_packed(dtype, *projections)]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """[...,inputs] -> [...,outputs] of each projection, in `dtype`."""
        x = x.to(self.dtype)
        if len(self.parts) == len(self.sizes):
            return [F.linear(x, *part) for part in self.parts]
        return list(F.linear(x, *self.parts[0]).split(self.sizes, -1))


class Projections:
    """What surrounds a layer's attention: q, k, v of one input, and the output projection.

    attention: a teacher's attention module or a `HybridMixer`; both have projections, and QK-norm if the family does.
    """

    def __init__(self, attention: Any, head_dim: int, products: torch.dtype) -> None:
        self.attention, self.head_dim = attention, head_dim
        self.qkv = Product(products, attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Product(products, attention.o_proj)

    def project(self, normed: Tensor, where: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """normed [B,T,hidden], where = cos, sin [1 or B,T,D] -> q [B,T,Hq,D], k [B,T,Hkv,D] with QK-norm and rotary
        embedding, float32, and v [B,T,Hkv,D] in the products' dtype."""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.qkv(normed))
        if getattr(self.attention, "q_norm", None) is not None:
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        return rows.rotary(q, *where), rows.rotary(k, *where), v

    def output(self, attended: Tensor) -> Tensor:
        """[...,Hq*D] -> [...,hidden] in the products' dtype."""
        return self.out(attended)[0]


class Mlp:
    """A gated MLP."""

    def __init__(self, mlp: Any, products: torch.dtype) -> None:
        self.act = mlp.act_fn
        self.gate_up = Product(products, mlp.gate_proj, mlp.up_proj)
        self.down = Product(products, mlp.down_proj)

    def __call__(self, normed: Tensor) -> Tensor:
        """[...,hidden] -> [...,hidden] in the products' dtype."""
        gate, up = self.gate_up(normed)
        return self.down(self.act(gate) * up)[0]


def rms_norm(hidden: Tensor, norm: Any, dtype: torch.dtype) -> Tensor:
    """RMS norm of [...,hidden], in `dtype` (float32 or bfloat16): the read-out of one head as wide as the model."""
    return rows.readout(hidden[..., None, :], norm.weight[None], norm.variance_epsilon, dtype).squeeze(-2)


def _packed(dtype: torch.dtype, *projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of projections of one input, one below the other."""
    weight = torch.cat([p.weight.detach() for p in projections]).to(dtype)
    if all(p.bias is None for p in projections):
        return weight, None
    biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias.detach() for p in projections]
    return weight, torch.cat(biases).to(dtype)
