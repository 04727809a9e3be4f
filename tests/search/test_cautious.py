"""Intervals that decisions on few items rest on: a table by hand, coverage, and draws that agree with scipy's."""

import numpy as np
import pytest
from scipy import stats

from dtr_deploy.search.resampling import Group, drawn_means
from dtr_deploy.search.statistics import cautious_difference, margin_standard_error
from dtr_deploy.tasks.base import TaskScore


def score(items, name: str = "t", strata: tuple[str, ...] = ()) -> TaskScore:
    values = np.asarray(items, float)
    return TaskScore(name, "search", values, values * 2 - 3, strata)


def test_it_is_agresti_and_mins_interval():
    """Matched pairs 12 / 9 / 3 / 16 (both, first only, second only, neither), by the paper's formula: n + 2 pairs, half
    a pair more in each cell."""
    one = [1] * 12 + [1] * 9 + [0] * 3 + [0] * 16
    other = [1] * 12 + [0] * 9 + [1] * 3 + [0] * 16
    p12, p21, n = 9.5 / 42, 3.5 / 42, 42
    error = np.sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
    found = cautious_difference([score(one)], [score(other)], [1.0])
    assert found.estimate == pytest.approx(p12 - p21)
    assert (found.low, found.high) == pytest.approx((p12 - p21 - 1.959964 * error, p12 - p21 + 1.959964 * error))


def test_few_items_that_agree_prove_little():
    three, many = (cautious_difference([score([1] * n)], [score([1] * n)], [1.0]) for n in (3, 3000))
    assert three.low < -0.3 and three.high > 0.3 and three.estimate == 0
    assert many.high < 0.001


def test_a_task_of_one_item_a_stratum_can_be_judged():
    strata = ("512", "1024", "2048")
    interval = cautious_difference([score([1, 1, 1], strata=strata)], [score([0, 0, 0], strata=strata)], [1.0])
    assert np.isfinite(interval.standard_error)
    assert np.isfinite(margin_standard_error([score([1, 0, 1])], [score([0, 0, 1])], [1.0]))


@pytest.mark.parametrize(("items", "differ"), [(8, 0.3), (30, 0.1), (120, 0.05)])
def test_it_covers_no_difference_on_few_items(items, differ):
    """Both models are wrong on different items equally often: 95% intervals exclude 0 in at most 7% of 2,000 draws."""
    rng = np.random.default_rng(items)
    excluded = 0
    for _ in range(2000):
        flips = rng.random(items)
        one, other = np.ones(items), np.ones(items)
        one[flips < differ / 2] = 0
        other[flips > 1 - differ / 2] = 0
        interval = cautious_difference([score(one)], [score(other)], [1.0])
        excluded += interval.low > 0 or interval.high < 0
    assert excluded / 2000 <= 0.07


def test_shared_draws_agree_with_scipy_and_are_paired():
    rng = np.random.default_rng(1)
    values = (rng.random((150, 3)) < [0.2, 0.5, 0.5]).astype(float)
    drawn = drawn_means([Group(values, 1.0)], resamples=8000)
    for column in range(3):
        expected = stats.bootstrap(
            [values[:, column]], np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(2)
        )
        ours = np.quantile(drawn[:, column], [0.025, 0.975])
        # Monte Carlo error of both: about 0.03 standard errors each.
        assert ours == pytest.approx(list(expected.confidence_interval), abs=0.12 * expected.standard_error)
    alone = drawn_means([Group(values[:, 1], 1.0)], resamples=8000)
    np.testing.assert_allclose(drawn[:, 1], alone, atol=1e-6)  # the same items are picked, whoever else is there


def test_groups_add_by_their_shares_and_what_does_not_vary_is_exact():
    rng = np.random.default_rng(3)
    groups = [Group(np.full(5, 0.25), 0.4), Group(rng.normal(size=80), 0.6)]
    drawn = drawn_means(groups, resamples=4000)
    assert drawn.shape == (4000,)
    assert drawn.mean() == pytest.approx(0.1 + 0.6 * groups[1].values.mean(), abs=0.01)
    assert drawn.std() == pytest.approx(0.6 * groups[1].values.std() / np.sqrt(80), rel=0.05)
    assert (drawn_means(groups[:1]) == 0.4 * 0.25).all()
