"""Strategies on planted problems whose optimum an independent brute force, or the plan itself, knows."""

import itertools
import random

import numpy as np
import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import full, replaced
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.objective import Objective
from dtr_deploy.search.problem import Candidate, Limits, Problem, apply
from dtr_deploy.search.strategies import STRATEGIES, Exhaustive, OneShot, Racing, make_strategy, run
from dtr_deploy.search.strategies.exchange import exchange
from dtr_deploy.search.strategies.ranking import gains
from dtr_deploy.search.targets import Targets
from tests.search.synthetic import LinearCost, NoisyEvaluator, PlantedEvaluator, SyntheticScorer

FLOOR = Objective(max_score_loss=0.02)


def problem_of(evaluator, objective=FLOOR, cost=None, limits=None) -> Problem:
    ledger = Ledger(":memory:")
    return Problem(SyntheticScorer(evaluator, ledger), cost or LinearCost(), objective, ledger, "test", limits)


def solve(strategy, evaluator, objective=FLOOR, cost=None) -> Problem:
    problem = problem_of(evaluator, objective, cost)
    run(strategy, problem)
    return problem


def random_harm(layers: int, seed: int, forms=("gla", "gated_deltanet")) -> dict:
    rng = random.Random(seed)
    return {(layer, form): (rng.randint(0, 12), rng.randint(0, 12)) for layer in range(layers) for form in forms}


def loss_of(harm: dict, layout) -> float:
    """The planted loss, in exact arithmetic of its own: mean over two tasks of a thousand items."""
    lost = [sum(harm[layer, form][task] for layer, form in enumerate(layout) if form) for task in (0, 1)]
    return sum(lost) / 2000


def greedy_by_hand(harm: dict, layers: int, floor: float) -> list:
    """The paper's greedy, written out: all layouts one swap away, the best by score, while it is within the floor."""
    layout, path = [None] * layers, []
    while layout.count(None) > 1:
        options = []
        for layer, form in itertools.product(range(layers), ("gated_deltanet", "gla")):
            if layout[layer] is None:
                trial = [form if index == layer else old for index, old in enumerate(layout)]
                options.append((loss_of(harm, trial), trial))
        best_loss = min(loss for loss, _ in options)
        if best_loss > floor + 1e-12:
            break
        layout = next(trial for loss, trial in options if loss == best_loss)
        path.append(best_loss)
    return path


@pytest.mark.parametrize("seed", range(6))
def test_exhaustive_walks_the_greedy_path(seed):
    harm = random_harm(5, seed)
    problem = solve(Exhaustive(), PlantedEvaluator(5, harm))
    assert [visit.loss.combined for visit in problem.path[1:]] == pytest.approx(greedy_by_hand(harm, 5, 0.02))


@pytest.mark.parametrize("strategy", [Exhaustive(), Racing(patience=None)])
@pytest.mark.parametrize("seed", range(6))
def test_most_replaced_equals_brute_force_over_all_layouts(strategy, seed):
    """Harms add, so taking the least harmful first is optimal, and all 3^5 layouts can be looked at."""
    harm = random_harm(5, seed)
    # Screening sees the true harm: divergence weight 1 makes the ranking that of the loss.
    if isinstance(strategy, Racing):
        strategy = Racing(patience=None, divergence_weight=1.0)
    problem = solve(strategy, PlantedEvaluator(5, harm))
    within = [
        layout
        for layout in itertools.product((None, "gla", "gated_deltanet"), repeat=5)
        if replaced(layout) < 5 and loss_of(harm, layout) <= 0.02 + 1e-12
    ]
    assert FLOOR.choose(list(problem.visits.values())).replaced == max(map(replaced, within))


def planted(layers: int = 30, bad=(0, 7, 18, 22)):
    """Most layers cost one item, the bad ones a quarter of all; as for SmolLM2's layers 0 and 18."""
    harm = {(layer, "gated_deltanet"): (250, 250) if layer in bad else (1, 1) for layer in range(layers)}
    best = tuple(None if layer in bad else "gated_deltanet" for layer in range(layers))
    return PlantedEvaluator(layers, harm), best


def test_racing_finds_the_planted_layout_with_few_trials():
    evaluator, best = planted()
    floor = Objective(max_score_loss=0.03)
    problem = solve(Racing(), evaluator, floor)
    assert floor.choose(list(problem.visits.values())).layout == best
    evaluator, _ = planted()
    exhaustive = solve(Exhaustive(), evaluator, floor)
    assert problem.scorer.spent_layer_forwards < 0.15 * exhaustive.scorer.spent_layer_forwards


def test_racing_finds_it_when_screening_misleads():
    """Screening shows two bad layers as the best of all: bisection finds and drops them, the rest is still taken."""
    harm = {(layer, "gla"): (250, 250) if layer in (3, 11) else (1, 1) for layer in range(16)}
    seen = {(layer, "gla"): (0.0, 0.0) if layer in (3, 11) else (0.01 + layer / 1e4, 0.0) for layer in range(16)}
    problem = solve(Racing(), PlantedEvaluator(16, harm, seen=seen))
    assert problem.committed.layout == tuple(None if layer in (3, 11) else "gla" for layer in range(16))


def test_lost_recall_counts_in_the_ranking():
    """A swap that costs no divergence but all recall is not taken first (SmolLM2's layer 18)."""
    harm = {(layer, "gla"): (2, 2) for layer in range(6)} | {(4, "gla"): (0, 900)}
    seen = {(layer, "gla"): (0.02 if layer != 4 else 0.001, 0.0 if layer != 4 else 8.0) for layer in range(6)}
    problem = solve(Racing(), PlantedEvaluator(6, harm, seen=seen))
    ranking = next(step["ranking"] for step in problem.steps if step["action"] == "rank")
    assert ranking[-1][0] == 4
    assert problem.committed.layout == ("gla", "gla", "gla", "gla", None, "gla")


def test_recall_gained_does_not_pay_for_divergence():
    harm = {(layer, "gla"): (1, 1) for layer in range(4)}
    seen = {(0, "gla"): (0.5, -5.0), (1, "gla"): (0.1, 0.0), (2, "gla"): (0.2, 0.0), (3, "gla"): (0.3, 0.0)}
    problem = solve(Racing(), PlantedEvaluator(4, harm, seen=seen))
    ranking = next(step["ranking"] for step in problem.steps if step["action"] == "rank")
    assert [layer for layer, *_ in ranking] == [1, 2, 3, 0]


def test_racing_chooses_the_better_form_of_each_layer():
    harm = {}
    for layer in range(8):
        good, bad = ("gla", "gated_deltanet") if layer % 2 else ("gated_deltanet", "gla")
        harm |= {(layer, good): (1, 1), (layer, bad): (40, 40)}
    problem = solve(Racing(), PlantedEvaluator(8, harm))
    taken = [form for form in problem.committed.layout if form]
    assert len(taken) == 7
    assert all(
        form == ("gla" if layer % 2 else "gated_deltanet")
        for layer, form in enumerate(problem.committed.layout)
        if form
    )


def test_a_form_that_saves_more_is_worth_more_harm():
    harm = {(layer, "gla"): (2, 2) for layer in range(4)} | {(layer, "gated_deltanet"): (3, 3) for layer in range(4)}
    cost = LinearCost(ratio=lambda layout: 1 - 0.01 * layout.count("gla") - 0.1 * layout.count("gated_deltanet"))
    problem = solve(Racing(), PlantedEvaluator(4, harm), cost=cost)
    assert problem.committed.layout.count("gated_deltanet") == 3


def test_stops_when_more_layers_are_not_faster():
    """Time falls up to eight layers and rises again: the search does not go on for the sake of replacing."""
    harm = {(layer, "gla"): (0, 0) for layer in range(20)}
    cost = LinearCost(ratio=lambda layout: 0.92 + 0.01 * abs(replaced(layout) - 8))
    problem = solve(Racing(step=5), PlantedEvaluator(20, harm), cost=cost)
    assert FLOOR.choose(list(problem.visits.values())).replaced == 8


def test_goes_on_over_a_hump():
    """vLLM's first replacements can be slower than the backbone: what counts is whether any number ahead is faster."""
    harm = {(layer, "gla"): (0, 0) for layer in range(20)}
    cost = LinearCost(ratio=lambda layout: 1 + (0.2 if 0 < replaced(layout) < 10 else 0.0) - 0.02 * replaced(layout))
    problem = solve(Racing(step=2), PlantedEvaluator(20, harm), cost=cost)
    assert problem.committed.replaced == 19


def test_goal_score_replaces_no_more_than_the_speedup_takes():
    evaluator, _ = planted()
    objective = Objective(Targets(speedup=1.25), max_score_loss=0.03, goal="score")
    problem = solve(Racing(), evaluator, objective)  # 1 / (1 - 0.02 n) >= 1.25 from n = 10
    assert problem.committed.replaced == 10


def test_max_replaced_is_kept():
    evaluator, _ = planted()
    problem = solve(Racing(), evaluator, Objective(max_score_loss=0.03, max_replaced=7))
    assert problem.committed.replaced == 7
    assert max(visit.replaced for visit in problem.visits.values()) == 7


def test_one_layer_always_keeps_full_attention():
    harm = {(layer, "gla"): (0, 0) for layer in range(6)}
    for strategy in [make_strategy(name) for name in STRATEGIES]:
        problem = solve(strategy, PlantedEvaluator(6, harm))
        assert problem.committed.replaced == 5, strategy.name


def test_frontier_goal_goes_to_the_end_whatever_it_costs():
    harm = {(layer, "gla"): (layer * 20, 0) for layer in range(8)}
    objective = Objective(max_score_loss=0.02, goal="frontier")
    for strategy in (Racing(step=1), Exhaustive()):
        problem = solve(strategy, PlantedEvaluator(8, harm), objective)
        assert problem.committed.replaced == 7
        assert objective.choose(list(problem.visits.values())).loss.combined <= 0.02


def test_max_task_loss_keeps_one_task_from_paying_for_another():
    harm = {(layer, "gla"): (-20, 30) for layer in range(4)}  # the sum gains, recall loses
    evaluator = PlantedEvaluator(4, harm)
    objective = Objective(max_score_loss=0.02, max_task_loss=0.05)
    problem = solve(Exhaustive(), evaluator, objective)
    assert problem.committed.replaced == 1


@pytest.mark.parametrize("name", ["one_shot", "uniform", "random"])
def test_baselines_commit_a_longest_prefix_within_the_floor(name):
    rng = random.Random(1)
    harm = {(layer, "gla"): (rng.randint(1, 6), rng.randint(1, 6)) for layer in range(16)}
    problem = solve(make_strategy(name), PlantedEvaluator(16, harm))
    chosen = problem.committed
    assert 0 < chosen.replaced < 15 and chosen.passes
    changes = [tuple(change) for change in problem.steps[-1]["changes"]]
    rejected = [step for step in problem.steps if step["action"] == "reject"]
    assert min(step["replaced"] for step in rejected) == chosen.replaced + 1
    assert chosen.layout == tuple("gla" if (layer, "gla") in changes else None for layer in range(16))


def test_baseline_goal_score_takes_the_shortest_fast_prefix_and_looks_once():
    harm = {(layer, "gla"): (1, 1) for layer in range(16)}
    evaluator = PlantedEvaluator(16, harm)
    problem = solve(OneShot(), evaluator, Objective(Targets(speedup=1.1), goal="score"))
    assert problem.committed.replaced == 5  # 1 / (1 - 0.02 n) >= 1.1 from n = 5
    assert len({layout for kind, layout, _ in problem.scorer.calls if kind == "score"}) == 2


def test_uniform_spreads_every_prefix():
    harm = {(layer, "gla"): (0, 0) for layer in range(16)}
    problem = solve(make_strategy("uniform"), PlantedEvaluator(16, harm), Objective(max_score_loss=0.1, max_replaced=4))
    assert [layer for layer, form in enumerate(problem.committed.layout) if form] == [0, 4, 8, 12]


def test_limits_end_the_search_with_what_it_has():
    evaluator, _ = planted()
    problem = problem_of(evaluator, limits=Limits(max_trials=120))
    run(Racing(), problem)
    assert problem.steps[-1]["action"] == "out_of_budget"
    # A layout's last parts are scored together: at most that many trials more.
    assert 120 <= problem.scorer.spent_trials < 120 + problem.scorer.parts
    assert problem.committed.replaced > 0


def test_every_step_is_in_the_ledger():
    evaluator, _ = planted()
    problem = solve(Racing(), evaluator)
    assert problem.ledger.steps("test") == problem.steps
    actions = {step["action"] for step in problem.steps}
    assert {"base", "rank", "commit", "reject"} <= actions
    statuses = {trial.key.layout: trial.status for trial in problem.ledger.trials(kind="score")}
    assert all(statuses[visit.layout] == "committed" for visit in problem.path[1:])


def test_progress_counts_up_to_its_total():
    evaluator, _ = planted()
    seen = []
    ledger = Ledger(":memory:")
    problem = Problem(
        SyntheticScorer(evaluator, ledger),
        LinearCost(),
        FLOOR,
        ledger,
        "test",
        progress=lambda *report: seen.append(report),
    )
    run(Racing(), problem)
    counts = [done for done, _, _ in seen]
    assert counts == sorted(set(counts)) and counts[0] == 0
    assert all(done < total for done, total, _ in seen)
    assert all(message for _, _, message in seen)


@pytest.mark.parametrize("objective", [FLOOR, Objective(goal="frontier")])
def test_racing_by_attribution_ranks_as_by_trying(objective):
    """Exact estimates lead to the same layouts, without a swap tried for the first ranking or for the exchange."""
    found, calls = [], []
    for attributable in (False, True):
        ledger = Ledger(":memory:")
        scorer = SyntheticScorer(planted()[0], ledger, attributable=attributable)
        problem = Problem(scorer, LinearCost(), objective, ledger, "test")
        run(Racing(), problem)
        found.append([visit.layout for visit in problem.path])
        calls.append(scorer.calls)
    tried, estimated = calls
    assert found[0] == found[1] and len(found[0]) > 3
    singles = [apply(full(30), [candidate]) for candidate in problem.scorer.candidates]
    assert {("screen", layout, "search") for layout in singles} <= set(tried)
    assert not any(kind == "screen" and layout in singles for kind, layout, _ in estimated)
    assert {("attribution", layout, "search") for layout in singles} <= set(estimated)
    assert sum(kind == "screen" for kind, *_ in estimated) < 0.5 * sum(kind == "screen" for kind, *_ in tried)


def test_unknown_strategy():
    with pytest.raises(UsageError, match=r"search\.strategy: 'raceing'.*racing, exhaustive"):
        make_strategy("raceing")


def test_base_is_the_start_of_every_path():
    evaluator, _ = planted()
    assert solve(Racing(), evaluator).path[0].layout == full(30)


# --- what the racing default promises


def frontier_scores(problem: Problem, evaluator: NoisyEvaluator, speedups) -> np.ndarray:
    """True scores of the layouts that the search itself would pick at each speedup (by its own noisy score)."""
    picked = [
        max((v for v in problem.visits.values() if v.speedup >= speedup - 1e-9), key=lambda v: (v.score, v.margin))
        for speedup in speedups
    ]
    return np.array([evaluator.true_score(visit.layout) for visit in picked])


@pytest.mark.parametrize(("seed", "settings"), [(0, {}), (1, {"interaction": 0.0}), (2, {"screen_error": 0.8})])
def test_racing_finds_the_frontier_at_a_fraction_of_the_cost(seed, settings):
    """30 layers, two forms, 128 noisy items, harms that add and interact: the paper's greedy scores 928 layouts."""
    evaluator = NoisyEvaluator(seed, **settings)
    objective = Objective(goal="frontier")
    cost = LinearCost(ratio=lambda layout: 1 - 0.015 * layout.count("gated_deltanet") - 0.016 * layout.count("gla"))
    racing = solve(Racing(), evaluator, objective, cost)
    exhaustive = solve(Exhaustive(), evaluator, objective, cost)
    one_shot = solve(OneShot(), evaluator, objective, cost)
    assert racing.scorer.spent_layer_forwards <= 0.15 * exhaustive.scorer.spent_layer_forwards
    speedups = [1 / (1 - 0.015 * count) for count in range(2, 28)]
    ours, paper, ranked = (frontier_scores(p, evaluator, speedups) for p in (racing, exhaustive, one_shot))
    # A score on 128 items has a standard error of 0.03 to 0.04 where curves are steep; of a mean over levels, less.
    assert (ours - paper).mean() > -0.02 and (ours - paper).min() > -0.09
    assert (ours - paper).mean() > (ranked - paper).mean()
    replaced_counts = sorted({visit.replaced for visit in racing.visits.values()})
    assert replaced_counts[-1] == 29 and max(np.diff(replaced_counts)) <= 2


@pytest.mark.parametrize("name", ["one_shot", "uniform", "random"])
def test_baselines_trace_a_frontier_of_prefixes(name):
    harm = {(layer, "gla"): (layer * 20, 0) for layer in range(12)}
    problem = solve(make_strategy(name), PlantedEvaluator(12, harm), Objective(goal="frontier"))
    assert [visit.replaced for visit in problem.path] == [0, 3, 6, 9, 11]
    for before, after in itertools.pairwise(problem.path):
        assert all(new == old for old, new in zip(before.layout, after.layout, strict=True) if old is not None)


def test_a_layer_that_turned_out_bad_is_exchanged():
    """Layers 0 and 3 are harmless alone and ruinous together; the path has both, and leaves out 6 and 7."""
    harm = {(layer, "gla"): (2, 2) for layer in range(8)}
    evaluator = PlantedEvaluator(8, harm, interaction=lambda layout: 15 if layout[0] and layout[3] else 0)
    problem = problem_of(evaluator, Objective(max_score_loss=0.05))
    changes = [Candidate(layer, "gla") for layer in range(6)]
    problem.commit(problem.visit(apply(full(8), changes)), changes)
    exchange(problem, gains(problem), exchanges=3, divergence_weight=1.0)
    assert problem.committed.replaced == 6 and problem.committed.loss.combined == pytest.approx(0.012)
    assert not (problem.committed.layout[0] and problem.committed.layout[3])


def test_nothing_is_exchanged_for_a_score_that_is_better_by_chance_only():
    harm = {(layer, "gla"): (2, 2) for layer in range(6)} | {(6, "gla"): (1, 1), (7, "gla"): (1, 2)}
    problem = problem_of(PlantedEvaluator(8, harm), Objective(max_score_loss=0.05))
    changes = [Candidate(layer, "gla") for layer in range(6)]
    problem.commit(problem.visit(apply(full(8), changes)), changes)
    exchange(problem, gains(problem), exchanges=3, divergence_weight=1.0)
    assert len(problem.path) == 2


def test_windows_of_a_form_are_candidates_of_their_own():
    """A wider window costs less score and more time: each layer gets the cheap one unless it hurts there."""
    wide = "gated_deltanet@256"
    harm = {(layer, "gated_deltanet"): (60, 60) if layer in (2, 5) else (1, 1) for layer in range(8)}
    harm |= {(layer, wide): (1, 1) for layer in range(8)}
    cost = LinearCost(ratio=lambda layout: 1 - 0.02 * layout.count("gated_deltanet") - 0.015 * layout.count(wide))
    problem = solve(Racing(), PlantedEvaluator(8, harm), cost=cost)
    layout = FLOOR.choose(list(problem.visits.values())).layout
    assert layout.count(None) == 1 and "gated_deltanet" not in (layout[2], layout[5])
    assert layout.count("gated_deltanet") >= 5


def test_gains_follow_costs_that_differ_by_layer():
    evaluator = PlantedEvaluator(6, {(layer, "gla"): (0, 0) for layer in range(6)})
    savings = [0.01, 0.02, 0.03, 0.01, 0.02, 0.03]
    cost = LinearCost(ratio=lambda layout: 1 - sum(s for s, form in zip(savings, layout, strict=True) if form))
    gain = gains(problem_of(evaluator, cost=cost))
    assert [gain[Candidate(layer, "gla")] / gain[Candidate(2, "gla")] for layer in range(6)] == pytest.approx(
        [s / 0.03 for s in savings], rel=0.15
    )  # not exact: the share is that of all layers but one


def test_gains_see_through_a_hump():
    """Costs that are no sum: the first replacements are slower than none, and yet every layer is worth the same."""
    evaluator = PlantedEvaluator(10, {(layer, "gla"): (0, 0) for layer in range(10)})
    cost = LinearCost(ratio=lambda layout: 1 + (0.2 if 0 < replaced(layout) < 4 else 0.0) - 0.02 * replaced(layout))
    assert set(gains(problem_of(evaluator, cost=cost)).values()) == {1.0}


def test_goal_score_reaches_a_time_to_first_token_and_no_more():
    harm = {(layer, "gla"): (1, 1) for layer in range(16)}
    targets = Targets(first_token_seconds=1.7, cache_bytes=120 << 20)  # 2.0 (1 - 0.02 n) from n = 8; 10 MiB a layer
    problem = solve(Racing(), PlantedEvaluator(16, harm), Objective(targets, max_score_loss=0.05, goal="score"))
    assert problem.committed.replaced == 8


def test_goal_throughput_pays_for_a_bound_on_the_cache_with_time_where_it_must():
    """Replaced layers are slower here, and yet only they keep the bound; no more of them than it takes."""
    harm = {(layer, "gla"): (1, 1) for layer in range(16)}
    objective = Objective(Targets(cache_bytes=120 << 20), max_score_loss=0.05)  # 10 MiB a layer
    problem = solve(Racing(), PlantedEvaluator(16, harm), objective, cost=LinearCost(saving=-0.01))
    assert objective.choose(list(problem.visits.values())).replaced == 4


def test_the_upper_bound_of_the_loss_allows_less():
    rng = np.random.default_rng(3)
    harm = {(layer, "gla"): (int(rng.integers(0, 3)), int(rng.integers(0, 3))) for layer in range(16)}
    estimate, upper = (
        solve(Racing(), PlantedEvaluator(16, harm, items=200), Objective(max_score_loss=0.04, bound=bound))
        for bound in ("estimate", "upper")
    )
    assert upper.committed.replaced < estimate.committed.replaced
    assert upper.committed.loss.combined < upper.committed.loss.upper <= 0.04
