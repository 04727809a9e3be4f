"""Sampling: what may be drawn, with which probability, and from whose random numbers."""

import numpy as np
import pytest

from dtr_deploy.engines.sampling import Chooser, Sampling, candidates
from dtr_deploy.errors import UsageError

LOGITS = np.log(np.array([0.1, 0.4, 0.05, 0.3, 0.15], np.float32))


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        ({}, {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.6}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.75}, {1: 0.4 / 0.85, 3: 0.3 / 0.85, 4: 0.15 / 0.85}),
        ({"top_k": 3, "top_p": 0.5}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 99}, {1: 0.4, 3: 0.3, 4: 0.15, 0: 0.1, 2: 0.05}),
        ({"temperature": 0.5, "top_k": 2}, {1: 0.16 / 0.25, 3: 0.09 / 0.25}),
    ),
)
def test_candidates(options, expected):
    ids, probabilities = candidates(LOGITS, Sampling(**{"temperature": 1.0, **options}))
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-6)


def test_nucleus_equals_a_sort_of_everything():
    logits = np.random.default_rng(0).normal(size=5000).astype(np.float32) * 3
    for top_p in (0.1, 0.5, 0.9, 0.999):
        weights = np.exp(logits.astype(np.float64) - logits.max())
        weights /= weights.sum()
        order = np.argsort(-weights, kind="stable")
        enough = int(np.searchsorted(weights[order].cumsum(), top_p)) + 1
        ids, _ = candidates(logits, Sampling(1.0, top_p=top_p))
        assert ids.tolist() == order[:enough].tolist()


def test_equal_logits_are_ordered_by_id():
    ids, _ = candidates(np.zeros(6, np.float32), Sampling(1.0, top_k=3))
    assert ids.tolist() == [0, 1, 2]


def test_frequencies_follow_the_probabilities():
    """10,000 draws: a standard error is at most 0.005."""
    chooser = Chooser(Sampling(1.0, seed=3))
    counts = np.bincount([chooser.choose(LOGITS) for _ in range(10_000)], minlength=5)
    np.testing.assert_allclose(counts / 10_000, np.exp(LOGITS), atol=0.02)


def test_a_seed_is_a_sequence():
    def draw(seed):
        chooser = Chooser(Sampling(1.0, seed=seed))
        return [chooser.choose(LOGITS) for _ in range(30)]

    assert draw(1) == draw(1) != draw(2)
    greedy = Chooser(Sampling(seed=1))
    assert [greedy.choose(LOGITS) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    "options", ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"seed": -1})
)
def test_values_out_of_range(options):
    with pytest.raises(UsageError, match=f"sampling: {next(iter(options))} is .*accepted"):
        Sampling(**options)
