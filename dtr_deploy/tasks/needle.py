"""Synthetic recall: a number hidden in filler text must be repeated at the end ("needle in a haystack").

Perplexity hides lost recall, and recall is what linear attention loses first; this task sees it at each context length.
"""

from __future__ import annotations

import random

from dtr_deploy.tasks.haystack import Haystack, Puzzle

NEEDLE = "\nThe special magic number is {number}. Remember it.\n"
QUESTION = "\nQuestion: What is the special magic number?\nAnswer: The special magic number is"


class Needle(Haystack):
    """One number of seven digits, at every depth: RULER's `niah_single_1`."""

    kind = "needle"

    def pose(self, rng: random.Random, depth: float) -> Puzzle:
        """See `Haystack.pose`."""
        number = str(rng.randint(1_000_000, 9_999_999))
        return Puzzle(((depth, NEEDLE.format(number=number)),), QUESTION, number)
