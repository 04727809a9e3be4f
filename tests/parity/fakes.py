"""Engines whose distributions are known exactly, to hold parity's arithmetic to."""

from collections.abc import Sequence

import numpy as np

from dtr_deploy.engines.base import TokenScores

VOCABULARY = 100


def logits_of(prompt: Sequence[int], seed: int = 0) -> np.ndarray:
    """[T-1, VOCABULARY] float64 logits that depend on the prompt and the seed alone."""
    random = np.random.default_rng([seed, *prompt])
    return 3 * random.standard_normal((len(prompt) - 1, VOCABULARY))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def scores_of(prompt: Sequence[int], logprobs: np.ndarray, top: int = 32) -> TokenScores:
    """What an engine with these log-probabilities [T-1, VOCABULARY] reports."""
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :top]
    actual = np.asarray(prompt[1:], dtype=np.int64)[:, None]
    return TokenScores(
        list(prompt),
        np.take_along_axis(logprobs, actual, 1)[:, 0].astype(np.float32),
        order.astype(np.int32),
        np.take_along_axis(logprobs, order, 1).astype(np.float32),
    )


class FakeEngine:
    """Distributions `softmax(logits_of(prompt) + noise)`; noise is a standard deviation, the same at every call."""

    name = "fake"

    def __init__(self, precision: str = "fp32", noise: float = 0.0, top: int = 32) -> None:
        self.precision, self.noise, self.top = precision, noise, top
        self.scored: list[list[int]] = []
        self.closed = False

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        assert not self.closed
        self.scored += [list(prompt) for prompt in prompts]
        return [scores_of(prompt, log_softmax(self.logits(prompt)), self.top) for prompt in prompts]

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        return logits_of(prompt) + self.noise * logits_of(prompt, seed=1)

    def close(self) -> None:
        self.closed = True
