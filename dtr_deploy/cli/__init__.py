"""The command line. Commands import what they need when they run, so that `--help` is quick.

Every error is one line on stderr (`--debug` adds the traceback); exit codes are in `EXIT_CODES` and in `--help`. What a
script reads is on stdout: with `--json` nothing else is.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dtr_deploy import __version__
from dtr_deploy.cli import building, machine, runs
from dtr_deploy.cli.terminal import EXIT_CODES, use_terminal_logging


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
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Distil linear-attention twins of a model's attention layers, replace the ones that pay, and serve the hybrid "
    "with vLLM and ONNX Runtime.",
    epilog=EXIT_CODES,
)


def main() -> None:
    """Entry point of the console script."""
    # Libraries' own bars and notices would break ours; a person who set these wants them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    use_terminal_logging()
    app(prog_name="dtr-deploy")


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


app.command(short_help="Write a commented recipe to begin from.")(building.init)
app.command(short_help="What a build will cost, without running it.")(building.plan)
app.command("build", epilog=EXIT_CODES, short_help="Build a recipe, from distillation to the report.")(building.build)
app.command("distill", epilog=EXIT_CODES, short_help="Only stage 1: train the twins.")(building.distill)
app.command("search", epilog=EXIT_CODES, short_help="Up to stage 2: choose which layers to replace.")(building.search)
app.command("export", epilog=EXIT_CODES, short_help="Up to the exported models, without the gate.")(building.export)
app.command(short_help="A checkpoint with its projections in 8 bits, for vLLM.")(building.quantize)
app.command(epilog=EXIT_CODES, short_help="Check a run's files and prove parity again.")(runs.verify)
app.command(epilog=EXIT_CODES, short_help="Measure a run's throughput again.")(runs.bench)
app.command(short_help="A run's report as tables.")(runs.show)
app.command(short_help="A run's report as one HTML file.")(runs.report)
app.command(short_help="Runs side by side.")(runs.compare)
app.command(short_help="Publish a run on the Hugging Face hub.")(runs.push)
app.command(short_help="What this machine has: devices and engines.")(machine.doctor)
app.command(short_help="The JSON Schema of recipes, for editors.")(machine.schema)
