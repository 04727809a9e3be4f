"""What the benchmarks' command lines share: options with several values, and one line an error."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand

from dtr_deploy.errors import DtrError


class Command(TyperCommand):
    """`--lengths 1 64 512` means `--lengths 1 --lengths 64 --lengths 512`; mistakes on the command line are one line
    and exit code 1."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        several = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        return super().parse_args(ctx, spread(args, several))

    def main(self, *args: Any, **options: Any) -> Any:
        options["standalone_mode"] = False
        try:
            result = super().main(*args, **options)
        except Exception as error:
            if not hasattr(error, "format_message"):
                raise
            typer.echo(f"{self.name}: {error.format_message()} (see --help)", err=True)
            sys.exit(1)
        sys.exit(result if isinstance(result, int) else 0)


def application() -> typer.Typer:
    """The typer application of one benchmark, for its one command."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def spread(args: Sequence[str], several: set[str]) -> list[str]:
    """Repeat an option of `several` before each further value that follows it."""
    found: list[str] = []
    option, values = "", 0
    for argument in args:
        if argument.startswith("-") and not argument.lstrip("-").isdigit():
            option, values = (argument if argument in several else ""), 0
            found.append(argument)
            continue
        if option and values:
            found.append(option)
        values += 1
        found.append(argument)
    return found


def use_threads(threads: int) -> int:
    """Give torch, and libraries that read OMP_NUM_THREADS when they load, this many threads (0: all cores of this
    process). Called before torch is imported. Returns the number."""
    if threads < 1:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Notices and bars of libraries would break the table; a person who sets these wants them.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    torch.set_num_threads(threads)
    return threads


@contextmanager
def one_line_errors(name: str, debug: bool) -> Iterator[None]:
    """Turn exceptions into one line on stderr and exit code 1, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"{name}: stopped", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        expected = isinstance(error, DtrError)
        typer.echo(f"{name}: {'' if expected else f'unexpected {type(error).__name__}: '}{reason}", err=True)
        raise typer.Exit(1) from error
