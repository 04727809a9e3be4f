"""Choosing the next token from logits: greedy, or drawn with temperature, top-k and top-p from a request's own seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtr_deploy.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    temperature: divides the logits; 0 takes the most likely token, and the other fields do not matter.
    top_k: draw from that many most likely tokens; 0 for all.
    top_p: draw from the fewest most likely tokens that have this much probability together, after top_k.
    seed: of the request's own random numbers, one for each token, so that what is drawn does not depend on what else
        is in the batch.

    Raises UsageError for a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fits, accepted in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0, at most 1"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not fits:
                raise UsageError(f"sampling: {name} is {getattr(self, name)}; accepted: {accepted}")


GREEDY = Sampling()


class Chooser:
    """Chooses the tokens of one request, one after another."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """logits [vocabulary], float32 or float16 -> the id of the next token."""
        if not self.sampling.temperature:
            return int(logits.argmax())
        ids, probabilities = candidates(logits, self.sampling)
        # The last sum is 1 but for rounding, and a random number is below 1.
        place = int(np.searchsorted(probabilities.cumsum(), self._random.random() * probabilities.sum(), side="right"))
        return int(ids[min(place, len(ids) - 1)])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn, most likely first (the smaller id first among equals), and their probabilities,
    float64, sum 1. The temperature must not be 0."""
    scaled = logits.astype(np.float64) / sampling.temperature
    ids = np.arange(len(scaled))
    if 0 < sampling.top_k < len(ids):
        kth = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        ids = np.flatnonzero(scaled >= kth)
    weights = np.exp(scaled[ids] - scaled[ids].max())
    weights /= weights.sum()
    if sampling.top_p < 1:
        # Tokens below this share have less than 1 - top_p together, so none of them is needed: they need no sorting.
        likely = weights >= (1 - sampling.top_p) / len(weights)
        ids, weights = ids[likely], weights[likely]
    order = np.lexsort((ids, -weights))
    if sampling.top_k:
        order = order[: sampling.top_k]
    ids, weights = ids[order], weights[order]
    if sampling.top_p < 1:
        enough = int(np.searchsorted(weights.cumsum(), sampling.top_p)) + 1
        ids, weights = ids[:enough], weights[:enough]
    return ids, weights / weights.sum()
