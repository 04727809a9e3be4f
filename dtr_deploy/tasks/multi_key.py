"""Recall among distractors: several keys with a number each are hidden in filler text, and one is asked for.

A single needle is found by its oddness alone; here the model has to bind each number to its key. RULER's
`niah_multikey_1` (Hsieh et al., arXiv 2404.06654), with the wording of our needle.
"""

from __future__ import annotations

import random
from typing import Any

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.haystack import WORDS, Haystack, Puzzle

DEFAULT_KEYS = 6
FACT = "\nThe special magic number of {key} is {number}. Remember it.\n"
QUESTION = "\nQuestion: What is the special magic number of {key}?\nAnswer: The special magic number of {key} is"


class MultiKey(Haystack):
    """`keys` words, a number of seven digits each, at random depths; the asked one's depths are spread evenly.

    A model that finds numbers but not whose they are scores 1 / `keys`. Other arguments as in `Haystack`.
    """

    kind = "multi_key"

    def __init__(self, name: str, tokenizer: Any, *, keys: int = DEFAULT_KEYS, **options: Any) -> None:
        super().__init__(name, tokenizer, **options)
        if not 2 <= keys <= len(WORDS):
            raise UsageError(f"task {name!r}: keys: accepted are 2 to {len(WORDS)}, got {keys}")
        self.keys = keys

    def pose(self, rng: random.Random, depth: float) -> Puzzle:
        """See `Haystack.pose`."""
        words = rng.sample(WORDS, self.keys)
        numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), self.keys)]
        depths = [depth, *(rng.random() for _ in words[1:])]
        facts = sorted(
            (where, FACT.format(key=word, number=number))
            for where, word, number in zip(depths, words, numbers, strict=True)
        )
        return Puzzle(tuple(facts), QUESTION.format(key=words[0]), numbers[0])
