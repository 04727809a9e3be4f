"""Decoding over a state pool on GPUs: `operator.linear_attention_step` in Triton, and what surrounds it in a form.

One program holds one kv head's state (or some of its value columns) in registers: it reads it once, applies the token,
reads out every query head of the group, and writes it back. More than one token a sequence (`cu_seqlens`, for the few
tokens of a speculative step or a short extend) goes token by token in the same program, the state staying in registers.

Options take over a form's element-wise steps, so that a decoded token costs one launch: the L2 norm of q and k, gates
from their logits, the normaliser, the RMS norm of the readout. Readout and normaliser need all value columns in one
program; without them the columns are split over programs.

Nothing is read on the host and nothing is allocated but `out`, so that a CUDA graph can hold the launch. States of more
than LARGEST_STATE elements have readout and normaliser done by torch, in float32, after the kernel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.forms.base import NORM_EPS
from dtr_kernels.forms.gated_deltanet import L2_EPS
from dtr_kernels.forms.gla import DECAY_TEMPERATURE
from dtr_kernels.forms.hedgehog import SMALLEST_NORMALISER
from dtr_kernels.triton.arithmetic import narrowed, sigmoid, softplus
from dtr_kernels.triton.operands import check_operands, contiguous_last, slot_stride

DECAYS_FROM = ("log_decay", "softplus", "logsigmoid")
BETAS_FROM = ("beta", "logits")
LOGSIGMOID_TEMPERATURE = tl.constexpr(DECAY_TEMPERATURE)
L2_NORM_EPS = tl.constexpr(L2_EPS)
RMS_NORM_EPS = tl.constexpr(NORM_EPS)
# Elements of a state that one program's registers hold: 128 KB in float32, half of what a multiprocessor has.
LARGEST_STATE = 32768
LEAST_NORMALISER = tl.constexpr(SMALLEST_NORMALISER)


def linear_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rule: str,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    l2_normalise: bool = False,
    decay_from: str = "log_decay",
    decay_log_rate: Tensor | None = None,
    beta_from: str = "beta",
    normaliser: bool = False,
    readout_gain: Tensor | None = None,
    rms_readout: bool = True,
    out: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """One token for R sequences over a state pool, in place; or a few tokens each, with `cu_seqlens`.

    Args:
        q, k, v: [R,Hq,Dk], [R,Hkv,Dk], [R,Hkv,Dv] (with cu_seqlens [N,...]), float32, bfloat16 or float16. Strided
            views are read as they are if the last dimension is contiguous.
        rule, log_decay, beta, scale: as for `operator.linear_attention_step`; log_decay [R,Hkv] or [R,Hkv,Dk].
        pool: [S,Hkv,Dk,Dv] float32 or bfloat16, contiguous but for the first dimension. Computed in float32.
        slots: [R] integers on the device. A slot <= 0 leaves the pool as it is and gives zeros. Two sequences must not
            share a live slot.
        cu_seqlens: [R+1] integers on the device: borders of the sequences among the N tokens.
        has_initial_state: [R] bool on the device; False starts from zeros. None: every slot holds a state.
        l2_normalise: q and k are divided by their norm over Dk.
        decay_from: "log_decay", or what log_decay holds instead: logits for "softplus", the decay
            -exp(decay_log_rate) softplus(logit), or for "logsigmoid", the decay logsigmoid(logit) / 16.
        decay_log_rate: [Hkv] float32, for "softplus".
        beta_from: "beta" or "logits", of which beta is the sigmoid.
        normaliser: the last column of v is ones; the output is the other Dv-1 columns over the last, which is taken as
            at least 1e-30.
        readout_gain: [Hq,Dv] (Dv-1 with a normaliser), contiguous: the output is RMS-normalised over its columns (not
            if rms_readout is False) and multiplied by it.
        out: [R,Hq,Dv] (Dv-1 with a normaliser), contiguous, to write to; allocated in out_dtype if None. With
            cu_seqlens, rows of no sequence are zero in an allocated `out` and left alone in a given one.

    Returns:
        out.

    Raises:
        ValueError: operands that do not fit the rule, the options or one another.
    """
    check_operands(q, k, v, rule, log_decay, beta, pool, slots)
    tokens, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[2]
    columns, sequences = value_dim - normaliser, slots.numel()
    if decay_from not in DECAYS_FROM or beta_from not in BETAS_FROM:
        raise ValueError(
            f"decay_from {decay_from!r} and beta_from {beta_from!r}: accepted are"
            f" {', '.join(DECAYS_FROM)} and {', '.join(BETAS_FROM)}"
        )
    if (decay_from != "log_decay" and log_decay is None) or (beta_from != "beta" and beta is None):
        raise ValueError(f"rule {rule!r} has nothing to make from {decay_from} and {beta_from}")
    if (decay_from == "softplus") != (decay_log_rate is not None):
        raise ValueError('decay_log_rate is for decay_from="softplus", which needs it')
    if decay_log_rate is not None and (decay_log_rate.shape != (kv_heads,) or not decay_log_rate.is_contiguous()):
        raise ValueError(f"decay_log_rate has shape {tuple(decay_log_rate.shape)}, expected ({kv_heads},)")
    if readout_gain is not None and (readout_gain.shape != (heads, columns) or not readout_gain.is_contiguous()):
        raise ValueError(
            f"readout_gain has shape {tuple(readout_gain.shape)}, expected ({heads}, {columns}), contiguous"
        )
    if cu_seqlens is None and tokens != sequences:
        raise ValueError(f"{tokens} tokens for {sequences} slots: without cu_seqlens there is one each")
    if cu_seqlens is not None and cu_seqlens.numel() != sequences + 1:
        raise ValueError(f"{sequences} slots need {sequences + 1} borders, got {cu_seqlens.numel()}")
    if has_initial_state is not None and has_initial_state.numel() != sequences:
        raise ValueError(f"{sequences} slots need as many has_initial_state, got {has_initial_state.numel()}")
    if out is None:
        make = torch.empty if cu_seqlens is None else torch.zeros
        out = make(tokens, heads, columns, dtype=out_dtype, device=q.device)
    elif tuple(out.shape) != (tokens, heads, columns) or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}, expected ({tokens}, {heads}, {columns}), contiguous")
    if tokens == 0 or sequences == 0:
        return out

    q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)
    per_key = log_decay is not None and log_decay.ndim == 3
    if log_decay is not None and per_key:
        log_decay = contiguous_last(log_decay)
    g_strides = (0, 0) if log_decay is None else (log_decay.stride(0), log_decay.stride(1))
    b_strides = (0, 0) if beta is None else (beta.stride(0), beta.stride(1))
    block_k = triton.next_power_of_2(key_dim)
    block_v = triton.next_power_of_2(columns)
    if not normaliser and readout_gain is None:
        block_v = min(block_v, 32)
    elif block_k * block_v > LARGEST_STATE:
        plain = linear_attention_decode(
            q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, pool=pool, slots=slots,
            cu_seqlens=cu_seqlens, has_initial_state=has_initial_state, l2_normalise=l2_normalise,
            decay_from=decay_from, decay_log_rate=decay_log_rate, beta_from=beta_from,
        )  # fmt: skip
        return out.copy_(_readout(plain, normaliser, readout_gain, rms_readout))
    decode_kernel[(sequences * kv_heads, triton.cdiv(columns, block_v))](
        q, k, v, log_decay, beta, decay_log_rate, readout_gain, pool, slots, cu_seqlens, has_initial_state, out,
        float(scale), q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        *g_strides, *b_strides, slot_stride(pool), slots.stride(0),
        HKV=kv_heads, G=heads // kv_heads, DK=key_dim, DV=value_dim, COLUMNS=columns, BK=block_k, BV=block_v,
        PER_HEAD=log_decay is not None and not per_key, PER_KEY=per_key, DELTA=beta is not None,
        SOFTPLUS=decay_from == "softplus", LOGSIGMOID=decay_from == "logsigmoid", BETA_LOGITS=beta_from == "logits",
        L2=l2_normalise, NORMALISER=normaliser,
        RMS=rms_readout and readout_gain is not None, GAIN=readout_gain is not None,
        PACKED=cu_seqlens is not None, INITIAL=has_initial_state is not None,
        num_warps=min(16, max(4, block_k * block_v // 2048)), num_stages=1,
    )  # fmt: skip
    return out


def _readout(out: Tensor, normaliser: bool, gain: Tensor | None, rms: bool) -> Tensor:
    """What decode_kernel does after the operator, in torch, for states that do not fit a program's registers."""
    if normaliser:
        out = out[..., :-1] / out[..., -1:].clamp_min(SMALLEST_NORMALISER)
    if gain is not None:
        if rms:
            out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + NORM_EPS)
        out = out * gain
    return out


@triton.jit(do_not_specialize=["scale"])
def decode_kernel(
    q, k, v, log_decay, beta, decay_log_rate, readout_gain, pool, slots, borders, has_initial, out,
    scale, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    stride_g, stride_gh, stride_b, stride_bh, stride_pool, stride_slots,
    HKV: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, COLUMNS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PER_HEAD: tl.constexpr, PER_KEY: tl.constexpr, DELTA: tl.constexpr,
    SOFTPLUS: tl.constexpr, LOGSIGMOID: tl.constexpr, BETA_LOGITS: tl.constexpr,
    L2: tl.constexpr, NORMALISER: tl.constexpr, RMS: tl.constexpr, GAIN: tl.constexpr,
    PACKED: tl.constexpr, INITIAL: tl.constexpr,
):  # fmt: skip
    """Grid (R Hkv, blocks of the output's columns). The normaliser's column is a vector of its own, `sums`."""
    r, h = tl.program_id(0) // HKV, tl.program_id(0) % HKV
    slot = tl.load(slots + r * stride_slots).to(tl.int64)
    d, e = tl.arange(0, BK), tl.program_id(1) * BV + tl.arange(0, BV)
    real_d, real_e = d < DK, e < COLUMNS
    first = r.to(tl.int64)
    count = 1
    if PACKED:
        first = tl.load(borders + r).to(tl.int64)
        count = (tl.load(borders + r + 1).to(tl.int64) - first).to(tl.int32)
    if slot <= 0:
        for n in range(0, count):
            for member in tl.static_range(G):
                row = ((first + n) * HKV + h) * G + member
                tl.store(out + row * COLUMNS + e, tl.zeros([BV], out.dtype.element_ty), mask=real_e)
        return
    if PACKED and count <= 0:
        return

    own = pool + slot * stride_pool + h * (DK * DV)
    tile = own + d[:, None] * DV + e[None, :]
    at_tile = real_d[:, None] & real_e[None, :]
    to_sums = own + d * DV + (DV - 1)
    state, sums = tl.zeros([BK, BV], tl.float32), tl.zeros([BK], tl.float32)
    started = 1
    if INITIAL:
        started = tl.load(has_initial + r).to(tl.int32)
    if started != 0:
        state += tl.load(tile, mask=at_tile, other=0.0).to(tl.float32)
        if NORMALISER:
            sums += tl.load(to_sums, mask=real_d, other=0.0).to(tl.float32)

    for n in range(0, count):
        t = first + n
        key = tl.load(k + t * stride_k + h * stride_kh + d, mask=real_d, other=0.0).to(tl.float32)
        value = tl.load(v + t * stride_v + h * stride_vh + e, mask=real_e, other=0.0).to(tl.float32)
        if L2:
            key *= tl.rsqrt(tl.sum(key * key, 0) + L2_NORM_EPS)
        if PER_KEY:
            g = tl.load(log_decay + t * stride_g + h * stride_gh + d, mask=real_d, other=0.0).to(tl.float32)
        if PER_HEAD:
            g = tl.load(log_decay + t * stride_g + h * stride_gh).to(tl.float32)
        if SOFTPLUS:
            g = -tl.exp(tl.load(decay_log_rate + h).to(tl.float32)) * softplus(g)
        if LOGSIGMOID:
            g = -softplus(-g) / LOGSIGMOID_TEMPERATURE
        if PER_HEAD:
            state *= tl.exp(g)
            sums *= tl.exp(g)
        if PER_KEY:
            state *= tl.exp(g)[:, None]
            sums *= tl.exp(g)
        one = 1.0
        if DELTA:
            strength = tl.load(beta + t * stride_b + h * stride_bh).to(tl.float32)
            if BETA_LOGITS:
                strength = sigmoid(strength)
            value = strength * (value - tl.sum(state * key[:, None], 0))
            if NORMALISER:
                one = strength * (1.0 - tl.sum(sums * key, 0))
        state += key[:, None] * value[None, :]
        if NORMALISER:
            sums += key * one
        for member in tl.static_range(G):
            head = h * G + member
            query = tl.load(q + t * stride_q + head * stride_qh + d, mask=real_d, other=0.0).to(tl.float32)
            factor = scale
            if L2:
                factor = scale * tl.rsqrt(tl.sum(query * query, 0) + L2_NORM_EPS)
            result = tl.sum(state * query[:, None], 0) * factor
            if NORMALISER:
                result = result / tl.maximum(tl.sum(sums * query, 0) * factor, LEAST_NORMALISER)
            if RMS:
                mean = tl.sum(tl.where(real_e, result * result, 0.0), 0) / COLUMNS
                result = result * tl.rsqrt(mean + RMS_NORM_EPS)
            if GAIN:
                result = result * tl.load(readout_gain + head * COLUMNS + e, mask=real_e, other=0.0).to(tl.float32)
            row = (t * HKV + h) * G + member
            tl.store(out + row * COLUMNS + e, narrowed(result, out.dtype.element_ty), mask=real_e)

    tl.store(tile, narrowed(state, pool.dtype.element_ty), mask=at_tile)
    if NORMALISER:
        tl.store(to_sums, narrowed(sums, pool.dtype.element_ty), mask=real_d)
