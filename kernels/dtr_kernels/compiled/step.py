"""A decoding step of a form's branch and its window in one call into C, for serving on CPUs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dtr_kernels.compiled.library import TYPES, call, can_take, indices, pointer, rows
from dtr_kernels.compiled.rows import MAX_DIM

STORED_DTYPES = (torch.float32, torch.bfloat16)
GATES = ("decay_weight", "decay_bias", "log_rate", "beta_weight", "beta_bias", "log_decay", "beta")


def fits(q: Tensor, values: Tensor, hidden: Tensor, state: Mapping[str, Tensor], out: Tensor) -> bool:
    """Whether `form_step` takes these: CPU tensors, states and output in float32 or bfloat16."""
    stored = [x.dtype for name, x in state.items() if name != "conv"]
    return (
        can_take(q, values, hidden)
        and all(x in STORED_DTYPES for x in (*stored, out.dtype))
        and out.is_contiguous()
        and max(q.shape[-1], hidden.shape[-1]) <= MAX_DIM
    )


def form_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    values: Tensor,
    hidden: Tensor,
    *,
    gates: Mapping[str, Tensor],
    per_key: bool,
    state: Mapping[str, Tensor],
    slots: Tensor,
    positions: Tensor,
    gain: Tensor,
    window_gate: Tensor | None,
    scale: float,
    unit_epsilon: float | None,
    norm_epsilon: float,
    out: Tensor,
) -> None:
    """One token for R sequences over state pools, in place.

    Args:
        q [R,Hq,D], k, v [R,Hkv,D]: of one dtype, as the window sees them. values [R,Hkv,D]: what the linear branch
            writes. hidden [R,hidden_size].
        gates: of `GATES`, what the form has: a projection of hidden with log_rate (log decay = -exp(log_rate)
            softplus), one for beta (sigmoid), or log_decay [R,Hkv] or [R,Hkv,D] as it is. per_key: the decay's shape.
        state: recurrent [S,Hkv,D,D]; window_k and window_v [S,W,Hkv,D] if there is a window.
        slots, positions: [R]. Null slots (<= 0) leave the states as they are and give zeros.
        gain [Hq,D], window_gate [Hq] or None: of the read-out; the window's share is sigmoid(window_gate).
        unit_epsilon: None leaves q and k as they are.
        out: [R,Hq,D] contiguous, float32 or bfloat16; written.
    """
    q, k, v, values = rows(q), rows(k), rows(v), rows(values)
    pool, ring_k, ring_v = state["recurrent"], state.get("window_k"), state.get("window_v")
    slots, positions = indices(slots), indices(positions)
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    given = [gates.get(name) for name in GATES]
    decay_kind = 0 if gates.get("log_rate") is None and gates.get("log_decay") is None else 1 + per_key
    call(
        "dtr_form_step",
        *map(
            pointer, (q, k, v, values, hidden, *given, pool, slots, ring_k, ring_v, positions, gain, window_gate, out)
        ),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        values.stride(0),
        hidden.stride(0),
        pool.stride(0),
        0 if ring_k is None else ring_k.stride(0),
        0 if ring_k is None else ring_k.stride(1),
        len(q),
        k.shape[1],
        q.shape[1] // k.shape[1],
        q.shape[2],
        hidden.shape[1],
        0 if ring_k is None else ring_k.shape[1],
        len(pool),
        TYPES[q.dtype],
        TYPES[values.dtype],
        TYPES[hidden.dtype],
        TYPES[pool.dtype],
        0 if ring_k is None else TYPES[ring_k.dtype],
        TYPES[out.dtype],
        decay_kind,
        int(unit_epsilon is not None),
        unit_epsilon or 0.0,
        norm_epsilon,
        scale,
        torch.get_num_threads(),
    )
