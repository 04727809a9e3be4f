"""Heals twins where they work: together, by the divergence of a hybrid's next-token distribution from the teacher's.

Layer-wise training shows every twin the teacher's own activations; in a hybrid it sees what other twins have made of
them. Here a hybrid with many layers replaced runs end to end, and what a twin passes on (W_v, W_o, gates, decays,
gains) follows KL(teacher || hybrid); W_q, W_k and the backbone stay. Every step draws another layout, so that what is
healed is not one hybrid but the twins in whatever company the search will put them; with a layout given, it is that
one.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dtr_deploy.distill.files import twin_file, write_safetensors, write_text
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.model import Twins, make_twin
from dtr_deploy.hybrid.precision import products_dtype, products_in

Progress = Callable[[int, int, str], None]

FROZEN = ("q_proj.", "k_proj.", "q_norm.", "k_norm.")
"""What decides where a layer looks: with end-to-end gradients of few tokens it would only drift."""
SUMMARY = "heal.json"


@dataclass(frozen=True)
class HealSettings:
    """tokens: budget of training tokens; batch_size: sequences a step; learning_rate: of W_v and W_o;
    form_learning_rate: of a form's own parameters; replaced: smallest and largest share of the layers that a drawn
    layout replaces; checkpointing: run each layer again on the way back instead of keeping what it computed.
    checkpoint_seconds and precision as in `DistillSettings`."""

    tokens: int = 50_000
    batch_size: int = 1
    learning_rate: float = 3e-4
    form_learning_rate: float = 3e-3
    replaced: tuple[float, float] = (0.5, 1.0)
    warmup_steps: int = 10
    clip_norm: float = 1.0
    seed: int = 0
    checkpoint_seconds: float = 60.0
    precision: str = "auto"
    checkpointing: bool = False


@dataclass(frozen=True)
class HealResult:
    """files: weights of every twin healed, by (layer, form). divergences: KL(teacher || hybrid) of each step before its
    update, nats a token. Layouts differ from step to step: compare means over many."""

    files: dict[tuple[int, str], Path]
    divergences: list[float]
    tokens: int
    seconds: float


def heal(
    backbone: Any,
    twins: Twins,
    window: int,
    sequences: Tensor,
    settings: HealSettings,
    folder: str | Path,
    layout: Layout | None = None,
    progress: Progress = lambda done, total, message: None,
) -> HealResult:
    """Train `twins` end to end and write all of them to `folder`, in the files that `stage.load_twins` reads.

    Args:
        backbone: causal LM in evaluation mode; its weights are not changed. It is the teacher.
        twins: state dictionaries by (layer, form); not modified.
        sequences: training tokens [N,T].
        layout: the hybrid to heal; None draws one a step, of layers and forms that have a twin.
        progress: called with (steps done, steps, message).

    Work that is already in `folder`, finished or half-way, is taken up; the caller keys the folder by its inputs.
    """
    started = time.monotonic()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    keys = sorted(twins) if layout is None else [(i, form) for i, form in enumerate(layout) if form is not None]
    files = {key: twin_file(folder, *key) for key in keys}
    summary = folder / SUMMARY
    if summary.is_file() and all(path.is_file() for path in files.values()):
        saved = json.loads(summary.read_text())
        return HealResult(files, saved["divergences"], saved["tokens"], saved["seconds"])

    steps = max(1, math.ceil(settings.tokens / (settings.batch_size * sequences.shape[1])))
    healer = _Healer(backbone, twins, window, keys, settings)
    half_way = folder / "healing.safetensors"
    done, spent, divergences = healer.restore(half_way)
    saved_at = time.monotonic()
    for step in range(done, steps):
        draw = random.Random(f"{settings.seed}/{step}")
        rows = [draw.randrange(len(sequences)) for _ in range(settings.batch_size)]
        chosen = layout or draw_layout(draw, keys, len(backbone.model.layers), settings.replaced)
        divergences.append(healer.step(step, steps, sequences[rows], chosen))
        if time.monotonic() - saved_at > settings.checkpoint_seconds and step + 1 < steps:
            healer.save(half_way, step + 1, spent + time.monotonic() - started, divergences)
            saved_at = time.monotonic()
        recent = divergences[-20:]
        progress(step + 1, steps, f"divergence {sum(recent) / len(recent):.3f} nats a token")

    for key in keys:
        weights = {name: p.detach().clone().contiguous() for name, p in healer.mixers[key].state_dict().items()}
        write_safetensors(files[key], weights, {})
    tokens, seconds = steps * settings.batch_size * sequences.shape[1], spent + time.monotonic() - started
    write_text(summary, json.dumps({"tokens": tokens, "seconds": seconds, "divergences": divergences}))
    half_way.unlink(missing_ok=True)
    return HealResult(files, divergences, tokens, seconds)


def draw_layout(
    draw: random.Random, keys: Sequence[tuple[int, str]], layers: int, replaced: tuple[float, float]
) -> Layout:
    """A random layout: how many layers, which, and which of a layer's forms. One layer keeps full attention."""
    forms: dict[int, list[str]] = {}
    for layer, form in keys:
        forms.setdefault(layer, []).append(form)
    count = round(draw.uniform(*replaced) * len(forms))
    chosen = draw.sample(sorted(forms), max(1, min(count, layers - 1)))
    layout: list[str | None] = [None] * layers
    for layer in chosen:
        layout[layer] = draw.choice(forms[layer])
    return tuple(layout)


class _Healer:
    """The mixers, their optimiser, and one step."""

    def __init__(
        self, backbone: Any, twins: Twins, window: int, keys: Sequence[tuple[int, str]], settings: HealSettings
    ) -> None:
        self.backbone, self.settings = backbone, settings
        self.products = products_dtype(settings.precision, backbone.device.type)
        self.mixers: dict[tuple[int, str], nn.Module] = {}
        self.layers: dict[tuple[int, str], nn.Module] = {}
        for layer, form in keys:
            block = backbone.model.layers[layer]
            weights = {name: tensor.clone() for name, tensor in twins[layer, form].items()}
            mixer = make_twin(block.self_attn, backbone.config, layer, form, window, {(layer, form): weights})
            self.mixers[layer, form] = mixer
            healed = copy.copy(block)
            healed._modules = {**block._modules, "self_attn": mixer}
            self.layers[layer, form] = healed
        self.trained = {
            f"{layer}.{form}.{name}": parameter.requires_grad_(True)
            for (layer, form), mixer in self.mixers.items()
            for name, parameter in mixer.named_parameters()
            if not name.startswith(FROZEN)
        }
        own = [p for n, p in self.trained.items() if ".form." in n]
        inherited = [p for n, p in self.trained.items() if ".form." not in n]
        self.rates = (settings.learning_rate, settings.form_learning_rate)
        self.optimizer = torch.optim.AdamW([{"params": inherited}, {"params": own}], weight_decay=0.0, fused=True)

    def step(self, step: int, steps: int, tokens: Tensor, layout: Layout) -> float:
        """One update on tokens [B,T]; returns the divergence before it, nats a token."""
        settings = self.settings
        schedule = min(1.0, (step + 1) / settings.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * max(schedule, 1e-3)
        tokens = tokens.to(self.backbone.device)
        with products_in(self.products, tokens.device.type):
            with torch.no_grad():
                teacher = self.backbone.model(input_ids=tokens, use_cache=False).last_hidden_state
            hidden = self._hidden(tokens, layout)
            divergence, gradient = self._divergence(hidden.detach(), teacher)
        self.optimizer.zero_grad(set_to_none=True)
        hidden.backward(gradient)
        torch.nn.utils.clip_grad_norm_([p for p in self.trained.values() if p.grad is not None], settings.clip_norm)
        self.optimizer.step()
        return divergence

    def _hidden(self, tokens: Tensor, layout: Layout) -> Tensor:
        """[B,T,H] after the final norm."""
        body = self.backbone.model
        hidden = body.embed_tokens(tokens)
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        where = body.rotary_emb(hidden, positions)
        for index, form in enumerate(layout):
            layer = body.layers[index] if form is None else self.layers[index, form]
            # Without a mask the backbone's attention is causal (no padding here), and a twin always is.
            run = partial(layer, attention_mask=None, position_ids=positions, position_embeddings=where)
            hidden = checkpoint(run, hidden, use_reentrant=False) if self.settings.checkpointing else run(hidden)
        return body.norm(hidden)

    def _divergence(self, hidden: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
        """KL(teacher || hybrid), nats a token, and its gradient by `hidden` [B,T,H], in closed form: the difference of
        the two distributions, taken back through the output embedding. A few sequences' logits fill gigabytes under
        autograd; here they live one sequence at a time."""
        head = self.backbone.get_output_embeddings()
        count = hidden.shape[0] * hidden.shape[1]
        total, gradients = 0.0, []
        weight = head.weight.detach().to(self.products)
        with torch.no_grad():
            for ours, theirs in zip(hidden, teacher, strict=True):
                log_q = head(ours).float().log_softmax(-1)
                log_p = head(theirs).float().log_softmax(-1)
                p = log_p.exp()
                total += (p * (log_p - log_q)).sum().item()
                gradient = ((log_q.exp() - p).to(self.products) @ weight).float() / count
                gradients.append(gradient.to(hidden.device))
        return total / count, torch.stack(gradients)

    def save(self, path: Path, step: int, seconds: float, divergences: list[float]) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trained.items():
            tensors[f"weight.{name}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["divergences"] = torch.tensor(divergences, dtype=torch.float64)
        write_safetensors(path, tensors, {"step": str(step), "seconds": str(seconds)})

    @torch.no_grad()
    def restore(self, path: Path) -> tuple[int, float, list[float]]:
        """(steps done, seconds spent, divergences so far); (0, 0.0, []) if there is nothing to go on from."""
        if not path.is_file():
            return 0, 0.0, []
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        for name, parameter in self.trained.items():
            parameter.copy_(tensors[f"weight.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            if f"optimizer.step.{name}" in tensors:  # a twin that no layout has drawn yet has none
                state = {key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in keys}
                self.optimizer.state[parameter] = state
        return int(metadata["step"]), float(metadata["seconds"]), tensors["divergences"].tolist()
