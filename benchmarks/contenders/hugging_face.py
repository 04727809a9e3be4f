"""transformers' torch code of the gated delta rule (Qwen3-Next): its fallback without flash-linear-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.contenders.base import Contender, Ready, Unavailable, directions, only, refuse_beyond_memory
from benchmarks.contenders.repeated import ready, repeated_operands
from benchmarks.problem import Inputs


def contenders() -> list[Contender]:
    return [
        Contender(
            "transformers chunk",
            "rule",
            _prepare("torch_chunk_gated_delta_rule"),
            directions("forward", "backward"),
        ),
        Contender(
            "transformers recurrent",
            "rule",
            _prepare("torch_recurrent_gated_delta_rule"),
            directions("forward", "decode"),
        ),
    ]


def _prepare(name: str) -> Callable[[Inputs], Ready]:
    def prepare(inputs: Inputs) -> Ready:
        problem = inputs.problem
        only(problem, "gated_delta")
        function = _function(name)
        if problem.direction == "backward":
            heads, d = problem.shape.query_heads, problem.shape.head_dim
            refuse_beyond_memory(4.0 * 24 * problem.length * heads * d, "its backward pass")

        def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            return function(
                q,
                k,
                v,
                g=g,
                beta=beta,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=False,
            )

        return ready(inputs, run, problem.dtype, repeated_operands(inputs))

    return prepare


def _function(name: str) -> Any:
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next
    except ImportError as error:
        raise Unavailable(f"transformers is not importable: {error}") from error
    if not hasattr(modeling_qwen3_next, name):
        raise Unavailable(f"this transformers has no {name}")
    return getattr(modeling_qwen3_next, name)
