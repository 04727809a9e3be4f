"""Losses are paired, bounds are bounds, and the choice among layouts is the one the goal names."""

import numpy as np
import pytest

from dtr_deploy.search.objective import LayoutScore, Loss, Objective, Visit, pareto
from dtr_deploy.search.targets import Targets
from dtr_deploy.tasks.base import TaskScore
from dtr_deploy.throughput.performance import Performance


def score(*tasks: list[int], weights: tuple[float, ...] | None = None) -> LayoutScore:
    weights = weights or (3.0, 1.0)[: len(tasks)]
    made = tuple(
        TaskScore(f"t{n}", "search", np.array(items), -np.array(items, float)) for n, items in enumerate(tasks)
    )
    return LayoutScore((None,), "search", made, weights)


def visit(speedup: float, score: float, passes: bool = True, replaced: int = 1) -> Visit:
    layout = ("gla",) * replaced + (None,) * (10 - replaced)
    performance = Performance(speedup, 2.0 / speedup, 0.01 / speedup, int(1e8 / speedup))
    return Visit(layout, score, 0.0, Loss(1 - score, 0.0, {"t": 1 - score}), performance, passes)


def test_loss_is_weighted_and_paired():
    base, other = score([1, 1, 0, 1], [1, 0]), score([1, 0, 0, 1], [0, 1])
    loss = Loss.between(base, other)
    assert loss.tasks == {"t0": 0.25, "t1": 0.0}
    assert loss.combined == pytest.approx(0.75 * 0.25)
    # By hand: differences (0, 1, 0, 0) and (1, -1); sample variances 1/4 and 2.
    assert loss.standard_error == pytest.approx(np.sqrt(0.75**2 * 0.25 / 4 + 0.25**2 * 2 / 2))
    assert base.combined == pytest.approx(0.75 * 0.75 + 0.25 * 0.5)


def test_loss_of_one_item_is_json_all_the_same():
    assert Loss.between(score([1], [1]), score([0], [1])).to_dict()["standard_error"] is None


def test_bounds_include_their_ends():
    objective = Objective(max_score_loss=0.02, max_task_loss=0.05)
    for lost in (2, 20, 200):  # a mean over items is not exactly 0.02 in floating point
        assert objective.passes(Loss(float(np.mean([1.0] * lost + [0.0] * 49 * lost)), 0.0, {"t": 0.05}))
    assert not objective.passes(Loss(0.0201, 0.0, {"t": 0.0}))
    assert not objective.passes(Loss(0.0, 0.0, {"t": 0.051}))
    assert Objective(Targets(2.0), goal="score").passes(Loss(1.0, 0.0, {"t": 1.0}))


def test_goal_throughput_takes_the_fastest_within_bounds():
    visits = [visit(1.0, 1.0), visit(1.5, 0.99), visit(1.4, 1.0), visit(2.0, 0.5, passes=False)]
    assert Objective(max_score_loss=0.02).choose(visits) is visits[1]


def test_goal_score_takes_the_best_that_is_fast_enough_else_the_fastest():
    visits = [visit(1.0, 1.0), visit(1.5, 0.99), visit(1.4, 0.995), visit(1.6, 0.99)]
    assert Objective(Targets(1.4), goal="score").choose(visits) is visits[2]
    assert Objective(Targets(1.45), goal="score").choose(visits) is visits[3]
    assert Objective(Targets(9.0), goal="score").choose(visits) is visits[3]


def test_pareto_equals_the_definition():
    rng = np.random.default_rng(0)
    visits = [visit(float(s), float(q)) for s, q in rng.integers(0, 6, (40, 2)) / 5 + 1]
    expected = {
        (v.speedup, v.score)
        for v in visits
        if not any(
            w.speedup >= v.speedup and w.score >= v.score and (w.speedup, w.score) != (v.speedup, v.score)
            for w in visits
        )
    }
    found = [(v.speedup, v.score) for v in pareto(visits)]
    assert set(found) == expected and len(found) == len(expected) and found == sorted(found)


@pytest.mark.parametrize("arguments", [{"goal": "score"}, {"goal": "throughput"}])
def test_a_goal_without_its_bound_is_refused(arguments):
    with pytest.raises(ValueError, match="needs"):
        Objective(**arguments)


def test_several_targets_have_to_be_met_together():
    slow, lean = visit(1.2, 1.0), visit(1.6, 0.99)
    targets = Targets(speedup=1.1, first_token_seconds=1.5, cache_bytes=10**8)  # 2.0 / 1.2 s is too long
    assert Objective(targets, goal="score").choose([slow, lean]) is lean
    assert Objective(targets, 0.05).choose([slow, lean, visit(3.0, 0.2, passes=False)]) is lean
    assert not targets.met(slow.performance) and targets.met(lean.performance)
    assert targets.shortfall(slow.performance) == pytest.approx(2.0 / 1.2 / 1.5)


def test_missed_targets_are_named_in_the_units_of_the_recipe():
    targets = Targets(speedup=3.0, first_token_seconds=0.5, token_seconds=0.008, cache_bytes=50 << 20)
    first, second, third = targets.missed(visit(1.6, 1.0).performance)
    assert first.startswith("target.speedup: 3 times") and "1.6 times" in first
    assert second.startswith("target.ttft_ms: at most 500 ms") and "1250 ms" in second
    assert third.startswith("target.cache_mib: at most 50 MiB") and "59.6 MiB" in third


def test_a_bound_on_the_upper_end_needs_items():
    """Five items that agree prove little, five hundred prove enough."""
    objective = Objective(max_score_loss=0.05, bound="upper")
    few, many = (Loss.between(score([1] * n), score([1] * n)) for n in (5, 500))
    assert few.combined == many.combined == 0.0 and few.upper > 0.05 > many.upper
    assert not objective.passes(few) and objective.passes(many)
    assert Objective(max_score_loss=0.05).passes(few)
