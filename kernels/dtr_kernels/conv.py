"""A causal convolution whose taps are made for each token and channel: the dynamic convolution of the form `jet`.

    out_t = sum over j of taps_t[j] * v_{t - (K - 1) + j},  j = 0 .. K - 1

so the last tap is the token's own. Rows before the first token are zero. What a sequence carries on is its last K - 1
rows of v, oldest first, in v's own dtype: v leaves its projection in that dtype, so nothing is lost by keeping it.

Two layouts of the carried rows, for two kinds of caller:

* `dynamic_conv` (Hugging Face, training): a tensor [B, K-1, Hkv, D], differentiable, with padding masks.
* `dynamic_conv_packed` / `_step` (serving): a pool [S, K-1, Hkv, D]. The order does not depend on a token's position,
  so a page of the pool can be copied as it is.
"""

import torch
from torch import Tensor


def dynamic_conv(
    v: Tensor, taps: Tensor, *, past: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve each row's real tokens.

    Args:
        v: [B,T,Hkv,D].
        taps: [B,T,K,Hkv,D].
        past: [B,K-1,Hkv,D], the rows before v; zeros if None. Not modified.
        mask: [B,T] bool, True for a real token. A token's taps meet the K - 1 real tokens before it, however much
            padding lies between; a right-padded row carries on the rows that end at its last real token.

    Returns:
        out [B,T,Hkv,D] in the wider dtype of v and taps, of no meaning at padding but finite, and the new past in v's
        dtype.
    """
    batch, length = v.shape[:2]
    kept = taps.shape[2] - 1
    past = v.new_zeros(batch, kept, *v.shape[2:]) if past is None else past.to(v.dtype)
    if mask is None:
        rows = torch.cat([past, v], 1)
        return _weighted(taps, [rows[:, j : j + length] for j in range(kept + 1)]), rows[:, length:]
    # Real tokens to the front, in order: then "before" means what it says. `place` is where each token went.
    order = mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    rows = torch.cat([past, _take(v, order)], 1)
    out = _weighted(taps, [_take(rows, place + j) for j in range(kept + 1)])
    count = mask.bool().sum(1, keepdim=True)
    return out, _take(rows, count + torch.arange(kept, device=v.device))


def dynamic_conv_packed(
    v: Tensor,
    taps: Tensor,
    *,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor,
) -> Tensor:
    """Prefill of R ragged sequences over a pool, in place. For serving; no gradient.

    Args:
        v: [N,Hkv,D], taps: [N,K,Hkv,D]: tokens of R sequences one after another.
        pool: [S,K-1,Hkv,D]. pool[slots[r]] is written, unless the sequence has no token here.
        slots: [R] integers. A slot <= 0 is a null slot: the pool stays as it is, outputs are zero.
        cu_seqlens: [R+1] integers, has_initial_state: [R] bool; False starts from zeros whatever the slot holds. On v's
            device, nothing is read on the host.

    Returns:
        out [N,Hkv,D] in the wider dtype of v and taps.
    """
    device, kept = v.device, taps.shape[1] - 1
    borders, initial = cu_seqlens.to(device).long(), has_initial_state.bool().to(device)
    lengths, token = borders.diff(), torch.arange(len(v), device=device)
    sequence = torch.searchsorted(borders, token, right=True) - 1
    slots = slots.to(device).long()
    live, slots = slots > 0, slots.clamp_min(0)
    # One buffer of rows: each sequence's past and then its tokens, so that K neighbours are always the right ones.
    start = borders[:-1] + kept * torch.arange(len(lengths), device=device)
    place = token + kept * (sequence + 1)
    past_place = start[:, None] + torch.arange(kept, device=device)
    old = pool.index_select(0, slots)
    rows = v.new_empty(len(v) + kept * len(lengths), *v.shape[1:])
    rows[past_place] = torch.where(_column(initial, old), old, 0.0).to(v.dtype)
    rows[place] = v
    out = _weighted(taps, [rows[place - kept + j] for j in range(kept + 1)], dim=1)
    written = live & (lengths > 0)
    new = rows[past_place + lengths[:, None]].to(pool.dtype)
    # Null rows write back what slot 0 holds: several of them write the same value, so the order does not matter.
    pool.index_copy_(0, slots, torch.where(_column(written, old), new, old))
    live = live[sequence]
    return torch.where(_column(live, out), out, 0.0)


def dynamic_conv_step(v: Tensor, taps: Tensor, *, pool: Tensor, slots: Tensor) -> Tensor:
    """Decoding: one token for R sequences over a pool, in place. No host synchronisation.

    v [R,Hkv,D], taps [R,K,Hkv,D], pool [S,K-1,Hkv,D], slots [R]. Null slots (<= 0) leave the pool as it was and give
    zeros.

    Returns:
        out [R,Hkv,D] in the wider dtype of v and taps.
    """
    slots = slots.long()
    live, slots = slots > 0, slots.clamp_min(0)
    old = pool.index_select(0, slots)
    rows = torch.cat([old.to(v.dtype), v[:, None]], 1)
    pool.index_copy_(0, slots, torch.where(_column(live, old), rows[:, 1:].to(pool.dtype), old))
    out = (taps * rows).sum(1)
    return torch.where(_column(live, out), out, 0.0)


def _weighted(taps: Tensor, shifted: list[Tensor], dim: int = 2) -> Tensor:
    """Sum over taps of tap j times the rows that lie K - 1 - j before each token."""
    total = taps.select(dim, 0) * shifted[0]
    for j, rows in enumerate(shifted[1:], start=1):
        total = total + taps.select(dim, j) * rows
    return total


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B,N,Hkv,D] at index [B,M] -> [B,M,Hkv,D]."""
    return rows.gather(1, index[..., None, None].expand(-1, -1, *rows.shape[2:]))


def _column(flags: Tensor, like: Tensor) -> Tensor:
    """flags [R] with dimensions of 1 appended, to be broadcast over `like` [R, ...]."""
    return flags.view(-1, *[1] * (like.ndim - 1))
