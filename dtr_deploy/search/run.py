"""Stage 2 from end to end: let a strategy walk, choose among what it visited, confirm, measure, judge the target.

Everything decided here rests on trials in the ledger, so that a search killed anywhere goes on where it was and ends
with the same layout: the same code runs again over the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from dtr_deploy.hybrid.layout import Layout, describe, full
from dtr_deploy.search import strategies
from dtr_deploy.search.confirm import Confirmation, confirm
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.objective import InfeasibleTarget, LayoutScore, Objective, pareto
from dtr_deploy.search.problem import Cost, LayoutScorer, Limits, Problem, Progress
from dtr_deploy.search.result import SearchResult, SplitScores
from dtr_deploy.search.shrinkage import Shrinkage, expected_shrinkage
from dtr_deploy.search.statistics import Interval, difference_interval, score_interval
from dtr_deploy.throughput.measure import Comparison
from dtr_deploy.throughput.performance import Performance


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

    The layout chosen on the search split is scored once on the confirm split; if it is out of bounds there, its last
    changes are taken back until it holds (`confirm`). The winner's performance is measured, never predicted. Last of
    all, backbone and winner are scored once on the test split: that is reported and decides nothing.

    name: of the steps in the ledger; the strategy's by default. confidence: of all intervals.
    Raises `InfeasibleTarget`, with the whole result in it, if the winner misses a target.
    """
    chosen = strategies.make_strategy(strategy) if isinstance(strategy, str) else strategy
    problem = Problem(scorer, cost, objective, ledger, name or chosen.name, limits, progress, confidence)
    strategies.run(chosen, problem)
    compared = list(problem.visits.values())
    confirmed = confirm(problem)
    winner = confirmed.winner
    measured, performance = None, winner.performance
    if winner.replaced:
        problem.report("measuring the throughput of the chosen layout")
        measured = cost.measure(winner.layout)
        performance = _as_measured(winner.performance, measured)
        problem.record("measured", winner, measured_speedup=measured.speedup)
    expected = expected_shrinkage(
        objective, problem.base_score, compared, [scorer.score(visit.layout) for visit in compared]
    )
    committed = problem.path[1:]
    within = [visit for visit in problem.visits.values() if visit.replaced and visit.passes]
    result = SearchResult(
        layout=winner.layout,
        strategy=chosen.name,
        scores=_all_scores(problem, confirmed),
        measured=measured,
        performance=performance,
        missed=objective.targets.missed(performance),
        shrinkage=Shrinkage.of(confirmed.chosen, expected, len(compared), confirmed.chosen_loss),
        frontier=pareto(list(problem.visits.values())),
        m_best=max(committed, key=lambda v: (v.score, v.margin, v.replaced), default=None),
        m_opt=max(within, key=lambda v: (v.replaced, v.score, v.margin), default=None),
        steps=problem.steps,
        walked_back=confirmed.walked_back,
        trials=scorer.spent_trials,
        layer_forwards=scorer.spent_layer_forwards,
        seconds=scorer.spent_seconds,
        throughput=cost.to_dict(),
    )
    if result.missed:
        raise InfeasibleTarget(_why(result, objective), result.frontier, result)
    return result


def _why(result: SearchResult, objective: Objective) -> str:
    """One line: every target that was missed, and what would help."""
    allowed = objective.max_score_loss
    bound = "" if allowed is None else f" with at most {allowed:g} of the score lost"
    missed = "; ".join(result.missed)
    return f"{missed}{bound}: {describe(result.layout)}; ask for less, or allow a larger search.max_score_loss"


def _as_measured(performance: Performance, measured: Comparison) -> Performance:
    """Measured times in place of the model's; memory is a matter of sizes, not of measurement."""
    hybrid = measured.hybrid
    later_tokens = hybrid.workload.output - 1
    return replace(
        performance,
        speedup=measured.speedup,
        first_token_seconds=hybrid.prefill_seconds,
        token_seconds=hybrid.decode_seconds / later_tokens if later_tokens else performance.token_seconds,
    )


def _all_scores(problem: Problem, confirmed: Confirmation) -> dict[str, SplitScores]:
    """Backbone and winner on all three splits; the test split is looked at here, for the first and only time."""
    scorer, layout, confidence = problem.scorer, confirmed.winner.layout, problem.confidence
    problem.report("scoring the test split")
    test = [scorer.score(one, "test") for one in (full(scorer.layers), layout)]
    return {
        "search": _split_scores(problem.base_score, scorer.score(layout), confidence),
        "confirm": _split_scores(confirmed.base, confirmed.score, confidence),
        "test": _split_scores(test[0], test[1], confidence),
    }


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
