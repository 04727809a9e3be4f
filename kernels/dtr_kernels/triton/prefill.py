"""Prefill of ragged packs over a state pool on GPUs: `operator.linear_attention_packed` in Triton.

Within a chunk of C tokens, with c_i the cumulated log decay and S the state before the chunk (as in `chunked.py`; Yang
et al., Gated Delta Networks, arXiv 2412.06464; GLA, arXiv 2312.06635; the stages are those of flash-linear-attention):

    A_ij = beta_i (k_i exp(c_i - c_j) k_j),  j < i
    U    = (I + A)^-1 beta V  -  W S,        W = (I + A)^-1 beta exp(c) K          (linear, gated: U = V)
    out  = q exp(c) S  +  [q_i exp(c_i - c_j) k_j, j <= i] U
    S'   = exp(c_C) S  +  (exp(c_C - c) K)^T U

Stages: (1) all chunks at once: decays, A, its inverse, W and the first part of U; with decay per key dimension also the
products of q and k, subchunk by subchunk; (2) chunk after chunk, split over the value dimension (and the key dimension
without the delta rule): the states before the chunks, and U; (3) all chunks at once: the output. State and everything
made of keys and values exist once per kv head; the query heads of a group are more rows of one product.

Exactness: no exponent is ever positive, and no sum of decays is the difference of two rounded sums. Decays per head
are cumulated in two parts whose differences are exact (`arithmetic.fixed_and_rest`); decays per key dimension are
summed from the token or the border that they lead to.

Operands of products are float32 (not TF32) for float32 inputs, else bfloat16; sums, decays, the inverse and the state
are float32, and the inverse, whose rounding the delta rule amplifies, enters its products in two bfloat16 parts. The
host reads no tensor: a pack's chunks are found on the device (`chunk_plan`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtr_kernels.triton.chunk_plan import ChunkPlan, chunk_plan
from dtr_kernels.triton.operands import check_operands, contiguous_last, padded, slot_stride
from dtr_kernels.triton.prefill_kernels import (
    key_decay_products_kernel,
    output_kernel,
    prepare_kernel,
    state_kernel,
)

SUBCHUNK = 16
# Enough programs to fill a large GPU; below it the state pass is split finer.
FULL_GRID = 128


def chunk_size(operand_dtype: torch.dtype) -> int:
    """Tokens of a chunk: tensor cores want large products, exact float32 products cost by the chunk."""
    return 32 if operand_dtype == torch.float32 else 64


def plan_of_operator(
    cu_seqlens: Tensor, tokens: int, operand_dtype: torch.dtype, device: torch.device | None = None
) -> ChunkPlan:
    """The plan that `linear_attention_prefill` builds for itself if it is given none; the same for all layers.

    cu_seqlens [R+1] on either device, tokens the rows of q, operand_dtype float32 or bfloat16.
    """
    return chunk_plan(cu_seqlens, tokens, chunk_size(operand_dtype), device or cu_seqlens.device)


def linear_attention_prefill(
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
    cu_seqlens: Tensor,
    has_initial_state: Tensor,
    plan: ChunkPlan | None = None,
    operand_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Prefill of R ragged sequences over a state pool, in place. No host synchronisation; no gradient.

    Args:
        q, k, v: [N,Hq,Dk], [N,Hkv,Dk], [N,Hkv,Dv], float32, bfloat16 or float16: tokens of R sequences one after
            another. Strided views are read as they are if the last dimension is contiguous.
        rule: "linear", "gated", "delta" or "gated_delta".
        log_decay: [N,Hkv] or [N,Hkv,Dk], at most 0, for the gated rules. beta: [N,Hkv] for the delta rules.
        scale: multiplies the output.
        pool: [S,Hkv,Dk,Dv] float32 or bfloat16, contiguous but for the first dimension. pool[slots[r]] is written.
        slots: [R] integers. A slot <= 0 is a null slot: the pool stays as it is, outputs are zero.
        cu_seqlens: [R+1] integers; has_initial_state: [R] bool, False starts from zeros whatever the slot holds. On
            either device; from pageable host memory the copy may wait for the stream.
        plan: of `plan_of_operator` for the same pack, to build it once for many layers.
        operand_dtype: of products, float32 or bfloat16; None: float32 if q, k and v are, else bfloat16.
        out_dtype: of the output.

    Returns:
        out [N,Hq,Dv]; zero in null slots and in rows that belong to no sequence.

    Raises:
        ValueError: operands that do not fit the rule or one another, or a plan of other tokens or chunks.
    """
    check_operands(q, k, v, rule, log_decay, beta, pool, slots)
    tokens, heads, key_dim = q.shape
    kv_heads, value_dim = v.shape[1], v.shape[2]
    group, sequences, device = heads // kv_heads, slots.numel(), q.device
    if operand_dtype is None:
        exact = q.dtype == k.dtype == v.dtype == torch.float32
        operand_dtype = torch.float32 if exact else torch.bfloat16
    if operand_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"operand_dtype {operand_dtype}: accepted are torch.float32, torch.bfloat16")
    if cu_seqlens.numel() != sequences + 1 or has_initial_state.numel() != sequences:
        raise ValueError(
            f"{sequences} slots need {sequences + 1} borders and {sequences} has_initial_state,"
            f" got {cu_seqlens.numel()} and {has_initial_state.numel()}"
        )
    out = torch.empty(tokens, heads, value_dim, dtype=out_dtype, device=device)
    if tokens == 0 or sequences == 0:
        return out.zero_()
    if plan is None:
        plan = plan_of_operator(cu_seqlens, tokens, operand_dtype, device)
    chunk, chunks = plan.chunk, plan.chunks
    if plan.tokens != tokens or plan.first_chunk.numel() != sequences + 1 or chunk != chunk_size(operand_dtype):
        raise ValueError(
            f"the plan is for {plan.tokens} tokens, {plan.first_chunk.numel() - 1} sequences and chunks of {chunk},"
            f" not for {tokens}, {sequences} and {chunk_size(operand_dtype)}"
        )
    initial = has_initial_state.to(device=device, dtype=torch.int8, non_blocking=True).contiguous()
    slots = slots.contiguous()
    q, k, v = contiguous_last(q), contiguous_last(k), contiguous_last(v)

    delta = beta is not None
    per_key = log_decay is not None and log_decay.ndim == 3
    per_head = log_decay is not None and not per_key
    exact = operand_dtype == torch.float32
    dot = tl.float32 if exact else tl.bfloat16
    sizes = dict(HKV=kv_heads, DK=key_dim, C=chunk, DOT=dot)
    decays = dict(PER_HEAD=per_head, PER_KEY=per_key)
    empty = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=device)  # noqa: E731

    g_strides = (0, 0)
    if log_decay is not None:
        log_decay = contiguous_last(log_decay) if per_key else log_decay
        g_strides = (log_decay.stride(0), log_decay.stride(1))
    attention = key_products = cumulated = decay_in = keys_out = decay_all = w = None
    u = empty(tokens, kv_heads, value_dim, dtype=operand_dtype) if delta else v
    if per_key:
        attention = empty(tokens, heads, chunk, dtype=operand_dtype)
        key_products = empty(tokens, kv_heads, chunk) if delta else None
        keys_out = empty(tokens, kv_heads, key_dim, dtype=operand_dtype)
        decay_in, decay_all = empty(tokens, kv_heads, key_dim), empty(chunks, kv_heads, key_dim)
        members = triton.next_power_of_2(group)
        key_decay_products_kernel[(chunks, chunk // SUBCHUNK, kv_heads)](
            q, k, log_decay, plan.table, slots, attention, key_products, chunks, sequences,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), *g_strides,
            G=group, GP=members, BK=16 if members > 8 else 32, DELTA=delta, **sizes,
            num_warps=4 if members <= 4 else 8, num_stages=2,
        )  # fmt: skip
    if per_head:
        cumulated = empty(2, kv_heads, tokens)
    if delta:
        w = empty(tokens, kv_heads, key_dim, dtype=operand_dtype)
    block_k = min(padded(key_dim), 32 if exact else 64)
    if delta or log_decay is not None:
        b_strides = (beta.stride(0), beta.stride(1)) if beta is not None else (0, 0)
        prepare_kernel[(chunks, kv_heads)](
            k, v, log_decay, beta, plan.table, slots, key_products,
            cumulated, decay_in, keys_out, decay_all, w, u, chunks, sequences, tokens,
            k.stride(0), k.stride(1), v.stride(0), v.stride(1), *g_strides, *b_strides,
            DV=value_dim, BK=min(block_k, 32) if per_key else block_k, BV=min(padded(value_dim), 32 if exact else 64),
            DELTA=delta, **decays, **sizes, num_warps=4, num_stages=2,
        )  # fmt: skip

    states = empty(chunks, kv_heads, key_dim, value_dim, dtype=operand_dtype)
    keys = k if keys_out is None else keys_out
    # The delta rule needs a whole column of the state in one program.
    state_k = max(32, padded(key_dim)) if delta else min(padded(key_dim), 64)
    largest = 64 if not exact and state_k <= 128 and value_dim % 8 == 0 else 32
    if exact and state_k > 64:
        largest = 16
    state_v = _state_block(value_dim, sequences * kv_heads * triton.cdiv(key_dim, state_k), largest)
    state_kernel[(sequences * kv_heads, triton.cdiv(value_dim, state_v), triton.cdiv(key_dim, state_k))](
        keys, w, u, cumulated, decay_all, pool, slots, plan.cu_seqlens, initial, plan.first_chunk, states,
        sequences, tokens,
        keys.stride(0), keys.stride(1), u.stride(0), u.stride(1), slot_stride(pool),
        DV=value_dim, BK=state_k, BV=state_v, DELTA=delta, **decays, **sizes,
        num_warps=8 if exact and state_k > 128 else 4, num_stages=1 if exact or state_k > 128 else 2,
    )  # fmt: skip

    block_m = 32 if exact else (64 if chunk * group < 256 else 128)
    block_v = 32 if exact else (128 if value_dim % 128 == 0 else 64)
    # Not narrower than a chunk on tensor cores: with fewer columns ptxas 12.8 (Triton 3.6) gives the second product of
    # weights and values a descriptor made from a wrong register; the assembly it is given is right, and 12.9 keeps it.
    block_v = min(padded(value_dim), block_v) if exact else block_v
    row_blocks = triton.cdiv(chunk * group, block_m)
    output_kernel[(chunks, row_blocks * triton.cdiv(value_dim, block_v), kv_heads)](
        q, k, u, plan.table, slots, states, cumulated, decay_in, attention, out, scale, chunks, sequences, tokens,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), u.stride(0), u.stride(1),
        G=group, DV=value_dim, BM=block_m, BK=block_k, BV=block_v, **decays, **sizes,
        num_warps=8 if block_m == 128 else 4, num_stages=2,
    )  # fmt: skip
    return out


def _state_block(value_dim: int, programs: int, largest: int) -> int:
    """Columns of the state a program carries: fewer when there are few sequences, so that the GPU is full."""
    block = min(largest, padded(value_dim))
    while block > 16 and programs * triton.cdiv(value_dim, block) < FULL_GRID:
        block //= 2
    return block
