"""Recall in steps: chains of assignments are hidden in filler text, and the value at the end of one is asked for.

RULER's variable tracking (Hsieh et al., arXiv 2404.06654): a value is assigned to a name, that name to the next, and so
on. RULER asks for all names that hold a value; here the value of the last name is asked for, which has one answer, and
several chains hide among each other so that finding a number is not enough.
"""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.haystack import WORDS, Haystack, Puzzle

DEFAULT_CHAINS = 4
DEFAULT_HOPS = 1
EXAMPLES = 3
"""Worked examples before the text (RULER has one). SmolLM2-135M follows no hop without any, and with them not reliably:
of some thirty wordings tried on 8 to 16 items each none did better than .69 among four chains."""
VALUE = "The magic number of {name} is {value}."
HOP = "The magic number of {name} is the magic number of {source}."
QUESTION = "Question: What is the magic number of {name}?\nAnswer: The magic number of {name} is"


class VariableTracking(Haystack):
    """`keys` chains of a number of five digits and `hops` assignments, in order at random depths; one value is asked.

    Names are words, not letters, and worked examples (a chain that is asked for and one that is not, without filler)
    stand before the text, which is easier than RULER's form. Look at the backbone's own score first. A model that finds
    numbers but does not follow assignments scores 1 / `keys`. Other arguments as in `Haystack`.
    """

    kind = "variable_tracking"

    def __init__(
        self, name: str, tokenizer: Any, *, keys: int = DEFAULT_CHAINS, hops: int = DEFAULT_HOPS, **options: Any
    ) -> None:
        super().__init__(name, tokenizer, **options)
        words = (keys + 2 * EXAMPLES) * (hops + 1)
        if keys < 2 or hops < 1 or words > len(WORDS):
            raise UsageError(
                f"task {name!r}: keys, hops: accepted are 2 chains or more of 1 hop or more, "
                f"({2 * EXAMPLES} + keys) * (hops + 1) at most {len(WORDS)}; got {keys} and {hops}"
            )
        self.keys, self.hops = keys, hops

    def pose(self, rng: random.Random, depth: float) -> Puzzle:
        """See `Haystack.pose`; the first assignment of the asked chain lies at `depth`, the others after it."""
        chains = self._chains(rng, self.keys + 2 * EXAMPLES)
        asked, *others = chains[: self.keys]
        facts = list(zip([depth, *self._depths(rng, depth, self.hops)], _statements(*asked), strict=True))
        for chain in others:
            facts += zip(self._depths(rng, 0.0, self.hops + 1), _statements(*chain), strict=True)
        names, value = asked
        examples = [_example(rng, chains[first], chains[first + 1]) for first in range(self.keys, len(chains), 2)]
        return Puzzle(
            ((0.0, "".join(examples)), *((where, f"\n{text}\n") for where, text in sorted(facts))),
            f"\n{QUESTION.format(name=names[-1])}",
            value,
        )

    def _chains(self, rng: random.Random, count: int) -> list[tuple[list[str], str]]:
        """(names from first to last, value) of each chain, all different."""
        words = rng.sample(WORDS, count * (self.hops + 1))
        values = rng.sample(range(10_000, 100_000), count)
        size = self.hops + 1
        return [(words[chain * size : (chain + 1) * size], str(values[chain])) for chain in range(count)]

    @staticmethod
    def _depths(rng: random.Random, low: float, count: int) -> list[float]:
        return sorted(rng.uniform(low, 1.0) for _ in range(count))


def _statements(names: list[str], value: str) -> list[str]:
    hops = [HOP.format(name=name, source=source) for source, name in pairwise(names)]
    return [VALUE.format(name=names[0], value=value), *hops]


def _example(rng: random.Random, one: tuple[list[str], str], other: tuple[list[str], str]) -> str:
    """Two chains, interleaved or one after the other, and the question about the first with its answer."""
    first, second = (one, other) if rng.random() < 0.5 else (other, one)
    lines = [*_statements(*first), *_statements(*second)]
    if rng.random() < 0.5:
        lines = [line for pair in zip(_statements(*first), _statements(*second), strict=True) for line in pair]
    names, value = one
    return "\n".join(lines) + f"\n{QUESTION.format(name=names[-1])} {value}\n\n"
