"""L2 norm, read-out and gates in Triton against torch in float64: on the GPU or in Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F

from dtr_kernels.forms import FORMS, FormConfig, base, gated_deltanet, make_form
from dtr_kernels.triton import rows
from tests.kernels.cases import assert_close
from tests.kernels.triton_cases import DEVICE

TOLERANCE = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3, 64), (2, 7, 3, 40), (1, 1, 129), (300, 2, 17)])
def test_rows(shape, dtype):
    x, gain = normal(*shape, dtype=dtype), normal(*shape[-2:], seed=1)
    exact = x.double()
    unit = exact / (exact.square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert_close(rows.unit_rows(x, 1e-6), unit, TOLERANCE)
    read = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain.double()
    assert_close(rows.readout(x, gain, 1e-5), read, TOLERANCE)


def test_rows_that_lie_apart_and_rows_of_zeros():
    whole = normal(6, 9, 2 * 32)
    part = whole[1:5, 2:7, 32:]
    assert_close(rows.unit_rows(part, 1e-6), F.normalize(part.double(), dim=-1, eps=1e-6), 1e-5)
    assert not rows.unit_rows(torch.zeros(3, 2, 16, device=DEVICE), 1e-6).any()
    assert rows.unit_rows(whole[:0], 1e-6).shape == (0, 9, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden", "heads"), [(1, 96, 3), (40, 200, 8), (7, 64, 17), (0, 64, 2)])
def test_gates(tokens, hidden, heads, dtype):
    decay, beta = (torch.nn.Linear(hidden, heads).to(DEVICE) for _ in range(2))
    x, log_rate = normal(tokens, hidden, dtype=dtype), normal(heads, seed=1)
    log_decay, strength = rows.gates(x, decay, log_rate, beta)
    exact = x.double()
    with torch.no_grad():
        truth = -log_rate.double().exp() * F.softplus(F.linear(exact, decay.weight.double(), decay.bias.double()))
        assert_close(log_decay, truth, 1e-5) if tokens else None
        assert log_decay.shape == strength.shape == (tokens, heads)
        truth = F.linear(exact, beta.weight.double(), beta.bias.double()).sigmoid()
        assert_close(strength, truth, 1e-5) if tokens else None


@pytest.mark.parametrize("name", FORMS)
def test_forms_make_the_same_operands_and_readouts_with_them(name, monkeypatch):
    """Without a gradient, on what counts as a GPU, against the same form in torch."""
    torch.manual_seed(0)
    form = make_form(name, FormConfig(96, 4, 2, 32, 16)).to(DEVICE)
    with torch.no_grad():
        for parameter in form.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = [normal(2, 9, heads, 32, seed=heads) for heads in (4, 2, 2)] + [normal(2, 9, 96)]
    plain = form.operands(*inputs)
    out = normal(2, 9, 4, form.value_dim)
    read = form.readout(out, inputs[-1])
    for module in (base, gated_deltanet):
        monkeypatch.setattr(module, "on_gpu", lambda *_: True)
        monkeypatch.setattr(module.rows, "fits", lambda *_: False)
    with torch.no_grad():
        for ours, truth in zip(form.operands(*inputs), plain, strict=True):
            assert (ours is None) == (truth is None)
            if ours is not None:
                assert_close(ours, truth.double(), 1e-5)
        assert_close(form.readout(out, inputs[-1]), read.double(), 1e-5)
