"""Hidden states of any layout, computed from the first layer that differs from the layout run before.

A search runs hundreds of layouts that share most of their layers. `LayerPool` holds one decoder layer per (layer,
form), all sharing the backbone's weights, so that a layout is a choice among modules and never a copy of the model.
`PrefixForward` runs a fixed set of batches and keeps, between runs, the hidden states at the borders between layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.config import hybrid_config
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.model import Twins, make_twin
from dtr_deploy.hybrid.precision import products_in
from dtr_deploy.tasks.scoring import ScoringBatch


class LayerPool:
    """The backbone's decoder layers and, for every distilled twin, the same layer with the twin as its attention.

    Modules are shared with the backbone, which is not modified: a twin costs the memory of its own weights.
    """

    def __init__(self, backbone: Any, twins: Twins, window: int) -> None:
        self.backbone, self.twins, self.window = backbone, twins, window
        self.layers: list[dict[str | None, nn.Module]] = []
        for index, layer in enumerate(backbone.model.layers):
            forms: dict[str | None, nn.Module] = {None: layer}
            for form in sorted(form for number, form in twins if number == index):
                mixer = make_twin(layer.self_attn, backbone.config, index, form, window, twins)
                forms[form] = _with_attention(layer, mixer.train(backbone.training))
            self.layers.append(forms)

    def choose(self, layout: Layout) -> list[nn.Module]:
        """The layers of a layout, first to last. Raises `UsageError` for one without a distilled twin."""
        if len(layout) != len(self.layers):
            raise UsageError(f"layout has {len(layout)} entries, the model has {len(self.layers)} layers")
        for index, form in enumerate(layout):
            if form not in self.layers[index]:
                raise UsageError(f"no distilled twin for layer {index}, form {form!r}")
        return [self.layers[index][form] for index, form in enumerate(layout)]


class _Context(NamedTuple):
    """What every layer of one batch is given besides the hidden states."""

    causal_mask: Any
    recurrent_mask: Tensor | None
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]

    def run(self, layer: nn.Module, form: str | None, hidden: Tensor, cache: Cache | None) -> Tensor:
        return layer(
            hidden,
            attention_mask=self.causal_mask if form is None else self.recurrent_mask,
            position_ids=self.position_ids,
            position_embeddings=self.position_embeddings,
            past_key_values=cache,
            use_cache=cache is not None,
        )


class PrefixForward:
    """Final-norm hidden states of `batches` under any layout of `pool`.

    stride: hidden states are kept at every `stride`-th border between layers, of the layout that was run last; 0 keeps
    none. A run starts at the last kept border before the first layer that differs. `border_bytes` says what one set
    takes at stride 1. Columns shared by all rows of all batches (few-shot examples) are run once per run, and each
    layer's cache of them is repeated over a batch's rows for the time of that layer only. products: dtype that linear
    layers multiply in; hidden states are float32 all the same.

    `layer_forwards` counts decoder layers run, each over one sequence.
    """

    def __init__(
        self,
        pool: LayerPool,
        batches: Sequence[ScoringBatch],
        stride: int = 1,
        products: torch.dtype = torch.float32,
    ) -> None:
        self.pool, self.batches, self.stride, self.products = pool, list(batches), stride, products
        self.layer_forwards = 0
        self._last: Layout | None = None
        self._borders: list[dict[int, Tensor]] = [{} for _ in self.batches]
        self._shared_borders: dict[int, Tensor] = {}
        self._check_lengths()

    @staticmethod
    def border_bytes(batches: Sequence[ScoringBatch], config: Any) -> int:
        """Bytes of the hidden states (float32) at every border between layers."""
        return 4 * config.hidden_size * config.num_hidden_layers * sum(batch.tokens for batch in batches)

    @property
    def kept_bytes(self) -> int:
        """Bytes of hidden states kept now."""
        kept = [tensor for borders in [*self._borders, self._shared_borders] for tensor in borders.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    def hidden(self, layout: Layout) -> Iterator[Tensor]:
        """Of each batch in order, lazily: [B, T - shared, H]. Exhaust it before the next call."""
        layers = self.pool.choose(layout)
        start = self._first_change(layout)
        self._last = None  # an abandoned run leaves borders of two layouts behind
        with torch.no_grad(), self._mixed():
            shared = self._run_shared(layout, layers, start)
        for batch, borders in zip(self.batches, self._borders, strict=True):
            with torch.no_grad(), self._mixed():
                hidden = self._run_batch(batch, borders, layout, layers, start, shared)
                hidden = self.pool.backbone.model.norm(hidden)
            yield hidden
        self._last = layout

    def _mixed(self) -> torch.autocast:
        return products_in(self.products, self.pool.backbone.model.embed_tokens.weight.device.type)

    def forget(self) -> None:
        """Free all kept hidden states."""
        self._last = None
        self._borders = [{} for _ in self.batches]
        self._shared_borders = {}

    def _first_change(self, layout: Layout) -> int:
        """The kept border to start from: no layer before it differs from the last run."""
        if self._last is None or self.stride == 0:
            return 0
        # A layout equal to the last one runs its last stretch again: outputs of the last layer are not kept.
        same = next((i for i, (a, b) in enumerate(zip(self._last, layout, strict=True)) if a != b), len(layout) - 1)
        return same - same % self.stride

    def _run_shared(self, layout: Layout, layers: list[nn.Module], start: int) -> DynamicCache | None:
        """Each layer's cache of the shared columns, from layer `start` on; None if nothing is shared."""
        batch = self.batches[0]
        if batch.shared == 0:
            return None
        model = self.pool.backbone.model
        cache = DynamicCache(config=hybrid_config(self.pool.backbone.config, layout, self.pool.window))
        ids = batch.input_ids[:1, : batch.shared].to(model.embed_tokens.weight.device)
        hidden = self._shared_borders[start] if start else model.embed_tokens(ids)
        context = self._context(hidden, None, 0)
        for index in range(start, len(layers)):
            self._keep(self._shared_borders, index, hidden)
            hidden = context.run(layers[index], layout[index], hidden, cache)
        self.layer_forwards += len(layers) - start
        return cache

    def _run_batch(
        self,
        batch: ScoringBatch,
        borders: dict[int, Tensor],
        layout: Layout,
        layers: list[nn.Module],
        start: int,
        shared: DynamicCache | None,
    ) -> Tensor:
        """Output of the last layer, before the final norm."""
        model = self.pool.backbone.model
        device = model.embed_tokens.weight.device
        hidden = borders[start] if start else model.embed_tokens(batch.input_ids[:, batch.shared :].to(device))
        context = self._context(hidden, batch.attention_mask.to(device), batch.shared)
        for index in range(start, len(layers)):
            self._keep(borders, index, hidden)
            cache = None if shared is None else _one_layer(shared, index, hidden.shape[0])
            hidden = context.run(layers[index], layout[index], hidden, cache)
        self.layer_forwards += (len(layers) - start) * batch.input_ids.shape[0]
        return hidden

    def _keep(self, borders: dict[int, Tensor], index: int, hidden: Tensor) -> None:
        if index and self.stride and index % self.stride == 0:
            borders[index] = hidden

    def _context(self, hidden: Tensor, attention_mask: Tensor | None, shared: int) -> _Context:
        """Masks and positions exactly as the model itself would make them."""
        config = self.pool.backbone.config
        position_ids = torch.arange(shared, shared + hidden.shape[1], device=hidden.device)[None]
        past = None
        if shared:  # a stand-in of the right length: masks are made from the first layer's cache length
            past = DynamicCache(config=config)
            past.update(hidden.new_zeros(1, 1, shared, 1), hidden.new_zeros(1, 1, shared, 1), 0)
        arguments = {
            "config": config,
            "inputs_embeds": hidden,
            "attention_mask": attention_mask,
            "past_key_values": past,
            "position_ids": position_ids,
        }
        return _Context(
            create_causal_mask(**arguments),
            create_recurrent_attention_mask(**arguments),
            position_ids,
            self.pool.backbone.model.rotary_emb(hidden, position_ids=position_ids),
        )

    def _check_lengths(self) -> None:
        limit = self.pool.backbone.config.max_position_embeddings
        longest = max((batch.input_ids.shape[1] for batch in self.batches), default=0)
        if longest > limit:
            raise UsageError(f"tasks: a prompt of {longest} tokens is longer than the model's context of {limit}")


def _with_attention(layer: nn.Module, attention: nn.Module) -> nn.Module:
    """`layer` with another attention, everything else the same objects."""
    twin = copy.copy(layer)
    twin._modules = {**layer._modules, "self_attn": attention}
    return twin


def _one_layer(cache: DynamicCache, index: int, rows: int) -> DynamicCache:
    """`cache` (of one row) with layer `index` copied and repeated over `rows` rows; the other layers are not used."""
    repeated = copy.copy(cache)
    layer = copy.deepcopy(cache.layers[index])
    rows_from = torch.zeros(rows, dtype=torch.int64)
    layer.reorder_cache(cast(torch.LongTensor, rows_from))
    repeated.layers = [*cache.layers[:index], layer, *cache.layers[index + 1 :]]
    return repeated
