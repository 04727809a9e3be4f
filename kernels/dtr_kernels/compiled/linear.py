"""linear_attention in C: R ragged sequences over a state pool, and sequences of a batch with gradients.

What is computed and in which shapes: `dtr_kernels.operator`, which checks operands before it comes here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dtr_kernels.compiled.library import TYPES, call, indices, pointer, rows

# Tokens between two states that the forward pass keeps for the backward pass.
SAVED_CHUNK = 32
POOL_DTYPES = (torch.float32, torch.bfloat16)
NO_NULL_SLOT = -1


def linear_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    null_slot: int = 0,
) -> Tensor:
    """As `operator.linear_attention_packed`, on the CPU; has_initial_state None means that all have one."""
    return _forward(q, k, v, log_decay, beta, scale, pool, slots, cu_seqlens, has_initial_state, null_slot, None, None)


def linear_attention_batch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sequences with a state each, [R,Hkv,Dk,Dv] float32, and gradients for every operand.

    q [N,Hq,Dk], k [N,Hkv,Dk], v [N,Hkv,Dv], log_decay [N,Hkv] or [N,Hkv,Dk], beta [N,Hkv], cu_seqlens [R+1].
    Returns out [N,Hq,Dv] float32 and the final state, a new tensor.
    """
    operands = (q, k, v, log_decay, beta, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in operands):
        return _Differentiable.apply(q, k, v, log_decay, beta, state, scale, cu_seqlens)  # type: ignore[no-untyped-call]
    pool = state.contiguous().clone()
    slots = torch.arange(len(cu_seqlens) - 1)
    out = _forward(q, k, v, log_decay, beta, scale, pool, slots, cu_seqlens, None, NO_NULL_SLOT, None, None)
    return out, pool


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    pool: Tensor,
    slots: Tensor,
    cu_seqlens: Tensor,
    has_initial_state: Tensor | None,
    null_slot: int,
    error: Tensor | None,
    saved: Tensor | None,
) -> Tensor:
    if not q.dtype == k.dtype == v.dtype:
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = rows(q), rows(k), rows(v)
    log_decay, beta = _plain(log_decay), _plain(beta)
    slots, cu_seqlens = indices(slots), indices(cu_seqlens)
    initial = None if has_initial_state is None else has_initial_state.to(torch.uint8).contiguous()
    if not pool[0].is_contiguous():
        raise ValueError("a slot of the pool must be contiguous")
    heads, key_dim, value_dim = k.shape[1], k.shape[2], v.shape[2]
    out = torch.empty(q.shape[0], q.shape[1], value_dim, dtype=torch.float32)
    call(
        "dtr_linear_forward",
        *map(pointer, (q, k, v, log_decay, beta, out, pool, slots, cu_seqlens, initial, error, saved)),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        pool.stride(0),
        len(slots),
        heads,
        q.shape[1] // heads,
        key_dim,
        value_dim,
        SAVED_CHUNK,
        0 if saved is None else saved.shape[1],
        null_slot,
        len(pool),
        len(q),
        TYPES[q.dtype],
        TYPES[pool.dtype],
        0 if log_decay is None else log_decay.ndim - 1,
        int(beta is not None),
        scale,
        torch.get_num_threads(),
    )
    return out


class _Differentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay, beta, state, scale, cu_seqlens = arguments
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, log_decay, beta, state)]
        q, k, v = (x.float().contiguous() for x in (q, k, v))
        log_decay, beta = _plain(log_decay), _plain(beta)
        pool = state.float().contiguous().clone()
        longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
        saved = torch.empty(len(pool), -(-longest // SAVED_CHUNK), *pool.shape[1:])
        error = None if beta is None else torch.empty(v.shape)
        slots = torch.arange(len(pool))
        out = _forward(q, k, v, log_decay, beta, scale, pool, slots, cu_seqlens, None, NO_NULL_SLOT, error, saved)
        ctx.scale = scale
        ctx.save_for_backward(q, k, v, log_decay, beta, error, saved, indices(cu_seqlens))
        return out, pool

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, grad_out: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, beta, error, saved, cu_seqlens = ctx.saved_tensors
        heads, key_dim, value_dim = k.shape[1], k.shape[2], v.shape[2]
        grad_out, grad_final = grad_out.contiguous(), grad_final.contiguous()
        grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, log_decay, beta)]
        grads.append(torch.empty_like(grad_final))
        call(
            "dtr_linear_backward",
            *map(pointer, (q, k, v, log_decay, beta, error, saved, grad_out, grad_final, *grads, cu_seqlens)),
            len(cu_seqlens) - 1,
            heads,
            q.shape[1] // heads,
            key_dim,
            value_dim,
            SAVED_CHUNK,
            saved.shape[1],
            0 if log_decay is None else log_decay.ndim - 1,
            int(beta is not None),
            ctx.scale,
            torch.get_num_threads(),
        )
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        return *typed, None, None


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()
