"""What surrounds the operator, in C, with gradients: rotary embedding, L2 norm, read-out.

In torch each is a chain of passes over [tokens, heads, dim]; here it is one. Every function says what it computes; the
caller has the torch formulation for other devices and for what `fits` refuses.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtr_kernels.compiled.library import TYPES, call, can_take, pointer

MAX_DIM = 8192  # of rows.c
OUT_DTYPES = (torch.float32, torch.bfloat16)


def fits(*operands: Tensor) -> bool:
    """Whether these functions take the operands: CPU tensors up to float32 with rows of at most MAX_DIM elements."""
    return all(x.shape[-1] <= MAX_DIM for x in operands) and can_take(*operands)


def unit_rows(x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(sum(x^2) + epsilon) over the last dimension, float32. x [...,H,D]."""
    return _UnitRows.apply(x, epsilon)  # type: ignore[no-untyped-call]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, float32. x [B,T,H,D]; cos, sin [1 or B,T,D], which get no gradient."""
    return _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]


def readout(x: Tensor, gain: Tensor, epsilon: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """gain x / sqrt(mean(x^2) + epsilon) over the last dimension. x [...,H,D], gain [H,D].

    Returns `dtype`, float32 or bfloat16, where no gradient is wanted, else float32.
    """
    if torch.is_grad_enabled() and (x.requires_grad or gain.requires_grad):
        return _Readout.apply(x, gain, epsilon)  # type: ignore[no-untyped-call]
    return _read(x, gain, epsilon, dtype)


def beta_gate(hidden: Tensor, projection: nn.Linear) -> Tensor:
    """sigmoid(projection(hidden)), float32, without a gradient. hidden [...,hidden_size]."""
    return _gates(hidden, projection, None)


def decay_gate(hidden: Tensor, projection: nn.Linear, rate: Tensor) -> Tensor:
    """-rate softplus(projection(hidden)), float32, without a gradient. hidden [...,hidden_size], rate [outputs]."""
    return _gates(hidden, projection, rate)


def _gates(hidden: Tensor, projection: nn.Linear, rate: Tensor | None) -> Tensor:
    weight = projection.weight
    out = torch.empty(*hidden.shape[:-1], len(weight), dtype=torch.float32)
    flat = hidden if hidden.ndim == 2 and hidden.stride(1) == 1 else hidden.reshape(-1, hidden.shape[-1]).contiguous()
    call(
        "dtr_gates", *map(pointer, (flat, weight, projection.bias, rate, out)), len(flat), weight.shape[1],
        len(weight), flat.stride(0), TYPES[flat.dtype], int(rate is not None), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _tokens(x: Tensor) -> Tensor:
    """[...,H,D] -> [tokens,H,D] whose heads lie one after another; tokens may lie apart."""
    x = x.flatten(0, -3) if x.ndim > 3 else x
    return (
        x
        if x.ndim == 3 and x.stride(2) == 1 and x.stride(1) == x.shape[2]
        else x.contiguous().reshape(-1, *x.shape[-2:])
    )


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, epsilon = arguments
        ctx.epsilon = epsilon
        ctx.save_for_backward(x)
        out = torch.empty(x.shape, dtype=torch.float32)
        flat = _tokens(x)
        call(
            "dtr_unit_rows", pointer(flat), pointer(out), *flat.shape, flat.stride(0), TYPES[x.dtype], epsilon,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        grad = torch.empty(x.shape, dtype=torch.float32)
        flat = _tokens(x)
        call(
            "dtr_unit_rows_backward", pointer(flat), pointer(grad_out), pointer(grad), *flat.shape, flat.stride(0),
            TYPES[x.dtype], ctx.epsilon, torch.get_num_threads(),
        )  # fmt: skip
        return grad.to(x.dtype), None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, cos, sin = arguments
        cos, sin = (t.expand(x.shape[0] if t.shape[0] > 1 else 1, -1, -1).float().contiguous() for t in (cos, sin))
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotate(x, cos, sin, backward=False)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad_out, cos, sin, backward=True).to(ctx.dtype), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    x = x.contiguous()
    batch, length, heads, dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float32)
    call(
        "dtr_rotary", *map(pointer, (x, cos, sin, out)), batch * length, heads, dim, cos.shape[0] * length,
        TYPES[x.dtype], int(backward), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _read(x: Tensor, gain: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    x, gain = x.float().contiguous(), gain.contiguous()
    heads, dim = x.shape[-2:]
    out = torch.empty(x.shape, dtype=dtype)
    call(
        "dtr_readout", *map(pointer, (x, gain, out)), x.numel() // (heads * dim), heads, dim, TYPES[dtype], epsilon,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Readout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, gain, epsilon = arguments
        x = x.float().contiguous()
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, gain)
        return _read(x, gain, epsilon, torch.float32)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        x, gain = ctx.saved_tensors
        grad_out, gain = grad_out.contiguous(), gain.contiguous()
        heads, dim = x.shape[-2:]
        grad_x, grad_gain = torch.empty_like(x), torch.empty_like(gain)
        call(
            "dtr_readout_backward", *map(pointer, (x, gain, grad_out, grad_x, grad_gain)), x.numel() // (heads * dim),
            heads, dim, ctx.epsilon, torch.get_num_threads(),
        )  # fmt: skip
        return grad_x, grad_gain, None
