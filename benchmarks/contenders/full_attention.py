"""torch's softmax attention, which is what a replaced layer had. It computes something else and is held to that."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders.base import (
    Contender,
    Ready,
    cast,
    directions,
    given,
    refuse_beyond_memory,
    with_gradients,
)
from benchmarks.problem import Inputs


def contenders() -> list[Contender]:
    taken = directions("forward", "backward", "decode")
    return [Contender("torch SDPA, full attention", "softmax", _attention, taken, graph=True)]


def _attention(inputs: Inputs) -> Ready:
    problem = inputs.problem
    grouped = problem.shape.group > 1
    leaves = {name: x.transpose(1, 2).contiguous() for name, x in given(cast(inputs), ("q", "k", "v")).items()}
    swap = lambda x: x.transpose(1, 2)  # noqa: E731  [B,H,T,D] <-> [B,T,H,D]
    if problem.direction == "decode":
        s = problem.shape
        needed = 4.0 * 4 * problem.batch * problem.length * s.kv_heads * s.head_dim
        refuse_beyond_memory(needed, "a cache of keys and values, and the float64 truth of it,")
        keys, values = inputs.context(problem.length)
        k = torch.cat([swap(keys), leaves["k"]], 2).contiguous()
        v = torch.cat([swap(values), leaves["v"]], 2).contiguous()
        del keys, values

        def step() -> Tensor:
            return F.scaled_dot_product_attention(leaves["q"], k, v, enable_gqa=grouped)

        return Ready(step, lambda out: {"out": swap(out)}, problem.dtype)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], is_causal=True, enable_gqa=grouped)

    if problem.direction == "backward":
        cotangent = swap(inputs.cotangent).contiguous().to(problem.torch_dtype)
        return with_gradients(forward, leaves, cotangent, problem.dtype, swap, lambda _, gradient: swap(gradient))
    return Ready(forward, lambda out: {"out": swap(out)}, problem.dtype)
