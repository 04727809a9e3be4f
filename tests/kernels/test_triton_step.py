"""A mixer's decoding step on a GPU against the same step operator by operator in torch."""

import pytest
import torch

from dtr_kernels.compiled.library import disabled
from dtr_kernels.conv import dynamic_conv_step
from dtr_kernels.forms import FormConfig, make_form
from dtr_kernels.triton import mixer_step
from tests.kernels.cases import assert_close
from tests.kernels.test_step import POSITIONS, SLOTS, operator_by_operator
from tests.kernels.triton_cases import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize(("dim", "group"), [(64, 3), (20, 1)])
@pytest.mark.parametrize("name", ["gated_deltanet", "gla", "jet"])
@torch.no_grad()
def test_step_equals_its_operators(name, dim, group, window, dtype):
    torch.manual_seed(0)
    form = make_form(name, FormConfig(24, 2 * group, 2, dim, window))
    for p in form.parameters():
        p.add_(0.3 * torch.randn_like(p))
    packed = torch.randn(len(SLOTS), (2 * group + 4) * dim).to(dtype)  # of one projection: rows lie apart
    hidden = torch.randn(len(SLOTS), 24).to(dtype)
    split = lambda x: [y.unflatten(-1, (-1, dim)) for y in x.split([2 * group * dim, 2 * dim, 2 * dim], -1)]  # noqa: E731
    q, k, v = split(packed)
    state = {n: torch.randn(6, *spec.shape).to(spec.dtype) for n, spec in form.state_spec(dtype).items()}
    expected_state = {n: x.clone() for n, x in state.items()}
    with disabled():
        values, taps = v, form.taps(hidden)
        if taps is not None:
            values = dynamic_conv_step(v, taps, pool=expected_state["conv"], slots=SLOTS)
        expected = operator_by_operator(form, q, k, v, values, hidden, expected_state, dtype)
    form, state = form.to(DEVICE), {n: x.to(DEVICE) for n, x in state.items()}
    before = {n: x.clone() for n, x in state.items()}
    out = torch.full((len(SLOTS), 2 * group, dim), 7.0, dtype=dtype, device=DEVICE)
    mixer_step(
        form, state, *split(packed.to(DEVICE)), values.to(DEVICE), hidden.to(DEVICE),
        slots=SLOTS.to(DEVICE), positions=POSITIONS.to(DEVICE), out=out,
    )  # fmt: skip
    live = SLOTS > 0
    # bfloat16: the torch window rounds its weights and its output once more
    assert_close(out.cpu()[live], expected[live].double(), 1e-5 if dtype == torch.float32 else 2e-2)
    assert not out.cpu()[~live].any()
    for n, x in state.items():
        if n != "conv":  # the caller's
            assert_close(x.cpu(), expected_state[n].double(), 1e-5)
        assert torch.equal(x[[0, 2, 4]], before[n][[0, 2, 4]])
