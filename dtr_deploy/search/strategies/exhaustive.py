"""The paper's greedy: every step scores every remaining (layer, form) and commits the best (arXiv 2601.11667).

It costs about `layers^2 / 2` scorings per form, and is the reference that cheaper strategies are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dtr_deploy.search.objective import Visit
from dtr_deploy.search.problem import Candidate, Problem, apply


@dataclass(frozen=True)
class Exhaustive:
    """Commits the best-scoring swap of each step; ties go to the higher margin, the faster layout, the earlier layer.

    Ends when the best swap is out of bounds, when the objective is reached, or when every layer is replaced. Goal
    "frontier" ignores the bounds on the way, as the paper's full curve does.
    """

    name: ClassVar[str] = "exhaustive"

    def run(self, problem: Problem) -> None:
        remaining = sorted(problem.scorer.candidates)
        layers = len({candidate.layer for candidate in remaining})
        problem.expected = sum(len(remaining) * step // layers for step in range(1, layers + 1))
        while remaining and problem.room > 0 and not problem.objective.done(problem.committed):
            best, best_change = self._best(problem, remaining)
            for change in remaining:
                if change != best_change:
                    problem.reject(problem.visits[apply(problem.committed.layout, [change])], [change])
            if not best.passes and problem.objective.goal != "frontier":
                problem.reject(best, [best_change])
                return
            problem.commit(best, [best_change])
            remaining = [candidate for candidate in remaining if candidate.layer != best_change.layer]

    def _best(self, problem: Problem, remaining: list[Candidate]) -> tuple[Visit, Candidate]:
        start = problem.committed.layout
        # Deepest layer first: the scorer keeps the hidden states of the layout it ran last, and this order shares most.
        order = sorted(remaining, reverse=True)
        message = f"step {problem.committed.replaced + 1}: {len(order)} candidates"
        visits = dict(
            zip(order, problem.visit_many([apply(start, [change]) for change in order], message), strict=True)
        )
        frontier = problem.objective.goal == "frontier"
        change = max(
            visits,
            key=lambda c: (
                frontier or visits[c].passes,
                visits[c].score,
                visits[c].margin,
                visits[c].speedup,
                -c.layer,
                c.form,
            ),
        )
        return visits[change], change
