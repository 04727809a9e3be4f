"""The softmax branch of a form: causal attention over the last W tokens, in blocks, with a bounded cache.

Two layouts of the cache, for two kinds of caller:

* `window_attention` (Hugging Face, training, ONNX): a tensor [B, W, 2*Hkv*D + 1], oldest token first, whose channels
  are k (Hkv*D), v (Hkv*D) and 1.0 for a real token or 0.0 for none. Zeros are an empty cache.
* `window_attention_packed` / `_step` (serving): pools [S, W, Hkv, D] with token p in row p % W, so that a page of the
  pool can be copied as it is and one token is one row's write.

Cost and memory are linear in T: block n of C = min(T, W) queries meets the W keys before it and its own C.

What lies outside the window may be one more key, see `Rest`: the softmax then says for each token how much of its
attention the window deserves, instead of a constant saying it for all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_kernels.compiled import window as compiled_window
from dtr_kernels.compiled.library import can_take
from dtr_kernels.gpu import on_gpu
from dtr_kernels.pack_plan import PackPlan


class Rest(NamedTuple):
    """All that lies outside the window, as one more key that every query sees.

    logit: [Hq], of the key, the same for every token: what softmax attention has in the logarithm of its weights' sum
    outside the window. value: [...,Hq,D] float32, one a query: its mean value there, which a linear branch computes.

    A learned constant in the denominator is also what absorbs an attention sink (Xiao et al., arXiv 2309.17453), whose
    weight would otherwise be shared out among the window's tokens.
    """

    logit: Tensor
    value: Tensor


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    past: Tensor | None = None,
    mask: Tensor | None = None,
    rest: Rest | None = None,
    return_past: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of each token over itself and the `window` - 1 tokens before it.

    Args:
        q: [B,T,Hq,D]; k, v: [B,T,Hkv,D], with rotary embedding applied.
        scale: of the logits; D ** -0.5 if None.
        past: [B, W, 2*Hkv*D + 1] as in the module's docstring; None is an empty cache. Not modified.
        mask: [B,T] bool, True for a real token. Padding is neither attended to nor cached; a right-padded row keeps
            the window that ends at its last real token.
        rest: one more key; its value is [B,T,Hq,D].
        return_past: False (training) skips building the new cache and returns None for it.

    Returns:
        out [B,T,Hq,D] in q's dtype (softmax in float32), zero (or the rest) where a row sees no real token, and the new
        cache.
    """
    length, query_heads, dim = q.shape[1:]
    kv_heads = k.shape[2]
    group = query_heads // kv_heads
    scale = dim**-0.5 if scale is None else scale
    if can_take(q, k, v) and (past is None or past.dtype in compiled_window.CACHE_DTYPES):
        out = compiled_window.window_attention(q, k, v, window=window, scale=scale, past=past, mask=mask, rest=rest)
        return out, _new_past(k, v, past, mask, window) if return_past else None
    rows, past_valid = _with_past(k, v, past, mask, window)
    new_past = _last_rows(rows, past_valid, mask, window, length, k.dtype) if return_past else None

    block = min(length, window)
    blocks = -(-length // block)
    pad = blocks * block - length
    if pad:
        q = F.pad(q, (0, 0, 0, 0, 0, pad))
        rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, pad))
    # keys of block n: the `window` rows before it and its own `block` rows.  rows [B, W+N*C, 2, Hkv, D]
    before = rows[:, : blocks * window].unflatten(1, (blocks, window))
    own = rows[:, window:].unflatten(1, (blocks, block))
    near = torch.cat([before, own], 2).permute(0, 1, 4, 3, 2, 5)  # [B,N,Hkv,2,W+C,D]
    keys, values = near[:, :, :, 0], near[:, :, :, 1]
    queries = q.unflatten(1, (blocks, block)).unflatten(3, (kv_heads, group)).permute(0, 1, 3, 4, 2, 5)
    logits = (queries.flatten(3, 4) @ keys.transpose(-1, -2)).unflatten(3, (group, block)).float() * scale

    i = torch.arange(block, device=q.device)[:, None] + window
    j = torch.arange(window + block, device=q.device)[None]
    visible = (i - j >= 0) & (i - j < window)  # [C, W+C]
    if past_valid is None:
        # Nothing cached and no padding: only the rows before the first token are missing.
        seen = torch.ones(1, window + blocks * block, dtype=torch.bool, device=q.device)
        seen[:, :window] = False
    else:
        seen = F.pad(past_valid, (0, pad)) if pad else past_valid
    seen = torch.cat(
        [seen[:, : blocks * window].unflatten(1, (blocks, window)), seen[:, window:].unflatten(1, (blocks, block))], 2
    )
    visible = visible & seen[:, :, None, :]  # [B or 1,N,C,W+C]
    logits = logits.masked_fill(~visible[:, :, None, None], torch.finfo(torch.float32).min)
    share = None
    if rest is None:
        weights = logits.softmax(-1)
    else:
        logit = rest.logit.float().view(kv_heads, group, 1, 1).expand(*logits.shape[:-1], 1)
        weights, share = torch.cat([logits, logit], -1).softmax(-1).split([logits.shape[-1], 1], -1)
    if past_valid is not None:
        weights = weights * visible[:, :, None, None].any(-1, keepdim=True)
    out = weights.to(values.dtype).flatten(3, 4) @ values  # [B,N,Hkv,group*C,D]
    out = _by_token(out.unflatten(3, (group, block)), length)
    if rest is not None and share is not None:
        out = out + (_by_token(share, length) * rest.value).to(out.dtype)
    return out.to(q.dtype), new_past


def _by_token(x: Tensor, length: int) -> Tensor:
    """[B,N,Hkv,group,C,D] -> [B,length,Hq,D]"""
    batch, blocks, kv_heads, group, block, dim = x.shape
    return x.permute(0, 1, 4, 2, 3, 5).reshape(batch, blocks * block, kv_heads * group, dim)[:, :length]


def _new_past(k: Tensor, v: Tensor, past: Tensor | None, mask: Tensor | None, window: int) -> Tensor:
    """The new cache. Without padding only the last W tokens are looked at."""
    if mask is None and k.shape[1] > window:
        k, v, past = k[:, -window:], v[:, -window:], None
    rows, past_valid = _with_past(k, v, past, mask, window)
    return _last_rows(rows, past_valid, mask, window, k.shape[1], k.dtype)


def _with_past(
    k: Tensor, v: Tensor, past: Tensor | None, mask: Tensor | None, window: int
) -> tuple[Tensor, Tensor | None]:
    """Keys and values with W rows of past in front, [B, W+T, 2, Hkv, D], and which of the rows are real (or None)."""
    batch, length, kv_heads, dim = k.shape
    rows = torch.stack([k, v], 2)
    if past is None:
        rows = F.pad(rows, (0, 0, 0, 0, 0, 0, window, 0))
        if mask is None:
            return rows, None
        return rows, F.pad(mask.bool(), (window, 0))
    old = past[..., :-1].unflatten(-1, (2, kv_heads, dim)).to(rows.dtype)
    real = torch.ones(batch, length, dtype=torch.bool, device=k.device) if mask is None else mask.bool()
    return torch.cat([old, rows], 1), torch.cat([past[..., -1] > 0.5, real], 1)


def _last_rows(
    rows: Tensor, valid: Tensor | None, mask: Tensor | None, window: int, length: int, dtype: torch.dtype
) -> Tensor:
    """The new cache: for each sequence the W rows that end at its last real token."""
    batch = rows.shape[0]
    if valid is None:
        valid = torch.ones(batch, window + length, dtype=torch.bool, device=rows.device)
        valid[:, :window] = False
    if mask is None:
        kept, kept_valid = rows[:, length : length + window], valid[:, length : length + window]
    else:
        # The last real token of a row, 1-based; 0 when the row has none, which keeps the old window.
        position = torch.arange(1, length + 1, device=rows.device)
        end = (position * mask.bool()).amax(1)
        index = end[:, None] + torch.arange(window, device=rows.device)[None]
        kept = rows.gather(1, index[..., None, None, None].expand(-1, -1, *rows.shape[2:]))
        kept_valid = valid.gather(1, index)
    return torch.cat([kept.flatten(2).to(dtype), kept_valid[..., None].to(dtype)], -1)


def window_attention_packed(
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
    plan: PackPlan | None = None,
) -> Tensor:
    """Prefill of R ragged sequences with ring caches, in place. For serving; no gradient.

    Args:
        q [N,Hq,D], k, v [N,Hkv,D]: tokens of R sequences one after another.
        ring_k, ring_v: [S,W,Hkv,D]; the token at position p lies in row p % W of ring[slot].
        slots: [R], on the rings' device. A slot <= 0 leaves the rings as they are and gives zeros.
        cu_seqlens: [R+1]; start: [R], position of each sequence's first token here, 0 = nothing cached. Nothing is read
            on the host if they are on the rings' device.
        rest: one more key; its value is [N,Hq,D].
        plan: of `pack_plan` for the same pack, made once for all layers; None makes one here.

    Returns:
        out [N,Hq,D] in q's dtype.
    """
    if can_take(q, k, v) and ring_k.dtype in compiled_window.CACHE_DTYPES:
        return compiled_window.window_attention_packed(
            q, k, v, window=window, scale=scale, ring_k=ring_k, ring_v=ring_v, slots=slots, cu_seqlens=cu_seqlens,
            start=start, rest=rest,
        )  # fmt: skip
    if on_gpu(q, k, v):
        from dtr_kernels.triton import window_attention_prefill

        return window_attention_prefill(
            q, k, v, window=window, scale=scale, ring_k=ring_k, ring_v=ring_v, slots=slots.to(q.device),
            cu_seqlens=cu_seqlens.to(q.device), start=start.to(q.device), rest=rest,
            plan=None if plan is None else plan.window,
        )  # fmt: skip
    out = torch.zeros_like(q)
    borders, starts = cu_seqlens.tolist(), start.tolist()
    for r, first in enumerate(starts):
        a, b = borders[r], borders[r + 1]
        if a == b:
            continue
        slot = slots[r : r + 1].to(ring_k.device).long()
        live, slot = slot > 0, slot.clamp_min(0)
        past = None
        if first > 0:
            # Unroll the ring: rows of positions first-W .. first-1, those below 0 marked as empty.
            positions = torch.arange(first - window, first, device=q.device)
            order = positions % window
            pair = torch.stack([ring_k[slot, order], ring_v[slot, order]], 1).flatten(1)
            past = torch.cat([pair, (positions >= 0)[:, None].to(pair.dtype)], -1)[None]
        own = None if rest is None else Rest(rest.logit, rest.value[None, a:b])
        y, _ = window_attention(
            q[None, a:b], k[None, a:b], v[None, a:b], window=window, scale=scale, past=past, rest=own, return_past=False
        )
        out[a:b] = torch.where(live[:, None, None], y[0], 0.0)
        kept = min(window, b - a)
        order = torch.arange(first + (b - a) - kept, first + (b - a), device=q.device) % window
        for ring, new in ((ring_k, k), (ring_v, v)):
            ring[slot, order] = torch.where(live[:, None, None], new[b - kept : b].to(ring.dtype), ring[slot, order])
    return out


def window_attention_step(
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
) -> Tensor:
    """Decoding: one token for R sequences with ring caches, in place, without host synchronisation.

    q [R,Hq,D], k, v [R,Hkv,D], ring_k, ring_v [S,W,Hkv,D], slots [R], positions [R] of the tokens, rest: one more key
    with values [R,Hq,D]. Softmax does not
    depend on the order of its keys, so the ring is read as it lies. Null slots (<= 0) change nothing and give zeros.

    Returns:
        out [R,Hq,D] in q's dtype.
    """
    if can_take(q, k, v) and ring_k.dtype in compiled_window.CACHE_DTYPES:
        return compiled_window.window_attention_step(
            q, k, v, window=window, scale=scale, ring_k=ring_k, ring_v=ring_v, slots=slots, positions=positions,
            rest=rest,
        )  # fmt: skip
    if on_gpu(q, k, v):
        from dtr_kernels.triton import window_attention_decode

        return window_attention_decode(
            q, k, v, window=window, scale=scale, ring_k=ring_k, ring_v=ring_v, slots=slots, positions=positions,
            rest=rest,
        )  # fmt: skip
    slots, positions = slots.long(), positions.long()
    live = slots > 0
    slot = slots.clamp_min(0)
    row = positions % window
    keep = live[:, None, None]
    ring_k[slot, row] = torch.where(keep, k.to(ring_k.dtype), ring_k[slot, row])
    ring_v[slot, row] = torch.where(keep, v.to(ring_v.dtype), ring_v[slot, row])
    keys, values = ring_k[slot], ring_v[slot]  # [R,W,Hkv,D]
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    queries = q.unflatten(1, (kv_heads, group)).to(keys.dtype)
    logits = (queries @ keys.permute(0, 2, 3, 1)).float() * scale  # [R,Hkv,group,W]
    filled = torch.arange(window, device=q.device)[None] <= positions[:, None]
    logits = logits.masked_fill(~filled[:, None, None], torch.finfo(torch.float32).min)
    if rest is not None:
        logits = torch.cat([logits, rest.logit.float().view(kv_heads, group, 1).expand(len(q), -1, -1, 1)], -1)
    weights = logits.softmax(-1)
    out = (weights[..., :window].to(values.dtype) @ values.transpose(1, 2)).flatten(1, 2)
    if rest is not None:
        out = out + (weights[..., window].flatten(1)[..., None] * rest.value).to(out.dtype)
    return torch.where(keep, out, 0.0).to(q.dtype)
