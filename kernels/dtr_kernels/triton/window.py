"""The softmax branch on GPUs: `window.window_attention_packed` and `_step` in Triton, over ring caches.

A ring [S,W,Hkv,D] holds the token at position p in row p % W. Softmax does not ask for the order of its keys, so a ring
is read as it lies. Query heads of a kv head are more rows of one product; the softmax runs along blocks of keys with a
running maximum, in float32. Products have operands in the ring's dtype (float32 ones are exact, not TF32).

One more key, `window.Rest`, is where the running softmax starts: its logit is the first maximum, its value the first
sum.

The prefill reads the old ring and writes the new one in two launches, since other programs' queries still need what
one would overwrite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.triton.arithmetic import narrowed, product
from dtr_kernels.triton.chunk_plan import ChunkPlan, chunk_of, chunk_plan
from dtr_kernels.triton.operands import INPUT_DTYPES, contiguous_last, padded, slot_stride
from dtr_kernels.window import Rest

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
CHUNK = 64


def plan_of_window(cu_seqlens: Tensor, tokens: int, device: torch.device | None = None) -> ChunkPlan:
    """The plan that `window_attention_prefill` builds for itself if it is given none; the same for all layers."""
    return chunk_plan(cu_seqlens, tokens, CHUNK, device or cu_seqlens.device)


def window_attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    ring_k: Tensor,
    ring_v: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    start: Tensor,
    rest: Rest | None = None,
    plan: ChunkPlan | None = None,
) -> Tensor:
    """Prefill of R ragged sequences with ring caches, in place. No host synchronisation; no gradient.

    Args:
        q [N,Hq,D], k, v [N,Hkv,D]: tokens of R sequences one after another.
        ring_k, ring_v: [S,W,Hkv,D] of one dtype, contiguous but for the first dimension.
        slots: [R] integers on the device. A slot <= 0 leaves the rings as they are and gives zeros.
        cu_seqlens: [R+1]; start: [R], position of each sequence's first token here, 0 = nothing cached. On either
            device; from pageable host memory the copy may wait for the stream.
        rest: one more key; logit [Hq] and value [N,Hq,D], float32.
        plan: of `plan_of_window` for the same pack, to build it once for many layers.

    Returns:
        out [N,Hq,D] in q's dtype; zero in null slots and in rows that belong to no sequence.

    Raises:
        ValueError: operands that do not fit one another.
    """
    _check(q, k, v, window, ring_k, ring_v, slots, slots.numel(), rest)
    tokens, heads, dim = q.shape
    kv_heads, sequences, device = k.shape[1], slots.numel(), q.device
    if cu_seqlens.numel() != sequences + 1 or start.numel() != sequences:
        raise ValueError(
            f"{sequences} slots need {sequences + 1} borders and {sequences} starts,"
            f" got {cu_seqlens.numel()} and {start.numel()}"
        )
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=device)
    if tokens == 0 or sequences == 0:
        return out.zero_()
    plan = plan or plan_of_window(cu_seqlens, tokens, device)
    if plan.tokens != tokens or plan.first_chunk.numel() != sequences + 1:
        raise ValueError(
            f"the plan is for {plan.tokens} tokens and {plan.first_chunk.numel() - 1} sequences,"
            f" not for {tokens} and {sequences}"
        )
    start = start.to(device=device, dtype=torch.int32, non_blocking=True).contiguous()
    slots, q, k, v = slots.contiguous(), contiguous_last(q), contiguous_last(k), contiguous_last(v)
    block_n, warps, stages = _blocks(dim, window, ring_k.dtype)
    block_m = 16 if ring_k.dtype == torch.float32 else 64
    strides = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), slot_stride(ring_k), slot_stride(ring_v))
    sizes = dict(HKV=kv_heads, D=dim, W=window, BD=padded(dim))
    group = heads // kv_heads
    rest_logit, rest_value = _floats(rest)
    window_prefill_kernel[(plan.chunks, triton.cdiv(plan.chunk * group, block_m), kv_heads)](
        q, k, v, ring_k, ring_v, plan.table, slots, plan.cu_seqlens, start, rest_logit, rest_value, out, float(scale),
        plan.chunks, sequences,
        q.stride(0), q.stride(1), *strides,
        G=group, C=plan.chunk, BM=block_m, BN=block_n, DOT=DTYPES[ring_k.dtype], REST=rest is not None, **sizes,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_w = min(4096 // padded(dim), triton.next_power_of_2(window))
    ring_write_kernel[(sequences, triton.cdiv(window, block_w), kv_heads)](
        k, v, ring_k, ring_v, slots, plan.cu_seqlens, start, *strides, BW=block_w, **sizes, num_warps=4
    )
    return out


def window_attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float,
    ring_k: Tensor,
    ring_v: Tensor,
    slots: Tensor,
    positions: Tensor,
    rest: Rest | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Decoding: one token for R sequences with ring caches, in place. No host synchronisation, and no allocation but
    `out`, so that a CUDA graph can hold it.

    q [R,Hq,D], k, v [R,Hkv,D], ring_k, ring_v [S,W,Hkv,D] (contiguous but for the first dimension), slots [R],
    positions [R] of the tokens, rest (one more key: logit [Hq] and value [R,Hq,D], float32), all on the device. Null
    slots (<= 0) change nothing and give zeros.

    Returns:
        out [R,Hq,D] in q's dtype, or the contiguous `out` that was given.

    Raises:
        ValueError: operands that do not fit one another.
    """
    _check(q, k, v, window, ring_k, ring_v, slots, q.shape[0], rest)
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    if positions.shape != slots.shape:
        raise ValueError(f"positions have shape {tuple(positions.shape)}, expected ({rows},)")
    if out is None:
        out = torch.empty(rows, heads, dim, dtype=q.dtype, device=q.device)
    elif out.shape != q.shape or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {tuple(q.shape)}, contiguous")
    if rows == 0:
        return out
    q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)
    block_n, warps, stages = _blocks(dim, window, ring_k.dtype)
    rest_logit, rest_value = _floats(rest)
    window_decode_kernel[(rows, kv_heads)](
        q, k, v, ring_k, ring_v, slots, positions, rest_logit, rest_value, out, float(scale),
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        slot_stride(ring_k), slot_stride(ring_v), slots.stride(0), positions.stride(0),
        HKV=kv_heads, G=heads // kv_heads, GP=padded(heads // kv_heads), D=dim, W=window, BD=padded(dim),
        BN=block_n, DOT=DTYPES[ring_k.dtype], REST=rest is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _blocks(dim: int, window: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys of a block, warps and stages. A product of float32 holds its operands in registers, so blocks are small."""
    if dtype == torch.float32:
        keys, warps, stages = (32, 4, 1) if dim <= 64 else (16, max(8, padded(dim) // 16), 1)
    else:
        keys, warps, stages = (64, 4, 2) if dim <= 128 else (32, 8, 2)
    return min(padded(window), keys), warps, stages


def _floats(rest: Rest | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if rest is None else (rest.logit.float().contiguous(), rest.value.float().contiguous())


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    ring_k: Tensor,
    ring_v: Tensor,
    slots: Tensor,
    sequences: int,
    rest: Rest | None,
) -> None:
    if q.ndim != 3 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    ring = (window, *k.shape[1:])
    for name, tensor in (("ring_k", ring_k), ("ring_v", ring_v)):
        if tuple(tensor.shape[1:]) != ring or tensor.dtype != ring_k.dtype or tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected [S, {', '.join(map(str, ring))}]"
            )
        slot_stride(tensor)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in INPUT_DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}: accepted are {', '.join(map(str, INPUT_DTYPES))}")
    if rest is not None and (rest.logit.shape != q.shape[1:2] or rest.value.shape != q.shape):
        raise ValueError(
            f"rest has logit {tuple(rest.logit.shape)} and value {tuple(rest.value.shape)}, expected"
            f" {tuple(q.shape[1:2])} and {tuple(q.shape)}"
        )
    if slots.shape != (sequences,):
        raise ValueError(f"slots have shape {tuple(slots.shape)}, expected ({sequences},)")


@triton.jit
def _attend(acc, top, total, queries, keys, values, seen, scale, DOT: tl.constexpr):
    """One block of keys [N,D] for queries [M,D]: the running softmax's sum of values, maximum and sum
    of weights. `top` starts at a finite number, so that a row that sees nothing yet stays at 0."""
    logits = tl.where(seen, product(queries, tl.trans(keys), DOT) * scale, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    shrink = tl.exp(top - new_top)
    weights = tl.exp(logits - new_top[:, None])
    acc = acc * shrink[:, None] + product(weights, values, DOT)
    return acc, new_top, total * shrink + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["scale", "chunks", "sequences"])
def window_prefill_kernel(
    q, k, v, ring_k, ring_v, table, slots, borders, starts, rest_logit, rest_value, out, scale, chunks, sequences,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_rk, stride_rv,
    HKV: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
    G: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, blocks of C G rows, Hkv). Row m is token m // G of the chunk, query head m % G of the kv head."""
    begin, end, live = chunk_of(table, slots, chunks, sequences)
    if begin >= end:
        return
    h = tl.program_id(2)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    d, j = tl.arange(0, BD), tl.arange(0, BN)
    t_row, h_row = begin + m // G, h * G + m % G
    real_row, real_d = (m // G < C) & (t_row < end), d < D
    at_row = real_row[:, None] & real_d[None, :]
    to_head = (t_row.to(tl.int64)[:, None] * (HKV * G) + h_row[:, None]) * D + d[None, :]
    to_out = out + to_head
    if live == 0:
        tl.store(to_out, tl.zeros([BM, BD], out.dtype.element_ty), mask=at_row)
        return
    sequence = tl.load(table + tl.program_id(0))
    first_token, start = tl.load(borders + sequence), tl.load(starts + sequence)
    slot = tl.load(slots + sequence).to(tl.int64)
    to_q = q + t_row.to(tl.int64)[:, None] * stride_q + h_row[:, None] * stride_qh + d[None, :]
    queries = tl.load(to_q, mask=at_row, other=0.0)
    acc, top, total = tl.zeros([BM, BD], tl.float32), tl.full([BM], -1e30, tl.float32), tl.zeros([BM], tl.float32)
    if REST:
        acc = tl.load(rest_value + to_head, mask=at_row, other=0.0)
        top, total = tl.load(rest_logit + h_row), total + 1.0
    earliest = begin + (tl.program_id(1) * BM) // G
    latest = tl.minimum(begin + (tl.program_id(1) * BM + BM - 1) // G + 1, end)
    # Positions in the ring: before `start`, and at most W - 1 before the block's first token.
    position = start + (t_row - first_token)
    for p0 in range(tl.maximum(start + (earliest - first_token) - W + 1, 0), start, BN):
        p = p0 + j
        at = (p < start)[:, None] & real_d[None, :]
        row = ((p % W)[:, None] * HKV + h) * D + d[None, :]
        keys = tl.load(ring_k + slot * stride_rk + row, mask=at, other=0.0)
        values = tl.load(ring_v + slot * stride_rv + row, mask=at, other=0.0)
        seen = (p < start)[None, :] & (position[:, None] - p[None, :] < W)
        acc, top, total = _attend(acc, top, total, queries, keys, values, seen, scale, DOT)
    for t0 in range(tl.maximum(earliest - W + 1, first_token), latest, BN):
        t = t0 + j
        at = (t < latest)[:, None] & real_d[None, :]
        keys = tl.load(k + t.to(tl.int64)[:, None] * stride_k + h * stride_kh + d[None, :], mask=at, other=0.0)
        values = tl.load(v + t.to(tl.int64)[:, None] * stride_v + h * stride_vh + d[None, :], mask=at, other=0.0)
        seen = (t[None, :] <= t_row[:, None]) & (t_row[:, None] - t[None, :] < W)
        acc, top, total = _attend(acc, top, total, queries, keys, values, seen, scale, DOT)
    result = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(to_out, narrowed(result, out.dtype.element_ty), mask=at_row)


@triton.jit
def ring_write_kernel(
    k, v, ring_k, ring_v, slots, borders, starts,
    stride_k, stride_kh, stride_v, stride_vh, stride_rk, stride_rv,
    HKV: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Grid (R, blocks of W, Hkv): the last tokens of every sequence, W at most, into the rings."""
    r, h = tl.program_id(0), tl.program_id(2)
    slot = tl.load(slots + r).to(tl.int64)
    if slot <= 0:
        return
    first, last, start = tl.load(borders + r), tl.load(borders + r + 1), tl.load(starts + r)
    t = last - 1 - (tl.program_id(1) * BW + tl.arange(0, BW))
    d = tl.arange(0, BD)
    row = (start + (t - first)) % W
    at = ((t >= first) & (t >= last - W))[:, None] & (d < D)[None, :]
    to_row = (row[:, None] * HKV + h) * D + d[None, :]
    t = t.to(tl.int64)
    keys = tl.load(k + t[:, None] * stride_k + h * stride_kh + d[None, :], mask=at, other=0.0)
    values = tl.load(v + t[:, None] * stride_v + h * stride_vh + d[None, :], mask=at, other=0.0)
    tl.store(ring_k + slot * stride_rk + to_row, narrowed(keys, ring_k.dtype.element_ty), mask=at)
    tl.store(ring_v + slot * stride_rv + to_row, narrowed(values, ring_v.dtype.element_ty), mask=at)


@triton.jit(do_not_specialize=["scale"])
def window_decode_kernel(
    q, k, v, ring_k, ring_v, slots, positions, rest_logit, rest_value, out, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_rk, stride_rv, stride_slots, stride_positions,
    HKV: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    BD: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Grid (R, Hkv). The new token's row is taken from k and v and not from the ring, which it is written to."""
    r, h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member, d, j = tl.arange(0, GP), tl.arange(0, BD), tl.arange(0, BN)
    real_d = d < D
    at_row = (member < G)[:, None] & real_d[None, :]
    to_head = (r * (HKV * G) + h * G + member[:, None]) * D + d[None, :]
    to_out = out + to_head
    slot = tl.load(slots + r * stride_slots).to(tl.int64)
    if slot <= 0:
        tl.store(to_out, tl.zeros([GP, BD], out.dtype.element_ty), mask=at_row)
        return
    position = tl.load(positions + r * stride_positions)
    own = (position % W).to(tl.int32)
    filled = tl.minimum(position + 1, W).to(tl.int32)
    RING: tl.constexpr = ring_k.dtype.element_ty
    key = narrowed(tl.load(k + r * stride_k + h * stride_kh + d, mask=real_d, other=0.0), RING)
    value = narrowed(tl.load(v + r * stride_v + h * stride_vh + d, mask=real_d, other=0.0), RING)
    queries = tl.load(q + r * stride_q + (h * G + member[:, None]) * stride_qh + d[None, :], mask=at_row, other=0.0)
    ring_k += slot * stride_rk + h * D
    ring_v += slot * stride_rv + h * D
    acc, top, total = tl.zeros([GP, BD], tl.float32), tl.full([GP], -1e30, tl.float32), tl.zeros([GP], tl.float32)
    if REST:
        acc = tl.load(rest_value + to_head, mask=at_row, other=0.0)
        top, total = tl.load(rest_logit + h * G + member, mask=member < G, other=0.0), total + 1.0
    for w0 in range(0, filled, BN):
        w = w0 + j
        old = ((w < filled) & (w != own))[:, None] & real_d[None, :]
        row = w[:, None] * (HKV * D) + d[None, :]
        mine = (w == own)[:, None]
        keys = tl.where(mine, key[None, :], tl.load(ring_k + row, mask=old, other=0.0))
        values = tl.where(mine, value[None, :], tl.load(ring_v + row, mask=old, other=0.0))
        seen = (w < filled)[None, :] & (member >= 0)[:, None]
        acc, top, total = _attend(acc, top, total, queries, keys, values, seen, scale, DOT)
    tl.store(to_out, narrowed(acc / total[:, None], out.dtype.element_ty), mask=at_row)
    tl.store(ring_k + own * (HKV * D) + d, key, mask=real_d)
    tl.store(ring_v + own * (HKV * D) + d, value, mask=real_d)
