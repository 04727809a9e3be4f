"""The teacher's forward pass with bfloat16 products, for CPUs: half the time of the same pass under autocast.

What layers are made of, and where they round: `dtr_deploy.hybrid.narrow`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_deploy.distill.teacher import Activations
from dtr_deploy.hybrid import narrow
from dtr_deploy.hybrid.narrow import NARROW, Mlp, Projections, rms_norm
from dtr_kernels.window import window_attention

# Above, the window's scratch memory leaves the second-level cache.
LONGEST_WINDOW = 2048


class NarrowTeacher:
    """Layers 0 .. last of a Llama, Qwen2 or Qwen3 backbone. Holds bfloat16 copies of their products' weights."""

    def __init__(self, model: Any, layers: list[int]) -> None:
        self.model, self.layers = model, layers
        self.blocks = [_Block(layer) for layer in model.model.layers[: max(layers) + 1]]

    @staticmethod
    def fits(model: Any) -> bool:
        """Whether this pass computes what the model computes."""
        return narrow.fits(model)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Activations:
        """tokens [B,T]; as `teacher.attention_activations`, outputs in bfloat16."""
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
                hidden = hidden + block.mlp(rms_norm(hidden, block.layer.post_attention_layernorm, NARROW))
        return Activations(inputs, outputs, where)


class _Block:
    """One decoder layer: causal attention with optional biases and QK-norm, and a gated MLP."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.projections, self.mlp = Projections(layer.self_attn, layer.self_attn.head_dim), Mlp(layer.mlp)

    def attention(self, normed: Tensor, where: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.projections.project(normed, where)
        q, k = q.to(NARROW), k.to(NARROW)
        length, scale = q.shape[1], self.layer.self_attn.scaling
        if length <= LONGEST_WINDOW:
            # Full attention is a window as long as the sequence; torch's kernel takes three times as long.
            out, _ = window_attention(q, k, v, window=length, scale=scale, return_past=False)
        else:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            out = out.transpose(1, 2)
        return self.projections.output(out.flatten(2))
