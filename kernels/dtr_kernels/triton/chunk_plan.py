"""Which chunk of which sequence a program works on, worked out on the device: no length is read on the host.

A pack of N tokens in R sequences has at most N // C + R + 1 chunks (the 1 for tokens after the last sequence), so that
many programs are started; the table says which of them have work. A plan depends on the lengths alone: build one a
step and pass it to every layer.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks of a pack.

    chunk: tokens of a chunk. chunks: upper bound of their number.
    cu_seqlens: [R+1] int32 on the device. first_chunk: [R+1] int32, number of each sequence's first chunk.
    table: [3, chunks] int32: sequence (R for tokens after the last one, -1 for no chunk), first token, last token + 1.
    """

    chunk: int
    chunks: int
    tokens: int
    cu_seqlens: Tensor
    first_chunk: Tensor
    table: Tensor


def chunk_plan(cu_seqlens: Tensor, tokens: int, chunk: int, device: torch.device) -> ChunkPlan:
    """Plan for R sequences with borders `cu_seqlens` [R+1] (on either device) among `tokens` rows. One launch."""
    sequences = cu_seqlens.numel() - 1
    borders = cu_seqlens.to(device=device, dtype=torch.int32, non_blocking=True).contiguous()
    chunks = min(tokens, tokens // chunk + sequences + 1)
    first = torch.empty(sequences + 1, dtype=torch.int32, device=device)
    table = torch.empty(3, chunks, dtype=torch.int32, device=device)
    if chunks:
        block = 64
        plan_kernel[(triton.cdiv(chunks, block),)](
            borders, first, table, tokens, sequences, chunks, C=chunk, BLOCK=block, BLOCK_R=128, num_warps=4
        )
    return ChunkPlan(chunk, chunks, tokens, borders, first, table)


@triton.jit(do_not_specialize=["tokens", "sequences", "chunks"])
def plan_kernel(
    borders, first, table, tokens, sequences, chunks, C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.full([BLOCK], -1, tl.int32)
    begin = tl.zeros([BLOCK], tl.int32)
    end = tl.zeros([BLOCK], tl.int32)
    counted = 0
    for r0 in range(0, sequences + 1, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        a = tl.load(borders + r, mask=r <= sequences, other=0)
        b = tl.load(borders + r + 1, mask=r < sequences, other=0)
        b = tl.where(r == sequences, tokens, b)
        count = tl.where(r <= sequences, (tl.maximum(b - a, 0) + C - 1) // C, 0)
        last = counted + tl.cumsum(count, 0)
        own = last - count
        if tl.program_id(0) == 0:
            tl.store(first + r, own, mask=r <= sequences)
        inside = (c[:, None] >= own[None, :]) & (c[:, None] < last[None, :])
        start = a[None, :] + (c[:, None] - own[None, :]) * C
        sequence += tl.sum(tl.where(inside, r[None, :] + 1, 0), 1)
        begin += tl.sum(tl.where(inside, start, 0), 1)
        end += tl.sum(tl.where(inside, tl.minimum(start + C, b[None, :]), 0), 1)
        counted += tl.sum(count, 0)
    real = c < chunks
    tl.store(table + c, sequence, mask=real)
    tl.store(table + chunks + c, begin, mask=real)
    tl.store(table + 2 * chunks + c, end, mask=real)


@triton.jit
def chunk_of(table, slots, chunks, sequences):
    """(first token, last token + 1, live) of the chunk of program_id(0). No tokens if there is no such chunk; not live
    in a null slot and after the last sequence."""
    c = tl.program_id(0)
    sequence = tl.load(table + c)
    begin = tl.load(table + chunks + c)
    end = tl.load(table + 2 * chunks + c)
    in_sequence = (sequence >= 0) & (sequence < sequences)
    slot = tl.load(slots + sequence, mask=in_sequence, other=0)
    return begin, end, slot > 0
