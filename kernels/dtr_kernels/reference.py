"""Token by token: the readable truth of the operator, in whatever float dtype it is given.

Slow on purpose. Tests run it in float64 and hold every other backend to it.
"""

import torch
from torch import Tensor


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rule: str,
    log_decay: Tensor | None,
    beta: Tensor | None,
    scale: float,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `operator.linear_attention`, one token after another.

    q [B,T,Hq,Dk], k [B,T,Hkv,Dk], v [B,T,Hkv,Dv], log_decay [B,T,Hkv] or [B,T,Hkv,Dk], beta [B,T,Hkv],
    state [B,Hkv,Dk,Dv]. Returns out [B,T,Hq,Dv] and the state after the last token, both in the dtype of `state`.
    """
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    dtype = state.dtype
    out = []
    for t in range(q.shape[1]):
        k_t, u = k[:, t].to(dtype), v[:, t].to(dtype)
        if log_decay is not None:
            decay = log_decay[:, t].to(dtype).exp()
            state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
        if beta is not None:
            u = beta[:, t].to(dtype)[..., None] * (u - torch.einsum("bhkv,bhk->bhv", state, k_t))
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, u)
        q_t = q[:, t].to(dtype).unflatten(1, (kv_heads, group))
        out.append(scale * torch.einsum("bhkv,bhgk->bhgv", state, q_t).flatten(1, 2))
    if not out:
        return q.new_zeros(*q.shape[:3], v.shape[-1], dtype=dtype), state
    return torch.stack(out, 1), state
