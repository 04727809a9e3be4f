"""A build of a tiny model that kills itself with SIGKILL at its n-th unit of work: `killable_build.py RECIPE RUN N`.

The engine's speed is set by hand (each replaced layer saves a tenth), since real timings would differ from run to run.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dtr_deploy import layout_search
from dtr_deploy.engines.base import Throughput, Workload
from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.pipeline import build
from dtr_deploy.progress import QuietProgress
from dtr_deploy.recipe import load_recipe
from dtr_deploy.run_dir import RunDir


class TimedEngine:
    """Takes as long as it is told to."""

    def __init__(self, layout: Layout) -> None:
        self.seconds = 10.0 - replaced(layout)

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        return Throughput("ort", "int4", workload, repeats, self.seconds / 2, self.seconds / 2, self.seconds)


def timed_opener(*_: Any) -> Any:
    @contextmanager
    def opened(layout: Layout) -> Iterator[TimedEngine]:
        yield TimedEngine(layout)

    return opened


class KillingProgress(QuietProgress):
    """Ends the process at the n-th unit of work of all stages together, without any chance to clean up."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.left = units

    @contextmanager
    def bar(self, what: str, total: float | None = None) -> Iterator[Any]:
        yield self

    def advance(self, amount: float = 1, note: str = "", total: float | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    layout_search.layout_opener = timed_opener
    recipe_file, run, units = sys.argv[1:]
    build(load_recipe(recipe_file), RunDir(run), KillingProgress(int(units)), until="lm-eval")
