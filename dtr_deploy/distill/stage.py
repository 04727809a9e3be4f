"""The training loop of stage 1: one teacher pass feeds every twin; stop and resume at any step.

Each twin has its own optimiser and its own loss, the normalised squared error of its layer's attention output, so
twins do not influence one another and a run over layers A and B trains A as a run over A alone would. The state of
all of them is written at intervals; a run that is killed goes on from there and ends with the same weights.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dtr_deploy.distill.calibrate import teacher_statistics
from dtr_deploy.distill.evaluate import Running, TwinReport, window_only
from dtr_deploy.distill.files import twin_file, write_safetensors, write_text
from dtr_deploy.distill.fused_teacher import FusedTeacher
from dtr_deploy.distill.peers import Alone
from dtr_deploy.distill.shared_teacher import SharedTeacher
from dtr_deploy.distill.teacher import Activations, attention_activations
from dtr_deploy.distill.trainer import DistillSettings, HalfWay, Trainer
from dtr_deploy.hybrid.mixer import HybridMixer
from dtr_deploy.hybrid.model import Twins, make_twin
from dtr_deploy.hybrid.precision import products_dtype, products_in

Progress = Callable[[int, int, str], None]

SUMMARY = "distill.json"
"""In the folder of finished twins: tokens, seconds and reports."""

CALIBRATED = 4
"""Training sequences that start values are made from."""
EVALUATED = 12
"""Held-out sequences that errors are reported on; about 6,000 tokens at 512 each."""


@dataclass(frozen=True)
class DistillResult:
    """reports: one for each (layer, form). files: their weights. tokens: how many each twin was trained on."""

    reports: list[TwinReport]
    files: dict[tuple[int, str], Path]
    tokens: int
    seconds: float


Mixers = Mapping[tuple[int, str], HybridMixer]
"""Twins in training, by (layer, form)."""


@dataclass(frozen=True)
class Variation:
    """How a study trains twins otherwise, or looks on. The product uses none of it.

    activations: called with (tokens [B,T], the twins so far, the share of the steps done); what it returns is trained
        on in place of the teacher's own pass.
    watch: called with (steps done, steps, the twins so far) after every pass.
    """

    activations: Callable[[Tensor, Mixers, float], Activations] | None = None
    watch: Callable[[int, int, Mixers], None] | None = None


@torch.no_grad()
def relative_errors(backbone: Any, twins: Twins, window: int, held_out: Tensor) -> dict[tuple[int, str], float]:
    """As in a report's `trained`, of twins from anywhere: |y - y'|^2 / |y|^2 on held-out tokens [M,T]."""
    mixers = {
        (layer, form): make_twin(backbone.model.layers[layer].self_attn, backbone.config, layer, form, window, twins)
        for layer, form in twins
    }
    sums = {key: Running() for key in mixers}
    for tokens in held_out[:EVALUATED].split(4):
        activations = attention_activations(backbone, tokens.to(backbone.device), sorted({layer for layer, _ in twins}))
        for (layer, form), mixer in mixers.items():
            out, _ = mixer(activations.inputs[layer], activations.where(layer))
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
    variation: Variation | None = None,
    peers: Alone | None = None,
) -> DistillResult:
    """Train a twin of every (layer, form) and write them to `folder`.

    Args:
        backbone: causal LM in evaluation mode; its weights are not changed.
        sequences: training tokens [N,T]; taken in an order that only depends on the seed.
        held_out: tokens [M,T] that errors are reported on.
        progress: called with (steps done, steps, message).
        variation: for studies.
        peers: other processes, each of which calls this with layers of its own; they share the teacher's passes.

    Work that is already in `folder`, finished or half-way, is taken up; the caller keys the folder by its inputs.
    """
    started = time.monotonic()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted(layers)
    keys = [(layer, form) for layer in layers for form in forms]
    steps = max(1, math.ceil(settings.tokens / (settings.batch_size * sequences.shape[1])))
    files = {key: twin_file(folder, *key) for key in keys}
    summary = folder / SUMMARY
    if summary.is_file() and all(path.is_file() for path in files.values()):
        saved = json.loads(summary.read_text())
        reports = [TwinReport.from_dict(r) for r in saved["reports"]]
        return DistillResult(reports, files, saved["tokens"], saved["seconds"])

    variation, peers = variation or Variation(), peers or Alone()
    trainers = {key: Trainer(backbone, *key, window, settings) for key in keys}
    mixers = {key: trainer.mixer for key, trainer in trainers.items()}
    half_way = HalfWay(folder, peers)
    done, spent = half_way.load(trainers)
    of_all = peers.gather(layers)
    exact = partial(_exact_passes, backbone, peers, of_all)
    if done == 0 and settings.calibrate:
        _calibrate(exact(sequences[:CALIBRATED].split(1)), trainers)
    order = _batches(len(sequences), settings.batch_size, steps, settings.seed)
    saved_at = time.monotonic()
    device = backbone.device
    dtype = products_dtype(settings.precision, device.type)
    mixed = products_in(dtype, device.type)
    seen = sorted({layer for some in of_all for layer in some})
    fused = FusedTeacher(backbone, seen, dtype) if FusedTeacher.fits(backbone, dtype) else None
    stride = max(1, settings.teacher_sequences // settings.batch_size)

    def one_pass(number: int) -> Activations:
        batch = sequences[torch.cat(order[number * stride :][:stride])].to(device)
        with mixed:
            if variation.activations is not None:
                return variation.activations(batch, mixers, number * stride / steps)
            return fused(batch) if fused else attention_activations(backbone, batch, seen)

    passes = math.ceil(steps / stride)
    rows = lambda number: settings.batch_size * min(stride, steps - number * stride)  # noqa: E731
    teacher = SharedTeacher(peers, of_all, one_pass, passes, rows)
    for number in range(done // stride, passes):
        first, activations = number * stride, teacher(number)
        # One twin after another, so that its weights and moments stay in the cache over the steps of a pass.
        errors = [
            trainer.steps(
                first, steps, activations.inputs[layer], activations.outputs[layer], activations.where(layer), mixed
            )
            for (layer, _), trainer in trainers.items()
        ]
        after = min(first + stride, steps)
        if not teacher.waiting and after < steps:
            late = time.monotonic() - saved_at > settings.checkpoint_seconds
            if peers.gather(late)[0]:
                half_way.save(trainers, after, spent + time.monotonic() - started)
                saved_at = time.monotonic()
        if variation.watch is not None:
            variation.watch(after, steps, mixers)
        progress(after, steps, f"relative error {sum(error.item() for error in errors) / len(errors):.3f}")

    reports = _evaluate(exact(held_out[:EVALUATED].split(4)), keys, trainers)
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


def _batches(count: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows for each step: every sequence once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    while sum(len(r) for r in rows) < steps * batch_size:
        rows.append(torch.randperm(count, generator=generator))
    flat = torch.cat(rows)
    return [flat[i * batch_size : (i + 1) * batch_size] for i in range(steps)]


def _exact_passes(
    backbone: Any, peers: Alone, layers: Sequence[Sequence[int]], batches: Sequence[Tensor]
) -> Iterator[Activations]:
    """Of these layers of each process, on each batch of tokens [B,T], in the model's own precision."""
    wanted = sorted({layer for some in layers for layer in some})
    run = lambda number: attention_activations(backbone, batches[number].to(backbone.device), wanted)  # noqa: E731
    teacher = SharedTeacher(peers, layers, run, len(batches), lambda number: len(batches[number]))
    return map(teacher, range(len(batches)))


@torch.no_grad()
def _calibrate(passes: Iterable[Activations], trainers: dict[tuple[int, str], Trainer]) -> None:
    """passes: of one sequence each."""
    seen = list(passes)
    for (layer, _), trainer in trainers.items():
        inputs = torch.cat([one.inputs[layer] for one in seen])
        statistics = teacher_statistics(trainer.teacher, inputs, seen[0].where(layer))
        trainer.teacher.form.start_from(statistics)
        trainer.mixer.form.load_state_dict(trainer.teacher.form.state_dict())


@torch.no_grad()
def _evaluate(
    passes: Iterable[Activations], keys: list[tuple[int, str]], trainers: dict[tuple[int, str], Trainer]
) -> list[TwinReport]:
    kinds = ("start", "trained", "no_op", "window_only")
    sums = {key: {kind: Running() for kind in kinds} for key in keys}
    for activations in passes:
        for (layer, form), trainer in trainers.items():
            hidden, target, running = activations.inputs[layer], activations.outputs[layer], sums[layer, form]
            where = activations.where(layer)
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
