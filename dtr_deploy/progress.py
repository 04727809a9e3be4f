"""What a long-running stage tells a person: bars with time left on a terminal, plain lines everywhere else.

A stage is handed a `Progress` and uses three things of it:

    with progress.bar("distil", total=steps) as bar:
        for step in range(steps):
            ...
            bar.advance(1, note=f"error {error:.3f}")       # also the point where Ctrl-C takes effect
    progress.line("layer 0 dropped: its swap costs 15 points of perplexity")   # stays on the screen

`QuietProgress` prints nothing (tests, use as a library); `PlainProgress` prints a line now and then (logs);
`RichProgress` draws. `for_terminal()` chooses.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import IO, Any, Protocol

PLAIN_SECONDS = 15.0
"""Without a terminal, a bar prints at most one line in this many seconds."""


class Bar(Protocol):
    def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
        """Count `amount` units as done. total: the new total, where it was an estimate. Raises KeyboardInterrupt here
        if the person asked to stop."""
        ...


class Progress(Protocol):
    def bar(self, what: str, total: float | None = None) -> AbstractContextManager[Bar]: ...

    def line(self, text: str) -> None:
        """Print one line that stays."""
        ...


class StopRequest:
    """Ctrl-C in two steps: the first asks for a stop at the next safe point, the second stops at once.

    Every artefact is written atomically and every stage resumes, so both lose nothing finished; the first also lets the
    unit of work that is under way be kept.
    """

    def __init__(self) -> None:
        self.requested = False

    def raise_if_requested(self) -> None:
        if self.requested:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self, progress: Progress) -> Iterator[None]:
        """Handle SIGINT this way inside the block. Call from the main thread."""

        def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            progress.line("stopping at the next safe point; Ctrl-C again stops at once")

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class QuietProgress:
    """Prints nothing, still honours a stop request."""

    def __init__(self, stop: StopRequest | None = None) -> None:
        self.stop = stop or StopRequest()

    @contextmanager
    def bar(self, what: str, total: float | None = None) -> Iterator[Bar]:
        yield _QuietBar(self.stop)

    def line(self, text: str) -> None:
        return None


class _QuietBar:
    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
        self.stop.raise_if_requested()


class PlainProgress:
    """At most one line a bar in `PLAIN_SECONDS`, each flushed; short work prints nothing."""

    def __init__(self, stop: StopRequest | None = None, out: IO[str] | None = None) -> None:
        self.stop = stop or StopRequest()
        self.out = out or sys.stdout

    @contextmanager
    def bar(self, what: str, total: float | None = None) -> Iterator[Bar]:
        yield _PlainBar(self, what, total)

    def line(self, text: str) -> None:
        print(text, file=self.out, flush=True)


class _PlainBar:
    def __init__(self, progress: PlainProgress, what: str, total: float | None) -> None:
        self.progress, self.what, self.total = progress, what, total
        self.began = self.printed = time.monotonic()
        self.done = 0.0

    def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
        self.done += amount
        self.total = total or self.total
        now = time.monotonic()
        if now - self.printed >= PLAIN_SECONDS:
            self.printed = now
            self.progress.line(self._text(now - self.began, note))
        self.progress.stop.raise_if_requested()

    def _text(self, elapsed: float, note: str) -> str:
        parts = [f"{self.what}: {self.done:,.0f}"]
        if self.total:
            parts[0] += f" of {self.total:,.0f}"
            if self.done:
                parts.append(f"about {seconds_text(elapsed / self.done * (self.total - self.done))} left")
        return ", ".join([*parts, *([note] if note else [])])


class RichProgress:
    """Bars with time left, drawn by rich on `console`; the same console must print everything else meanwhile."""

    def __init__(self, console: object | None = None, stop: StopRequest | None = None) -> None:
        from rich.console import Console

        self.stop = stop or StopRequest()
        self.console: Console = console if isinstance(console, Console) else Console()
        self._open: list[object] = []

    @contextmanager
    def bar(self, what: str, total: float | None = None) -> Iterator[Bar]:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import (
            Progress as Display,
        )

        if self._open:  # a bar inside a bar is one more row of the same display
            display = self._open[-1]
            assert isinstance(display, Display)
            yield from self._row(display, what, total, remove=True)
            return
        display = Display(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
        )
        self._open.append(display)
        try:
            with display:
                yield from self._row(display, what, total, remove=False)
        finally:
            self._open.pop()

    def _row(self, display: object, what: str, total: float | None, remove: bool) -> Iterator[Bar]:
        from rich.progress import Progress as Display

        assert isinstance(display, Display)
        row = display.add_task(what, total=total, note="")
        yield _RichBar(self.stop, display, row)
        if remove:
            display.remove_task(row)

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)


class _RichBar:
    def __init__(self, stop: StopRequest, display: object, row: object) -> None:
        self.stop, self.display, self.row = stop, display, row

    def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
        changes = {"note": note} if note else {}
        self.display.update(self.row, advance=amount, total=total, **changes)  # type: ignore[attr-defined]
        self.stop.raise_if_requested()


def for_terminal(stop: StopRequest | None = None, out: IO[str] | None = None) -> PlainProgress | RichProgress:
    """Bars when `out` (stdout if None) is a terminal, plain lines otherwise."""
    out = out or sys.stdout
    if not out.isatty():
        return PlainProgress(stop, out)
    from rich.console import Console

    return RichProgress(Console(file=out), stop)


def seconds_text(seconds: float) -> str:
    """`9.4 s`, `3 min 05 s`, `2 h 10 min`: a duration for a person."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


class CountingBar:
    """A bar for code that reports `(done, total, message)` instead of advancing: `with CountingBar(...) as report:`.

    Opens when the first report comes, and again whenever counting starts over. A total that changes meanwhile was an
    estimate.
    """

    def __init__(self, progress: Progress, what: str) -> None:
        self.progress, self.what = progress, what
        self.stack = ExitStack()
        self.bar: Bar | None = None
        self.done, self.total = 0, 0

    def __enter__(self) -> CountingBar:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.stack.__exit__(*exc)

    def __call__(self, done: int, total: int, message: str = "") -> None:
        if self.bar is None or done < self.done or (done == 0 and total != self.total):
            self.stack.close()
            self.bar = self.stack.enter_context(self.progress.bar(self.what, total=total))
            self.done, self.total = 0, total
        self.bar.advance(done - self.done, note=message, total=total)
        self.done, self.total = done, total
