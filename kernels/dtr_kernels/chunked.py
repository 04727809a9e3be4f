"""Chunkwise form of the operator in torch: prefill and training.

All chunks are prepared at once; only the state is carried from chunk to chunk. Query heads of one kv head share the
key products, the triangular solve and the state. Memory is linear in T: the largest tensors are [chunks, C, C].

On a GPU the two parts that torch does slowly are Triton kernels (`triton.training`): the state from chunk to chunk, and
the triangular systems. What is around them is the same.

Within a chunk of C tokens, with c_i the cumulated log-decay and S the state before the chunk (Yang et al., Gated Delta
Networks, arXiv 2412.06464, section 3; Yang et al., GLA, arXiv 2312.06635, section 4):

    A_ij = beta_i (k_i exp(c_i - c_j) k_j)  for j < i            (delta rules; 0 otherwise)
    U    = (I + A)^-1 (beta V  -  beta exp(c) K S)               (linear, gated: U = V)
    out  = q exp(c) S  +  [q_i exp(c_i - c_j) k_j, j <= i] U
    S'   = exp(c_C) S  +  (exp(c_C - c) K)^T U
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from dtr_kernels.gpu import on_gpu

CHUNK = 64
SUBCHUNK = 16


def linear_attention_chunked(
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
    """The operator over T tokens; shapes as `operator.linear_attention`, differentiable in every operand.

    Computes in the dtype of `state` (float32 in use, float64 in tests). Returns out [B,T,Hq,Dv] and the final state.
    The operands that are given decide what is computed; `rule` says the same.
    """
    dtype = state.dtype
    batch, length, query_heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[-1]
    group = query_heads // kv_heads
    if length == 0:
        return q.new_zeros(batch, 0, query_heads, value_dim, dtype=dtype), state
    kernels = _kernels(q, k, v, state, beta is not None)
    chunk = min(CHUNK, max(SUBCHUNK if kernels is None else min(kernels.INVERTIBLE), 1 << (length - 1).bit_length()))
    chunks = -(-length // chunk)
    pad = chunks * chunk - length

    def split(x: Tensor) -> Tensor:
        """[B,T,H,...] -> [B,H,N,C,...]. Zero padding is inert: no decay, no key, no write."""
        if pad:
            x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad))
        return x.to(dtype).unflatten(1, (chunks, chunk)).movedim(3, 1)

    keys, values = split(k), split(v)
    # [B,Hkv,N,group,C,Dk]: the query heads of a kv head ride as one more batch dimension.
    queries = split(q).unflatten(1, (kv_heads, group)).movedim(2, 3)
    decay_in = decay_out = decay_all = None
    if log_decay is not None:
        g = split(log_decay)
        per_key = g.ndim == 5
        # Differences of cumulated decays in float64: at -20 a token float32 rounds a chunk's sum by up to 1e-4.
        cumulated = g.double().cumsum(3)
        total = cumulated[:, :, :, -1:]
        decay_in, decay_out, decay_all = (
            _exp(cumulated, dtype),
            _exp(total - cumulated, dtype),
            _exp(total.squeeze(3), dtype),
        )
        if not per_key:
            decay_in, decay_out, decay_all = decay_in[..., None], decay_out[..., None], decay_all[..., None]
    else:
        cumulated, per_key = None, False

    products = _decayed_products(torch.cat([queries, keys.unsqueeze(3)], 3), keys, cumulated, per_key)
    attention = products[:, :, :, :group]
    written, correction = values, None
    if beta is not None:
        strength = split(beta)[..., None]
        system = (products[:, :, :, group] * strength).tril(-1)
        keys_in = keys if decay_in is None else keys * decay_in
        right = torch.cat([values * strength, keys_in * strength], -1)
        if kernels is not None:
            solved = kernels.inverse(system) @ right
        else:
            system = system + torch.eye(chunk, dtype=dtype, device=q.device)
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        written, correction = solved.split([value_dim, key_dim], -1)

    keys_out = keys if decay_out is None else keys * decay_out
    if kernels is not None:
        together = lambda x: None if x is None else x.flatten(0, 1)  # noqa: E731
        before, last = kernels.carry(
            together(keys_out.mT @ written), together(state), together(decay_all), together(correction),
            None if correction is None else together(keys_out),
        )  # fmt: skip
        before, state = before.unflatten(0, (batch, kv_heads)), last.unflatten(0, (batch, kv_heads))
    else:
        before, state = _carried(written, correction, keys_out, decay_all, state)
    if correction is not None:
        written = written - correction @ before
    queries_in = queries if decay_in is None else queries * decay_in.unsqueeze(3)
    out = queries_in.flatten(3, 4) @ before + attention.flatten(3, 4) @ written
    out = out.unflatten(3, (group, chunk)).movedim(3, 2)  # [B,Hkv,group,N,C,Dv]
    out = (scale * out).flatten(1, 2).flatten(2, 3)[:, :, :length].transpose(1, 2)
    return out, state


def _kernels(q: Tensor, k: Tensor, v: Tensor, state: Tensor, delta: bool) -> ModuleType | None:
    """`triton.training` where its kernels take these operands, None where torch does everything."""
    if state.dtype != torch.float32 or not on_gpu(q, k, v):
        return None
    from dtr_kernels.triton import training

    return None if delta and k.shape[-1] > training.LARGEST_CORRECTED else training


def _carried(
    written: Tensor, correction: Tensor | None, keys_out: Tensor, decay_all: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """States before the chunks [B,Hkv,N,Dk,Dv] and the last one. written [B,Hkv,N,C,Dv], correction and keys_out
    [B,Hkv,N,C,Dk], decay_all [B,Hkv,N,Dk or 1], state [B,Hkv,Dk,Dv]."""
    states = []
    # Not by index: the gradient of x[:, :, n] is as large as x.
    corrections, decays = (None if x is None else x.unbind(2) for x in (correction, decay_all))
    for n, (u, keys) in enumerate(zip(written.unbind(2), keys_out.unbind(2), strict=True)):
        states.append(state)
        update = keys.transpose(-1, -2) @ (u if corrections is None else u - corrections[n] @ state)
        state = (state if decays is None else state * decays[n].unsqueeze(-1)) + update
    return torch.stack(states, 2), state


def _exp(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    return exponent.to(dtype).exp()


def _decayed_products(rows: Tensor, keys: Tensor, cumulated: Tensor | None, per_key: bool) -> Tensor:
    """rows_i exp(c_i - c_j) k_j for j <= i, zero above the diagonal.

    rows [B,H,N,R,C,D], keys [B,H,N,C,D], cumulated [B,H,N,C] or [B,H,N,C,D]. Returns [B,H,N,R,C,C].
    Exponents are never positive, so decays down to exp(-20) a token neither overflow nor lose the near past.
    """
    chunk = keys.shape[3]
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=keys.device).tril()
    if cumulated is None:
        return (rows @ keys.unsqueeze(3).transpose(-1, -2)).masked_fill(~mask, 0)
    if not per_key:
        products = rows.flatten(3, 4) @ keys.transpose(-1, -2)
        decay = (cumulated[..., :, None] - cumulated[..., None, :]).masked_fill(~mask, -torch.inf)
        decay = _exp(decay, keys.dtype)
        return products.unflatten(3, rows.shape[3:5]) * decay.unsqueeze(3)
    # Per key dimension the decay does not factor out of the product. For queries of one subchunk and keys before it,
    # both sides decay to the subchunk's border; inside the subchunk the exponents are written out.
    blocks = []
    for start in range(0, chunk, SUBCHUNK):
        stop = start + SUBCHUNK
        row, c_row = rows[..., start:stop, :], cumulated[..., start:stop, :]
        inside = (c_row[..., :, None, :] - c_row[..., None, :, :]).masked_fill(
            ~mask[start:stop, start:stop, None], -torch.inf
        )
        weighted = _exp(inside, keys.dtype) * keys[..., None, start:stop, :]  # [B,H,N,c,c,D]
        near = torch.einsum("bhnrid,bhnijd->bhnrij", row, weighted)
        parts = [near]
        if start:
            border = cumulated[..., start - 1 : start, :]
            row_at_border = row * _exp(c_row - border, keys.dtype).unsqueeze(3)
            keys_at_border = keys[..., :start, :] * _exp(border - cumulated[..., :start, :], keys.dtype)
            parts.insert(0, row_at_border @ keys_at_border.unsqueeze(3).transpose(-1, -2))
        if stop < chunk:
            parts.append(near.new_zeros(*near.shape[:-1], chunk - stop))
        blocks.append(torch.cat(parts, -1))
    return torch.cat(blocks, -2)
