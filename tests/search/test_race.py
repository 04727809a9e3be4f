"""One race: losers leave early, ties go to the cheapest, and the cost is that of a few parts."""

from dtr_deploy.hybrid.layout import full
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.objective import Objective
from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.strategies.race import OUT_OF_BOUNDS, TIED, WORSE, Entry, race
from tests.search.synthetic import LinearCost, PlantedEvaluator, SyntheticScorer

LAYERS = 8
HARM = {(layer, "gla"): (2, 2) for layer in range(LAYERS)} | {(3, "gla"): (60, 60), (5, "gla"): (12, 12)}


def problem_of(harm=HARM, objective=None, parts=4, items=400) -> Problem:
    ledger = Ledger(":memory:")
    scorer = SyntheticScorer(PlantedEvaluator(LAYERS, harm, items=items), ledger, parts)
    return Problem(scorer, LinearCost(), objective or Objective(max_score_loss=0.05), ledger, "test")


def singles(*layers: int, gain: float = 1.0) -> list[Entry]:
    return [Entry(apply(full(LAYERS), [Candidate(layer, "gla")]), (Candidate(layer, "gla"),), gain) for layer in layers]


def test_an_entry_out_of_bounds_is_dropped_on_the_first_part():
    problem = problem_of()
    before = problem.scorer.spent_trials
    outcome = race(problem, full(LAYERS), singles(3))
    assert outcome.winner is None and outcome.failed is None
    assert list(outcome.dropped.values()) == [OUT_OF_BOUNDS]
    assert problem.scorer.spent_trials - before == 1  # one part of one layout


def test_an_entry_that_is_worse_than_the_leader_loses_though_within_bounds():
    objective = Objective(max_score_loss=0.5)
    outcome = race(problem_of(objective=objective), full(LAYERS), singles(3, 1))
    assert outcome.winner is not None and outcome.winner.changes[0].layer == 1
    assert [(entry.changes[0].layer, why) for entry, why in outcome.dropped.items()] == [(3, WORSE)]


def test_of_equals_the_one_that_gains_most_wins():
    cheap, dear = singles(1, gain=1.0) + singles(2, gain=0.5)
    outcome = race(problem_of(), full(LAYERS), [dear, cheap])
    assert outcome.winner is cheap and outcome.dropped == {dear: TIED}


def test_a_gain_does_not_pay_for_a_loss_that_is_larger_still():
    """Twelve items lost for twice the gain, against two."""
    good, greedy = singles(1, gain=1.0) + singles(5, gain=2.0)
    assert race(problem_of(objective=Objective(max_score_loss=0.5)), full(LAYERS), [good, greedy]).winner is good


def test_ties_are_halved_so_that_a_field_costs_two_scorings():
    problem = problem_of({(layer, "gla"): (2, 2) for layer in range(LAYERS)})
    scored = problem.scorer.spent_trials
    outcome = race(problem, full(LAYERS), singles(1, 2, 4, 6))
    assert outcome.winner is not None and set(outcome.dropped.values()) == {TIED}
    assert problem.scorer.spent_trials - scored == 4 + 2 + 1 + 1  # parts


def test_without_parts_every_entry_is_scored_whole():
    problem = problem_of(parts=1)
    outcome = race(problem, full(LAYERS), singles(1, 3, 5))
    assert outcome.winner is not None and outcome.winner.changes[0].layer == 1
    assert len(problem.visits) == 4


def test_an_entry_that_fails_on_all_items_is_told_apart():
    """A loss just beyond the bound is no certainty on any part; the estimate on all items decides."""
    problem = problem_of({**HARM, (5, "gla"): (21, 21)})
    outcome = race(problem, full(LAYERS), singles(5))
    assert outcome.winner is None and outcome.failed is not None and outcome.visit is not None
    assert not outcome.visit.passes
    assert race(problem, full(LAYERS), singles(5), bounded=False).winner is not None
