"""What computes scores for `Scorer`: raw results of parts of a split, and what they mean together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.search.objective import Screening
from dtr_deploy.search.problem import BatchProgress, Candidate
from dtr_deploy.tasks.base import Split, TaskScore

SCORE, SCREEN, ATTRIBUTION = "score", "screen", "attribution"
"""Kinds of trials in the ledger."""


@dataclass
class Finished:
    """One layout's raw result. number: of what was asked for. seconds: its share of the time taken, which
    layouts run side by side have in proportion to their layer-forwards."""

    number: int
    arrays: dict[str, np.ndarray]
    scalars: dict[str, Any]
    layer_forwards: int
    seconds: float


class Evaluator(Protocol):
    """Computes raw results and says what they mean. `fingerprint` tells one evaluator's results from another's."""

    @property
    def layers(self) -> int: ...

    @property
    def candidates(self) -> Sequence[Candidate]: ...

    @property
    def weights(self) -> tuple[float, ...]: ...

    def parts(self, split: Split) -> int:
        """Into how many parts a split's items are dealt."""
        ...

    def score(self, wanted: Sequence[tuple[Layout, int]], split: Split) -> Iterator[Finished]:
        """Raw results of layouts, each on one part of a split, as soon as they are there, in any order."""
        ...

    def interpret(
        self, split: Split, raw: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, Any]]]
    ) -> list[TaskScore]:
        """The tasks' scores on the items of the first parts, from arrays and scalars of each."""
        ...

    def screen(self, layouts: Sequence[Layout]) -> Iterator[Finished]:
        """Screenings (as `screening` reads them), each as soon as it is there, in any order."""
        ...

    @property
    def attributable(self) -> bool:
        """Whether `attribute` can do the tasks at hand, and is cheaper than trying."""
        ...

    def attribute(
        self, start: Layout, layouts: Sequence[Layout], priced: bool, progress: BatchProgress | None = None
    ) -> Iterator[Finished]:
        """Estimates of layouts that differ from `start` in one layer, or not at all: screenings and, if `priced`, raw
        results of the first part of the search split."""
        ...

    def screening(self, layout: Layout, scalars: Mapping[str, Any]) -> Screening: ...

    def fingerprint(self, kind: str, split: Split, part: int = 0) -> str:
        """Hash of everything a result depends on but the layout."""
        ...
