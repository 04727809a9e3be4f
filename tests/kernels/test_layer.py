"""Norm and activation of a decoder layer against torch, step by step as vLLM's layers round them."""

import pytest
import torch
import torch.nn.functional as F

from dtr_kernels.compiled import layer


def rms_norm(x, residual, weight, epsilon):
    """vLLM's RMSNorm: float32 sums, rounded to the model's dtype before the weight."""
    total = x.float() + (0 if residual is None else residual.float())
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + epsilon)
    return normed.to(x.dtype) * weight, total.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 576), (3, 33), (40, 2048), (0, 16)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_norm(implementation, tokens, width, dtype, with_residual):
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(width).to(dtype)
    residual = 3 * torch.randn(tokens, width).to(dtype) if with_residual else None
    assert layer.fits(x, weight) == (implementation != "torch")
    if implementation == "torch":
        return
    out, total = layer.add_norm(x, residual, weight, 1e-5)
    expected, expected_total = rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_rounded_alike(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 1536), (3, 33), (64, 1030), (0, 16)])
def test_silu_mul(implementation, tokens, width, dtype):
    if implementation == "torch":
        return
    torch.manual_seed(0)
    x = (4 * torch.randn(tokens, 2 * width)).to(dtype)
    if tokens:
        x[0, :5] = torch.tensor([0.0, -200.0, 200.0, -88.5, 1e-30])
    gate, up = x.chunk(2, -1)
    assert_rounded_alike(layer.silu_mul(x), F.silu(gate) * up)


def test_strided_rows_are_taken(implementation):
    if implementation == "torch":
        return
    wide = torch.randn(6, 80)
    assert_rounded_alike(layer.silu_mul(wide[:, 8:72]), F.silu(wide[:, 8:40]) * wide[:, 40:72])


def assert_rounded_alike(actual, expected):
    """The same up to sums in another order, after which a bfloat16 may fall on the other side of a rounding, twice."""
    if expected.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        return
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-6)
    if expected.numel():
        assert (actual == expected).float().mean() > 0.95
