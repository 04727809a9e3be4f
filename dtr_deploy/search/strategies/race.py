"""One race: a small field of changes on top of the same layout, scored part by part on the same items.

After each part, entries are dropped that are worse than the leader, or out of bounds, with confidence; of those that
are tied, the half with the lower price goes on. So a field of four costs about as much as two whole scorings. It is
Hoeffding's race (Maron and Moore, NIPS 1994) with paired intervals, under the budget of sequential halving (Karnin,
Koren and Somekh, ICML 2013).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.search.objective import LayoutScore, Visit
from dtr_deploy.search.problem import Candidate, Problem
from dtr_deploy.search.statistics import Interval, cautious_difference
from dtr_deploy.search.strategies.ranking import price

WORSE, OUT_OF_BOUNDS, TIED = "worse", "out of bounds", "tied"


@dataclass(frozen=True)
class Entry:
    """A layout, and the changes that made it of the one the race starts from. gain: of these, see `ranking.gains`."""

    layout: Layout
    changes: tuple[Candidate, ...]
    gain: float


@dataclass
class Outcome:
    """winner: the entry that is left and within bounds, with its visit. dropped: the others and why. failed: the entry
    that was left but is out of bounds on all items. prices: of all entries, on the first part (nats of margin lost, at
    least what noise is, over gain)."""

    winner: Entry | None = None
    visit: Visit | None = None
    failed: Entry | None = None
    dropped: dict[Entry, str] = field(default_factory=dict)
    prices: dict[Entry, float] = field(default_factory=dict)


def race(
    problem: Problem,
    start: Layout,
    entries: Sequence[Entry],
    message: str = "racing",
    bounded: bool = True,
    no_worse: bool = False,
) -> Outcome:
    """Race `entries` against one another; `start` is what they change, and has been scored on the whole split.

    bounded: entries must keep the objective's bounds on the score. no_worse: entries that are worse than `start` with
    confidence are dropped as well. Every look is in the ledger; nothing is committed or rejected here.
    """
    outcome = Outcome()
    alive = sorted(entries, key=lambda entry: entry.changes, reverse=True)  # deepest first: most is shared
    for parts in range(1, problem.scorer.parts):
        heat = _Field(problem, start, alive, parts, message)
        outcome.prices = outcome.prices or {entry: heat.price(entry) for entry in alive}
        reasons = heat.out_of_bounds() if bounded else {}
        reasons |= heat.worse({entry for entry in alive if entry not in reasons}, no_worse)
        tied = heat.by_price([entry for entry in alive if entry not in reasons])
        reasons |= dict.fromkeys(tied[(len(tied) + 1) // 2 :], TIED)
        outcome.dropped |= reasons
        alive = [entry for entry in alive if entry not in reasons]
        if not alive:
            return outcome
    visits = dict(zip(alive, problem.visit_many([entry.layout for entry in alive], message), strict=True))
    heat = _Field(problem, start, alive, problem.scorer.parts, message)
    inside = {entry for entry in alive if visits[entry].passes or not bounded}
    among = inside or set(alive)
    reasons = heat.worse(among, no_worse=False)
    best = heat.by_price([entry for entry in alive if entry in among and entry not in reasons])[0]
    for entry in alive:
        if entry is not best:
            outcome.dropped[entry] = OUT_OF_BOUNDS if entry not in among else reasons.get(entry, TIED)
    outcome.visit = visits[best]
    if best in inside:
        outcome.winner = best
    else:
        outcome.failed = best
    return outcome


def first_prices(problem: Problem, start: Layout, entries: Sequence[Entry], message: str) -> dict[Entry, float]:
    """What each entry costs on the first part of the items, as in the first part of a race."""
    heat = _Field(problem, start, sorted(entries, key=lambda entry: entry.changes, reverse=True), 1, message)
    return {entry: heat.price(entry) for entry in entries}


class _Field:
    """The scores of a race's entries on the first `parts` parts, and what can be said from them."""

    def __init__(self, problem: Problem, start: Layout, entries: Sequence[Entry], parts: int, message: str) -> None:
        self.problem = problem
        known = None if parts >= problem.scorer.parts else parts
        self.base = problem.scorer.score(problem.base_score.layout, parts=known)
        self.start = problem.scorer.score(start, parts=known)
        message = f"{message}, part {parts} of {problem.scorer.parts}"
        scores = problem.look_many([entry.layout for entry in entries], known, message)
        self.scores: dict[Entry, LayoutScore] = dict(zip(entries, scores, strict=True))

    def out_of_bounds(self) -> dict[Entry, str]:
        """Entries whose loss is beyond a bound with confidence."""
        return {
            entry: OUT_OF_BOUNDS
            for entry, score in self.scores.items()
            if not self.problem.objective.within(*self._least_losses(score))
        }

    def worse(self, among: set[Entry], no_worse: bool) -> dict[Entry, str]:
        """Entries of `among` whose score is below that of the best one (no_worse: or of the start) with confidence."""
        if not among:
            return {}
        rivals = [max((self.scores[entry] for entry in among), key=lambda score: (score.combined, score.margin))]
        if no_worse:
            rivals.append(self.start)
        return {
            entry: WORSE
            for entry in self.scores
            if entry in among and any(self._difference(self.scores[entry], rival).high < 0 for rival in rivals)
        }

    def price(self, entry: Entry) -> float:
        """See `price`."""
        return price(self.start, self.scores[entry], entry.gain)

    def by_price(self, entries: Sequence[Entry]) -> list[Entry]:
        """Cheapest first."""
        return sorted(entries, key=lambda entry: (self.price(entry), -self.scores[entry].margin, entry.changes))

    def _least_losses(self, score: LayoutScore) -> tuple[float, float]:
        """Lower confidence bounds of the combined loss and of the largest task loss."""
        tasks = [
            cautious_difference([before], [after], [1.0], confidence=self.problem.confidence).low
            for before, after in zip(self.base.tasks, score.tasks, strict=True)
        ]
        return self._difference(self.base, score).low, max(tasks)

    def _difference(self, one: LayoutScore, other: LayoutScore) -> Interval:
        return cautious_difference(one.tasks, other.tasks, one.weights, confidence=self.problem.confidence)
