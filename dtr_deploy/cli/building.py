"""Commands about recipes: write one, see what it costs, build it, and quantize what was built."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dtr_deploy.cli.terminal import AsJson, Debug, Quiet, RecipeFile, RunsFolder, Terminal, Verbose, one_line_errors
from dtr_deploy.errors import DtrError, UsageError

if TYPE_CHECKING:
    from dtr_deploy.report.schema import Report
    from dtr_deploy.run_dir import RunDir


def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write, for example my.yaml.", show_default=False)],
    model: Annotated[str, typer.Option(help="A Hugging Face id, a local folder, a .gguf file, or package:NAME.")],
    task: Annotated[
        list[str],
        typer.Option(help="A folder or .jsonl file of labelled rows, an lm-eval task, or needle; may be repeated."),
    ],
    corpus: Annotated[
        list[str] | None, typer.Option(help="Text to train on, may be repeated; pydoc and recall if left out.")
    ] = None,
    engine: Annotated[str, typer.Option(help="ort or vllm.")] = "ort",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of a request.")] = 4096,
    output: Annotated[int, typer.Option(min=2, help="Output tokens of a request.")] = 128,
    speedup: Annotated[float, typer.Option(min=0.1, help="Times the throughput of the model as it is.")] = 1.2,
    debug: Debug = False,
) -> None:
    """Write a commented recipe to begin from, for a model, a task and where it is to be served."""
    with one_line_errors(debug):
        from dtr_deploy.recipe import load_recipe
        from dtr_deploy.recipe_template import template
        from dtr_deploy.run_dir import write_atomically

        if file.exists():
            raise UsageError(f"{file}: exists already; name another file, or remove it")
        if not file.parent.is_dir():
            raise UsageError(f"{file}: there is no folder {file.parent}")
        text = template(file, model, task, corpus or ["pydoc", "recall"], engine, prompt, output, speedup)
        write_atomically(file, text.encode())
        try:
            load_recipe(file)
        except DtrError:
            file.unlink()
            raise
        typer.echo(f"wrote {file}; next: dtr-deploy plan --recipe {file}")


def plan(
    recipe: RecipeFile,
    runs: RunsFolder = Path("runs"),
    teraflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="10^12 operations a second of large products where it will be built; measured here if left out.",
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """What a build will cost, without running it: tokens, evaluations, measurements, time, memory, disk."""
    with one_line_errors(debug):
        from dtr_deploy.plan import check_engines, gigabytes, make_plan, matrix_flops, model_config, trains_on
        from dtr_deploy.progress import seconds_text
        from dtr_deploy.recipe import load_recipe
        from dtr_deploy.report.tables import new_table

        terminal = Terminal(as_json)
        loaded = load_recipe(recipe)
        config = model_config(loaded)
        loaded.check_layers(config.num_hidden_layers)
        if teraflops is None:
            made = make_plan(loaded, config, matrix_flops(trains_on(loaded, config)))
        else:
            made = make_plan(loaded, config, 1e12 * teraflops)
        place = next(folder for folder in (runs, *runs.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        table = new_table(f"Plan of {loaded.name}", "stage", "work", "about", numbers_from=2)
        for stage in made.stages:
            table.add_row(stage.stage, stage.work, seconds_text(stage.seconds))
        table.add_row("all", "", seconds_text(made.seconds), style="bold")
        if not as_json:
            disk = f"about {gigabytes(made.disk_bytes)} in {runs / loaded.name}; {gigabytes(free)} are free"
            terminal.show(table)
            terminal.show(f"Disk: {disk}.")
            terminal.show(f"Memory of training: about {gigabytes(made.memory_bytes)} on the device that trains.")
            speed = "on this machine" if teraflops is None else f"of {teraflops:g} teraflops"
            terminal.show(f"Times are rough: counts of the recipe over the speed of a matrix product {speed}.")
        check_engines(loaded)
        stages = [vars(stage) for stage in made.stages]
        sizes = {"disk_bytes": made.disk_bytes, "free_bytes": free, "memory_bytes": made.memory_bytes}
        terminal.answer({"name": loaded.name, "stages": stages, "seconds": made.seconds, **sizes})


def _until(stage: str, words: str) -> Callable[..., None]:
    """The command that builds up to a stage."""

    def command(
        recipe: RecipeFile,
        runs: RunsFolder = Path("runs"),
        as_json: AsJson = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
        debug: Debug = False,
    ) -> None:
        _build(recipe, runs, stage, as_json, quiet, verbose, debug)

    command.__doc__ = words
    return command


build = _until(
    "report",
    "Build a recipe: distil, search, export, prove parity, measure, report. Goes on where an earlier build stopped.",
)
distill = _until("distill", "Only stage 1: train the twins of the attention layers.")
search = _until("search", "Up to stage 2: choose which layers to replace.")
export = _until("export", "Up to the exported models, without the parity gate and the throughput table.")


def _build(recipe_file: Path, runs: Path, until: str, as_json: bool, quiet: bool, verbose: bool, debug: bool) -> None:
    command = "build" if until == "report" else until
    again = f"dtr-deploy {command} --recipe {recipe_file} --runs {runs}"
    with one_line_errors(debug, again, as_json):
        from dtr_deploy.pipeline import build as build_pipeline
        from dtr_deploy.progress import StopRequest
        from dtr_deploy.recipe import load_recipe
        from dtr_deploy.report.tables import parts
        from dtr_deploy.run_dir import RunDir
        from dtr_deploy.run_log import run_log

        terminal = Terminal(as_json, quiet, verbose)
        recipe = load_recipe(recipe_file)
        run = RunDir(runs / recipe.name)
        stop = StopRequest()
        shown = terminal.progress(stop)
        with run_log(run.path, again, shown) as progress, stop.listening(shown):
            report = build_pipeline(recipe, run, progress, until)
        for part in parts(report) if report is not None and not as_json else ():
            terminal.show(part)
            terminal.show("")
        terminal.answer(_finished(run, report))
        terminal.say(f"{until} finished: {run.path}" if until != "report" else f"built: {run.path}")


def _finished(run: RunDir, report: Report | None) -> object:
    """The report where there is one, otherwise where the run is and the seconds of its stages."""
    if report is not None:
        return report.model_dump(mode="json")
    return {"run": str(run.path), "seconds": {name: record.seconds for name, record in run.stages.items()}}


def quantize(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder: a run's hybrid, or a backbone.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    precision: Annotated[str, typer.Option(help="int8 or fp8 (e4m3).")] = "int8",
    debug: Debug = False,
) -> None:
    """Write a checkpoint with the projections of attention and MLP in 8 bits: compressed-tensors, round to nearest,
    activations quantized while serving. `vllm serve` runs it as it is. Forms, norms and head are left alone."""
    with one_line_errors(debug):
        from dtr_deploy.export.compressed import quantize_checkpoint

        files = quantize_checkpoint(folder, out, precision)
        size = sum(file.stat().st_size for file in files) / 2**20
        typer.echo(f"quantized to {precision}: {out} ({size:,.0f} MiB)")
        if precision == "int8":
            from dtr_deploy.doctor import hardware

            machine = hardware()
            if not machine.gpus and "AVX-512" not in machine.instruction_sets:
                typer.echo(
                    "warning: vLLM 0.32 computes int8 wrongly, without an error, on a CPU like this one (no AVX-512); "
                    "serve it on a GPU or a CPU with AVX-512, or quantize to fp8",
                    err=True,
                )
