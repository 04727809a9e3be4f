"""The command line. Commands import what they need when they run, so that `--help` is quick.

Every error is one line on stderr (`--debug` adds the traceback); exit codes are in `EXIT_CODES` and in `--help`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from dtr_deploy import __version__
from dtr_deploy.errors import DtrError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from dtr_deploy.recipe import Recipe
    from dtr_deploy.report.schema import Report

EXIT_CODES = """Exit codes: 0 done; 1 wrong input (recipe, file, model, engine) or any other error; 2 no layout reaches
the recipe's target; 3 parity failed, an exported model does not compute what was trained, or lm-eval finds another
score; 130 stopped with Ctrl-C."""

INTERRUPTED = 130


class _Commands(TyperGroup):
    """typer reports mistakes on its own command line with exit code 2; here 2 means something else."""

    def main(self, *args: Any, **options: Any) -> Any:
        standalone = options.pop("standalone_mode", True)
        try:
            options["standalone_mode"] = False
            result = super().main(*args, **options)
        except Exception as error:
            if not standalone or not hasattr(error, "format_message"):
                raise
            message = error.format_message()
            typer.echo(message if message.startswith("Usage:") else f"dtr-deploy: {message} (see --help)", err=True)
            sys.exit(1)
        if not standalone:
            return result
        sys.exit(result if isinstance(result, int) else 0)


app = typer.Typer(
    name="dtr-deploy",
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Distil linear-attention twins of a model's attention layers, replace the ones that pay, and serve the hybrid "
    "with vLLM and ONNX Runtime.",
    epilog=EXIT_CODES,
)

RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="The recipe, a YAML file.", show_default=False)]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Where run folders are made.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, as `build` made it: runs/NAME.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def main() -> None:
    """Entry point of the console script."""
    # Libraries' own bars and notices would break ours; a person who set these wants them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING)
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dtr-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of all commands."""


# --- building


@app.command(short_help="Write a commented recipe to begin from.")
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
    with _one_line_errors(debug):
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


@app.command(epilog=EXIT_CODES, short_help="Build a recipe, from distillation to the report.")
def build(recipe: RecipeFile, runs: RunsFolder = Path("runs"), debug: Debug = False) -> None:
    """Build a recipe: distil, search, export, prove parity, measure, report. Goes on where an earlier build stopped."""
    _build(recipe, runs, "report", debug)


@app.command(epilog=EXIT_CODES, short_help="Only stage 1: train the twins.")
def distill(recipe: RecipeFile, runs: RunsFolder = Path("runs"), debug: Debug = False) -> None:
    """Only stage 1: train the twins of the attention layers."""
    _build(recipe, runs, "distill", debug)


@app.command(epilog=EXIT_CODES)
def search(recipe: RecipeFile, runs: RunsFolder = Path("runs"), debug: Debug = False) -> None:
    """Up to stage 2: choose which layers to replace."""
    _build(recipe, runs, "search", debug)


@app.command(epilog=EXIT_CODES, short_help="Up to the exported models, without gate and table.")
def export(recipe: RecipeFile, runs: RunsFolder = Path("runs"), debug: Debug = False) -> None:
    """Up to the exported models, without the parity gate and the throughput table."""
    _build(recipe, runs, "export", debug)


def _build(recipe_file: Path, runs: Path, until: str, debug: bool) -> None:
    again = f"dtr-deploy {'build' if until == 'report' else until} --recipe {recipe_file} --runs {runs}"
    with _one_line_errors(debug, again):
        from dtr_deploy.pipeline import build as build_pipeline
        from dtr_deploy.progress import StopRequest, for_terminal
        from dtr_deploy.recipe import load_recipe
        from dtr_deploy.report.tables import show as show_report
        from dtr_deploy.run_dir import RunDir

        recipe = load_recipe(recipe_file)
        run = RunDir(runs / recipe.name)
        stop = StopRequest()
        progress = for_terminal(stop)
        with stop.listening(progress):
            report = build_pipeline(recipe, run, progress, until)
        if report is not None:
            show_report(report, _console())
        typer.echo(f"{until} finished: {run.path}" if until != "report" else f"built: {run.path}")


@app.command(short_help="A checkpoint with its projections in 8 bits, for vLLM.")
def quantize(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder: a run's hybrid, or a backbone.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    precision: Annotated[str, typer.Option(help="int8 or fp8 (e4m3).")] = "int8",
    debug: Debug = False,
) -> None:
    """Write a checkpoint with the projections of attention and MLP in 8 bits: compressed-tensors, round to nearest,
    activations quantized while serving. `vllm serve` runs it as it is. Forms, norms and head are left alone."""
    with _one_line_errors(debug):
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


@app.command(short_help="What a build will cost, without running it.")
def plan(recipe: RecipeFile, runs: RunsFolder = Path("runs"), debug: Debug = False) -> None:
    """What a build will cost, without running it: tokens, evaluations, measurements, time, disk."""
    with _one_line_errors(debug):
        from dtr_deploy.plan import check_engines, gigabytes, make_plan, matrix_flops, model_config
        from dtr_deploy.progress import seconds_text
        from dtr_deploy.recipe import load_recipe
        from dtr_deploy.report.tables import new_table

        loaded = load_recipe(recipe)
        config = model_config(loaded)
        loaded.check_layers(config.num_hidden_layers)
        made = make_plan(loaded, config, matrix_flops())
        table = new_table(f"Plan of {loaded.name}", "stage", "work", "about", numbers_from=2)
        for stage in made.stages:
            table.add_row(stage.stage, stage.work, seconds_text(stage.seconds))
        table.add_row("all", "", seconds_text(made.seconds), style="bold")
        console = _console()
        console.print(table)
        place = next(folder for folder in (runs, *runs.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        console.print(f"Disk: about {gigabytes(made.disk_bytes)} in {runs / loaded.name}; {gigabytes(free)} are free.")
        console.print("Times are rough: counts of the recipe over the speed of a matrix product on this machine.")
        check_engines(loaded)


# --- looking at a run


@app.command(epilog=EXIT_CODES, short_help="Check a run's files and prove parity again.")
def verify(run: RunFolder, debug: Debug = False) -> None:
    """Check a run: sha256 of every artefact, then the whole parity ladder on the build's own prompts."""
    with _one_line_errors(debug, f"dtr-deploy verify {run}"):
        from dtr_deploy.parity.prove import prove, read_prompts
        from dtr_deploy.plan import check_engines
        from dtr_deploy.progress import StopRequest, for_terminal
        from dtr_deploy.run_dir import RunDir

        opened, recipe = _open_run(run)
        check_engines(recipe)
        stop = StopRequest()
        progress = for_terminal(stop)
        with stop.listening(progress), RunDir(run, create=False).lock():
            files = sum(opened.check_artefacts(stage) for stage in opened.stages)
            progress.line(f"{files} artefacts are what the build wrote")
            rows = prove(recipe, opened.path, read_prompts(opened.path), progress)
        typer.echo(f"verified: {len(rows)} of {len(rows)} programs agree")


@app.command(epilog=EXIT_CODES, short_help="Measure a run's throughput again.")
def bench(run: RunFolder, debug: Debug = False) -> None:
    """Measure a run's throughput again, base and hybrid, and write bench.json."""
    with _one_line_errors(debug, f"dtr-deploy bench {run}"):
        from dtr_deploy.benchmark import benchmark
        from dtr_deploy.parity.rungs import benchmarked
        from dtr_deploy.plan import check_engines
        from dtr_deploy.progress import StopRequest, for_terminal
        from dtr_deploy.report.tables import throughput_rows_table
        from dtr_deploy.run_dir import write_atomically
        from dtr_deploy.serving import base_of

        opened, recipe = _open_run(run)
        check_engines(recipe)
        context = json.loads((base_of(opened.path).checkpoint / "config.json").read_text())["max_position_embeddings"]
        stop = StopRequest()
        progress = for_terminal(stop)
        with stop.listening(progress), opened.lock():
            rows = [
                row
                for engine, precision in benchmarked(recipe)
                for row in benchmark(recipe, opened.path, engine, precision, context, progress)
            ]
        data = json.dumps([row.model_dump(mode="json") for row in rows], indent=1)
        write_atomically(opened.path / "bench.json", data.encode())
        _console().print(throughput_rows_table(rows))


@app.command(short_help="A run's report as tables.")
def show(run: RunFolder, debug: Debug = False) -> None:
    """A run's report: layout, scores, throughput, parity, time."""
    with _one_line_errors(debug):
        from dtr_deploy.report.tables import show as show_report

        show_report(_read_report(run), _console())


@app.command(short_help="A run's report as one HTML file.")
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="The file to write; report.html in the run's folder.")] = None,
    debug: Debug = False,
) -> None:
    """A run's report as one HTML file that opens offline. `build` writes it too; this writes it again."""
    with _one_line_errors(debug):
        from dtr_deploy.report.page import PAGE, page
        from dtr_deploy.run_dir import write_atomically

        target = out or run / PAGE
        text = page(_read_report(run))
        if not target.parent.is_dir():
            raise UsageError(f"--out {target}: there is no folder {target.parent}")
        write_atomically(target, text.encode())
        typer.echo(f"report: {target}")


@app.command(short_help="Runs side by side.")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, two or more.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Runs side by side: layout, scores, speedups, memory, parity, time."""
    with _one_line_errors(debug):
        from dtr_deploy.report.compare import comparison

        if len(runs) < 2:
            raise UsageError("name two runs or more; `dtr-deploy show` shows one")
        names = [run.resolve().name for run in runs]
        distinct = len(set(names)) == len(names)
        found = {name if distinct else str(run): _read_report(run) for name, run in zip(names, runs, strict=True)}
        if len(found) < len(runs):
            raise UsageError(f"{_first_twice(runs)}: named twice")
        _console().print(comparison(found))


@app.command(short_help="What this machine has: devices and engines.")
def doctor(debug: Debug = False) -> None:
    """What this machine has: processor, memory, GPUs, engines, versions."""
    with _one_line_errors(debug):
        from dtr_deploy.doctor import compiled_kernels, examine
        from dtr_deploy.plan import gigabytes
        from dtr_deploy.report.tables import new_table

        hardware, engines, versions = examine()
        console = _console()
        console.print(f"Processor: {hardware.processor}, {hardware.cores} cores for this process")
        console.print(
            f"Instruction sets: {', '.join(hardware.instruction_sets) or 'none that engines choose kernels by'}"
        )
        memory = f"{gigabytes(hardware.memory_bytes)}, {gigabytes(hardware.available_memory_bytes)} available"
        console.print(f"Memory: {memory if hardware.memory_bytes else 'unknown'}")
        console.print(f"GPUs: {'; '.join(hardware.gpus) or 'none'}")
        built, where = compiled_kernels()
        slow = "" if built else "; linear attention runs in torch, several times slower"
        console.print(f"Compiled CPU kernels: {where}{slow}")
        table = new_table("Engines", "engine", "usable", "version, or why not", numbers_from=3)
        for name, (usable, reason) in engines.items():
            table.add_row(name, "yes" if usable else "no", reason)
        console.print(table)
        console.print("Versions: " + ", ".join(f"{name} {version}" for name, version in versions.items()))


@app.command(short_help="The JSON Schema of recipes, for editors.")
def schema(debug: Debug = False) -> None:
    """The JSON Schema of recipes, for editors that complete and check while one writes."""
    with _one_line_errors(debug):
        from dtr_deploy.recipe_schema import json_schema

        typer.echo(json.dumps(json_schema(), indent=1))


# --- what commands share


def _open_run(run: Path) -> tuple[Any, Recipe]:
    """A run's folder and the recipe it was built from."""
    from dtr_deploy.recipe import recipe_from_copy
    from dtr_deploy.run_dir import RunDir

    opened = RunDir(run, create=False)
    return opened, recipe_from_copy(opened.path)


def _read_report(run: Path) -> Report:
    from dtr_deploy.report.schema import REPORT, read_report

    if not run.is_dir():
        raise UsageError(f"{run}: no such run; accepted: a folder that `dtr-deploy build` made")
    return read_report(run / REPORT)


def _first_twice(runs: Sequence[Path]) -> Path:
    return next(run for index, run in enumerate(runs) if run in runs[:index])


def _console() -> Console:
    """stdout. Piped output is wide and plain, so that tables are not folded."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


@contextmanager
def _one_line_errors(debug: bool, again: str = "") -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit code. again: the command that goes on after Ctrl-C."""
    try:
        yield
    except DtrError as error:
        _show_frontier(error)
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail(f"stopped; nothing finished is lost{f', to go on: {again}' if again else ''}", INTERRUPTED, debug)
    except Exception as error:
        from dtr_deploy.run_lock import is_disk_full

        if is_disk_full(error):
            _fail(_disk_full_text(error), 1, debug)
        reason = (str(error).strip().splitlines() or [""])[0]
        hint = "" if debug else " (--debug shows where)"
        _fail(f"unexpected {type(error).__name__}: {reason}{hint}", 1, debug)


def _fail(message: str, code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    typer.echo(f"dtr-deploy: {message}", err=True)
    raise typer.Exit(code)


def _disk_full_text(error: BaseException) -> str:
    file = getattr(error, "filename", None)
    where = f" while writing {file}" if file else ""
    return f"disk full{where}; free some space and run the same command again, what is finished is kept"


def _show_frontier(error: DtrError) -> None:
    """What is within reach, when the target is not."""
    frontier = getattr(error, "frontier", None)
    if frontier:
        from dtr_deploy.report.tables import frontier_table

        _console().print(frontier_table([visit.to_dict() for visit in frontier]))
