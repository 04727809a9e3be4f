"""The window branch in C. What is computed and in which shapes: `dtr_kernels.window`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtr_kernels.compiled.library import TYPES, call, indices, pointer, rows

if TYPE_CHECKING:
    from dtr_kernels.window import Rest

CACHE_DTYPES = (torch.float32, torch.bfloat16)
NO_NULL_SLOT = -1


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float, past: Tensor | None, mask: Tensor | None,
    rest: Rest | None,
) -> Tensor:  # fmt: skip
    """As `window.window_attention`, without the new cache; differentiable where there is no past."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *(rest or ()))):
        if past is not None:
            raise ValueError("gradients through a cached window are not supported")
        return _Differentiable.apply(q, k, v, mask, window, scale, *(rest or (None, None)))  # type: ignore[no-untyped-call]
    return _attend(q, k, v, window, scale, past, mask, *(rest or (None, None)))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    scale: float,
    past: Tensor | None,
    mask: Tensor | None,
    rest_logit: Tensor | None,
    rest_value: Tensor | None,
) -> Tensor:
    batch, length, query_heads, dim = q.shape
    past_k = past_v = valid = None
    if past is not None:
        size = k.shape[2] * dim
        past = past.contiguous()
        past_k, past_v = past, past[..., size:]
        valid = (past[..., -1] > 0.5).to(torch.uint8).contiguous()
    out = torch.empty(batch, length, query_heads, dim, dtype=_out_dtype(q.dtype))
    _forward(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), out, window, scale,
        past_k, past_v, valid, mask, rest_logit, rest_value,
        slots=torch.arange(batch), borders=torch.arange(batch + 1) * length, start=None,
        past_strides=(0, 0) if past is None else (past.stride(0), past.stride(1)),
        null_slot=NO_NULL_SLOT, ring=False,
    )  # fmt: skip
    return out.to(q.dtype)


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
    rest: Rest | None,
) -> Tensor:
    """As `window.window_attention_packed`, on the CPU."""
    out = torch.empty(q.shape, dtype=_out_dtype(q.dtype))
    _forward(
        q, k, v, out, window, scale, ring_k, ring_v, None, None, *(rest or (None, None)),
        slots=indices(slots), borders=indices(cu_seqlens), start=indices(start),
        past_strides=(ring_k.stride(0), ring_k.stride(1)), null_slot=0, ring=True,
    )  # fmt: skip
    return out.to(q.dtype)


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
    rest: Rest | None,
) -> Tensor:
    """As `window.window_attention_step`, on the CPU."""
    q, k, v = _same_type(q, k, v)
    logit, value = map(_floats, rest or (None, None))
    slots, positions = indices(slots), indices(positions)
    out = torch.empty(q.shape, dtype=_out_dtype(q.dtype))
    call(
        "dtr_window_step",
        *map(pointer, (q, k, v, ring_k, ring_v, slots, positions, logit, value, out)),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        ring_k.stride(0),
        ring_k.stride(1),
        len(q),
        k.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        window,
        0,
        len(ring_k),
        TYPES[q.dtype],
        TYPES[ring_k.dtype],
        TYPES[out.dtype],
        scale,
        torch.get_num_threads(),
    )
    return out.to(q.dtype)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    window: int,
    scale: float,
    past_k: Tensor | None,
    past_v: Tensor | None,
    valid: Tensor | None,
    mask: Tensor | None,
    rest_logit: Tensor | None,
    rest_value: Tensor | None,
    *,
    slots: Tensor,
    borders: Tensor,
    start: Tensor | None,
    past_strides: tuple[int, int],
    null_slot: int,
    ring: bool,
) -> None:
    q, k, v = _same_type(q, k, v)
    mask, rest_logit, rest_value = _bytes(mask), _floats(rest_logit), _floats(rest_value)
    call(
        "dtr_window_forward",
        *map(pointer, (q, k, v, past_k, past_v, valid, mask, slots, borders, start, rest_logit, rest_value, out)),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        *past_strides,
        len(slots),
        k.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        window,
        null_slot,
        len(slots) if past_k is None else len(past_k),
        len(q),
        TYPES[q.dtype],
        0 if past_k is None else TYPES[past_k.dtype],
        TYPES[out.dtype],
        int(ring),
        scale,
        torch.get_num_threads(),
    )


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, v, mask, window, scale, rest_logit, rest_value = arguments
        ctx.window, ctx.scale = window, scale
        ctx.save_for_backward(q, k, v, _bytes(mask), rest_logit, rest_value)
        return _attend(q, k, v, window, scale, None, mask, rest_logit, rest_value)

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, rest_logit, rest_value = ctx.saved_tensors
        types = [x.dtype for x in (q, k, v)]
        q, k, v, grad_out = (x.float().contiguous() for x in (q, k, v, grad_out))
        batch, length, query_heads, dim = q.shape
        grads = [torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)]
        rest_logit, rest_value = _floats(rest_logit), _floats(rest_value)
        grad_logit = grad_value = None
        if rest_logit is not None and rest_value is not None:
            grad_logit = torch.zeros(batch, query_heads)
            grad_value = torch.empty_like(rest_value)
        borders = torch.arange(batch + 1) * length
        call(
            "dtr_window_backward",
            *map(pointer, (q, k, v, mask, borders, rest_logit, rest_value, grad_out, *grads, grad_logit, grad_value)),
            batch,
            k.shape[2],
            query_heads // k.shape[2],
            dim,
            ctx.window,
            ctx.scale,
            torch.get_num_threads(),
        )
        of_rest = (None if grad_logit is None else grad_logit.sum(0), grad_value)
        return *(g.to(dtype) for g, dtype in zip(grads, types, strict=True)), None, None, None, *of_rest


def _same_type(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    return rows(q), rows(k), rows(v)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.to(torch.uint8).contiguous()


def _floats(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _out_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in CACHE_DTYPES else torch.float32
