"""TaskScore and the combined score."""

import json

import numpy as np
import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import TaskScore, check_split, combined


def score(values: list[float], strata: tuple[str, ...] = ()) -> TaskScore:
    return TaskScore("t", "search", np.array(values), np.array(values) - 1.5, strata)


def test_the_standard_error_is_that_of_a_mean() -> None:
    # Of a proportion p over n items, with the unbiased variance: sqrt(p (1 - p) / (n - 1)).
    result = score([1, 1, 1, 0] * 5)
    assert result.mean == 0.75
    assert result.standard_error == pytest.approx((0.75 * 0.25 / 19) ** 0.5)
    assert score([1.0]).standard_error == float("inf")


def test_a_score_survives_json() -> None:
    before = score([0.1, 1 / 3, 1.0], ("a", "b", "a"))
    after = TaskScore.from_dict(json.loads(json.dumps(before.to_dict())))
    np.testing.assert_array_equal(after.per_item, before.per_item)
    np.testing.assert_array_equal(after.margins, before.margins)
    assert (after.task, after.split, after.strata) == (before.task, before.split, before.strata)


def test_strata_keep_their_order_and_their_means() -> None:
    assert score([1, 0, 0, 0], ("2048", "512", "2048", "512")).by_stratum() == {"2048": 0.5, "512": 0.0}
    assert score([1, 0]).by_stratum() == {}


def test_combined_is_a_weighted_mean_of_means() -> None:
    assert combined([score([1, 1]), score([0, 0, 0, 1])], [1, 3]) == pytest.approx((1 + 3 * 0.25) / 4)
    with pytest.raises(UsageError, match="weights"):
        combined([score([1, 1])], [0])


def test_mismatched_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        TaskScore("t", "search", np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="one number an item"):
        TaskScore("t", "search", np.zeros(0), np.zeros(0))


def test_unknown_splits_are_refused() -> None:
    assert check_split("confirm") == "confirm"
    with pytest.raises(UsageError, match="search, confirm, test"):
        check_split("train")
