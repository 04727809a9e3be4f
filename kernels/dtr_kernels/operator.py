"""`linear_attention`: the one definition that training, vLLM and ONNX share, and the choice of backend.

The definition is that of the ONNX operator LinearAttention (com.microsoft, and ai.onnx opset 27):

    S <- exp(g) S + k (x) u,   u = v  (linear, gated)   or   beta (v - S^T k) with the decayed S  (delta, gated_delta)
    out = scale * S^T q        of the updated S

State is kept per kv head and shared by its query heads, which is exact because k, v, decay and beta are per kv head.
"""

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dtr_kernels.chunked import linear_attention_chunked
from dtr_kernels.compiled import linear as compiled_linear
from dtr_kernels.compiled.library import can_take, is_available, unavailable_reason
from dtr_kernels.gpu import on_gpu, triton_is_installed
from dtr_kernels.pack_plan import PackPlan
from dtr_kernels.recurrent import linear_attention_recurrent
from dtr_kernels.reference import linear_attention_reference

RULES = ("linear", "gated", "delta", "gated_delta")
GPU_POOL_DTYPES = (torch.float32, torch.bfloat16)
BACKENDS = ("auto", "reference", "chunked", "recurrent", "compiled", "triton")


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that can run on a device of this type, "auto" left out."""
    kind = torch.device(device).type
    wanted = {"compiled": kind == "cpu" and is_available(), "triton": kind == "cuda" and triton_is_installed()}
    return tuple(name for name in BACKENDS[1:] if wanted.get(name, True))


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rule: str,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention over sequences.

    Args:
        q: [B,T,Hq,Dk]; query head h reads the state of kv head h // (Hq // Hkv).
        k: [B,T,Hkv,Dk].
        v: [B,T,Hkv,Dv]. A normaliser is a column of ones appended here.
        rule: "linear", "gated", "delta" or "gated_delta".
        log_decay: [B,T,Hkv] or [B,T,Hkv,Dk], at most 0; required by the gated rules, refused by the others.
        beta: [B,T,Hkv]; required by the delta rules, refused by the others.
        scale: multiplies the output; Dk ** -0.5 if None.
        state: [B,Hkv,Dk,Dv] float32 (float64 for float64 inputs), zeros if None. Not modified.
        cu_seqlens: [R+1] integers: B is 1, tokens of R sequences lie one after another, `state` is [R,Hkv,Dk,Dv].
        backend: "auto" (compiled on a CPU, triton on a CUDA GPU where no gradient is wanted; otherwise, for float64 and
            under torch.compile recurrent for one token and else chunked), or one of `BACKENDS`. "triton" has no
            gradient, and runs on a CPU in Triton's interpreter only.

    Returns:
        out [B,T,Hq,Dv] in the dtype of v, and the final state in float32 (float64 for float64 inputs).

    Raises:
        ValueError: operands that do not fit the rule or one another, a backend that cannot run here.
    """
    _check(q, k, v, rule, log_decay, beta)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: accepted are {', '.join(BACKENDS)}")
    if backend == "compiled" and not can_take(q, k, v):
        reason = unavailable_reason() or "it takes CPU tensors up to float32, outside torch.compile"
        raise ValueError(f"backend 'compiled' cannot run here: {reason}")
    if backend == "triton" and not (on_gpu(q, k, v) or os.environ.get("TRITON_INTERPRET") == "1"):
        raise ValueError("backend 'triton' cannot run here: it takes CUDA tensors up to float32, outside torch.compile")
    wants_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, log_decay, beta, state)
    )
    if backend == "triton" and wants_gradient:
        raise ValueError("backend 'triton' has no gradient: 'chunked' and 'compiled' have")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"cu_seqlens needs a batch of 1, got {q.shape[0]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    shape = (sequences, k.shape[2], k.shape[3], v.shape[3])
    if state is None:
        state = torch.zeros(shape, dtype=dtype, device=q.device)
    elif tuple(state.shape) != shape:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {shape}")
    state = state.to(dtype)
    if backend == "compiled" or (backend == "auto" and can_take(q, k, v)):
        return _flat(_compiled, q, k, v, rule, log_decay, beta, scale, state, cu_seqlens)
    if backend == "triton" or (backend == "auto" and on_gpu(q, k, v) and not wants_gradient):
        return _flat(_triton, q, k, v, rule, log_decay, beta, scale, state, cu_seqlens)
    if cu_seqlens is None:
        out, state = _run(backend, q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, state=state)
        return out.to(v.dtype), state
    borders = cu_seqlens.tolist()
    outs, states = [], []
    for i, (start, stop) in enumerate(pairwise(borders)):
        rows = slice(start, stop)
        out, final = _run(
            backend,
            q[:, rows],
            k[:, rows],
            v[:, rows],
            rule=rule,
            log_decay=None if log_decay is None else log_decay[:, rows],
            beta=None if beta is None else beta[:, rows],
            scale=scale,
            state=state[i : i + 1],
        )
        outs.append(out)
        states.append(final)
    return torch.cat(outs, 1).to(v.dtype), torch.cat(states)


def linear_attention_packed(
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
    products: torch.dtype | None = None,
    plan: PackPlan | None = None,
) -> Tensor:
    """Prefill of R ragged sequences over a state pool, in place. For serving; no gradient.

    Args:
        q, k, v: [N,Hq,Dk], [N,Hkv,Dk], [N,Hkv,Dv]: tokens of R sequences one after another.
        log_decay, beta: [N,Hkv] or [N,Hkv,Dk]; [N,Hkv].
        pool: [S,Hkv,Dk,Dv], float32 or bfloat16 (computed in float32). pool[slots[r]] is written.
        slots: [R] integers, on the pool's device. A slot <= 0 is a null slot: the pool stays as it is,
            outputs are zero.
        cu_seqlens: [R+1] integers. has_initial_state: [R] bool; False starts from zeros whatever the slot holds.
            Nothing is read on the host if they are on the pool's device.
        products: what a GPU multiplies in, float32 or bfloat16 (float16 models take bfloat16: states do not fit
            float16). None is float32 if q, k and v are float32, else bfloat16. CPUs always multiply in float32.
        plan: of `pack_plan` for the same pack and products, made once for all layers; None makes one here.

    Returns:
        out [N,Hq,Dv] in float32.
    """
    if can_take(q, k, v) and pool.dtype in compiled_linear.POOL_DTYPES:
        return compiled_linear.linear_attention_packed(
            q, k, v, log_decay=log_decay, beta=beta, scale=scale, pool=pool, slots=slots, cu_seqlens=cu_seqlens,
            has_initial_state=has_initial_state,
        )  # fmt: skip
    if on_gpu(q, k, v) and pool.dtype in GPU_POOL_DTYPES:
        from dtr_kernels.triton import linear_attention_prefill

        return linear_attention_prefill(
            q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, pool=pool, slots=slots.to(pool.device),
            cu_seqlens=cu_seqlens, has_initial_state=has_initial_state, operand_dtype=products,
            plan=None if plan is None else plan.operator,
        )  # fmt: skip
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float32, device=q.device)
    borders, initial = cu_seqlens.tolist(), has_initial_state.tolist()
    for r, (start, stop) in enumerate(pairwise(borders)):
        if stop == start:
            continue
        slot = slots[r : r + 1].to(pool.device).long()
        live, slot = (slot > 0)[:, None, None, None], slot.clamp_min(0)
        row = pool.index_select(0, slot)
        state = row.float() if initial[r] else torch.zeros_like(row, dtype=torch.float32)
        rows = slice(start, stop)
        y, final = _run(
            "auto",
            q[None, rows],
            k[None, rows],
            v[None, rows],
            rule=rule,
            log_decay=None if log_decay is None else log_decay[None, rows],
            beta=None if beta is None else beta[None, rows],
            scale=scale,
            state=state,
        )
        out[start:stop] = torch.where(live[0], y[0], 0.0)
        pool.index_copy_(0, slot, torch.where(live, final.to(pool.dtype), row))
    return out


def linear_attention_step(
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
) -> Tensor:
    """Decoding: one token for R sequences over a state pool, in place. No host synchronisation.

    q [R,Hq,Dk], k [R,Hkv,Dk], v [R,Hkv,Dv], log_decay [R,Hkv] or [R,Hkv,Dk], beta [R,Hkv],
    pool [S,Hkv,Dk,Dv], slots [R]. Null slots (<= 0) leave the pool as it was and give zeros.

    Returns:
        out [R,Hq,Dv] in float32.
    """
    if can_take(q, k, v) and pool.dtype in compiled_linear.POOL_DTYPES:
        return compiled_linear.linear_attention_packed(
            q, k, v, log_decay=log_decay, beta=beta, scale=scale, pool=pool, slots=slots,
            cu_seqlens=torch.arange(len(q) + 1), has_initial_state=None,
        )  # fmt: skip
    if on_gpu(q, k, v) and pool.dtype in GPU_POOL_DTYPES:
        from dtr_kernels.triton import linear_attention_decode

        return linear_attention_decode(
            q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, pool=pool, slots=slots
        )
    slots = slots.long()
    live = slots > 0
    rows = pool.index_select(0, slots.clamp_min(0))
    out, state = linear_attention_recurrent(
        q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, state=rows.float()
    )
    keep = live[:, None, None]
    # Null rows write back what slot 0 holds: several of them write the same value, so the order does not matter.
    pool.index_copy_(0, slots.clamp_min(0), torch.where(keep[..., None], state.to(pool.dtype), rows))
    return torch.where(keep, out, 0.0)


def _flat(
    run: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: str,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A batch as packed sequences of one length."""
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        cu_seqlens = torch.arange(batch + 1, device=q.device) * length
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    log_decay, beta = (None if x is None else x.flatten(0, 1) for x in (log_decay, beta))
    out, state = run(
        q, k, v, rule=rule, log_decay=log_decay, beta=beta, scale=scale, state=state, cu_seqlens=cu_seqlens
    )
    return out.unflatten(0, (batch, length)).to(v.dtype), state


def _compiled(q: Tensor, k: Tensor, v: Tensor, *, rule: str, **options: Any) -> tuple[Tensor, Tensor]:
    return compiled_linear.linear_attention_batch(q, k, v, **options)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, *, state: Tensor, cu_seqlens: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    from dtr_kernels.triton import linear_attention_decode, linear_attention_prefill

    pool = torch.cat([state.new_zeros(1, *state.shape[1:]), state])  # slot 0 is the null slot
    slots = torch.arange(1, len(pool), device=q.device)
    if len(q) == len(slots) and torch.equal(cu_seqlens.cpu(), torch.arange(len(pool))):
        out = linear_attention_decode(q, k, v, pool=pool, slots=slots, **options)
    else:
        initial = torch.ones(len(slots), dtype=torch.bool, device=q.device)
        out = linear_attention_prefill(
            q, k, v, pool=pool, slots=slots, cu_seqlens=cu_seqlens.to(q.device), has_initial_state=initial, **options
        )
    return out, pool[1:]


def _run(backend: str, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return linear_attention_reference(q, k, v, **kwargs)
    if backend == "chunked" or (backend == "auto" and q.shape[1] != 1):
        return linear_attention_chunked(q, k, v, **kwargs)
    state, outs = kwargs.pop("state"), []
    decay, beta = kwargs.pop("log_decay"), kwargs.pop("beta")
    for t in range(q.shape[1]):
        out, state = linear_attention_recurrent(
            q[:, t],
            k[:, t],
            v[:, t],
            log_decay=None if decay is None else decay[:, t],
            beta=None if beta is None else beta[:, t],
            state=state,
            **kwargs,
        )
        outs.append(out)
    if not outs:
        return q.new_zeros(*q.shape[:3], v.shape[-1], dtype=state.dtype), state
    return torch.stack(outs, 1), state


def _check(q: Tensor, k: Tensor, v: Tensor, rule: str, log_decay: Tensor | None, beta: Tensor | None) -> None:
    if rule not in RULES:
        raise ValueError(f"rule {rule!r}: accepted are {', '.join(RULES)}")
    if q.shape[2] % k.shape[2] or k.shape[2] != v.shape[2]:
        raise ValueError(f"heads do not fit: q {q.shape[2]}, k {k.shape[2]}, v {v.shape[2]}")
    if q.shape[-1] != k.shape[-1] or not (q.shape[:2] == k.shape[:2] == v.shape[:2]):
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    gated, delta = rule in ("gated", "gated_delta"), rule in ("delta", "gated_delta")
    if gated != (log_decay is not None):
        raise ValueError(f"rule {rule!r} {'needs' if gated else 'takes no'} log_decay")
    if delta != (beta is not None):
        raise ValueError(f"rule {rule!r} {'needs' if delta else 'takes no'} beta")
    if log_decay is not None and log_decay.shape not in (k.shape[:3], k.shape):
        raise ValueError(f"log_decay has shape {tuple(log_decay.shape)}, expected {tuple(k.shape[:3])} or k's")
    if beta is not None and beta.shape != k.shape[:3]:
        raise ValueError(f"beta has shape {tuple(beta.shape)}, expected {tuple(k.shape[:3])}")
