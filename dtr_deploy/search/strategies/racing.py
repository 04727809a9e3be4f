"""The default: rank all single swaps once, cheaply; commit several layers a step in that order; bisect what fails.

About `layers` screenings (each a forward from the swapped layer on) and a dozen scorings, where the paper's greedy
takes hundreds. The ranking is a guess, the scores decide: a group of layers is committed only if the whole layout
scores within bounds. Near the frontier, where interactions matter most, the cheapest remaining candidates are ranked
again on top of what is committed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from dtr_deploy.search.objective import Visit
from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.strategies.ranking import DIVERGENCE_WEIGHT, harms, in_order

_SAME = 1e-9


@dataclass(frozen=True)
class Racing:
    """step: layers per step at first (None: a fifth of those that can be replaced). refresh: how many of the cheapest
    candidates are ranked again after one was rejected alone. patience: rejections in a row after which the search
    ends (None: it ends when every candidate was rejected)."""

    step: int | None = None
    refresh: int = 4
    patience: int | None = 3
    divergence_weight: float = DIVERGENCE_WEIGHT
    name: ClassVar[str] = "racing"

    def run(self, problem: Problem) -> None:
        candidates = sorted(problem.scorer.candidates)
        problem.expected = 1 + len(candidates) + 12
        harm = harms(problem, problem.committed.layout, candidates, self.divergence_weight)
        remaining = in_order(harm)
        problem.record("rank", ranking=[[*candidate, harm[candidate]] for candidate in remaining])

        layers = len({candidate.layer for candidate in candidates})
        first_size = self.step or max(1, math.ceil(layers / 5))
        size = first_size
        suspects = 0  # how many of the first remaining are known to contain at least one that fails
        rejected = 0
        while remaining and not problem.objective.done(problem.committed):
            changes = self._group(problem, remaining, size)
            if not changes:
                break
            visit = problem.visit(
                apply(problem.committed.layout, changes),
                f"{problem.committed.replaced + len(changes)} of {problem.scorer.layers} layers replaced",
            )
            if visit.passes or problem.objective.goal == "frontier":
                problem.commit(visit, changes)
                taken = {change.layer for change in changes}
                remaining = [candidate for candidate in remaining if candidate.layer not in taken]
                suspects = max(0, suspects - len(changes))
                size = max(1, suspects // 2) if suspects else min(first_size, 2 * size)
                rejected = 0
                continue
            problem.reject(visit, changes)
            if len(changes) > 1:
                suspects, size = len(changes), len(changes) // 2
                continue
            remaining.remove(changes[0])
            rejected += 1
            if self.patience is not None and rejected >= self.patience:
                break
            suspects, size = 0, 1
            remaining = self._refreshed(problem, remaining)
        self._fill_in(problem)

    def _group(self, problem: Problem, remaining: list[Candidate], size: int) -> list[Candidate]:
        """The next candidates of different layers, at most `size`; empty if no number of further layers is faster.

        Goal "score" takes no more of them than the speedup needs.
        """
        objective, start = problem.objective, problem.committed
        ahead: list[Candidate] = []
        for candidate in remaining:
            if candidate.layer not in {change.layer for change in ahead} and len(ahead) < problem.room:
                ahead.append(candidate)
        speedups = [problem.cost.predicted_speedup(apply(start.layout, ahead[: n + 1])) for n in range(len(ahead))]
        if objective.goal == "score":
            enough = [n + 1 for n, speedup in enumerate(speedups) if objective.fast_enough(speedup)]
            return ahead[: min([size, *enough[:1]])]
        if objective.goal == "throughput":
            now = problem.cost.predicted_speedup(start.layout)
            if max(speedups, default=0.0) <= now * (1 + _SAME):
                return []
        return ahead[:size]

    def _refreshed(self, problem: Problem, remaining: list[Candidate]) -> list[Candidate]:
        """`remaining` with its first candidates ranked again on top of the committed layout."""
        front = remaining[: self.refresh]
        if len(front) < 2 or problem.committed.replaced == 0:
            return remaining
        harm = harms(problem, problem.committed.layout, front, self.divergence_weight)
        order = in_order(harm)
        problem.record("refresh", ranking=[[*candidate, harm[candidate]] for candidate in order])
        return order + remaining[self.refresh :]

    def _fill_in(self, problem: Problem) -> None:
        """Score layouts between two commits that promise to be faster than every layout committed.

        Only where time is not monotone in the count of replaced layers: the fastest count may lie inside a step.
        """
        if problem.objective.goal == "frontier":
            return
        commits = [step["changes"] for step in problem.steps if step["action"] == "commit"]
        best = problem.objective.choose(problem.path)
        inside: list[Visit] = []
        for before, changes in zip(problem.path, commits, strict=False):
            for count in range(1, len(changes)):
                layout = apply(before.layout, [Candidate(*change) for change in changes[:count]])
                faster = problem.cost.predicted_speedup(layout) > best.speedup * (1 + _SAME)
                if problem.objective.goal == "throughput" and faster:
                    inside.append(problem.visit(layout, "a faster layout between two steps"))
        for visit in inside:
            problem.record("between_steps", visit)
