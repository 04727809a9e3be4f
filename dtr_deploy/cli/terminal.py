"""What commands share: their common options, how they talk, and how errors end them.

A command talks through a `Terminal`: lines and tables for a person, or with `--json` one JSON value for a script on
stdout and everything else on stderr. `-q` leaves out all but errors, warnings and the JSON; `-v` adds what is logged.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from dtr_deploy.errors import DtrError, UsageError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from dtr_deploy.progress import Progress, StopRequest

EXIT_CODES = """Exit codes: 0 done; 1 wrong input (recipe, file, model, engine) or any other error; 2 no layout reaches
the recipe's target; 3 parity failed, an exported model does not compute what was trained, or lm-eval finds another
score; 130 stopped with Ctrl-C."""

INTERRUPTED = 130
WIDE = 140
"""Columns of output that goes to no terminal: tables are not folded."""

RecipeFile = Annotated[Path, typer.Option("--recipe", "-r", help="The recipe, a YAML file.", show_default=False)]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Where run folders are made.")]
RunFolder = Annotated[Path, typer.Argument(help="A run's folder, as `build` made it: runs/NAME.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout, all else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also print what is logged.")]


class _StderrHandler(logging.StreamHandler[TextIO]):
    """To whatever sys.stderr is at the time: a bar on the terminal takes its place while it is drawn."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        return None


_handler = _StderrHandler()


def use_terminal_logging() -> None:
    """Warnings of libraries on stderr; `Terminal` changes how much that is."""
    from dtr_deploy import run_log

    _handler.setLevel(logging.WARNING)
    _handler.addFilter(lambda record: record.name != run_log.__name__)  # says what is on the terminal anyway
    _handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(_handler)


@dataclass(frozen=True)
class Terminal:
    """How one command talks."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        if self.quiet and self.verbose:
            raise UsageError("--quiet and --verbose: one of the two is accepted")
        _handler.setLevel(logging.DEBUG if self.verbose else logging.WARNING)
        if self.verbose:
            logging.getLogger("dtr_deploy").setLevel(logging.DEBUG)

    def progress(self, stop: StopRequest) -> Progress:
        """Bars on a terminal, lines elsewhere, nothing with `-q`."""
        from dtr_deploy.progress import QuietProgress, for_terminal

        if self.quiet:
            return QuietProgress(stop)
        return for_terminal(stop, sys.stderr if self.as_json else sys.stdout)

    def say(self, text: str) -> None:
        """A line for a person."""
        if not self.quiet:
            typer.echo(text, err=self.as_json)

    def show(self, what: RenderableType) -> None:
        """Anything rich can print, for a person."""
        if not self.quiet:
            self.console().print(what)

    def console(self) -> Console:
        """Where a person reads. Piped output is wide and plain."""
        from rich.console import Console

        stream = sys.stderr if self.as_json else sys.stdout
        return Console(file=stream) if stream.isatty() else Console(file=stream, width=WIDE)

    def answer(self, data: object) -> None:
        """What a script asked for; nothing without `--json`."""
        if self.as_json:
            typer.echo(json.dumps(data, indent=1))


GPU_FULL = (
    "GPU memory full; a smaller distill.twins_at_once, heal.checkpointing, or device: spread need less, "
    "and what is finished is kept"
)


@contextmanager
def one_line_errors(debug: bool, again: str = "", as_json: bool = False) -> Iterator[None]:
    """Turn exceptions into one line on stderr and an exit code. again: the command that goes on after Ctrl-C."""
    try:
        yield
    except DtrError as error:
        _show_frontier(error, as_json)
        _fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        _fail(f"stopped; nothing finished is lost{f', to go on: {again}' if again else ''}", INTERRUPTED, debug)
    except Exception as error:
        from dtr_deploy.packages import BUILD_PACKAGES, ENGINE_PACKAGES, missing_text
        from dtr_deploy.run_lock import is_disk_full

        module = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and module in BUILD_PACKAGES + ENGINE_PACKAGES:
            _fail(missing_text((module,)), 1, debug)
        if is_disk_full(error):
            _fail(_disk_full_text(error), 1, debug)
        reason = (str(error).strip().splitlines() or [""])[0]
        if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does not import it
            _fail(f"{GPU_FULL} ({reason})", 1, debug)
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


def _show_frontier(error: DtrError, as_json: bool) -> None:
    """What is within reach, when the target is not."""
    frontier = [visit.to_dict() for visit in getattr(error, "frontier", None) or ()]
    if not frontier:
        return
    from dtr_deploy.report.tables import frontier_table

    terminal = Terminal(as_json)
    terminal.answer({"error": str(error), "frontier": frontier})
    if not as_json:
        terminal.show(frontier_table(frontier))


def open_run(run: Path) -> tuple[Any, Any]:
    """A run's folder (`RunDir`) and the `Recipe` it was built from."""
    from dtr_deploy.recipe import recipe_from_copy
    from dtr_deploy.run_dir import RunDir

    opened = RunDir(run, create=False)
    return opened, recipe_from_copy(opened.path)
