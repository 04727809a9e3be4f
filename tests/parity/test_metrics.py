"""Distances between programs, held to formulas over whole distributions."""

import numpy as np
import pytest
from scipy.special import rel_entr

from dtr_deploy.engines.base import TokenScores
from dtr_deploy.parity.metrics import coarse_kl, distance
from tests.parity.fakes import VOCABULARY, FakeEngine, log_softmax, scores_of

PROMPTS = [list(np.random.default_rng(n).integers(0, VOCABULARY, n)) for n in (2, 3, 17, 60)]
FLOAT32 = 1e-6
"""The scores are float32 log-probabilities of a few units: sums of 33 of them are right to about this."""


def test_whole_distributions_give_the_exact_kl() -> None:
    """With the top list as long as the vocabulary nothing is joined, and scipy's relative entropy is the reference."""
    ours, theirs = FakeEngine(top=VOCABULARY), FakeEngine(noise=0.1, top=VOCABULARY)
    for prompt in PROMPTS:
        p, q = (np.exp(log_softmax(engine.logits(prompt))) for engine in (ours, theirs))
        found = coarse_kl(ours.score([prompt])[0], theirs.score([prompt])[0])
        np.testing.assert_allclose(found, rel_entr(p, q).sum(-1), atol=FLOAT32)


def test_top_lists_give_the_kl_of_the_joined_outcomes() -> None:
    """Reference: a loop over positions that joins in plain Python what not both report."""
    ours, theirs = FakeEngine(), FakeEngine(noise=0.5)
    for prompt in PROMPTS:
        left, right = ours.score([prompt])[0], theirs.score([prompt])[0]
        p, q = (np.exp(log_softmax(engine.logits(prompt))) for engine in (ours, theirs))
        expected = []
        for t, actual in enumerate(prompt[1:]):
            both = (set(left.top_ids[t]) | {actual}) & (set(right.top_ids[t]) | {actual})
            kept = sorted(int(token) for token in both)
            joined_p = [*p[t, kept], 1 - p[t, kept].sum()]
            joined_q = [*q[t, kept], 1 - q[t, kept].sum()]
            expected.append(rel_entr(joined_p, joined_q).sum())
        np.testing.assert_allclose(coarse_kl(left, right), expected, atol=FLOAT32)


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_joining_outcomes_never_raises_the_kl(noise: float) -> None:
    whole, ours = FakeEngine(top=VOCABULARY), FakeEngine()
    other_whole, theirs = FakeEngine(noise=noise, top=VOCABULARY), FakeEngine(noise=noise)
    for prompt in PROMPTS:
        exact = coarse_kl(whole.score([prompt])[0], other_whole.score([prompt])[0])
        coarse = coarse_kl(ours.score([prompt])[0], theirs.score([prompt])[0])
        assert (coarse <= exact + FLOAT32).all()
        assert coarse.sum() > 0.5 * exact.sum()  # and it still sees most of it


def test_equal_programs_have_no_distance() -> None:
    engine = FakeEngine()
    found = distance(engine.score(PROMPTS), engine.score(PROMPTS))
    assert (found.max_abs_dlogprob, found.mean_kl, found.greedy_agreement) == (0.0, 0.0, 1.0)
    assert found.prompts == 4 and found.positions == sum(len(prompt) - 1 for prompt in PROMPTS)


def test_the_largest_difference_and_the_means_are_over_all_positions() -> None:
    ours, theirs = FakeEngine(), FakeEngine(noise=0.3)
    left, right = ours.score(PROMPTS), theirs.score(PROMPTS)
    found = distance(left, right)
    differences = np.concatenate([a.logprobs - b.logprobs for a, b in zip(left, right, strict=True)])
    assert found.max_abs_dlogprob == pytest.approx(np.abs(differences).max(), rel=1e-6)
    kls = np.concatenate([coarse_kl(a, b) for a, b in zip(left, right, strict=True)])
    assert found.mean_kl == pytest.approx(kls.mean())
    argmax = [(logits_pair[0].argmax(-1), logits_pair[1].argmax(-1)) for logits_pair in _logits(ours, theirs)]
    agree = np.concatenate([a == b for a, b in argmax])
    assert found.greedy_agreement == pytest.approx(agree.mean())


def _logits(ours: FakeEngine, theirs: FakeEngine) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(ours.logits(prompt), theirs.logits(prompt)) for prompt in PROMPTS]


@pytest.mark.parametrize("broken", [np.nan, -np.inf, np.inf])
def test_a_broken_program_is_infinitely_far(broken: float) -> None:
    prompt = PROMPTS[2]
    logprobs = log_softmax(FakeEngine().logits(prompt))
    bad = logprobs.copy()
    bad[5] = broken
    found = distance([scores_of(prompt, logprobs)], [scores_of(prompt, bad)])
    assert found.max_abs_dlogprob == found.mean_kl == float("inf")


def test_prompts_of_one_token_have_no_positions() -> None:
    empty = TokenScores([7], np.zeros(0, np.float32), np.zeros((0, 32), np.int32), np.zeros((0, 32), np.float32))
    found = distance([empty], [empty])
    assert (found.prompts, found.positions, found.mean_kl, found.greedy_agreement) == (1, 0, 0.0, 1.0)


def test_different_prompts_are_refused() -> None:
    engine = FakeEngine()
    with pytest.raises(ValueError, match="different prompts"):
        distance(engine.score([[1, 2, 3]]), engine.score([[1, 2, 4]]))
