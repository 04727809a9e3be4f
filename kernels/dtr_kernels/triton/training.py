"""What the chunkwise form does not leave to torch when it trains on a GPU: the states, and the inverse.

`chunked.py` prepares all chunks at once with batched products, which torch does well. What is left is serial: a loop
over chunks in Python is several launches a chunk, more backwards, and a batched triangular solve is slow.
Both are one kernel here, with gradients made of the same kernels and of batched products:

    S_n+1 = d_n S_n + A_n - Y_n^T (X_n S_n)         `carry`, forwards in n
    G_n   = H_n + d_n G_n+1 - X_n^T (Y_n G_n+1)     its gradient: the same sum backwards in n, with X and Y exchanged

where H_n is the gradient of S_n from outside and G_n the whole one. So dA_n = G_n+1, dX_n = -(Y_n G_n+1) S_n^T,
dY_n = -(X_n S_n) G_n+1^T and dd_n = the sum of S_n G_n+1 over the value dimension.

All tensors are float32. Products are three TF32 products (the rounded operands and what is left of each), which loses
next to nothing against float32 and runs on the tensor cores.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtr_kernels.triton.arithmetic import unit_lower_inverse
from dtr_kernels.triton.operands import padded

# Of the keys' dimension, where there is a correction: two [C,Dk] blocks of float32 are what a program's shared memory
# holds. Without a correction there is no limit.
LARGEST_CORRECTED = 128
INVERTIBLE = (32, 64)


def carry(
    updates: Tensor, state: Tensor, decay: Tensor | None = None, x: Tensor | None = None, y: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S_n+1 = d_n S_n + A_n - Y_n^T (X_n S_n), one chunk after another.

    Args:
        updates: A, [M,N,Dk,Dv] float32: M independent sequences (batch and heads) of N chunks.
        state: S_0, [M,Dk,Dv] float32.
        decay: d, [M,N,Dk] or [M,N,1] float32, or None for 1.
        x, y: [M,N,C,Dk] float32, or None for no correction; Dk at most `LARGEST_CORRECTED`, C 16, 32 or 64.

    Returns:
        The states before the chunks, S_0 .. S_N-1 [M,N,Dk,Dv], and S_N [M,Dk,Dv]. Once differentiable in every operand.
    """
    return _Carry.apply(updates, state, decay, x, y)  # type: ignore[no-untyped-call,no-any-return]


def inverse(a: Tensor) -> Tensor:
    """(I + a)^-1 for strictly lower triangular a [...,C,C] float32, C 32 or 64. Once differentiable."""
    return _Inverse.apply(a)  # type: ignore[no-untyped-call,no-any-return]


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, updates: Tensor, state: Tensor, decay: Any, x: Any, y: Any) -> tuple[Tensor, Tensor]:
        before, last = _carry(updates, state, decay, x, y, False)
        ctx.save_for_backward(before, decay, x, y)
        return before, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        before, decay, x, y = ctx.saved_tensors
        after, d_state = _carry(d_before, d_last, decay, y, x, True)
        d_decay = d_x = d_y = None
        if decay is not None:
            d_decay = (before * after).sum(-1)
            if decay.shape[-1] == 1:
                d_decay = d_decay.sum(-1, keepdim=True)
        if x is not None:
            d_x = -(y @ after) @ before.mT
            d_y = -(x @ before) @ after.mT
        return after, d_state, d_decay, d_x, d_y


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        size = a.shape[-1]
        if size not in INVERTIBLE:
            raise ValueError(f"blocks of {size}: accepted are {', '.join(map(str, INVERTIBLE))}")
        a = a.contiguous()
        out = torch.empty_like(a)
        if a.numel():
            inverse_kernel[(a.numel() // size**2,)](a, out, C=size, num_warps=4)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return (-(out.mT @ d_out) @ out.mT).tril(-1)


def _carry(
    updates: Tensor, state: Tensor, decay: Tensor | None, x: Tensor | None, y: Tensor | None, backwards: bool
) -> tuple[Tensor, Tensor]:
    sequences, chunks, key_dim, value_dim = updates.shape
    updates, state = updates.contiguous(), state.contiguous()
    decay, x, y = (None if t is None else t.contiguous() for t in (decay, x, y))
    before, last = torch.empty_like(updates), torch.empty_like(state)
    tokens = 16 if x is None else x.shape[2]
    # The correction needs a whole column of the state in one program.
    block_k = padded(key_dim) if x is not None else min(padded(key_dim), 64)
    block_v = min(padded(value_dim), 32 if block_k <= 64 else 16)
    grid = (sequences, triton.cdiv(value_dim, block_v), triton.cdiv(key_dim, block_k))
    carry_kernel[grid](
        updates, state, decay, x, y, before, last, chunks,
        DK=key_dim, DV=value_dim, C=tokens, BK=block_k, BV=block_v, CORRECTED=x is not None,
        PER_HEAD=decay is not None and decay.shape[-1] == 1, PER_KEY=decay is not None and decay.shape[-1] != 1,
        BACKWARDS=backwards, num_warps=4, num_stages=1 if x is not None else 3,
    )  # fmt: skip
    return before, last


@triton.jit
def _exact(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit(do_not_specialize=["chunks"])
def carry_kernel(
    updates, state, decay, x, y, before, last, chunks,
    DK: tl.constexpr, DV: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CORRECTED: tl.constexpr, PER_HEAD: tl.constexpr, PER_KEY: tl.constexpr, BACKWARDS: tl.constexpr,
):  # fmt: skip
    """Grid (M, blocks of Dv, blocks of Dk; one block of Dk for CORRECTED)."""
    m = tl.program_id(0).to(tl.int64)
    d, e = tl.program_id(2) * BK + tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    tile = d[:, None] * DV + e[None, :]
    real_d = d < DK
    at = real_d[:, None] & (e < DV)[None, :]
    own = tl.load(state + m * (DK * DV) + tile, mask=at, other=0.0)
    for step in range(0, chunks):
        n = m * chunks + step
        if BACKWARDS:
            n = m * chunks + (chunks - 1 - step)
        tl.store(before + n * (DK * DV) + tile, own, mask=at)
        new = tl.load(updates + n * (DK * DV) + tile, mask=at, other=0.0)
        if CORRECTED:
            rows = (n * C + i)[:, None] * DK + d[None, :]
            seen = _exact(tl.load(x + rows, mask=real_d[None, :], other=0.0), own)
            new -= _exact(tl.trans(tl.load(y + rows, mask=real_d[None, :], other=0.0)), seen)
        if PER_HEAD:
            own *= tl.load(decay + n)
        if PER_KEY:
            own *= tl.load(decay + n * DK + d, mask=real_d, other=0.0)[:, None]
        own += new
    tl.store(last + m * (DK * DV) + tile, own, mask=at)


@triton.jit
def inverse_kernel(a, out, C: tl.constexpr):
    """Grid (matrices): (I + a)^-1 of [C,C] each."""
    i = tl.arange(0, C)
    at = tl.program_id(0).to(tl.int64) * (C * C) + i[:, None] * C + i[None, :]
    lower = i[:, None] > i[None, :]
    tl.store(out + at, unit_lower_inverse(tl.load(a + at, mask=lower, other=0.0), C))
