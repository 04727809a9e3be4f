"""What the teacher's attention layers see and answer, layer by layer, from one forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """Inputs and outputs of attention layers for one batch.

    inputs, outputs: by layer, [B,T,hidden], after the input norm and after the output projection.
    position_embeddings: cos and sin, [1,T,D].
    """

    inputs: dict[int, Tensor]
    outputs: dict[int, Tensor]
    position_embeddings: tuple[Tensor, Tensor]

    def where(self, layer: int) -> tuple[Tensor, Tensor]:
        """`position_embeddings` on the device of this layer's input."""
        cos, sin = self.position_embeddings
        device = self.inputs[layer].device
        return cos.to(device), sin.to(device)


class _Done(Exception):
    """Leaves the forward pass after the last layer that is wanted."""


@contextmanager
def _recorded(model: Any, layers: list[int], store: dict[str, Any]) -> Iterator[None]:
    last = max(layers)

    def record(layer: int) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            store["inputs"][layer] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            store["outputs"][layer] = output[0]
            store["position_embeddings"] = kwargs["position_embeddings"]
            if layer == last:
                raise _Done

        return hook

    handles = [
        model.model.layers[layer].self_attn.register_forward_hook(record(layer), with_kwargs=True) for layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention_activations(model: Any, tokens: Tensor, layers: list[int]) -> Activations:
    """Run the teacher on tokens [B,T] up to the last of `layers` and return what their attention saw and answered."""
    store: dict[str, Any] = {"inputs": {}, "outputs": {}}
    with _recorded(model, layers, store), suppress(_Done):
        model.model(input_ids=tokens, use_cache=False)
    return Activations(store["inputs"], store["outputs"], store["position_embeddings"])
