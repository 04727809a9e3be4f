"""What a strategy works with: candidates to propose, a way to have a layout judged, and a record of every step.

A strategy decides *what to try next*; everything else (scoring, memory, throughput, bounds, limits) is behind
`Problem`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dtr_deploy.hybrid.layout import Layout, full, swap
from dtr_deploy.search.ledger import Ledger, Status
from dtr_deploy.search.objective import LayoutScore, Loss, Objective, Screening, Visit
from dtr_deploy.tasks.base import Split

Progress = Callable[[int, int, str], None]
"""Called with (done, total, message); `total` is an estimate that may grow."""


class Candidate(NamedTuple):
    """Give layer `layer` the form `form`."""

    layer: int
    form: str

    def __str__(self) -> str:
        return f"layer {self.layer} {self.form}"


def apply(layout: Layout, changes: Iterable[Candidate]) -> Layout:
    """`layout` with several layers replaced."""
    for change in changes:
        layout = swap(layout, change.layer, change.form)
    return layout


class LayoutScorer(Protocol):
    """Scores layouts and remembers. `spent_*`: of all trials this object returned, remembered ones included."""

    @property
    def layers(self) -> int: ...

    @property
    def candidates(self) -> Sequence[Candidate]: ...

    @property
    def spent_seconds(self) -> float: ...

    @property
    def spent_trials(self) -> int: ...

    @property
    def spent_layer_forwards(self) -> int: ...

    def score(self, layout: Layout, split: Split = "search") -> LayoutScore: ...

    def screen(self, layout: Layout) -> Screening: ...

    def decide(self, layout: Layout, status: Status, split: Split = "search") -> None:
        """Note in the ledger what became of a scored layout."""
        ...


class Cost(Protocol):
    """Throughput of layouts over the backbone's: predicted for looking ahead, or good enough to decide on."""

    def predicted_speedup(self, layout: Layout) -> float: ...

    def speedup(self, layout: Layout) -> float: ...


class OutOfBudget(Exception):
    """The search has used up its trials or minutes. Not an error: the search ends with what it has."""


@dataclass(frozen=True)
class Limits:
    """When to stop looking, whatever is left to try. Trials and minutes count what resumed searches already spent."""

    max_trials: int | None = None
    minutes: float | None = None


class Problem:
    """One search: candidates, judged layouts (`visits`, in order), the committed path, and the steps taken.

    `path` starts with the backbone and grows by `commit`. Raises `OutOfBudget` from `visit` and `screen` when a limit
    is reached; `strategies.run` catches it.
    """

    def __init__(
        self,
        scorer: LayoutScorer,
        cost: Cost,
        objective: Objective,
        ledger: Ledger,
        name: str,
        limits: Limits | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.scorer, self.cost, self.objective = scorer, cost, objective
        self.ledger, self.name, self.limits, self.progress = ledger, name, limits or Limits(), progress
        self.steps: list[dict[str, Any]] = []
        self.visits: dict[Layout, Visit] = {}
        self.expected = 0
        self._done = 0
        self.base_score = scorer.score(full(scorer.layers))
        score = self.base_score
        base = Visit(score.layout, score.combined, score.margin, Loss.none(score), speedup=1.0, passes=True)
        self.visits[base.layout] = base
        self.path: list[Visit] = [base]
        self.record("base", score=base.score)

    @property
    def committed(self) -> Visit:
        """The end of the path."""
        return self.path[-1]

    @property
    def room(self) -> int:
        """How many more layers may be replaced. One layer always keeps full attention: engines count tokens by it."""
        most = self.scorer.layers - 1
        if self.objective.max_replaced is not None:
            most = min(most, self.objective.max_replaced)
        return most - self.committed.replaced

    def visit(self, layout: Layout, message: str = "") -> Visit:
        """Score a layout on the search split, item by item against the backbone, and judge it."""
        if layout not in self.visits:
            self._check_limits()
            self.report(message or "scoring")
            score = self.scorer.score(layout)
            loss = Loss.between(self.base_score, score)
            self.visits[layout] = Visit(
                layout, score.combined, score.margin, loss, self.cost.speedup(layout), self.objective.passes(loss)
            )
        return self.visits[layout]

    def screen(self, layout: Layout, message: str = "") -> Screening:
        """Cheap scores of a layout, for ranking."""
        self._check_limits()
        self.report(message or "screening")
        return self.scorer.screen(layout)

    def commit(self, visit: Visit, changes: Sequence[Candidate]) -> None:
        """Go on from this layout."""
        self.path.append(visit)
        self.scorer.decide(visit.layout, "committed")
        self.record("commit", visit, changes)

    def reject(self, visit: Visit, changes: Sequence[Candidate]) -> None:
        """Note that this layout was tried and is not gone on from."""
        self.scorer.decide(visit.layout, "rejected")
        self.record("reject", visit, changes)

    def record(self, action: str, visit: Visit | None = None, changes: Sequence[Candidate] = (), **more: Any) -> None:
        """Append a step to the record, in memory and in the ledger."""
        step: dict[str, Any] = {"action": action}
        if changes:
            step["changes"] = [list(change) for change in changes]
        if visit is not None:
            step |= {key: value for key, value in visit.to_dict().items() if key != "layout"}
        step |= more
        self.ledger.record_step(self.name, len(self.steps), step)
        self.steps.append(step)

    def _check_limits(self) -> None:
        most, minutes = self.limits.max_trials, self.limits.minutes
        if most is not None and self.scorer.spent_trials >= most:
            raise OutOfBudget(f"{most} trials are used up")
        if minutes is not None and self.scorer.spent_seconds >= 60 * minutes:
            raise OutOfBudget(f"{minutes:g} minutes are used up")

    def report(self, message: str) -> None:
        """Tell what is being done now, and that everything before it is finished."""
        if self.progress is not None:
            self.progress(self._done, max(self.expected, self._done + 1), message)
        self._done += 1
