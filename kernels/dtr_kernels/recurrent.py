"""One token for many sequences: decoding, with the states in a pool that is updated in place."""

import torch
from torch import Tensor


def linear_attention_recurrent(
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
    """One token. q [R,Hq,Dk], k [R,Hkv,Dk], v [R,Hkv,Dv], log_decay [R,Hkv] or [R,Hkv,Dk], beta [R,Hkv],
    state [R,Hkv,Dk,Dv]. Returns out [R,Hq,Dv] and the new state, in the dtype of `state`. The operands that are given
    decide what is computed; `rule` says the same and is there for the common signature."""
    dtype = state.dtype
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    k, u = k.to(dtype), v.to(dtype)
    if log_decay is not None:
        decay = log_decay.to(dtype).exp()
        state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    if beta is not None:
        u = beta.to(dtype)[..., None] * (u - (k.unsqueeze(-2) @ state).squeeze(-2))
    state = torch.addcmul(state, k.unsqueeze(-1), u.unsqueeze(-2))
    out = (q.to(dtype) * scale).unflatten(1, (kv_heads, group)) @ state
    return out.flatten(1, 2), state
