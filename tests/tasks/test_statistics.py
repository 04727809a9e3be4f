"""Intervals and standard errors: closed forms, a bootstrap loop of our own, and coverage."""

import numpy as np
import pytest

from dtr_deploy.search.statistics import (
    difference_interval,
    difference_standard_error,
    items_needed,
    margin_difference_interval,
    score_interval,
    standard_error,
)
from dtr_deploy.tasks.base import TaskScore, combined


def score(values: np.ndarray, task: str = "t", strata: tuple[str, ...] = ()) -> TaskScore:
    return TaskScore(task, "search", values, np.asarray(values) - 2.0, strata)


def coins(probability: float, count: int, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).random(count) < probability).astype(float)


def test_the_standard_error_adds_tasks_in_quadrature() -> None:
    one, other = score(coins(0.8, 200, 0), "a"), score(coins(0.5, 50, 1), "b")
    expected = np.hypot(0.75 * one.standard_error, 0.25 * other.standard_error)
    assert standard_error([one, other], [3, 1]) == pytest.approx(expected)
    assert standard_error([one, other], [1, 0]) == pytest.approx(one.standard_error)


def test_strata_of_fixed_size_do_not_count_as_chance() -> None:
    # All items of one length right, all of the other wrong: the mean of 0.5 is certain.
    values, strata = np.array([1.0] * 8 + [0.0] * 8), ("512",) * 8 + ("2048",) * 8
    assert standard_error([score(values, strata=strata)], [1]) == 0
    assert standard_error([score(values)], [1]) > 0.1


def test_the_interval_equals_a_bootstrap_loop() -> None:
    scores, weights = [score(coins(0.7, 120, 2), "a"), score(coins(0.4, 40, 3), "b")], [2.0, 1.0]
    interval = score_interval(scores, weights, resamples=4000)
    rng = np.random.default_rng(99)
    draws = [
        sum(w * rng.choice(s.per_item, s.per_item.size).mean() for s, w in zip(scores, weights, strict=True)) / 3
        for _ in range(4000)
    ]
    assert interval.estimate == pytest.approx(combined(scores, weights))
    # Monte Carlo error of a 2.5% quantile from 4,000 draws: about 0.04 standard errors; twice, and twice again.
    tolerance = 0.16 * interval.standard_error
    assert interval.low == pytest.approx(np.quantile(draws, 0.025), abs=tolerance)
    assert interval.high == pytest.approx(np.quantile(draws, 0.975), abs=tolerance)


def test_pairing_removes_what_both_models_share() -> None:
    base = coins(0.8, 400, 4)
    ours = base.copy()
    ours[:8] = 1 - ours[:8]  # they differ on 2% of the items
    candidate, reference = [score(ours)], [score(base)]
    interval = difference_interval(candidate, reference, [1])
    assert interval.estimate == pytest.approx(ours.mean() - base.mean())
    error = difference_standard_error(candidate, reference, [1])
    assert error == pytest.approx((ours - base).std(ddof=1) / 20)
    assert interval.standard_error == error < 0.3 * np.hypot(candidate[0].standard_error, reference[0].standard_error)


def test_ninety_five_percent_intervals_cover_the_truth() -> None:
    hits = 0
    for seed in range(200):
        truth = 0.75 * 0.7 + 0.25 * 0.4
        scores = [score(coins(0.7, 150, 2 * seed), "a"), score(coins(0.4, 80, 2 * seed + 1), "b")]
        interval = score_interval(scores, [3, 1], resamples=500, seed=seed)
        hits += interval.low <= truth <= interval.high
    # 200 trials at 0.95: 190 +- 3.1; four standard deviations either way.
    assert 178 <= hits <= 200


def test_the_seed_decides_the_interval() -> None:
    scores = [score(np.random.default_rng(5).normal(size=60))]
    assert score_interval(scores, [1]) == score_interval(scores, [1])
    assert score_interval(scores, [1], seed=1) != score_interval(scores, [1])


def test_scores_without_spread_have_an_interval_of_no_width() -> None:
    sure, unsure = score(np.ones(16), "a"), score(coins(0.5, 100, 6), "b")
    interval = score_interval([sure], [1])
    assert (interval.low, interval.estimate, interval.high, interval.standard_error) == (1, 1, 1, 0)
    mixed = score_interval([sure, unsure], [1, 1])
    assert mixed.low < mixed.estimate < mixed.high
    assert mixed.estimate == pytest.approx((1 + unsure.mean) / 2)
    same = difference_interval([sure, unsure], [sure, unsure], [1, 1])
    assert (same.low, same.estimate, same.high) == (0, 0, 0)


def test_a_single_item_says_nothing_about_chance() -> None:
    interval = score_interval([score(np.ones(1))], [1])
    assert (interval.low, interval.high, interval.standard_error) == (-np.inf, np.inf, np.inf)


def test_margins_are_compared_in_pairs_too() -> None:
    base = [score(coins(0.5, 50, 7))]
    better = [TaskScore("t", "search", base[0].per_item, base[0].margins + 0.25)]
    assert margin_difference_interval(better, base, [1]).estimate == pytest.approx(0.25)
    assert difference_interval(better, base, [1]).estimate == 0


def test_scores_of_other_items_are_refused() -> None:
    one, short = score(coins(0.5, 20, 8)), score(coins(0.5, 19, 8))
    for other in (short, score(coins(0.5, 20, 8), "u"), TaskScore("t", "test", one.per_item, one.margins)):
        with pytest.raises(ValueError, match="not of the same items"):
            difference_interval([one], [other], [1])
    with pytest.raises(ValueError, match="same tasks"):
        difference_interval([one], [one, one], [1])
    with pytest.raises(ValueError, match="weights"):
        score_interval([one], [0])


def test_items_needed_is_the_inverse_of_the_standard_error() -> None:
    result = score(coins(0.85, 300, 9))
    count = items_needed(result, 0.02)
    assert np.sqrt(result.per_item.var(ddof=1) / count) <= 0.02 < np.sqrt(result.per_item.var(ddof=1) / (count - 1))
