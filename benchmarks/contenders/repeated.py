"""Implementations that keep a state for every query head: keys, values, decays and states repeated, and folded back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.contenders.base import Ready, cast, with_gradients
from benchmarks.problem import Inputs

Rule = Callable[..., tuple[Tensor, Tensor]]


def repeated_operands(inputs: Inputs, dtype: Any = None) -> dict[str, Tensor]:
    """q, k, v, g, beta [B,T,Hq,...] and state [B,Hq,D,D], contiguous; those that the rule has."""
    operands, group = cast(inputs, dtype), inputs.problem.shape.group
    names = {"q": "q", "k": "k", "v": "v", "log_decay": "g", "beta": "beta", "state": "state"}
    found = {}
    for ours, theirs in names.items():
        tensor = operands[ours]
        if tensor is None:
            continue
        dim = 1 if ours == "state" else 2
        found[theirs] = tensor if ours == "q" else tensor.repeat_interleave(group, dim).contiguous()
    return found


def ready(inputs: Inputs, run: Rule, dtype: str, operands: dict[str, Tensor]) -> Ready:
    """run(q, k, v, g, beta, state) -> out [B,T,Hq,D] and state [B,Hq,D,D] of the operands, timed in the direction."""
    group = inputs.problem.shape.group
    if inputs.problem.direction != "backward":
        return Ready(lambda: run(**operands), lambda result: {"out": result[0], "state": result[1][:, ::group]}, dtype)
    leaves = {
        ours: operands[theirs].detach().clone()
        for ours, theirs in {"q": "q", "k": "k", "v": "v", "log_decay": "g", "beta": "beta"}.items()
        if theirs in operands
    }

    def forward() -> Tensor:
        return run(*leaves.values(), operands["state"])[0]

    def folded(name: str, gradient: Tensor) -> Tensor:
        # The gradient of what was repeated is the sum over its copies.
        return gradient if name == "q" else gradient.unflatten(2, (-1, group)).sum(3)

    return with_gradients(forward, leaves, inputs.cotangent.to(leaves["v"].dtype), dtype, layout=folded)
