"""The requests of a soak: how long, with which beginnings, when they are aborted. Random, and the same for a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Of all prompts, this share has a length spread evenly over the whole range; the others' logarithm is.
EVEN_LENGTHS = 0.1
PREFIXES = 8
# Steps after which a request is aborted that is not aborted at a token: it may still wait, be filled in, or decode.
ABORT_STEPS = 40


@dataclass(frozen=True)
class PlannedRequest:
    """One request of a soak.

    shared: tokens at the prompt's beginning that other requests have too.
    abort_tokens, abort_steps: aborted when it has so many tokens, or so many steps after it was submitted; both None:
        not aborted.
    """

    prompt: list[int]
    new_tokens: int
    shared: int = 0
    abort_tokens: int | None = None
    abort_steps: int | None = None

    @property
    def aborted(self) -> bool:
        return self.abort_tokens is not None or self.abort_steps is not None


def plan_load(
    requests: int,
    vocabulary: np.ndarray,
    *,
    seed: int,
    longest: int,
    new_tokens: tuple[int, int],
    shared: float,
    aborted: float,
) -> list[PlannedRequest]:
    """The load for a seed.

    vocabulary: ids that prompts are drawn from, evenly. longest: tokens of a prompt. new_tokens: the fewest and the
    most. shared, aborted: shares of the requests. Half of the aborted ones are at a token, half at a step.
    """
    random = np.random.default_rng(seed)
    # Each prefix comes about as often as the others; the longest leaves half of a prompt's room.
    lengths = np.geomspace(max(1, longest // 100), max(1, longest // 2), PREFIXES).astype(int)
    prefixes = [random.choice(vocabulary, length).tolist() for length in lengths]
    doomed = set(random.choice(requests, round(aborted * requests), replace=False).tolist())
    load = []
    for number in range(requests):
        length = _length(random, longest)
        budget = int(random.integers(new_tokens[0], new_tokens[1] + 1))
        prefix: list[int] = []
        if random.random() < shared:
            prefix = prefixes[int(random.integers(PREFIXES))]
            length = max(1, min(length, longest - len(prefix)))
        prompt = prefix + random.choice(vocabulary, length).tolist()
        tokens = steps = None
        if number in doomed:
            if random.random() < 0.5:
                tokens = int(random.integers(1, budget))
            else:
                steps = int(random.integers(ABORT_STEPS))
        load.append(PlannedRequest(prompt, budget, len(prefix), tokens, steps))
    return load


def _length(random: np.random.Generator, longest: int) -> int:
    if random.random() < EVEN_LENGTHS:
        return int(random.integers(1, longest + 1))
    return min(longest, int(np.exp(random.uniform(0, np.log(longest + 1)))))
