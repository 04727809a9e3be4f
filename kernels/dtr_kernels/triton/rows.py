"""What surrounds the operator, on GPUs: L2 norm, read-out, gates. The functions of `compiled.rows`, without gradients.

In torch each is a chain of passes over [tokens, heads, dim], launched one by one; here it is one launch and one pass.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from dtr_kernels.triton.arithmetic import sigmoid, softplus
from dtr_kernels.triton.operands import INPUT_DTYPES, contiguous_last, padded

# Elements of a block of rows.
BLOCK = 4096
LARGEST_ROW = BLOCK


def fits(x: Tensor) -> bool:
    """Whether a tensor of rows [...,D] is taken: D at most LARGEST_ROW, float32, bfloat16 or float16."""
    return x.shape[-1] <= LARGEST_ROW and x.dtype in INPUT_DTYPES


def unit_rows(x: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(sum(x^2) + epsilon) over the last dimension, float32. x [...,H,D]; tokens and heads may lie apart."""
    return _rows(x, None, 1, epsilon)


def readout(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """gain x / sqrt(mean(x^2) + epsilon) over the last dimension, float32. x [...,H,D], gain [H,D] float32."""
    return _rows(x, gain.contiguous(), x.shape[-1], epsilon)


def gates(hidden: Tensor, decay: nn.Linear, log_rate: Tensor, beta: nn.Linear) -> tuple[Tensor, Tensor]:
    """-exp(log_rate) softplus(decay(hidden)) and sigmoid(beta(hidden)), float32: one pass over hidden.

    hidden [...,hidden_size]; the projections have float32 weights and biases, as many outputs each as log_rate [H] has.
    Products are of three TF32 products.

    Returns:
        log decay and beta, [...,H] each.
    """
    flat = contiguous_last(hidden).reshape(-1, hidden.shape[-1])
    heads = len(log_rate)
    log_decay, strength = (
        torch.empty(*hidden.shape[:-1], heads, dtype=torch.float32, device=hidden.device) for _ in range(2)
    )
    if len(flat):
        # Few tokens leave most of a GPU idle: small blocks then, for more programs.
        block = 16 if len(flat) <= 1024 else 32
        gates_kernel[(triton.cdiv(len(flat), block), triton.cdiv(heads, 16))](
            flat, decay.weight, decay.bias, log_rate, beta.weight, beta.bias, log_decay, strength,
            len(flat), flat.stride(0), HIDDEN=hidden.shape[-1], H=heads, BN=block, BK=64, num_warps=4, num_stages=3,
        )  # fmt: skip
    return log_decay, strength


def _rows(x: Tensor, gain: Tensor | None, count: int, epsilon: float) -> Tensor:
    heads, dim = x.shape[-2:]
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    flat = contiguous_last(x)
    flat = flat.reshape(-1, heads, dim) if flat.ndim != 3 else flat
    rows = len(flat) * heads
    if rows:
        block = max(1, BLOCK // padded(dim))
        rows_kernel[(triton.cdiv(rows, block),)](
            flat, gain, out, rows, float(epsilon), flat.stride(0), flat.stride(1),
            H=heads, D=dim, BD=padded(dim), ROWS=block, COUNT=count, num_warps=4,
        )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows", "epsilon"])
def rows_kernel(
    x, gain, out, rows, epsilon, stride, stride_h,
    H: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows): x / sqrt(sum(x^2) / COUNT + epsilon), times gain [H,D] if there is one."""
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BD)
    at = (row < rows)[:, None] & (d < D)[None, :]
    token, head = (row // H).to(tl.int64), row % H
    values = tl.load(x + token[:, None] * stride + head[:, None] * stride_h + d[None, :], mask=at, other=0.0)
    values = values.to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / COUNT + epsilon)[:, None]
    if gain is not None:
        values *= tl.load(gain + head[:, None] * D + d[None, :], mask=at, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * D + d[None, :], values, mask=at)


@triton.jit(do_not_specialize=["tokens"])
def gates_kernel(
    hidden, decay_weight, decay_bias, log_rate, beta_weight, beta_bias, log_decay, strength, tokens, stride,
    HIDDEN: tl.constexpr, H: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, blocks of 16 heads)."""
    t, h = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * 16 + tl.arange(0, 16)
    decay_logits, beta_logits = tl.zeros([BN, 16], tl.float32), tl.zeros([BN, 16], tl.float32)
    for d0 in range(0, HIDDEN, BK):
        d = d0 + tl.arange(0, BK)
        at = (t < tokens)[:, None] & (d < HIDDEN)[None, :]
        inputs = tl.load(hidden + t.to(tl.int64)[:, None] * stride + d[None, :], mask=at, other=0.0).to(tl.float32)
        at = (d < HIDDEN)[:, None] & (h < H)[None, :]
        place = h[None, :] * HIDDEN + d[:, None]
        decay_logits += _product(inputs, tl.load(decay_weight + place, mask=at, other=0.0))
        beta_logits += _product(inputs, tl.load(beta_weight + place, mask=at, other=0.0))
    decay_logits += tl.load(decay_bias + h, mask=h < H, other=0.0)[None, :]
    beta_logits += tl.load(beta_bias + h, mask=h < H, other=0.0)[None, :]
    rate = tl.exp(tl.load(log_rate + h, mask=h < H, other=0.0))
    at, place = (t < tokens)[:, None] & (h < H)[None, :], t.to(tl.int64)[:, None] * H + h[None, :]
    tl.store(log_decay + place, -rate[None, :] * softplus(decay_logits), mask=at)
    tl.store(strength + place, sigmoid(beta_logits), mask=at)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")
