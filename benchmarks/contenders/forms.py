"""What the window adds: a whole form (operands, operator, output) without and with it, and the window alone.

A form is timed as the Hugging Face model runs it, and "as served": over pools, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders.base import Contender, Ready, Unavailable, cast, directions, given, plain, with_gradients
from benchmarks.oracle import form_parameters
from benchmarks.problem import Inputs
from dtr_kernels.forms import Form, FormConfig, make_form
from dtr_kernels.operator import linear_attention, linear_attention_packed, linear_attention_step
from dtr_kernels.pack_plan import pack_plan, products_of
from dtr_kernels.window import Rest, window_attention, window_attention_packed, window_attention_step

FORM = "gated_deltanet"


def contenders(rule: str, window: int) -> list[Contender]:
    """The window alone for every rule; the form under its own rule only."""
    rows = [Contender(f"window {window} alone", "window", _window, directions("forward", "backward", "decode"))]
    if rule == "gated_delta":
        for computes, size in (("form", 0), ("form + window", window)):
            rows.append(Contender(f"{FORM}, window {size}", computes, _form(size), directions("forward", "decode")))
            name, run = f"{FORM}, window {size}, as served", _served_form(size)
            rows.append(Contender(name, computes, run, directions("forward", "decode"), graph=True))
    return rows


def _window(inputs: Inputs) -> Ready:
    problem = inputs.problem
    if problem.direction == "decode":
        step = _window_step(inputs)
        return Ready(lambda: step(None), lambda out: {"out": out[:, None]}, problem.dtype)
    leaves = given(cast(inputs), ("q", "k", "v"))

    def forward() -> Tensor:
        return window_attention(leaves["q"], leaves["k"], leaves["v"], window=problem.window, return_past=False)[0]

    if problem.direction == "backward":
        return with_gradients(forward, leaves, inputs.cotangent.to(problem.torch_dtype), problem.dtype)
    return Ready(forward, plain, problem.dtype)


def _window_step(inputs: Inputs) -> Callable[[Rest | None], Tensor]:
    """A step over full rings: tokens 0 .. W-1 lie in them, the new one is at position W."""
    problem = inputs.problem
    q, k, v = (x[:, 0] for x in given(cast(inputs), ("q", "k", "v")).values())
    keys, values = inputs.context(problem.window)
    rings = [torch.cat([torch.zeros_like(x[:1]), x]) for x in (keys, values)]
    slots = torch.arange(1, problem.batch + 1, device=q.device)
    positions = torch.full((problem.batch,), problem.window, device=q.device)

    def call(rest: Rest | None) -> Tensor:
        return window_attention_step(
            q,
            k,
            v,
            window=problem.window,
            scale=problem.shape.head_dim**-0.5,
            ring_k=rings[0],
            ring_v=rings[1],
            slots=slots,
            positions=positions,
            rest=rest,
        )

    return call


def _make_form(inputs: Inputs, window: int) -> Form:
    s = inputs.problem.shape
    form = make_form(FORM, FormConfig(s.query_heads * s.head_dim, s.query_heads, s.kv_heads, s.head_dim, window))
    parameters = form_parameters(inputs)
    form.load_state_dict({name: parameters[name] for name in form.state_dict()})
    return form.to(inputs.problem.device).requires_grad_(False)


def _form(window: int) -> Callable[[Inputs], Ready]:
    def prepare(inputs: Inputs) -> Ready:
        form, decode = _make_form(inputs, window), inputs.problem.direction == "decode"
        return _decoding_form(inputs, form) if decode else _whole_form(inputs, form)

    return prepare


def _whole_form(inputs: Inputs, form: Form) -> Ready:
    """From q, k, v and the layer's input to the heads' output, as the mixer does it; the state starts empty."""
    q, k, v = given(cast(inputs), ("q", "k", "v")).values()
    hidden, window = inputs.hidden.to(q.dtype), form.config.window

    def call() -> Tensor:
        op = form.operands(q, k, v, hidden)
        out, _ = linear_attention(
            op.q, op.k, op.v, rule=form.rule, log_decay=op.log_decay, beta=op.beta, scale=form.scale
        )
        out = form.readout(out, hidden)
        if window:
            out, _ = window_attention(q, k, v, window=window, rest=form.rest(out), return_past=False)
        return out

    return Ready(torch.no_grad()(call), plain, inputs.problem.dtype)


def _decoding_form(inputs: Inputs, form: Form) -> Ready:
    q, k, v = (x[:, 0] for x in given(cast(inputs), ("q", "k", "v")).values())
    hidden = inputs.hidden[:, 0].to(q.dtype)
    pool = torch.cat([torch.zeros_like(inputs.state[:1]), inputs.state]).float()
    slots = torch.arange(1, inputs.problem.batch + 1, device=q.device)
    near = _window_step(inputs) if form.config.window else None

    def call() -> Tensor:
        op = form.operands(q, k, v, hidden)
        out = linear_attention_step(
            op.q,
            op.k,
            op.v,
            rule=form.rule,
            log_decay=op.log_decay,
            beta=op.beta,
            scale=form.scale,
            pool=pool,
            slots=slots,
        )
        out = form.readout(out, hidden)
        return near(form.rest(out)) if near else out

    return Ready(torch.no_grad()(call), lambda out: {"out": out[:, None]}, inputs.problem.dtype)


def _served_form(window: int) -> Callable[[Inputs], Ready]:
    def prepare(inputs: Inputs) -> Ready:
        form, problem = _make_form(inputs, window), inputs.problem
        dtype, device, rows = problem.torch_dtype, problem.device, problem.batch + 1
        state = {
            name: torch.zeros(rows, *spec.shape, dtype=spec.dtype, device=device)
            for name, spec in form.state_spec(dtype).items()
        }
        slots = torch.arange(1, rows, device=device)
        if problem.direction == "decode":
            state["recurrent"][1:] = inputs.state
            if window:
                state["window_k"][1:], state["window_v"][1:] = inputs.context(window)
            return _served_step(inputs, form, state, slots)
        return _served_prefill(inputs, form, state, slots)

    return prepare


def _served_prefill(inputs: Inputs, form: Form, state: dict[str, Tensor], slots: Tensor) -> Ready:
    problem, window = inputs.problem, form.config.window
    q, k, v = (x[0] for x in given(cast(inputs), ("q", "k", "v")).values())
    hidden, device = inputs.hidden[0].to(q.dtype), problem.device
    borders, start = torch.tensor([0, problem.length], device=device), torch.zeros(1, dtype=torch.long, device=device)
    plan = pack_plan(borders, problem.length, q.dtype)

    def call() -> Tensor:
        op = form.operands(q, k, v, hidden)
        out = linear_attention_packed(
            op.q, op.k, op.v, rule=form.rule, log_decay=op.log_decay, beta=op.beta, scale=form.scale,
            pool=state["recurrent"], slots=slots, cu_seqlens=borders, has_initial_state=start > 0,
            products=products_of(q.dtype), plan=plan,
        )  # fmt: skip
        heads = form.readout(out, hidden)
        if window:
            heads = window_attention_packed(
                q, k, v, window=window, scale=form.scale, ring_k=state["window_k"], ring_v=state["window_v"],
                slots=slots, cu_seqlens=borders, start=start, rest=form.rest(heads), plan=plan,
            )  # fmt: skip
        return heads

    return Ready(torch.no_grad()(call), lambda out: {"out": out[None]}, problem.dtype)


def _served_step(inputs: Inputs, form: Form, state: dict[str, Tensor], slots: Tensor) -> Ready:
    problem = inputs.problem
    q, k, v = (x[:, 0] for x in given(cast(inputs), ("q", "k", "v")).values())
    hidden, out = inputs.hidden[:, 0].to(q.dtype), torch.empty_like(q)
    positions = torch.full((problem.batch,), form.config.window, device=problem.device)
    plan = form.bind_step(state, q.dtype)
    if plan is None and problem.device != "cuda":
        raise Unavailable("the compiled kernels are not there, or do not take this dtype")

    def call() -> Tensor:
        if plan is not None:
            form.step(plan, q, k, v, hidden, slots=slots, positions=positions, out=out)
        else:
            from dtr_kernels.triton import mixer_step

            mixer_step(form, state, q, k, v, v, hidden, slots=slots, positions=positions, out=out)
        return out

    return Ready(call, lambda out: {"out": out[:, None]}, problem.dtype)
