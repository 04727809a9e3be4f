"""What a strategy works with: candidates to propose, a way to have a layout judged, and a record of every step.

A strategy decides *what to try next*; everything else (scoring, memory, throughput, bounds, limits) is behind
`Problem`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dtr_deploy.hybrid.layout import Layout, full, swap
from dtr_deploy.search.ledger import Ledger, Status
from dtr_deploy.search.objective import Estimate, LayoutScore, Loss, Objective, Screening, Visit
from dtr_deploy.tasks.base import Split
from dtr_deploy.throughput.performance import Performance

Progress = Callable[[int, int, str], None]
"""Called with (done, total, message); `total` is an estimate that may grow."""

BatchProgress = Callable[[int, int], None]
"""Called with (batches done, batches) inside one unit of work."""

TOGETHER = 8
"""Layouts handed to the scorer at once: enough to share prefixes, few enough to see progress and to stop."""


class Candidate(NamedTuple):
    """Give layer `layer` the form `form` (a form's name, or `form@window`)."""

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
    """Scores layouts and remembers. `spent_*`: of all trials this object returned, remembered ones included.

    parts: how many equal, stratified parts the items of a split are dealt into (1: they cannot be dealt). A score of
    the first k parts costs k/parts of a whole one, and what was computed for a part is not computed again for more.
    """

    @property
    def layers(self) -> int: ...

    @property
    def candidates(self) -> Sequence[Candidate]: ...

    @property
    def parts(self) -> int: ...

    @property
    def spent_seconds(self) -> float: ...

    @property
    def spent_trials(self) -> int: ...

    @property
    def spent_layer_forwards(self) -> int: ...

    def score(self, layout: Layout, split: Split = "search", parts: int | None = None) -> LayoutScore:
        """Scores of all tasks on the items of the first `parts` parts; None: on all items."""
        ...

    def score_many(
        self, layouts: Sequence[Layout], split: Split = "search", parts: int | None = None
    ) -> list[LayoutScore]:
        """`score` of each, in order; layouts that share their first layers run these once."""
        ...

    def screen(self, layout: Layout) -> Screening: ...

    def screen_many(self, layouts: Sequence[Layout]) -> list[Screening]: ...

    @property
    def attributable(self) -> bool:
        """Whether `attribute_many` can do the tasks at hand, and is cheaper than trying."""
        ...

    def attribute_many(
        self, start: Layout, layouts: Sequence[Layout], priced: bool, progress: BatchProgress | None = None
    ) -> list[Estimate]:
        """Estimates of layouts that differ from `start` in one layer, or not at all; priced: of their scores too."""
        ...

    def decide(self, layout: Layout, status: Status, split: Split = "search") -> None:
        """Note in the ledger what became of a scored layout."""
        ...


class Cost(Protocol):
    """Performance of layouts on the target's engine and workload. It need not be a sum over layers."""

    def predicted(self, layout: Layout) -> Performance:
        """By a model, trusted or not: for looking ahead over many layouts."""
        ...

    def performance(self, layout: Layout) -> Performance:
        """What decisions rest on: the model where it is trusted, else a measurement."""
        ...


class OutOfBudget(Exception):
    """The search has used up its trials or minutes. Not an error: the search ends with what it has."""


@dataclass(frozen=True)
class Limits:
    """When to stop looking, whatever is left to try. Trials and minutes count what resumed searches already spent."""

    max_trials: int | None = None
    minutes: float | None = None


class Problem:
    """One search: candidates, judged layouts (`visits`, in order), the committed path, and the steps taken.

    `path` starts with the backbone and grows by `commit`. Raises `OutOfBudget` from everything that scores or screens
    when a limit is reached; `strategies.run` catches it.
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
        confidence: float = 0.95,
    ) -> None:
        self.scorer, self.cost, self.objective, self.confidence = scorer, cost, objective, confidence
        self.ledger, self.name, self.limits, self.progress = ledger, name, limits or Limits(), progress
        self.steps: list[dict[str, Any]] = []
        self.visits: dict[Layout, Visit] = {}
        self.expected = 0
        self._done = 0
        self.base_score = scorer.score(full(scorer.layers))
        score, none = self.base_score, Loss.none(self.base_score, confidence)
        base = Visit(score.layout, score.combined, score.margin, none, cost.performance(score.layout), passes=True)
        self.visits[base.layout] = base
        self.path: list[Visit] = [base]
        self.record("base", score=base.score)

    @property
    def committed(self) -> Visit:
        """The end of the path."""
        return self.path[-1]

    @property
    def most(self) -> int:
        """How many layers may be replaced. One always keeps full attention: engines count a sequence's tokens by it."""
        most = self.scorer.layers - 1
        return most if self.objective.max_replaced is None else min(most, self.objective.max_replaced)

    @property
    def room(self) -> int:
        """How many more layers may be replaced."""
        return self.most - self.committed.replaced

    def visit(self, layout: Layout, message: str = "") -> Visit:
        """Score a layout on the whole search split, item by item against the backbone, and judge it."""
        return self.visit_many([layout], message)[0]

    def visit_many(self, layouts: Sequence[Layout], message: str = "") -> list[Visit]:
        """`visit` of each, in order; the scorer may run them together."""
        missing = [layout for layout in dict.fromkeys(layouts) if layout not in self.visits]
        for group in self._batches(missing, message or "scoring"):
            for score in self.scorer.score_many(group):
                self.visits[score.layout] = self._judge(score)
        return [self.visits[layout] for layout in layouts]

    def look_many(self, layouts: Sequence[Layout], parts: int | None, message: str = "") -> list[LayoutScore]:
        """Scores on the first `parts` parts of the search split (None: on all of it); nothing is judged."""
        scores: list[LayoutScore] = []
        for group in self._batches(layouts, message or "scoring a part"):
            scores += self.scorer.score_many(group, parts=parts)
        return scores

    def screen_many(self, layouts: Sequence[Layout], message: str = "") -> list[Screening]:
        """Cheap scores of layouts, in order, for ranking."""
        screenings: list[Screening] = []
        for group in self._batches(layouts, message or "screening"):
            screenings += self.scorer.screen_many(group)
        return screenings

    def attribute_many(
        self, start: Layout, layouts: Sequence[Layout], priced: bool, message: str = ""
    ) -> list[Estimate]:
        """What one pass back through `start` says of layouts that differ from it in one layer: for ranking."""
        self._trials_left()
        message = message or "estimating swaps"
        self.report(message, 0)

        def tell(done: int, batches: int) -> None:
            self._done += 1  # a batch there and back takes about as long as scoring a part
            self.report(f"{message}, batch {done} of {batches}", 0)

        return self.scorer.attribute_many(start, layouts, priced, tell)

    def commit(self, visit: Visit, changes: Sequence[Candidate], **more: Any) -> None:
        """Go on from this layout."""
        self.path.append(visit)
        self.scorer.decide(visit.layout, "committed")
        self.record("commit", visit, changes, **more)

    def reject(self, visit: Visit, changes: Sequence[Candidate], **more: Any) -> None:
        """Note that this layout was tried and is not gone on from."""
        self.scorer.decide(visit.layout, "rejected")
        self.record("reject", visit, changes, **more)

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

    @property
    def done(self) -> int:
        """Units of work finished, as `report` counts them."""
        return self._done

    def foresee(self, more: float) -> None:
        """Estimate that about so many more units of work are left: for the progress bar."""
        self.expected = self._done + round(more)

    def report(self, message: str, count: int = 1) -> None:
        """Tell what is being done now (`count` units of work), and that everything before it is finished."""
        if self.progress is not None:
            self.progress(self._done, max(self.expected, self._done + count), message)
        self._done += count

    def _judge(self, score: LayoutScore) -> Visit:
        loss = Loss.between(self.base_score, score, self.confidence)
        performance, passes = self.cost.performance(score.layout), self.objective.passes(loss)
        return Visit(score.layout, score.combined, score.margin, loss, performance, passes)

    def _batches(self, layouts: Sequence[Layout], message: str) -> Iterator[Sequence[Layout]]:
        """Layouts in groups, each after a look at the limits and a report."""
        start = 0
        while start < len(layouts):
            group = layouts[start : start + min(TOGETHER, self._trials_left())]
            self.report(message, len(group))
            yield group
            start += len(group)

    def _trials_left(self) -> int:
        """At least 1. Raises `OutOfBudget` if there is none."""
        most, minutes = self.limits.max_trials, self.limits.minutes
        if minutes is not None and self.scorer.spent_seconds >= 60 * minutes:
            raise OutOfBudget(f"{minutes:g} minutes are used up")
        if most is None:
            return TOGETHER
        if self.scorer.spent_trials >= most:
            raise OutOfBudget(f"{most} trials are used up")
        return most - self.scorer.spent_trials
