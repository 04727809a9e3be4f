"""How far two programs are apart on the same tokens: log-probabilities, KL divergence, greedy choice.

KL comes from the `TOP_K` most likely tokens of each side, since no server reports a whole distribution. Tokens that
both report (the actual next one among them) are compared one by one, all others together as one bucket. Joining
outcomes can only lower a KL divergence (data-processing inequality), so this is a lower bound of the true one; it is
the same lower bound for the hybrid and for the backbone it is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtr_deploy.engines.base import TokenScores

SMALLEST_REST = 1e-7
"""The bucket's probability is 1 minus a float32 sum: below this it is rounding noise."""


@dataclass(frozen=True)
class Distance:
    """How far scores are from the reference's, over all positions of all prompts. `mean_kl` in nats per token."""

    prompts: int
    positions: int
    max_abs_dlogprob: float
    mean_kl: float
    greedy_agreement: float


def distance(reference: Sequence[TokenScores], other: Sequence[TokenScores]) -> Distance:
    """Compare two programs' scores of the same prompts.

    max_abs_dlogprob: the largest difference of the actual next token's log-probability; a value that is not finite
    gives infinity. mean_kl: KL(reference || other). greedy_agreement: share of positions with the same most likely
    token (1.0 if there are none).
    """
    if [scores.tokens for scores in reference] != [scores.tokens for scores in other]:
        raise ValueError("the two programs scored different prompts")
    differences, divergences, agreements = [], [], []
    for ours, theirs in zip(reference, other, strict=True):
        differences.append(np.abs(ours.logprobs.astype(np.float64) - theirs.logprobs))
        divergences.append(coarse_kl(ours, theirs))
        agreements.append(ours.top_ids[:, 0] == theirs.top_ids[:, 0])
    difference, divergence, agreement = (np.concatenate(part) for part in (differences, divergences, agreements))
    if not len(difference):
        return Distance(len(reference), 0, 0.0, 0.0, 1.0)
    finite = bool(np.isfinite(difference).all() and np.isfinite(divergence).all())
    return Distance(
        prompts=len(reference),
        positions=len(difference),
        max_abs_dlogprob=float(difference.max()) if finite else float("inf"),
        mean_kl=float(divergence.mean()) if finite else float("inf"),
        greedy_agreement=float(agreement.mean()),
    )


def coarse_kl(reference: TokenScores, other: TokenScores) -> np.ndarray:
    """[T-1] float64: KL(reference || other) at each position, over {tokens that both report, all others}."""
    actual = np.asarray(reference.tokens[1:], dtype=np.int64)[:, None]
    is_actual = reference.top_ids == actual
    # What `other` says of the reference's top tokens; -inf where it does not report them.
    same = reference.top_ids[:, :, None] == other.top_ids[:, None, :]
    log_q = np.where(same, other.top_logprobs[:, None, :].astype(np.float64), -np.inf).max(-1)
    log_q = np.where(is_actual, other.logprobs[:, None], log_q)
    both = log_q != -np.inf
    # The actual next token is the last column, unless it is among the top ones already.
    log_p = np.concatenate([reference.top_logprobs, reference.logprobs[:, None]], axis=1).astype(np.float64)
    log_q = np.concatenate([log_q, other.logprobs[:, None]], axis=1)
    both = np.concatenate([both, ~is_actual.any(1, keepdims=True)], axis=1)

    p, q = (np.where(both, np.exp(values), 0.0) for values in (log_p, log_q))
    rest_p, rest_q = (np.maximum(1.0 - values.sum(1), SMALLEST_REST) for values in (p, q))
    log_ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=both)
    result = (p * log_ratio).sum(1) + rest_p * np.log(rest_p / rest_q)
    # Rounding can push equal distributions a hair below zero; nan (a broken program) stays nan.
    return np.where(result < 0, 0.0, result)
