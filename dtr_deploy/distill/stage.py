"""The training loop of stage 1: one teacher pass feeds every twin; stop and resume at any step.

Each twin has its own optimiser and its own loss, the normalised squared error of its layer's attention output, so
twins do not influence one another and a run over layers A and B trains A as a run over A alone would. The state of
all of them is written at intervals; a run that is killed goes on from there and ends with the same weights.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dtr_deploy.distill.calibrate import teacher_statistics
from dtr_deploy.distill.evaluate import Running, TwinReport, window_only
from dtr_deploy.distill.files import twin_file, write_safetensors, write_text
from dtr_deploy.distill.narrow_teacher import NarrowTeacher
from dtr_deploy.distill.teacher import Activations, attention_activations
from dtr_deploy.hybrid.mixer import HybridMixer, own_parameters
from dtr_deploy.hybrid.model import Twins, make_twin
from dtr_deploy.hybrid.precision import products_dtype, products_in

Progress = Callable[[int, int, str], None]

EVALUATED = 12
"""Held-out sequences that errors are reported on; about 6,000 tokens at 512 each."""


@dataclass(frozen=True)
class DistillSettings:
    """tokens: budget of training tokens; batch_size: sequences a step; teacher_sequences: of one pass of the teacher,
    which several steps share, since large products are faster than small ones; learning_rate: of inherited projections;
    form_learning_rate: of a form's own parameters; calibrate: start forms from statistics of their teachers;
    checkpoint_seconds: how much a kill may cost.

    precision: of the products with large projections, in the teacher and in twins: "float32", "bfloat16" (through
    autocast; weights, optimiser, states and losses stay float32) or "auto", which is bfloat16 where the processor
    multiplies it natively. Errors are always reported in float32.
    """

    tokens: int = 100_000
    batch_size: int = 1
    teacher_sequences: int = 4
    learning_rate: float = 1e-3
    form_learning_rate: float = 2e-2
    warmup_steps: int = 10
    clip_norm: float = 1.0
    calibrate: bool = True
    seed: int = 0
    checkpoint_seconds: float = 60.0
    precision: str = "auto"


@dataclass(frozen=True)
class DistillResult:
    """reports: one for each (layer, form). files: their weights. tokens: how many each twin was trained on."""

    reports: list[TwinReport]
    files: dict[tuple[int, str], Path]
    tokens: int
    seconds: float


@torch.no_grad()
def relative_errors(backbone: Any, twins: Twins, window: int, held_out: Tensor) -> dict[tuple[int, str], float]:
    """As in a report's `trained`, of twins from anywhere: |y - y'|^2 / |y|^2 on held-out tokens [M,T]."""
    mixers = {
        (layer, form): make_twin(backbone.model.layers[layer].self_attn, backbone.config, layer, form, window, twins)
        for layer, form in twins
    }
    sums = {key: Running() for key in mixers}
    for tokens in held_out[:EVALUATED].split(4):
        activations = attention_activations(backbone, tokens, sorted({layer for layer, _ in twins}))
        for (layer, form), mixer in mixers.items():
            out, _ = mixer(activations.inputs[layer], activations.position_embeddings)
            sums[layer, form].add(out, activations.outputs[layer])
    return {key: running.result().relative_error for key, running in sums.items()}


def load_twins(files: dict[tuple[int, str], Path]) -> dict[tuple[int, str], dict[str, Tensor]]:
    """State dictionaries of `HybridMixer`, float32, by (layer, form)."""
    return {key: load_file(path) for key, path in files.items()}


def distill(
    backbone: Any,
    sequences: Tensor,
    held_out: Tensor,
    forms: Sequence[str],
    layers: Sequence[int],
    window: int,
    settings: DistillSettings,
    folder: str | Path,
    progress: Progress = lambda done, total, message: None,
) -> DistillResult:
    """Train a twin of every (layer, form) and write them to `folder`.

    Args:
        backbone: causal LM in evaluation mode; its weights are not changed.
        sequences: training tokens [N,T]; taken in an order that only depends on the seed.
        held_out: tokens [M,T] that errors are reported on.
        progress: called with (steps done, steps, message).

    Work that is already in `folder`, finished or half-way, is taken up; the caller keys the folder by its inputs.
    """
    started = time.monotonic()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted(layers)
    keys = [(layer, form) for layer in layers for form in forms]
    steps = max(1, math.ceil(settings.tokens / (settings.batch_size * sequences.shape[1])))
    files = {key: twin_file(folder, *key) for key in keys}
    summary = folder / "distill.json"
    if summary.is_file() and all(path.is_file() for path in files.values()):
        saved = json.loads(summary.read_text())
        reports = [TwinReport.from_dict(r) for r in saved["reports"]]
        return DistillResult(reports, files, saved["tokens"], saved["seconds"])

    trainers = {key: _Trainer(backbone, *key, window, settings) for key in keys}
    half_way = _HalfWay(folder / "half_way.safetensors")
    done, spent = half_way.load(trainers)
    if done == 0 and settings.calibrate:
        _calibrate(backbone, sequences[:4], layers, trainers)
    order = _batches(len(sequences), settings.batch_size, steps, settings.seed)
    saved_at = time.monotonic()
    device = sequences.device.type
    dtype = products_dtype(settings.precision, device)
    mixed = products_in(dtype, device)
    narrow = NarrowTeacher(backbone, layers) if dtype == torch.bfloat16 and NarrowTeacher.fits(backbone) else None
    at_once = max(1, settings.teacher_sequences // settings.batch_size)
    for first in range(done, steps, at_once):
        coming = order[first : first + at_once]
        batch = sequences[torch.cat(coming)]
        with mixed:
            activations = narrow(batch) if narrow else attention_activations(backbone, batch, layers)
        # One twin after another, so that its weights and moments stay in the cache over the steps of a pass.
        errors = [
            trainer.steps(first, steps, activations.inputs[layer], activations.outputs[layer], activations, mixed)
            for (layer, _), trainer in trainers.items()
        ]
        after = first + len(coming)
        if time.monotonic() - saved_at > settings.checkpoint_seconds and after < steps:
            half_way.save(trainers, after, spent + time.monotonic() - started)
            saved_at = time.monotonic()
        progress(after, steps, f"relative error {sum(errors) / len(errors):.3f}")

    reports = _evaluate(backbone, held_out[:EVALUATED], layers, keys, trainers)
    for key, trainer in trainers.items():
        weights = {name: p.detach().clone().contiguous() for name, p in trainer.mixer.state_dict().items()}
        write_safetensors(files[key], weights, {})
    tokens = steps * settings.batch_size * sequences.shape[1]
    seconds = spent + time.monotonic() - started
    write_text(
        summary, json.dumps({"tokens": tokens, "seconds": seconds, "reports": [r.to_dict() for r in reports]}, indent=1)
    )
    half_way.remove()
    return DistillResult(reports, files, tokens, seconds)


class _Trainer:
    """One twin and its optimiser."""

    def __init__(self, backbone: Any, layer: int, form: str, window: int, settings: DistillSettings) -> None:
        # The seed depends on the twin alone, so that which other twins are trained does not matter.
        torch.manual_seed(settings.seed * 1_000_003 + layer)
        teacher = backbone.model.layers[layer].self_attn
        self.mixer = HybridMixer(teacher, backbone.config, form, window, layer)
        self.teacher = HybridMixer(teacher, backbone.config, form, window, layer)
        self.teacher.form.load_state_dict(self.mixer.form.state_dict())
        own_parameters(self.mixer)
        self.mixer.requires_grad_(True)
        self.settings = settings
        inherited = [p for n, p in self.mixer.named_parameters() if not n.startswith("form.")]
        own = [p for n, p in self.mixer.named_parameters() if n.startswith("form.")]
        self.groups = [(inherited, settings.learning_rate), (own, settings.form_learning_rate)]
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "lr": rate} for params, rate in self.groups], weight_decay=0.0, fused=True
        )

    def steps(
        self,
        first: int,
        steps: int,
        hidden: Tensor,
        target: Tensor,
        activations: Activations,
        mixed: AbstractContextManager[Any],
    ) -> float:
        """Updates `first`, `first` + 1, ... on `batch_size` sequences each; returns the last relative error."""
        size, error = self.settings.batch_size, math.nan
        for index, (x, y) in enumerate(zip(hidden.split(size), target.split(size), strict=True)):
            error = self._step(first + index, steps, x, y.float(), activations, mixed)
        return error

    def _step(
        self,
        step: int,
        steps: int,
        hidden: Tensor,
        target: Tensor,
        activations: Activations,
        mixed: AbstractContextManager[Any],
    ) -> float:
        """One update; returns the relative error before it."""
        schedule = min(1.0, (step + 1) / self.settings.warmup_steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, (_, rate) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = rate * max(schedule, 1e-3)
        with mixed:
            out, _ = self.mixer(hidden, activations.position_embeddings)
        loss = (out.float() - target).square().sum() / target.square().sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.mixer.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        return loss.item()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        state = {f"weight.{n}": p.detach() for n, p in self.mixer.named_parameters()}
        state |= {f"start.{n}": p.detach() for n, p in self.teacher.form.named_parameters()}
        for n, p in self.mixer.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                state[f"optimizer.{key}.{n}"] = value.detach()
        return state

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        for n, p in self.mixer.named_parameters():
            p.copy_(state[f"weight.{n}"])
            self.optimizer.state[p] = {
                key: state[f"optimizer.{key}.{n}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
            }
        for n, p in self.teacher.form.named_parameters():
            p.copy_(state[f"start.{n}"])


class _HalfWay:
    """The one file that holds a run between two steps. Replaced as a whole: a kill leaves the old or the new."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, trainers: dict[tuple[int, str], _Trainer], step: int, seconds: float) -> None:
        tensors = {
            f"{layer}.{form}.{name}": tensor.contiguous()
            for (layer, form), trainer in trainers.items()
            for name, tensor in trainer.tensors().items()
        }
        write_safetensors(self.path, tensors, {"step": str(step), "seconds": str(seconds)})

    def load(self, trainers: dict[tuple[int, str], _Trainer]) -> tuple[int, float]:
        """(steps done, seconds spent), restoring the trainers; (0, 0.0) if there is nothing to go on from."""
        if not self.path.is_file():
            return 0, 0.0
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(self.path)
        for (layer, form), trainer in trainers.items():
            prefix = f"{layer}.{form}."
            trainer.restore({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        return int(metadata["step"]), float(metadata["seconds"])

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _batches(count: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows for each step: every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    while sum(len(r) for r in rows) < steps * batch_size:
        rows.append(torch.randperm(count, generator=generator))
    flat = torch.cat(rows)
    return [flat[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


@torch.no_grad()
def _calibrate(backbone: Any, tokens: Tensor, layers: list[int], trainers: dict[tuple[int, str], _Trainer]) -> None:
    activations = attention_activations(backbone, tokens, layers)
    for (layer, _), trainer in trainers.items():
        statistics = teacher_statistics(trainer.teacher, activations.inputs[layer], activations.position_embeddings)
        trainer.teacher.form.start_from(statistics)
        trainer.mixer.form.load_state_dict(trainer.teacher.form.state_dict())


@torch.no_grad()
def _evaluate(
    backbone: Any,
    held_out: Tensor,
    layers: list[int],
    keys: list[tuple[int, str]],
    trainers: dict[tuple[int, str], _Trainer],
) -> list[TwinReport]:
    kinds = ("start", "trained", "no_op", "window_only")
    sums = {key: {kind: Running() for kind in kinds} for key in keys}
    for tokens in held_out.split(4):
        activations = attention_activations(backbone, tokens, layers)
        where = activations.position_embeddings
        for (layer, form), trainer in trainers.items():
            hidden, target, running = activations.inputs[layer], activations.outputs[layer], sums[layer, form]
            # `teacher` holds the teacher's projections and the form's start values: the twin before training.
            running["start"].add(trainer.teacher(hidden, where)[0], target)
            running["trained"].add(trainer.mixer(hidden, where)[0], target)
            running["no_op"].add(torch.zeros_like(target), target)
            if trainer.mixer.sizes.window:
                running["window_only"].add(window_only(trainer.teacher, hidden, where), target)
    return [
        TwinReport(
            layer,
            form,
            start=sums[layer, form]["start"].result(),
            trained=sums[layer, form]["trained"].result(),
            no_op=sums[layer, form]["no_op"].result(),
            window_only=sums[layer, form]["window_only"].result() if trainers[layer, form].mixer.sizes.window else None,
        )
        for layer, form in keys
    ]
