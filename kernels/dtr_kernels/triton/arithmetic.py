"""Arithmetic that the kernels share: rounding, products, block inverses, gates. Device functions only.

Triton's interpreter truncates where a GPU rounds to nearest, and has no products of bfloat16. Both are made up for
here, so that the interpreter computes what the GPU does.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """x in DTYPE, rounded to nearest even."""
    if x.dtype != DTYPE:
        x = x.to(tl.float32)
        if INTERPRETED and DTYPE.is_bf16():
            bits = x.to(tl.uint32, bitcast=True)
            x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        x = x.to(DTYPE)
    return x


@triton.jit
def product(a, b, DTYPE: tl.constexpr):
    """a @ b with operands in DTYPE, summed in float32. float32 operands are multiplied exactly, not as TF32."""
    a, b = narrowed(a, DTYPE), narrowed(b, DTYPE)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def split_product(a, b, DTYPE: tl.constexpr):
    """a @ b for a in float32 that is not to be rounded to a narrow DTYPE: the rounded a and what is left of it."""
    total = product(a, b, DTYPE)
    if not DTYPE.is_fp32():
        total += product(a - narrowed(a, DTYPE).to(tl.float32), b, DTYPE)
    return total


@triton.jit
def unit_lower_inverse(a, C: tl.constexpr):
    """(I + a)^-1 for a strictly lower triangular a [C,C] float32, C = 32 or 64.

    Forward substitution in the diagonal blocks of 16, all at once; then neighbours are merged, twice the size each
    time:  [[I+A, 0], [B, I+D]]^-1 = [[(I+A)^-1, 0], [-(I+D)^-1 B (I+A)^-1, (I+D)^-1]]. Products of [32,32] in float32:
    those of [64,64] cost five times as much and spill registers.
    """
    BLOCKS: tl.constexpr = C // 16
    block, row = tl.arange(0, BLOCKS), tl.arange(0, 16)
    on_diagonal = block[:, None, None, None] == block[None, None, :, None]
    diagonal = tl.sum(tl.where(on_diagonal, tl.reshape(a, (BLOCKS, 16, BLOCKS, 16)), 0.0), axis=2)
    inverse = tl.where(row[None, :, None] == row[None, None, :], 1.0, 0.0) + tl.zeros([BLOCKS, 16, 16], tl.float32)
    for n in range(1, 16):
        at_row = row[None, :, None] == n
        factors = tl.sum(tl.where(at_row, diagonal, 0.0), axis=1)
        known = tl.sum(factors[:, :, None] * inverse, axis=1)
        inverse = tl.where(at_row, inverse - known[:, None, :], inverse)
    whole = tl.reshape(tl.where(on_diagonal, inverse[:, :, None, :], 0.0), (C, C))
    if C == 32:
        whole = _merged(whole, a)
    if C == 64:
        first = _merged(_quarter(whole, 0, 0), _quarter(a, 0, 0))
        second = _merged(_quarter(whole, 1, 1), _quarter(a, 1, 1))
        left = tl.dot(second, _quarter(a, 1, 0), input_precision="ieee")
        below = -tl.dot(left, first, input_precision="ieee")
        half = tl.arange(0, 2)
        at_row, at_column = half[:, None, None, None], half[None, None, :, None]
        upper = tl.where(at_column == 0, first[None, :, None, :], 0.0)
        lower = tl.where(at_column == 0, below[None, :, None, :], second[None, :, None, :])
        whole = tl.reshape(tl.where(at_row == 0, upper, lower), (64, 64))
    return whole


@triton.jit
def _merged(inverse, a):
    """Inverses of the two diagonal blocks of 16 in [32,32] -> the inverse of the whole."""
    i = tl.arange(0, 32)
    below = tl.where((i[:, None] >= 16) & (i[None, :] < 16), a, 0.0)
    left = tl.dot(inverse, below, input_precision="ieee")
    return inverse - tl.dot(left, inverse, input_precision="ieee")


@triton.jit
def _quarter(x, ROW: tl.constexpr, COLUMN: tl.constexpr):
    """A quarter [32,32] of x [64,64]."""
    half = tl.arange(0, 2)
    chosen = (half[:, None, None, None] == ROW) & (half[None, None, :, None] == COLUMN)
    return tl.sum(tl.sum(tl.where(chosen, tl.reshape(x, (2, 32, 2, 32)), 0.0), axis=2), axis=0)


@triton.jit
def fixed_and_rest(g):
    """Splits log decays so that differences of their cumulated sums are exact: multiples of 2^-10, and the rest.

    64 multiples of 2^-10, none below -128, add up exactly in float32 (8192 * 2^10 = 2^23); the rest, at most 2^-11
    each, adds up with errors near 1e-9. exp(-128) is 0 in float32, so the bound changes nothing.
    """
    g = tl.maximum(g, -128.0)
    fixed = tl.floor(g * 1024.0 + 0.5) * 0.0009765625
    return fixed, g - fixed


@triton.jit
def log1p_unit(y):
    """log(1 + y) for 0 <= y <= 1, to float32 rounding: 2 atanh(y / (2 + y)). log alone is only absolutely exact."""
    s = y / (2.0 + y)
    s2 = s * s
    series = 1.0 / 13 + s2 * (1.0 / 15 + s2 * (1.0 / 17))
    series = 1.0 / 7 + s2 * (1.0 / 9 + s2 * (1.0 / 11 + s2 * series))
    return 2.0 * s * (1.0 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * series)))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); logsigmoid(x) is -softplus(-x)."""
    return tl.maximum(x, 0.0) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))
