"""The teacher's forward pass for CPUs: with bfloat16 products half the time of the same pass under autocast.

What layers are made of, and where they round: `dtr_deploy.hybrid.fused`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_deploy.distill.teacher import Activations
from dtr_deploy.hybrid import fused
from dtr_deploy.hybrid.fused import Mlp, Projections, rms_norm
from dtr_kernels.window import window_attention

# Above, the window's scratch memory leaves the second-level cache.
LONGEST_WINDOW = 2048


class FusedTeacher:
    """Layers 0 .. last of a Llama, Qwen2 or Qwen3 backbone. Holds copies of their weights in bfloat16, if that is the
    products' dtype."""

    def __init__(self, model: Any, layers: list[int], products: torch.dtype) -> None:
        self.model, self.layers, self.products = model, layers, products
        self.blocks = [_Block(layer, products) for layer in model.model.layers[: max(layers) + 1]]

    @staticmethod
    def fits(model: Any, products: torch.dtype) -> bool:
        """Whether this pass computes what the model computes."""
        return fused.fits(model, products)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Activations:
        """tokens [B,T]; as `teacher.attention_activations`, outputs in the products' dtype."""
        body = self.model.model
        hidden = body.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        where = body.rotary_emb(hidden, positions)
        inputs, outputs = {}, {}
        for index, block in enumerate(self.blocks):
            normed = rms_norm(hidden, block.layer.input_layernorm, torch.float32)
            attended = block.attention(normed, where)
            if index in self.layers:
                inputs[index], outputs[index] = normed, attended
            if index + 1 < len(self.blocks):
                hidden = hidden + attended
                hidden = hidden + block.mlp(rms_norm(hidden, block.layer.post_attention_layernorm, self.products))
        return Activations(inputs, outputs, where)


class _Block:
    """One decoder layer: causal attention with optional biases and QK-norm, and a gated MLP."""

    def __init__(self, layer: Any, products: torch.dtype) -> None:
        self.layer, self.products = layer, products
        self.projections = Projections(layer.self_attn, layer.self_attn.head_dim, products)
        self.mlp = Mlp(layer.mlp, products)

    def attention(self, normed: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.projections.project(normed, where)
        q, k = q.to(self.products), k.to(self.products)
        length, scale = q.shape[1], self.layer.self_attn.scaling
        if length <= LONGEST_WINDOW:
            # Full attention is a window as long as the sequence; torch's kernel takes three times as long.
            out, _ = window_attention(q, k, v, window=length, scale=scale, return_past=False)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            out = out.transpose(1, 2)
        return self.projections.output(out.flatten(2))
