"""Norm and MLP around a linear mixer: vLLM's modules, run on a CPU by the compiled kernels where those take them.

In eager mode vLLM's CPU build runs norm and activation as chains of torch operators. What torch.compile traces keeps
vLLM's own modules, which it fuses itself.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaMLP

from dtr_kernels.compiled import layer


def add_norm(norm: RMSNorm, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of hidden + residual, and the sum; all [N, hidden]."""
    if layer.fits(hidden, norm.weight):
        return layer.add_norm(hidden, residual, norm.weight, norm.variance_epsilon)
    if residual is None:
        return norm(hidden), hidden
    return norm(hidden, residual)


def gated_mlp(mlp: LlamaMLP, hidden: torch.Tensor) -> torch.Tensor:
    """down(silu(gate(hidden)) * up(hidden)), [N, hidden]."""
    gate_up, _ = mlp.gate_up_proj(hidden)
    activated = layer.silu_mul(gate_up) if layer.takes(gate_up) else mlp.act_fn(gate_up)
    out, _ = mlp.down_proj(activated)
    return out
