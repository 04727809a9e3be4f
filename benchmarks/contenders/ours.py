"""The operator of this project: every backend, and the serving entry points over state pools."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import (
    Contender,
    Ready,
    Unavailable,
    cast,
    directions,
    given,
    plain,
    refuse_beyond_memory,
    with_gradients,
)
from benchmarks.problem import Inputs
from dtr_kernels import operator
from dtr_kernels.pack_plan import pack_plan

TRUTH = "reference"
"""The backend that the others are held to; it is not timed."""


# Operands go in by name, as a dictionary without those that the rule lacks; its types are checked when it is called.
linear_attention: Callable[..., tuple[Tensor, Tensor]] = operator.linear_attention
linear_attention_packed: Callable[..., Tensor] = operator.linear_attention_packed
linear_attention_step: Callable[..., Tensor] = operator.linear_attention_step


def contenders(device: str) -> list[Contender]:
    """A row for every backend that `dtr_kernels.operator` names, whether or not it runs here."""
    names = [name for name in operator.BACKENDS if name != TRUTH]
    rows = [
        Contender(f"ours {name}", "rule", _backend(name, device), directions("forward", "backward", "decode"))
        for name in names
    ]
    for label, function, prepare, direction in (
        ("packed", linear_attention_packed, _packed, "forward"),
        ("step", linear_attention_step, _step, "decode"),
    ):
        chooses = "backend" in inspect.signature(function).parameters
        for name in names if chooses else ["auto"]:
            options = {"backend": name} if chooses else {}
            suffix = "" if name == "auto" else f" {name}"
            row = _usable(name, device, prepare, options)
            rows.append(Contender(f"ours {label} over a pool{suffix}", "rule", row, directions(direction), graph=True))
    return rows


def usable_backends(device: str) -> set[str]:
    """Backends that the operator says run on a device; all of them where it does not say."""
    listed: Callable[..., Any] | None = getattr(operator, "available_backends", None)
    if listed is None:
        return set(operator.BACKENDS)
    takes_device = bool(inspect.signature(listed).parameters)
    return {"auto", *(listed(torch.device(device)) if takes_device else listed())}


def _usable(
    name: str, device: str, prepare: Callable[[Inputs, dict[str, Any]], Ready], options: dict[str, Any]
) -> Callable[[Inputs], Ready]:
    def checked(inputs: Inputs) -> Ready:
        if name not in usable_backends(device):
            raise Unavailable(_why_not(name, inputs))
        return prepare(inputs, options)

    return checked


def _why_not(name: str, inputs: Inputs) -> str:
    """What the operator itself says to a backend that it does not list, asked with one token."""
    operands = {key: None if x is None else x[:, :1] for key, x in cast(inputs).items() if key != "state"}
    try:
        linear_attention(**operands, rule=inputs.problem.rule, backend=name)
    except Exception as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"dtr_kernels does not list backend {name!r} for {inputs.problem.device}"


def _backend(name: str, device: str) -> Callable[[Inputs], Ready]:
    return _usable(name, device, _whole, {"backend": name})


def _whole(inputs: Inputs, options: dict[str, Any]) -> Ready:
    problem = inputs.problem
    operands = cast(inputs)
    if problem.direction != "backward":
        return Ready(lambda: linear_attention(**operands, rule=problem.rule, **options), plain, problem.dtype)
    if options["backend"] == "recurrent":
        # Autograd keeps the state before and after the decay and the write of every token.
        refuse_beyond_memory(12.0 * problem.length * inputs.state.numel(), "autograd through the token loop")
    leaves = given(operands, ("q", "k", "v", "log_decay", "beta"))
    rest = {name: value for name, value in operands.items() if name not in leaves}

    def forward() -> Tensor:
        return linear_attention(**leaves, **rest, rule=problem.rule, **options)[0]

    return with_gradients(forward, leaves, inputs.cotangent.to(problem.torch_dtype), problem.dtype)


def _pool(state: Tensor) -> tuple[Tensor, Tensor]:
    """A pool whose slots 1.. hold the states, and the slots. Slot 0 is the null slot."""
    return torch.cat([torch.zeros_like(state[:1]), state]), torch.arange(1, len(state) + 1, device=state.device)


def _packed(inputs: Inputs, options: dict[str, Any]) -> Ready:
    problem = inputs.problem
    operands = cast(inputs)
    pool, slots = _pool(inputs.state.float())
    tokens = {name: None if (x := operands[name]) is None else x[0] for name in ("q", "k", "v", "log_decay", "beta")}
    borders = torch.tensor([0, problem.length], device=problem.device)
    started = torch.tensor([True], device=problem.device)
    # As in serving: one plan of the pack for all layers.
    plan = pack_plan(borders, problem.length, problem.torch_dtype)

    def call() -> Tensor:
        return linear_attention_packed(
            **tokens,
            rule=problem.rule,
            scale=problem.shape.head_dim**-0.5,
            pool=pool,
            slots=slots,
            cu_seqlens=borders,
            has_initial_state=started,
            plan=plan,
            **options,
        )

    return Ready(call, lambda out: {"out": out[None], "state": pool[1:]}, problem.dtype)


def _step(inputs: Inputs, options: dict[str, Any]) -> Ready:
    problem = inputs.problem
    operands = cast(inputs)
    pool, slots = _pool(inputs.state.float())
    token = {name: None if (x := operands[name]) is None else x[:, 0] for name in ("q", "k", "v", "log_decay", "beta")}

    def call() -> Tensor:
        return linear_attention_step(
            **token, rule=problem.rule, scale=problem.shape.head_dim**-0.5, pool=pool, slots=slots, **options
        )

    return Ready(call, lambda out: {"out": out[:, None], "state": pool[1:]}, problem.dtype)
