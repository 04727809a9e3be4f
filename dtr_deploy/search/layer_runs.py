"""How a decoder layer is run over the rows of a batch: by its own Hugging Face module.

`LayerRuns` is what `PrefixForward` walks layouts with; `ModuleRuns` works for every model, device and dtype, and
`packed_runs` has the fast one for CPUs. Hidden states of several layouts over one batch lie one after another in the
first dimension, so that one call of a layer serves all of them.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from dtr_deploy.hybrid.config import hybrid_config
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.precision import products_in
from dtr_deploy.tasks.scoring import ScoringBatch


class LayerRuns(Protocol):
    """Runs layers over a batch's columns behind the shared ones, or over the shared ones (one row) beforehand."""

    def embed(self, batch: ScoringBatch, of_shared: bool = False) -> Tensor:
        """Input of the first layer."""
        ...

    def context(self, batch: ScoringBatch, copies: int = 1, of_shared: bool = False) -> Any:
        """What every layer of a batch is given besides the hidden states of `copies` layouts."""
        ...

    def run(self, layer: int, form: str | None, hidden: Tensor, context: Any, past: Any) -> Tensor:
        """Output of a layer. past: what `run_shared` returned for this layer, None without shared columns."""
        ...

    def run_shared(self, layer: int, layout: Layout, hidden: Tensor, context: Any) -> tuple[Tensor, Any]:
        """Output of a layer over the shared columns, and what later columns need of them."""
        ...

    def finish(self, batch: ScoringBatch, hidden: Tensor) -> Tensor:
        """After the final norm, of one layout: [B, T - shared, H], float32 or the model's dtype."""
        ...


class _Context(NamedTuple):
    """Masks and positions, as the model itself would make them."""

    causal_mask: Any
    recurrent_mask: Tensor | None
    position_ids: Tensor
    position_embeddings: tuple[Tensor, Tensor]


class ModuleRuns:
    """Layers as Hugging Face modules, hidden states [copies x B, T - shared, H].

    layers: by layer and form. products: dtype that linear layers multiply in; hidden states stay as they are.
    """

    def __init__(
        self, backbone: Any, layers: list[dict[str | None, nn.Module]], window: int, products: torch.dtype
    ) -> None:
        self.backbone, self.layers, self.window, self.products = backbone, layers, window, products
        self.device = backbone.model.embed_tokens.weight.device

    def embed(self, batch: ScoringBatch, of_shared: bool = False) -> Tensor:
        """See `LayerRuns`."""
        ids = batch.input_ids[:1, : batch.shared] if of_shared else batch.input_ids[:, batch.shared :]
        return self.backbone.model.embed_tokens(ids.to(self.device))

    def context(self, batch: ScoringBatch, copies: int = 1, of_shared: bool = False) -> _Context:
        """See `LayerRuns`."""
        model, config = self.backbone.model, self.backbone.config
        past, mask = 0 if of_shared else batch.shared, None
        if not of_shared:
            mask = batch.attention_mask.to(self.device).repeat(copies, 1)
        rows = 1 if of_shared else copies * batch.input_ids.shape[0]
        width = batch.shared if of_shared else batch.input_ids.shape[1] - batch.shared
        # Of the right shape and dtype; what is in it is not looked at.
        hidden = model.embed_tokens.weight.new_zeros(1).expand(rows, width, config.hidden_size)
        position_ids = torch.arange(past, past + width, device=self.device)[None]
        stand_in = None
        if past:  # masks are made from the first layer's cache length
            stand_in = DynamicCache(config=config)
            stand_in.update(hidden.new_zeros(1, 1, past, 1), hidden.new_zeros(1, 1, past, 1), 0)
        arguments = {
            "config": config,
            "inputs_embeds": hidden,
            "attention_mask": mask,
            "past_key_values": stand_in,
            "position_ids": position_ids,
        }
        return _Context(
            create_causal_mask(**arguments),
            create_recurrent_attention_mask(**arguments),
            position_ids,
            model.rotary_emb(hidden, position_ids=position_ids),
        )

    def run(self, layer: int, form: str | None, hidden: Tensor, context: _Context, past: Any) -> Tensor:
        """See `LayerRuns`."""
        cache = None if past is None else _repeated(past, layer, hidden.shape[0])
        return self._call(layer, form, hidden, context, cache)

    def run_shared(self, layer: int, layout: Layout, hidden: Tensor, context: _Context) -> tuple[Tensor, DynamicCache]:
        """See `LayerRuns`. What is returned is a cache of which only this layer is filled."""
        cache = DynamicCache(config=hybrid_config(self.backbone.config, layout, self.window))
        return self._call(layer, layout[layer], hidden, context, cache), cache

    def finish(self, batch: ScoringBatch, hidden: Tensor) -> Tensor:
        """See `LayerRuns`."""
        return self.backbone.model.norm(hidden)

    def _call(self, layer: int, form: str | None, hidden: Tensor, context: _Context, cache: Cache | None) -> Tensor:
        with products_in(self.products, hidden.device.type):
            return self.layers[layer][form](
                hidden,
                attention_mask=context.causal_mask if form is None else context.recurrent_mask,
                position_ids=context.position_ids,
                position_embeddings=context.position_embeddings,
                past_key_values=cache,
                use_cache=cache is not None,
            )


def _repeated(cache: DynamicCache, index: int, rows: int) -> DynamicCache:
    """`cache` (of one row) with layer `index` copied and repeated over `rows` rows; the other layers are not used."""
    repeated = copy.copy(cache)
    layer = copy.deepcopy(cache.layers[index])
    layer.reorder_cache(cast(torch.LongTensor, torch.zeros(rows, dtype=torch.int64)))
    repeated.layers = [*cache.layers[:index], layer, *cache.layers[index + 1 :]]
    return repeated
