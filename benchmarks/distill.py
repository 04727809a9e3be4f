"""`python -m benchmarks.distill`: seconds of a step of stage 1, and which part of the step takes them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads
from dtr_deploy.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.stage_timing import StepTimes

NAME = "benchmarks.distill"
SCHEMA = 1

app = application()


@app.command(name=NAME, cls=Command)
def distill(
    model: Annotated[str, typer.Option(help="A local folder, a GGUF file, package:NAME or a hub id.")],
    layers: Annotated[int, typer.Option(min=1, help="Layers trained side by side, spread over the model.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 2048,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 512,
    form: Annotated[str, typer.Option(help="The form of every twin.")] = "gated_deltanet",
    window: Annotated[int, typer.Option(min=0, help="Tokens of the softmax window.")] = 64,
    backend: Annotated[str, typer.Option(help="The operator's backend in the twins.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of large products: auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="As in a recipe: cpu, cuda, cuda:N, spread or auto.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="Twins go through torch.compile.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 5,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before them that are not.")] = 2,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time steps of stage 1 on a model: teacher pass, forward, backward, optimiser.

    Tokens are random: no step's cost depends on them.
    """
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)
        if tokens % length:
            raise UsageError(f"--tokens {tokens}: accepted are multiples of --length, {length}")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UsageError(f"--json {json_file}: no folder {json_file.absolute().parent}")
        settings: dict[str, Any] = {
            "model": model,
            "layers": layers,
            "tokens": tokens,
            "length": length,
            "form": form,
            "window": window,
            "backend": backend,
            "precision": precision,
            "device": device,
            "compile": compiled,
            "warm_up": warm_up,
        }
        _check(form, backend)

        from benchmarks.machine import describe
        from benchmarks.table import console, machine_lines

        screen = console()
        times, settings["layer_indices"] = time_steps(settings, steps)
        environment = describe(settings["placed"].partition(":")[0], threads)
        for line in machine_lines(environment):
            screen.print(line, soft_wrap=True, highlight=False)
        screen.print()
        screen.print(_title(settings, len(times.steps)), style="bold", soft_wrap=True, highlight=False)
        screen.print(_table(times))
        if json_file is not None:
            answer = {
                "schema": SCHEMA,
                "environment": environment,
                "settings": settings,
                "seen": sorted(times.seen),
                "steps": times.steps,
            }
            json_file.write_text(json.dumps(answer, indent=1))


def _check(form: str, backend: str) -> None:
    from dtr_kernels.forms import FORMS
    from dtr_kernels.operator import BACKENDS

    for option, value, accepted in (("--form", form, tuple(FORMS)), ("--backend", backend, tuple(BACKENDS))):
        if value not in accepted:
            raise UsageError(f"{option} {value!r}: accepted are {', '.join(accepted)}")


def time_steps(settings: dict[str, Any], steps: int) -> tuple[StepTimes, list[int]]:
    """Run stage 1 for the warm-up and `steps` steps; the timed steps, and the layers that were trained."""
    import tempfile
    from unittest.mock import patch

    import torch

    from benchmarks.stage_timing import StepTimes, device_clock, timed_parts
    from dtr_deploy.distill.stage import distill as run_stage
    from dtr_deploy.distill.trainer import DistillSettings
    from dtr_deploy.hybrid.backbone import load_backbone
    from dtr_deploy.hybrid.mixer import HybridMixer

    backbone = load_backbone(settings["model"], device=settings["device"])
    settings["placed"] = str(backbone.model.device)
    if settings["layers"] > backbone.layers:
        raise UsageError(f"--layers {settings['layers']}: the model has {backbone.layers}")
    layers = [i * backbone.layers // settings["layers"] for i in range(settings["layers"])]
    length, batch = settings["length"], settings["tokens"] // settings["length"]
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.model.config.vocab_size
    sequences = torch.randint(0, vocabulary, (max(4, batch), length), generator=generator)
    times = StepTimes(device_clock)

    def choose_backend(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, HybridMixer):
            module.backend = settings["backend"]

    # The first call of progress ends the first step and starts the clock, hence one warm-up step at least.
    chosen = DistillSettings(
        tokens=(settings["warm_up"] + steps) * settings["tokens"],
        batch_size=batch,
        teacher_sequences=batch,  # one pass a step, for the clock's sake
        precision=settings["precision"],
        checkpoint_seconds=float("inf"),
    )
    handle = torch.nn.modules.module.register_module_forward_pre_hook(choose_backend)
    # One function for all twins: they differ in weights only, so that it is compiled once a use, not once a twin.
    forward = torch.compile(HybridMixer.forward, dynamic=False) if settings["compile"] else HybridMixer.forward
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(HybridMixer, "forward", forward),
            timed_parts(times),
        ):
            run_stage(
                backbone.model,
                sequences,
                sequences[:1],
                [settings["form"]],
                layers,
                settings["window"],
                chosen,
                folder,
                lambda done, total, message: times.step_done(),
            )
    finally:
        handle.remove()
    times.steps = times.steps[-steps:]
    return times, layers


def _title(settings: dict[str, Any], steps: int) -> str:
    return (
        f"Stage 1, {settings['model']}: {settings['layers']} layers, {settings['form']}, window {settings['window']}, "
        f"backend {settings['backend']}, {settings['tokens']:,} tokens a step in sequences of {settings['length']:,}, "
        f"products in {settings['precision']}, on {settings['placed']}, {steps} steps"
        + (", torch.compile" if settings["compile"] else "")
    )


def _table(times: StepTimes) -> Table:
    from rich import box
    from rich.table import Table

    from benchmarks.stage_timing import PARTS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    for column in ("s a step", "fastest", "slowest", "share"):
        table.add_column(column, justify="right")
    whole = statistics.median(step["total"] for step in times.steps)
    for part in (*PARTS, "other", "total"):
        if part in PARTS and part not in times.seen:
            table.add_row(part, "not seen", "", "", "")
            continue
        seconds = [step[part] for step in times.steps]
        middle = statistics.median(seconds)
        figures = [f"{x:.4f}" for x in (middle, min(seconds), max(seconds))]
        table.add_row(part, *figures, f"{100 * middle / whole:.0f}%", style="bold" if part == "total" else None)
    return table


if __name__ == "__main__":
    app()
