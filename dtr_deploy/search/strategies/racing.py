"""The default: rank all single swaps once, cheaply; then race a few of the next ones at each step, several layers at
once while it costs nothing that can be seen.

The ranking is a guess, the scores decide: a step is committed only if the whole layout scores within bounds. It is made
of a screening and of the first part of the task's own items, since either alone misleads; both come from one pass back
through the backbone (`attribution`), or, for tasks without a gradient, from trying every swap. Groups that fail, or
lose visibly, are split until the layer at fault is alone; a layer that is out of bounds alone goes to the back, and
ranks of what is next are refreshed on top of what is committed, for that is where interactions matter. At the end the
chosen layout's worst layers are tried for exchange (`exchange`).

Cost for a whole frontier of 30 layers and 2 forms: about a tenth of the layer-forwards that the paper's greedy takes
for its 928 scorings.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dtr_deploy.search.objective import Visit
from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.statistics import cautious_difference
from dtr_deploy.search.strategies.exchange import exchange
from dtr_deploy.search.strategies.race import OUT_OF_BOUNDS, TIED, Entry, Outcome, first_prices, race
from dtr_deploy.search.strategies.ranking import (
    DIVERGENCE_WEIGHT,
    Belief,
    SwapCost,
    estimated,
    gains,
    harms,
    in_order,
    one_per_layer,
    tried,
)

_SAME = 1e-9

VISIBLE_SHARE = 0.25
"""Of the allowed score loss: what a group of layers may lose with confidence before it is split."""
DEFAULT_VISIBLE = 0.005
"""The same where the recipe bounds no loss."""
CHANCES = 2
"""Races in which a layer alone may be out of bounds before it is given up."""
UNITS_PER_LAYER, UNITS_PER_EXCHANGE = 4, 8
"""Scorings of a part that a layer takes, and an exchange: a first guess for the progress bar."""
FILL_GAP = 2
"""On a frontier: layers between neighbouring layouts that are scored, at most."""


@dataclass(frozen=True)
class Racing:
    """step: layers per step at first (None: a tenth of those that can be replaced). entries: of a race of single
    layers, of which `explored` are the best that were not raced yet. refresh: how many of the next candidates are
    screened again after such a race. patience: races without a winner in a
    row after which the search ends (None: it ends when every candidate failed). exchanges: layers of the chosen layout
    that are tried for exchange at the end, at most."""

    step: int | None = None
    entries: int = 6
    explored: int = 2
    refresh: int = 5
    patience: int | None = 2
    exchanges: int = 3
    divergence_weight: float = DIVERGENCE_WEIGHT
    name: ClassVar[str] = "racing"

    def run(self, problem: Problem) -> None:
        walk = _Walk(problem, self)
        walk.go()
        fill_in(problem)
        if self.exchanges:
            exchange(problem, walk.gain, self.exchanges, self.divergence_weight)


class _Walk:
    """The state of one run: what is left to replace, in order, and how many layers the next step takes.

    suspects: how many of the first remaining are known to contain at least one that fails.
    """

    def __init__(self, problem: Problem, settings: Racing) -> None:
        self.problem, self.settings = problem, settings
        candidates = sorted(problem.scorer.candidates)
        layers = len({candidate.layer for candidate in candidates})
        self.gain = gains(problem)
        costs, self.belief = self._first_belief(candidates)
        believed = self.belief.of(candidates)
        self.remaining = in_order(believed)
        problem.record(
            "rank",
            ranking=[[*candidate, believed[candidate]] for candidate in self.remaining],
            swaps=[candidate._asdict() | costs[candidate].to_dict() for candidate in candidates],
        )
        self.raced: set[Candidate] = set()
        self.lost: Counter[Candidate] = Counter()
        self.first_size = self.size = settings.step or max(1, math.ceil(layers / 10))
        self.suspects = self.failures = 0
        self.begun_at = problem.done

    def _first_belief(self, candidates: Sequence[Candidate]) -> tuple[dict[Candidate, SwapCost], Belief]:
        """By attribution where that works, else by trying every swap."""
        problem, start, weight = self.problem, self.problem.committed.layout, self.settings.divergence_weight
        priced = problem.scorer.parts > 1
        if problem.scorer.attributable:
            problem.foresee(1 + UNITS_PER_LAYER * problem.room)
            costs = estimated(problem, start, candidates, priced)
            belief = Belief(harms(costs, self.gain, weight))
            belief.price = {
                candidate: cost.price / self.gain[candidate]
                for candidate, cost in costs.items()
                if cost.price is not None
            }
            return costs, belief
        problem.foresee((2 if priced else 1) * len(candidates) + UNITS_PER_LAYER * problem.room)
        costs = tried(problem, start, candidates)
        belief = Belief(harms(costs, self.gain, weight))
        if priced:
            entries = [self._entry([candidate]) for candidate in candidates]
            prices = first_prices(problem, start, entries, "scoring single swaps")
            belief.price = {entry.changes[0]: price for entry, price in prices.items()}
        return costs, belief

    def go(self) -> None:
        """Race and commit until the objective is reached, nothing is left, or patience ends."""
        problem, patience = self.problem, self.settings.patience
        while self.remaining and not problem.objective.done(problem.committed):
            ahead = self._ahead()
            if not ahead:
                return
            size = self._size(ahead)
            self._foresee(len(ahead))
            entries = self._groups(ahead, size) if size > 1 else self._singles(ahead)
            message = f"{problem.committed.replaced + size} of {problem.scorer.layers} layers replaced"
            bounded = problem.objective.goal != "frontier"
            outcome = race(problem, problem.committed.layout, entries, message, bounded)
            if size > 1:
                self._after_groups(outcome, entries, size)
            else:
                self._after_singles(outcome)
            if patience is not None and self.failures >= patience:
                return

    def _foresee(self, ahead: int) -> None:
        """Estimate the work left from what the layers so far have taken; the last ones before the end take more."""
        problem = self.problem
        spent, taken = problem.done - self.begun_at, problem.committed.replaced
        rate = max(UNITS_PER_LAYER, spent / taken if taken else spent)
        more = rate * min(ahead, problem.room)
        if self.settings.exchanges:
            more += taken + UNITS_PER_EXCHANGE * self.settings.exchanges
        problem.foresee(more)

    # --- what is raced

    def _ahead(self) -> list[Candidate]:
        """The best candidate of every remaining layer, in order; empty if all targets are met and no number of further
        layers is faster."""
        problem, objective = self.problem, self.problem.objective
        ahead = one_per_layer(self.remaining)
        if problem.room <= 0:
            return []
        if objective.goal == "throughput" and objective.targets.met(problem.committed.performance):
            now = objective.burden(problem.cost.predicted(problem.committed.layout))
            if min(self._burdens(ahead), default=math.inf) >= now * (1 - _SAME):
                return []
        return ahead

    def _burdens(self, ahead: Sequence[Candidate]) -> list[float]:
        start, cost = self.problem.committed.layout, self.problem.cost
        layouts = [apply(start, ahead[: count + 1]) for count in range(min(len(ahead), self.problem.room))]
        return [self.problem.objective.burden(cost.predicted(layout)) for layout in layouts]

    def _size(self, ahead: Sequence[Candidate]) -> int:
        """Layers of the next step. Goal "score" takes no more of them than the targets need."""
        enough = min(len(ahead), self.problem.room)
        if self.problem.objective.goal == "score":
            reached = [count + 1 for count, burden in enumerate(self._burdens(ahead)) if burden <= 1 + _SAME]
            enough = min([enough, *reached[:1]])
        return min(self.size, enough)

    def _groups(self, ahead: Sequence[Candidate], size: int) -> list[Entry]:
        """The next `size` layers, and the `size` after them (the other half of what is under suspicion)."""
        groups = [ahead[:size], ahead[size : 2 * size]]
        return [self._entry(group) for group in groups if len(group) == size]

    def _singles(self, ahead: Sequence[Candidate]) -> list[Entry]:
        """The next layers one by one, the first one's other forms, and the best that were not raced yet."""
        settings = self.settings
        others = [candidate for candidate in self.remaining if candidate.layer == ahead[0].layer][1:]
        others = others[: settings.entries // 3]
        firsts = ahead[: max(1, settings.entries - settings.explored - len(others))]
        fresh = [c for c in self.remaining if c not in self.raced and c not in firsts and c not in others]
        fresh = one_per_layer(fresh)[: settings.entries - len(others) - len(firsts)]
        return [self._entry([candidate]) for candidate in [*firsts, *others, *fresh]]

    def _entry(self, changes: Sequence[Candidate]) -> Entry:
        layout = apply(self.problem.committed.layout, changes)
        return Entry(layout, tuple(changes), sum(self.gain[change] for change in changes))

    # --- what follows from a race

    def _after_groups(self, outcome: Outcome, entries: Sequence[Entry], size: int) -> None:
        winner, visit = outcome.winner, outcome.visit
        if winner is not None and visit is not None and not self._loses_visibly(visit):
            first_failed = winner is not entries[0] and outcome.dropped.get(entries[0]) != TIED
            self._commit(winner, visit, outcome)
            self._grow(size, suspects=size if first_failed else 0)
            return
        if visit is not None:
            self._reject(outcome.winner or outcome.failed, visit)
        self._note(outcome)
        self.suspects, self.size = size, size // 2

    def _grow(self, size: int, suspects: int) -> None:
        """After a commit: half of what is under suspicion, else twice as many layers as before."""
        if suspects:
            self.suspects, self.size = suspects, max(1, suspects // 2)
            return
        self.suspects = max(0, self.suspects - size)
        self.size = max(1, self.suspects // 2) if self.suspects else min(self.first_size, 2 * size)

    def _after_singles(self, outcome: Outcome) -> None:
        if outcome.winner is not None and outcome.visit is not None:
            self._commit(outcome.winner, outcome.visit, outcome)
            self._grow(1, suspects=0)
        else:
            self.failures += 1
            self.suspects, self.size = 0, 1
            if outcome.visit is not None:
                self._reject(outcome.failed, outcome.visit)
            self._note(outcome)
        lost = [entry.changes[0] for entry, reason in outcome.dropped.items() if reason == OUT_OF_BOUNDS]
        if outcome.failed is not None:
            lost.append(outcome.failed.changes[0])
        self.raced |= {entry.changes[0] for entry in outcome.prices}
        self.belief.price |= {entry.changes[0]: price for entry, price in outcome.prices.items()}
        self.lost.update(lost)
        self.remaining = self._ordered([candidate for candidate in self.remaining if self.lost[candidate] < CHANCES])
        self._refresh()

    def _refresh(self) -> None:
        """Rank the first of the remaining again, on top of what is committed."""
        problem, settings = self.problem, self.settings
        front = self.remaining[: settings.refresh]
        if len(front) < 2 or problem.committed.replaced == 0:
            return
        start, message = problem.committed.layout, "ranking the next swaps again"
        harm = harms(tried(problem, start, front, message), self.gain, settings.divergence_weight)
        self.belief.harm |= harm
        self.remaining = self._ordered(self.remaining)
        problem.record("refresh", ranking=[[*candidate, harm[candidate]] for candidate in in_order(harm)])

    def _ordered(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Those that were out of bounds least often first, then by what is believed of them."""
        believed = self.belief.of(candidates)
        return sorted(candidates, key=lambda candidate: (self.lost[candidate], believed[candidate], candidate))

    def _loses_visibly(self, visit: Visit) -> bool:
        """Whether a step loses more than a share of the allowance, with confidence, against what is committed."""
        problem = self.problem
        allowed = problem.objective.max_score_loss
        visible = DEFAULT_VISIBLE if allowed is None else VISIBLE_SHARE * allowed
        before, after = (problem.scorer.score(layout) for layout in (problem.committed.layout, visit.layout))
        lost = cautious_difference(before.tasks, after.tasks, before.weights, confidence=problem.confidence)
        return lost.low > visible

    def _commit(self, entry: Entry, visit: Visit, outcome: Outcome) -> None:
        self.failures = 0
        self.problem.commit(visit, entry.changes, raced=_raced(outcome))
        taken = {change.layer for change in entry.changes}
        self.remaining = [candidate for candidate in self.remaining if candidate.layer not in taken]

    def _reject(self, entry: Entry | None, visit: Visit) -> None:
        assert entry is not None
        self.problem.reject(visit, entry.changes)

    def _note(self, outcome: Outcome) -> None:
        if outcome.dropped:
            self.problem.record("dropped", raced=_raced(outcome))


def _raced(outcome: Outcome) -> list[dict[str, object]]:
    return [
        {"changes": [list(change) for change in entry.changes], "dropped": reason}
        for entry, reason in outcome.dropped.items()
    ]


def fill_in(problem: Problem) -> None:
    """Score layouts inside steps of several layers, where one of them may be the best there is.

    Where time is not monotone in the count of replaced layers, those that promise to be faster than every layout
    committed; for a frontier, every second one.
    """
    commits = [step["changes"] for step in problem.steps if step["action"] == "commit"]
    best = problem.objective.choose(problem.path)
    inside: list[Visit] = []
    for before, changes in zip(list(problem.path), commits, strict=False):
        for count in range(1, len(changes)):
            layout = apply(before.layout, [Candidate(*change) for change in changes[:count]])
            if problem.objective.goal == "frontier":
                wanted = count % FILL_GAP == 0
            elif problem.objective.goal == "throughput":
                wanted = problem.cost.predicted(layout).speedup > best.speedup * (1 + _SAME)
            else:
                wanted = False
            if wanted:
                inside.append(problem.visit(layout, "a layout between two steps"))
    for visit in inside:
        problem.record("between_steps", visit)
