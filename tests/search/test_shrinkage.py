"""The winner's curse: what is expected is what happens, over many searches whose truth is known."""

import numpy as np
import pytest

from dtr_deploy.search.objective import LayoutScore, Loss, Objective, Visit
from dtr_deploy.search.shrinkage import expected_shrinkage
from dtr_deploy.tasks.base import TaskScore
from dtr_deploy.throughput.performance import Performance

ITEMS = 200


def search_of(rng: np.random.Generator, rights: np.ndarray) -> tuple[list[Visit], list[LayoutScore]]:
    """The backbone (right with 0.9) and layouts that are right on an item with probability `rights`, one each."""
    layouts = [(None,) * len(rights)]
    layouts += [tuple("gla" if i == j else None for j in range(len(rights))) for i in range(len(rights))]
    scores = []
    for layout, right in zip(layouts, [0.9, *rights], strict=True):
        items = (rng.random(ITEMS) < right).astype(float)
        task = TaskScore("t", "search", items, items - 1)
        scores.append(LayoutScore(layout, "search", (task,), (1.0,)))
    visits = []
    for index, score in enumerate(scores):
        loss = Loss.between(scores[0], score) if index else Loss.none(score)
        performance = Performance(1.0 if index == 0 else 1.5, 1.0, 0.01, 1)
        visits.append(Visit(score.layout, score.combined, score.margin, loss, performance, True))
    return visits, scores


def average(rights: np.ndarray, searches: int) -> tuple[float, float]:
    """(expected, actual) rise of the chosen layout's loss, means over searches."""
    objective = Objective(max_score_loss=1.0)
    expected, actual = [], []
    for seed in range(searches):
        visits, scores = search_of(np.random.default_rng(seed), rights)
        chosen = visits.index(objective.choose(visits))
        expected.append(expected_shrinkage(objective, scores[0], visits, scores, resamples=200, seed=seed))
        # The backbone's own luck is in both losses and cancels in the mean over searches.
        actual.append(scores[chosen].combined - rights[chosen - 1])
    return float(np.mean(expected)), float(np.mean(actual))


def test_a_single_layout_does_not_shrink():
    expected, actual = average(np.array([0.8]), 60)
    assert abs(expected) < 0.003 and abs(actual) < 0.012  # standard errors: 0.0004 and 0.0037


def test_the_best_of_many_equals_shrinks_and_the_estimate_is_between_its_known_limits():
    """Twenty equal layouts: the actual fall is E[max of 20] = 1.87 standard errors; the bootstrap sees 0.71 of it."""
    expected, actual = average(np.full(20, 0.8), 60)
    error = np.sqrt(0.8 * 0.2 / ITEMS)
    assert actual == pytest.approx(1.87 * error, rel=0.15)
    assert 0.6 * actual < expected < 1.05 * actual


def test_layouts_far_apart_do_not_shrink():
    expected, _ = average(np.array([0.85, 0.5, 0.4, 0.3]), 20)
    assert abs(expected) < 0.003


def test_a_bound_that_decides_makes_a_loss_look_smaller():
    """The fastest layout within the bound got there by luck as often as not, and the estimate knows."""
    objective = Objective(max_score_loss=0.08)
    rng = np.random.default_rng(5)
    values = []
    for seed in range(30):
        visits, scores = search_of(rng, np.full(12, 0.8))
        visits = [
            Visit(v.layout, v.score, v.margin, v.loss, Performance(1 + i / 10, 1.0, 0.01, 1), objective.passes(v.loss))
            for i, v in enumerate(visits)
        ]
        if any(v.passes and v.replaced for v in visits):
            values.append(expected_shrinkage(objective, scores[0], visits, scores, resamples=200, seed=seed))
    assert len(values) > 15 and np.mean(values) > 0.005
