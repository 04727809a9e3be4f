"""What an adapter is: the operands as an implementation wants them, and the call that is timed, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.problem import Inputs, Problem


class Unavailable(Exception):
    """The contender cannot solve this problem here. The message is the reason, and appears in the table."""


@dataclass(frozen=True)
class Ready:
    """A contender that has its operands.

    call: what is timed. The first call starts from the problem's state; those that update a state in place go on from
        it in later calls.
    convert: the call's result -> tensors in the layout of `linear_attention`, by the oracle's names.
    dtype: of queries, keys and values.
    """

    call: Callable[[], Any]
    convert: Callable[[Any], dict[str, Tensor]]
    dtype: str


@dataclass(frozen=True)
class Contender:
    """One row of the table.

    computes: "rule", "softmax", "window", "form" or "form + window"; which oracle it is held to.
    prepare: takes the operands, returns what to time, raises Unavailable.
    graph: its call can be captured in a CUDA graph; when decoding on a GPU it then has a second row, replayed.
    """

    name: str
    computes: str
    prepare: Callable[[Inputs], Ready]
    directions: frozenset[str] = field(default=frozenset({"forward"}))
    graph: bool = False

    def takes_part(self, problem: Problem) -> bool:
        return problem.direction in self.directions


def graphed(contender: Contender) -> Contender:
    """The same call replayed from a CUDA graph: what the GPU takes, without the time to launch."""

    def prepare(inputs: Inputs) -> Ready:
        warm = contender.prepare(inputs)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                warm.call()
        torch.cuda.current_stream().wait_stream(stream)
        ready = contender.prepare(inputs)  # its states are those of the problem still
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = ready.call()

        def call(operands: Ready = ready) -> Any:  # the graph reads them: they must not be freed
            graph.replay()
            return result

        return replace(ready, call=call)

    return replace(contender, name=f"{contender.name}, CUDA graph", prepare=prepare)


def directions(*names: str) -> frozenset[str]:
    return frozenset(names)


def plain(out: Any) -> dict[str, Tensor]:
    """Results of calls that give (out, state) or out alone, already in the operator's layout."""
    return {"out": out[0], "state": out[1]} if isinstance(out, tuple) else {"out": out}


def with_gradients(
    forward: Callable[[], Tensor],
    leaves: dict[str, Tensor],
    cotangent: Tensor,
    dtype: str,
    out_layout: Callable[[Tensor], Tensor] = lambda out: out,
    layout: Callable[[str, Tensor], Tensor] = lambda name, gradient: gradient,
) -> Ready:
    """Forward and backward of a torch implementation under autograd.

    cotangent: in the layout of forward's result. out_layout, layout: of output and gradients -> the operator's.
    """
    for leaf in leaves.values():
        leaf.requires_grad_()

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        out = forward()
        return out, torch.autograd.grad(out, list(leaves.values()), cotangent)

    def convert(result: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, Tensor]:
        out, gradients = result
        found = {f"d_{name}": layout(name, g) for name, g in zip(leaves, gradients, strict=True)}
        return {"out": out_layout(out), **found}

    return Ready(call, convert, dtype)


def cast(inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Operands as the operator takes them: q, k, v in `dtype` (the problem's if None), decay, beta, state float32."""
    dtype = dtype or inputs.problem.torch_dtype
    operands: dict[str, Tensor | None] = {name: getattr(inputs, name).to(dtype) for name in ("q", "k", "v")}
    for name in ("log_decay", "beta", "state"):
        value = getattr(inputs, name)
        operands[name] = None if value is None else value.float()
    return operands


def given(operands: dict[str, Tensor | None], names: Iterable[str]) -> dict[str, Tensor]:
    """Those of the named operands that the rule has."""
    return {name: value for name in names if (value := operands[name]) is not None}


def refuse_beyond_memory(needed: float, what: str) -> None:
    """Raise Unavailable if `needed` bytes are more than half of the memory that is available to this process."""
    from dtr_deploy.doctor import hardware

    available = hardware().available_memory_bytes
    if available and needed > available / 2:
        raise Unavailable(f"{what} takes {needed / 1e9:.1f} GB of {available / 1e9:.1f} GB available")


def only(problem: Problem, rule: str, per_key: bool = False) -> None:
    """Raise Unavailable unless the problem is `rule` with one decay a head, or one a key dimension."""

    def kind(name: str, per_key: bool) -> str:
        return f"{name} with one decay a {'key dimension' if per_key else 'head'}"

    if (problem.rule, problem.per_key) != (rule, per_key):
        raise Unavailable(f"computes {kind(rule, per_key)}, not {kind(problem.rule, problem.per_key)}")
