"""A form's decoding step in one call against the same step operator by operator in torch, without compiled kernels."""

import pytest
import torch

from dtr_kernels.compiled.library import disabled
from dtr_kernels.conv import dynamic_conv_step
from dtr_kernels.forms import FormConfig, make_form
from dtr_kernels.operator import linear_attention_step
from dtr_kernels.window import window_attention_step
from tests.kernels.cases import assert_close

SLOTS = torch.tensor([3, 0, 1, 5], dtype=torch.int32)
POSITIONS = torch.tensor([40, 7, 2, 15])  # a wrapped ring, a null row, a young one, one that is just full


def operator_by_operator(form, q, k, v, values, hidden, state, dtype):
    o = form.operands(q, k, values, hidden)
    linear = linear_attention_step(
        o.q, o.k, o.v, rule=form.rule, log_decay=o.log_decay, beta=o.beta, scale=form.scale, pool=state["recurrent"],
        slots=SLOTS,
    )  # fmt: skip
    heads = form.readout(linear, hidden)
    if form.config.window:
        heads = window_attention_step(
            q, k, v, window=form.config.window, scale=form.config.head_dim**-0.5, ring_k=state["window_k"],
            ring_v=state["window_v"], slots=SLOTS, positions=POSITIONS,
            rest=form.rest(heads),
        )  # fmt: skip
    return heads.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (20, 1), (32, 8)])
@pytest.mark.parametrize("name", ["gated_deltanet", "gla", "jet"])
@pytest.mark.parametrize("slots", [SLOTS, SLOTS.long(), torch.stack([SLOTS, SLOTS + 1], 1)[:, 0]])
@torch.no_grad()
def test_step_equals_its_operators(implementation, slots, name, dim, group, window, dtype):
    torch.manual_seed(0)
    form = make_form(name, FormConfig(24, 2 * group, 2, dim, window))
    for p in form.parameters():
        p.add_(0.3 * torch.randn_like(p))
    rows = len(SLOTS)
    packed = torch.randn(rows, (2 * group + 4) * dim).to(dtype)  # q, k and v of one projection: rows lie apart
    q, k, v = (x.unflatten(-1, (-1, dim)) for x in packed.split([2 * group * dim, 2 * dim, 2 * dim], -1))
    hidden = torch.randn(rows, 24).to(dtype)
    state = {n: torch.randn(6, *spec.shape).to(spec.dtype) for n, spec in form.state_spec(dtype).items()}
    before = {n: x.clone() for n, x in state.items()}
    expected_state = {n: x.clone() for n, x in state.items()}
    with disabled():
        values, taps = v, form.taps(hidden)
        if taps is not None:
            values = dynamic_conv_step(v, taps, pool=expected_state["conv"], slots=SLOTS)
        expected = operator_by_operator(form, q, k, v, values, hidden, expected_state, dtype)
    plan = form.bind_step(state, dtype)
    assert (plan is not None) == (implementation != "torch")
    if plan is None:
        return
    out = torch.full((rows, 2 * group, dim), 7.0, dtype=dtype)
    form.step(plan, q, k, v, hidden, slots=slots, positions=POSITIONS, out=out)
    live = SLOTS > 0
    # bfloat16: the torch window rounds its weights and its output once more
    assert_close(out[live], expected[live].double(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert not out[~live].any()
    for n, x in state.items():
        assert_close(x, expected_state[n].double(), 1e-5)
        assert torch.equal(x[[0, 2, 4]], before[n][[0, 2, 4]])


@torch.no_grad()
def test_hedgehog_and_half_precision_states_go_operator_by_operator(implementation):
    half, single = torch.float16, torch.float32
    for name, stored, dtype in (("hedgehog", single, single), ("gla", half, single), ("gla", single, half)):
        form = make_form(name, FormConfig(24, 2, 2, 8))
        state = {"recurrent": torch.zeros(3, 2, form.key_dim, form.value_dim, dtype=stored)}
        assert form.bind_step(state, dtype) is None


@torch.no_grad()
def test_slots_and_positions_out_of_range_are_refused(implementation):
    form = make_form("gated_deltanet", FormConfig(24, 2, 2, 8, window=4))
    state = {n: torch.zeros(3, *spec.shape) for n, spec in form.state_spec(torch.float32).items()}
    plan = form.bind_step(state, torch.float32)
    if implementation == "torch":  # without compiled kernels there is no such call
        assert plan is None
        return
    q, hidden, out = torch.randn(1, 2, 8), torch.randn(1, 24), torch.zeros(1, 2, 8)
    for slot, position in ((3, 0), (1, -1)):
        with pytest.raises(IndexError, match="dtr_form_step"):
            form.step(plan, q, q, q, hidden, slots=torch.tensor([slot]), positions=torch.tensor([position]), out=out)
