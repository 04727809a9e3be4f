"""The log in a run's folder: what a command was told, did, and how it ended, with the time of each line.

`runs/NAME/dtr-deploy.log` is appended to by every command that works in the run. It holds the lines that a person saw,
where each bar was once a minute, warnings, records of Python's `logging` (of this project from DEBUG on, of others from
INFO on), and the traceback of an error.
"""

from __future__ import annotations

import logging
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dtr_deploy.errors import DtrError
from dtr_deploy.progress import Bar, Progress
from dtr_deploy.run_dir import versions

LOG = "dtr-deploy.log"
BAR_SECONDS = 60.0
"""A bar leaves at most one line in this many seconds."""

logger = logging.getLogger(__name__)


@contextmanager
def run_log(folder: Path, command: str, shown: Progress) -> Iterator[Progress]:
    """Log to `folder` inside the block; hand what is yielded to the work in place of `shown`."""
    root, ours = logging.getLogger(), logging.getLogger("dtr_deploy")
    handler = logging.FileHandler(folder / LOG, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = root.level, ours.level, warnings.showwarning
    root.addHandler(handler)
    root.setLevel(min(logging.INFO, root.level or logging.INFO))
    ours.setLevel(logging.DEBUG)
    warnings.showwarning = _and_log(warnings.showwarning)
    try:
        logger.info("%s", command)
        found = ", ".join(f"{name} {version}" for name, version in versions().items())
        logger.info("%s; %s", platform.platform(), found)
        yield LoggedProgress(shown)
    except DtrError as error:
        logger.error("%s: %s", type(error).__name__, error)
        raise
    except KeyboardInterrupt:
        logger.info("stopped")
        raise
    except BaseException:
        logger.exception("unexpected")
        raise
    else:
        logger.info("finished")
    finally:
        root.removeHandler(handler)
        root.setLevel(before[0])
        ours.setLevel(before[1])
        warnings.showwarning = before[2]
        handler.close()


def _and_log(show: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning, and logs it."""

    def showwarning(message: Any, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        logger.info("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        show(message, category, filename, lineno, *more)

    return showwarning


class LoggedProgress:
    """Shows what `shown` does, and logs it."""

    def __init__(self, shown: Progress) -> None:
        self.shown = shown

    def line(self, text: str) -> None:
        logger.debug("%s", text)
        self.shown.line(text)

    @contextmanager
    def bar(self, what: str, total: float | None = None) -> Iterator[Bar]:
        with self.shown.bar(what, total) as bar:
            logged = _LoggedBar(bar, what, total)
            try:
                yield logged
            finally:
                logged.log("")


class _LoggedBar:
    def __init__(self, bar: Bar, what: str, total: float | None) -> None:
        self.bar, self.what, self.total, self.done = bar, what, total, 0.0
        self.logged_at = time.monotonic()

    def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
        self.done += amount
        self.total = total or self.total
        if time.monotonic() - self.logged_at >= BAR_SECONDS:
            self.log(note)
        self.bar.advance(amount, note, total)

    def log(self, note: str) -> None:
        self.logged_at = time.monotonic()
        of = f" of {self.total:,.0f}" if self.total else ""
        logger.debug("%s: %s%s%s", self.what, f"{self.done:,.0f}", of, f", {note}" if note else "")
