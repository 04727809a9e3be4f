"""vLLM's CPU kernel of the gated delta rule. bfloat16 queries, keys, values and beta; float32 decay and state."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, Ready, Unavailable, directions, only
from benchmarks.contenders.repeated import ready, repeated_operands
from benchmarks.problem import Inputs

KERNEL = "chunk_gated_delta_rule_cpu"


def contenders() -> list[Contender]:
    return [Contender("vLLM CPU chunk", "rule", _prepare, directions("forward"))]


def _prepare(inputs: Inputs) -> Ready:
    problem = inputs.problem
    only(problem, "gated_delta")
    _load_kernel()
    operands = repeated_operands(inputs, torch.bfloat16)
    operands["beta"] = operands["beta"].bfloat16()
    # The kernel updates the state in place, by slot.
    operands["state"] = operands["state"].clone()
    borders = torch.tensor([0, problem.length], dtype=torch.int32)
    slots = torch.zeros(1, dtype=torch.int32)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        out, _ = torch.ops._C.chunk_gated_delta_rule_cpu(q, k, v, g, beta, state, True, borders, False, False, slots)
        return out, state

    return ready(inputs, run, "bfloat16", operands)


def _load_kernel() -> None:
    """Import vLLM's operators, which takes seconds, and say what is missing."""
    threads = torch.get_num_threads()
    try:
        import vllm._custom_ops  # noqa: F401
    except Exception as error:
        # A build for another platform fails in many ways, all of which mean the same here.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unavailable(f"vllm is not importable: {reason}") from error
    finally:
        torch.set_num_threads(threads)
    if not hasattr(torch.ops._C, KERNEL):
        instructions = torch.backends.cpu.get_cpu_capability()
        raise Unavailable(f"this vLLM has no {KERNEL} (processor: {instructions})")
