"""Stage 2 from end to end: let a strategy walk, choose among what it visited, confirm, measure, judge the target.

Everything decided here rests on trials in the ledger, so that a search killed anywhere goes on where it was and ends
with the same layout: the same code runs again over the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from dtr_deploy.hybrid.layout import Layout, describe, full
from dtr_deploy.search import strategies
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.objective import InfeasibleTarget, LayoutScore, Loss, Objective, Visit, pareto
from dtr_deploy.search.problem import Cost, LayoutScorer, Limits, Problem, Progress
from dtr_deploy.search.result import SearchResult, SplitScores
from dtr_deploy.search.statistics import Interval, difference_interval, score_interval
from dtr_deploy.throughput.measure import Comparison


class MeasuredCost(Cost, Protocol):
    """A cost that can also measure: `throughput.measure.CalibratedCost`."""

    def measure(self, layout: Layout) -> Comparison: ...

    def to_dict(self) -> dict[str, Any]: ...


def search_layout(
    scorer: LayoutScorer,
    cost: MeasuredCost,
    objective: Objective,
    ledger: Ledger,
    strategy: strategies.Strategy | str = "racing",
    limits: Limits | None = None,
    confidence: float = 0.95,
    progress: Progress | None = None,
    name: str | None = None,
) -> SearchResult:
    """Find the layout that serves `objective` best.

    The layout chosen on the search split is scored once on the confirm split. If it is out of bounds there, the
    search goes back along the layouts it had found good, to the next one with fewer layers replaced, until one holds
    (the backbone always does). The winner's throughput is measured, never predicted.

    name: of the steps in the ledger; the strategy's by default. confidence: of the intervals reported.
    Raises `InfeasibleTarget`, with the whole result in it, if the winner is slower than the objective asks.
    """
    chosen = strategies.make_strategy(strategy) if isinstance(strategy, str) else strategy
    problem = Problem(scorer, cost, objective, ledger, name or chosen.name, limits, progress)
    strategies.run(chosen, problem)
    winner, confirmed, walked_back = _confirm(problem)
    measured = None
    if winner.replaced:
        problem.report("measuring the throughput of the chosen layout")
        measured = cost.measure(winner.layout)
        problem.record("measured", winner, measured_speedup=measured.speedup)

    committed = problem.path[1:]
    within = [visit for visit in problem.visits.values() if visit.replaced and visit.passes]
    result = SearchResult(
        layout=winner.layout,
        strategy=chosen.name,
        scores={
            "search": _split_scores(problem.base_score, scorer.score(winner.layout), confidence),
            "confirm": _split_scores(scorer.score(full(scorer.layers), "confirm"), confirmed, confidence),
        },
        measured=measured,
        frontier=pareto(list(problem.visits.values())),
        m_best=max(committed, key=lambda v: (v.score, v.margin, v.replaced), default=None),
        m_opt=max(within, key=lambda v: (v.replaced, v.score, v.margin), default=None),
        steps=problem.steps,
        walked_back=walked_back,
        trials=scorer.spent_trials,
        layer_forwards=scorer.spent_layer_forwards,
        seconds=scorer.spent_seconds,
        throughput=cost.to_dict(),
    )
    if not objective.fast_enough(result.speedup):
        assert objective.speedup is not None
        allowed = objective.max_score_loss
        bound = "" if allowed is None else f" with at most {allowed:g} of the score lost"
        raise InfeasibleTarget(
            f"target.speedup: {objective.speedup:g} times the backbone was not reached{bound}: the best layout found"
            f" ({describe(result.layout)}) reaches {result.speedup:.3g} times; ask for less, or allow a larger"
            " search.max_score_loss",
            result.frontier,
            result,
        )
    return result


def _confirm(problem: Problem) -> tuple[Visit, LayoutScore, list[Layout]]:
    """The winner after confirmation, its confirm scores, and the layouts that failed there."""
    scorer, objective = problem.scorer, problem.objective
    base = scorer.score(full(scorer.layers), "confirm")
    options = list(problem.visits.values())
    walked_back: list[Layout] = []
    while True:
        winner = objective.choose(options)
        if not winner.replaced:
            return winner, base, walked_back
        problem.report(f"confirming {winner.replaced} of {scorer.layers} layers replaced")
        score = scorer.score(winner.layout, "confirm")
        loss = Loss.between(base, score)
        if objective.passes(loss):
            scorer.decide(winner.layout, "committed", "confirm")
            problem.record("confirm", winner, confirm=loss.to_dict())
            return winner, score, walked_back
        # Every further look at the confirm split weakens it, so only layouts the search went on from are considered.
        scorer.decide(winner.layout, "walked_back", "confirm")
        scorer.decide(winner.layout, "walked_back")
        problem.record("walk_back", winner, confirm=loss.to_dict())
        walked_back.append(winner.layout)
        options = [visit for visit in problem.path if visit.replaced < winner.replaced]


def _split_scores(base: LayoutScore, hybrid: LayoutScore, confidence: float) -> SplitScores:
    weights = base.weights
    loss = difference_interval(base.tasks, hybrid.tasks, weights, confidence=confidence)
    return SplitScores(
        _interval(base, confidence),
        _interval(hybrid, confidence),
        loss,
        {ours.task: (theirs.mean, ours.mean) for ours, theirs in _pairs(hybrid, base)},
    )


def _interval(score: LayoutScore, confidence: float) -> Interval:
    return score_interval(score.tasks, score.weights, confidence=confidence)


def _pairs(hybrid: LayoutScore, base: LayoutScore) -> Sequence[tuple[Any, Any]]:
    return list(zip(hybrid.tasks, base.tasks, strict=True))
