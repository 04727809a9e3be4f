"""A decoding step of a form's branch and its window in one call into C, for serving on CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from dtr_kernels.compiled.library import TYPES, call, is_available, pointer, rows
from dtr_kernels.compiled.rows import MAX_DIM

STORED_DTYPES = (torch.float32, torch.bfloat16)
GATES = ("decay_weight", "decay_bias", "log_rate", "beta_weight", "beta_bias")


class _FormStep(ctypes.Structure):
    """`FormStep` of step.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*GATES, "gain", "rest_logit", "pool", "ring_k", "ring_v", "conv")),
        *((name, ctypes.c_int64) for name in ("pool_stride", "ring_slot", "ring_row", "conv_stride", "pool_slots")),
        *((name, ctypes.c_int64) for name in ("heads", "group", "dim", "inputs", "window", "taps")),
        *((name, ctypes.c_int) for name in ("pool_type", "ring_type", "conv_type", "decay_kind", "unit")),
        *((name, ctypes.c_float) for name in ("unit_epsilon", "norm_epsilon", "scale")),
    ]


class StepPlan:
    """One layer's decoding step, bound to its weights and to pools of states: a call passes only what changes.

    Args:
        gates: of `GATES`, what the form has: a projection of hidden with log_rate (log decay = -exp(log_rate)
            softplus), and one for beta (sigmoid).
        decay: "none", "head" or "key": the form's log decay, by projection or given to each call.
        state: recurrent [S,Hkv,D,D] float32 or bfloat16; window_k and window_v [S,W,Hkv,D] if there is a window; conv
            [S,K-1,Hkv,D] for forms with a convolution. Updated in place by `run`.
        gain: [Hq,D], of the read-out. rest_logit: [Hq] of the linear branch as a key of the window, or None.
        hidden_size: of the layer's input, which gates are projected from.
        unit_epsilon: None leaves q and k as they are, else they are L2-normalised for the linear branch.

    Weights are float32 and contiguous. The plan keeps weights and pools alive; it has to be made anew when either are
    replaced by other tensors (not when their values change).
    """

    def __init__(
        self,
        *,
        gates: Mapping[str, Tensor],
        decay: str,
        state: Mapping[str, Tensor],
        gain: Tensor,
        rest_logit: Tensor | None,
        hidden_size: int,
        scale: float,
        unit_epsilon: float | None,
        norm_epsilon: float,
    ) -> None:
        pool, ring_k, ring_v, conv = (state.get(name) for name in ("recurrent", "window_k", "window_v", "conv"))
        assert pool is not None
        self._kept = (*gates.values(), gain, rest_logit, pool, ring_k, ring_v, conv)
        named = {**{name: gates.get(name) for name in GATES}, "gain": gain, "rest_logit": rest_logit}
        pools = {"pool": pool, "ring_k": ring_k, "ring_v": ring_v, "conv": conv}
        query_heads, dim = gain.shape
        self._step = _FormStep(
            **{name: pointer(tensor) for name, tensor in {**named, **pools}.items()},
            pool_stride=pool.stride(0),
            ring_slot=0 if ring_k is None else ring_k.stride(0),
            ring_row=0 if ring_k is None else ring_k.stride(1),
            conv_stride=0 if conv is None else conv.stride(0),
            pool_slots=len(pool),
            heads=pool.shape[1],
            group=query_heads // pool.shape[1],
            dim=dim,
            inputs=hidden_size,
            window=0 if ring_k is None else ring_k.shape[1],
            taps=0 if conv is None else conv.shape[1] + 1,
            pool_type=TYPES[pool.dtype],
            ring_type=0 if ring_k is None else TYPES[ring_k.dtype],
            conv_type=0 if conv is None else TYPES[conv.dtype],
            decay_kind=("none", "head", "key").index(decay),
            unit=int(unit_epsilon is not None),
            unit_epsilon=unit_epsilon or 0.0,
            norm_epsilon=norm_epsilon,
            scale=scale,
        )
        self._address = ctypes.addressof(self._step)

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor,
        log_decay: Tensor | None,
        taps: Tensor | None,
        *,
        slots: Tensor,
        positions: Tensor,
        out: Tensor,
    ) -> None:
        """One token for R sequences.

        Args:
            q [R,Hq,D], k, v [R,Hkv,D]: of one dtype, as the window sees them. hidden [R,hidden_size].
            log_decay: [R,Hkv] or [R,Hkv,D] float32 where the gates do not make it, taps: [R,K,Hkv,D] float32 for forms
                with a convolution; else None.
            slots: [R] integers. Null slots (<= 0) leave the states as they are and give zeros.
            positions: [R] int64, of the tokens.
            out: [R,Hq,D] contiguous, float32 or bfloat16; written.

        Raises:
            IndexError: a slot outside the pool or a negative position.
        """
        q, k, v = rows(q), rows(k), rows(v)
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        if log_decay is not None:
            log_decay = log_decay.contiguous()
        if taps is not None:
            taps = taps.contiguous()
        if slots.dtype not in (torch.int32, torch.int64):
            slots = slots.long()
        if positions.dtype != torch.int64 or not positions.is_contiguous():
            positions = positions.long().contiguous()
        call(
            "dtr_form_step",
            self._address,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            hidden.data_ptr(),
            pointer(log_decay),
            pointer(taps),
            slots.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            hidden.stride(0),
            slots.stride(0),
            len(q),
            TYPES[q.dtype],
            TYPES[hidden.dtype],
            slots.dtype == torch.int64,
            TYPES[out.dtype],
            torch.get_num_threads(),
        )


def fits(state: Mapping[str, Tensor], dtype: torch.dtype, hidden_size: int) -> bool:
    """Whether a `StepPlan` can be made here: pools on a CPU, slots contiguous, all of it and the output `dtype` float32
    or bfloat16."""
    return (
        dtype in STORED_DTYPES
        and all(x.device.type == "cpu" and x.dtype in STORED_DTYPES and x[0].is_contiguous() for x in state.values())
        and max(state["recurrent"].shape[-1], hidden_size) <= MAX_DIM
        and is_available()
    )
