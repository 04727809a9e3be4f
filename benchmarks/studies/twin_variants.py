"""Variants of the twins' training that the study compares: what the product does not do, and why not, or does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dtr_deploy.distill.evaluate import Running
from dtr_deploy.distill.teacher import Activations, attention_activations
from dtr_deploy.run_dir import write_atomically

if TYPE_CHECKING:
    from dtr_deploy.distill.stage import Mixers

CALIBRATED = "+ calibration"
NONE, TOGETHER, LAYOUT = "none", "together", "layout"
"""How twins are healed: not at all, all of them in random layouts, or those of one layout in it."""


@dataclass(frozen=True)
class Variant:
    """window: tokens, 0 for none. calibrate: forms start from statistics of their teachers. student_prefix: twins see
    what a hybrid of all twins hands them. heal: how they are trained end to end afterwards. asked: what builds do not
    do, trained to see whether they should."""

    name: str
    window: int
    calibrate: bool = True
    student_prefix: bool = False
    heal: str = NONE
    asked: bool = False

    @property
    def folder(self) -> str:
        return self.name.replace("+ ", "").replace(" ", "_")


def variants(window: int) -> list[Variant]:
    """From the least to the most that a twin can have."""
    return [
        Variant("form only", 0),
        Variant("form + window", window, calibrate=False),
        Variant(CALIBRATED, window),
        Variant("+ student prefix", window, student_prefix=True, asked=True),
        Variant("+ heal", window, heal=TOGETHER),
        Variant("+ heal of the layout", window, heal=LAYOUT, asked=True),
    ]


class StudentPrefix:
    """Activations as `Variation.activations`: from the middle of training on, inputs are those of a hybrid of all the
    twins so far, and the target is what the teacher's layer answers to the same input.

    Before, twins are too far from their teachers for what they make of a text to be worth learning from.
    """

    BEGINS = 0.5

    def __init__(self, backbone: Any, form: str) -> None:
        self.backbone, self.form = backbone, form

    @torch.no_grad()
    def __call__(self, tokens: Tensor, twins: Mixers, share: float) -> Activations:
        layers = sorted({layer for layer, _ in twins})
        if share < self.BEGINS:
            return attention_activations(self.backbone, tokens, layers)
        body = self.backbone.model
        hidden = body.embed_tokens(tokens)
        where = body.rotary_emb(hidden, torch.arange(tokens.shape[1], device=tokens.device)[None])
        inputs, outputs = {}, {}
        for index, layer in enumerate(body.layers):
            normed = layer.input_layernorm(hidden)
            answer = layer.self_attn(normed, position_embeddings=where, attention_mask=None)[0]
            if (index, self.form) in twins:
                inputs[index], outputs[index] = normed, answer
                answer = twins[index, self.form](normed, where)[0]
            hidden = hidden + answer
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return Activations(inputs, outputs, where)


class Checkpoints:
    """Held-out errors on the way, as `Variation.watch`, kept in `file`: are the last weights of a twin its best?

    errors: {share of the steps: [error of each layer]}. held_out: tokens [M,T], looked at about ten times.
    """

    LOOKS = 10

    def __init__(self, backbone: Any, form: str, held_out: Tensor, file: Path) -> None:
        self.backbone, self.form, self.held_out, self.file = backbone, form, held_out, file
        self._activations: Activations | None = None

    @torch.no_grad()
    def __call__(self, done: int, steps: int, twins: Mixers) -> None:
        errors = self.errors()
        share = done * self.LOOKS // steps / self.LOOKS
        if share == 0 or f"{share:.1f}" in errors:
            return
        layers = sorted({layer for layer, _ in twins})
        if self._activations is None:
            self._activations = attention_activations(self.backbone, self.held_out, layers)
        found = []
        for layer in layers:
            running = Running()
            out, _ = twins[layer, self.form](self._activations.inputs[layer], self._activations.where(layer))
            running.add(out, self._activations.outputs[layer])
            found.append(running.result().relative_error)
        write_atomically(self.file, json.dumps(errors | {f"{share:.1f}": found}).encode())

    def errors(self) -> dict[str, list[float]]:
        return json.loads(self.file.read_text()) if self.file.is_file() else {}

    def summary(self) -> dict[str, float]:
        """Mean error at the end and with every twin's best look; how many twins had theirs before the end; and when the
        mean error was within a tenth of the last one, as a share of the steps."""
        errors = self.errors()
        looks = sorted(errors, key=float)
        last = torch.tensor(errors[looks[-1]])
        table = torch.tensor([errors[look] for look in looks])
        near = next(look for look in looks if torch.tensor(errors[look]).mean() <= 1.1 * last.mean())
        return {
            "last": float(last.mean()),
            "best": float(table.min(0).values.mean()),
            "before_the_end": int((table.min(0).values < last).sum()),
            "twins": len(last),
            "near": float(near),
        }
