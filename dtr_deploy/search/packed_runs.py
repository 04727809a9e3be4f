"""Decoder layers for scoring on a CPU: fused parts, compiled operators, and no padding.

Tokens of all rows of a batch, and of several layouts over it, lie one after another as `[tokens, H]`; attention, window
and linear operator are told where rows begin. So a batch costs the tokens it has, and a short batch of one layout can
share its calls with that of another. How the parts are rounded: `dtr_deploy.hybrid.fused`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dtr_deploy.hybrid import fused
from dtr_deploy.hybrid.fused import Mlp, Projections, rms_norm
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.mixer import HybridMixer
from dtr_deploy.tasks.scoring import ScoringBatch
from dtr_kernels.compiled.causal import causal_attention_packed
from dtr_kernels.conv import dynamic_conv_packed
from dtr_kernels.operator import linear_attention
from dtr_kernels.window import window_attention_packed

MLP_TOKENS = 1024
"""Tokens an MLP is given at a time: its inner width then stays in the caches."""


class _Context(NamedTuple):
    """borders: int64 [R+1], where rows begin; where: cos, sin [1,N,D]; cached: shared columns before every row."""

    borders: Tensor
    where: tuple[Tensor, Tensor]
    cached: int


class _FullPast(NamedTuple):
    """Keys and values [S,Hkv,D] of the shared columns."""

    k: Tensor
    v: Tensor


class _LinearPast(NamedTuple):
    """A twin's states after the shared columns, each with a leading 1: recurrent, the window's rings, convolution."""

    state: Tensor
    ring: tuple[Tensor, Tensor] | None
    conv: Tensor | None


class PackedRuns:
    """`LayerRuns` with hidden states [tokens of all copies, H], float32.

    For products in bfloat16, weights are converted when a layer is first run, and kept: two bytes a parameter for the
    backbone's decoder layers, shared by all layouts (213 MB for SmolLM2-135M), and for each twin that is run its
    projections (1.8 MB).
    """

    def __init__(self, backbone: Any, layers: list[dict[str | None, nn.Module]], products: torch.dtype) -> None:
        self.backbone, self.layers, self.products = backbone, layers, products
        self._mlps: dict[int, Mlp] = {}
        self._projections: dict[tuple[int, str | None], Projections] = {}

    @staticmethod
    def fits(backbone: Any, products: torch.dtype) -> bool:
        """Whether these runs compute what the modules would, in this dtype of products, for this backbone."""
        return fused.fits(backbone, products)

    def embed(self, batch: ScoringBatch, of_shared: bool = False) -> Tensor:
        """See `LayerRuns`."""
        ids, mask = _columns(batch, of_shared)
        return self.backbone.model.embed_tokens(ids[mask])

    def context(self, batch: ScoringBatch, copies: int = 1, of_shared: bool = False) -> _Context:
        """See `LayerRuns`."""
        _, mask = _columns(batch, of_shared)
        cached = 0 if of_shared else batch.shared
        positions = (cached + torch.arange(mask.shape[1])).expand_as(mask)[mask].repeat(copies)[None]
        borders = torch.nn.functional.pad(mask.sum(1).repeat(copies).cumsum(0), (1, 0))
        model = self.backbone.model
        return _Context(borders, model.rotary_emb(model.embed_tokens.weight, position_ids=positions), cached)

    def run(self, layer: int, form: str | None, hidden: Tensor, context: _Context, past: Any) -> Tensor:
        """See `LayerRuns`."""
        return self._run(layer, form, hidden, context, past)[0]

    def run_shared(self, layer: int, layout: Layout, hidden: Tensor, context: _Context) -> tuple[Tensor, Any]:
        """See `LayerRuns`."""
        return self._run(layer, layout[layer], hidden, context, None)

    def finish(self, batch: ScoringBatch, hidden: Tensor) -> Tensor:
        """See `LayerRuns`. Zeros at padding."""
        _, mask = _columns(batch, of_shared=False)
        out = hidden.new_zeros(*mask.shape, hidden.shape[-1])
        out[mask] = rms_norm(hidden, self.backbone.model.norm, torch.float32)
        return out

    def _run(
        self, index: int, form: str | None, hidden: Tensor, context: _Context, past: Any
    ) -> tuple[Tensor, _FullPast | _LinearPast]:
        layer: Any = self.layers[index][form]
        attention = layer.self_attn
        if (index, form) not in self._projections:
            self._projections[index, form] = Projections(attention, self._head_dim, self.products)
        if index not in self._mlps:
            self._mlps[index] = Mlp(layer.mlp, self.products)
        projections, mlp = self._projections[index, form], self._mlps[index]
        # Decays and gates of a form are made from what its teacher saw, unrounded.
        normed = rms_norm(hidden, layer.input_layernorm, self.products if form is None else torch.float32)
        q, k, v = projections.project(normed[None], context.where)
        kept: _FullPast | _LinearPast
        if form is None:
            attended, kept = _full(attention, q[0], k[0], v[0], context, past, self.products)
        else:
            attended, kept = _linear(attention, q, k, v, normed[None], context, past, self.products)
        hidden = hidden + projections.output(attended.flatten(-2))
        normed = rms_norm(hidden, layer.post_attention_layernorm, self.products)
        for part, change in zip(hidden.split(MLP_TOKENS), normed.split(MLP_TOKENS), strict=True):
            part += mlp(change)
        return hidden, kept

    @property
    def _head_dim(self) -> int:
        return int(self.backbone.model.layers[0].self_attn.head_dim)


def _columns(batch: ScoringBatch, of_shared: bool) -> tuple[Tensor, Tensor]:
    """Token ids of the columns meant, and which of them are tokens (bool)."""
    if of_shared:
        ids = batch.input_ids[:1, : batch.shared]
        return ids, torch.ones_like(ids, dtype=torch.bool)
    return batch.input_ids[:, batch.shared :], batch.attention_mask[:, batch.shared :].bool()


def _full(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context: _Context,
    past: _FullPast | None,
    products: torch.dtype,
) -> tuple[Tensor, _FullPast]:
    """Causal softmax attention, [N,Hq,D] in the products' dtype."""
    q, k = q.to(products), k.to(products)
    attended = causal_attention_packed(
        q, k, v, cu_seqlens=context.borders, scale=attention.scaling,
        past_k=None if past is None else past.k, past_v=None if past is None else past.v,
    )  # fmt: skip
    return attended, _FullPast(k, v)


def _linear(
    mixer: HybridMixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normed: Tensor,
    context: _Context,
    past: _LinearPast | None,
    products: torch.dtype,
) -> tuple[Tensor, _LinearPast]:
    """What `HybridMixer` computes, for packed rows: [N,Hq,D] in the products' dtype."""
    form, borders = mixer.form, context.borders
    rows = len(borders) - 1
    slots = torch.arange(1, rows + 1)
    taps, values, conv, ring = form.taps(normed), v, None, None
    if taps is not None:
        conv = _pool(None if past is None else past.conv, v.new_zeros(1, taps.shape[2] - 1, *v.shape[2:]), rows)
        started = torch.full((rows,), past is not None)
        values = dynamic_conv_packed(
            v[0], taps[0], pool=conv, slots=slots, cu_seqlens=borders, has_initial_state=started
        )[None]
    op = form.operands(q, k, values, normed)
    out, state = linear_attention(
        op.q, op.k, op.v, rule=form.rule, log_decay=op.log_decay, beta=op.beta, scale=form.scale,
        state=None if past is None else past.state.expand(rows, -1, -1, -1), cu_seqlens=borders,
    )  # fmt: skip
    attended, window = form.readout(out, normed)[0], mixer.sizes.window
    if window:
        empty = k.new_zeros(1, window, *k.shape[2:])
        old = (None, None) if past is None or past.ring is None else past.ring
        ring = (_pool(old[0], empty, rows), _pool(old[1], empty, rows))
        attended = window_attention_packed(
            q[0], k[0], v[0].float(), window=window, scale=mixer.sizes.head_dim**-0.5, ring_k=ring[0], ring_v=ring[1],
            slots=slots, cu_seqlens=borders, start=torch.full((rows,), context.cached), rest=form.rest(attended),
        )  # fmt: skip
    last = slice(rows, rows + 1)
    kept = _LinearPast(
        state[-1:], None if ring is None else (ring[0][last], ring[1][last]), None if conv is None else conv[last]
    )
    return attended.to(products), kept


def _pool(old: Tensor | None, empty: Tensor, rows: int) -> Tensor:
    """[rows + 1, ...] whose slots from 1 on hold `old` (or `empty`); slot 0 is the kernels' null slot."""
    return (empty if old is None else old).repeat(rows + 1, *[1] * (empty.ndim - 1))
