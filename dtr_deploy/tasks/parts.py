"""Items dealt into parts: a score of some parts is a cheap estimate of the whole that can be added to."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

PARTS = 4
"""Into how many parts a search split is dealt."""


def deal(strata: Sequence[str], parts: int, seed: str) -> list[np.ndarray]:
    """Item numbers (ascending int64) of each of `parts` disjoint parts that together are all items.

    strata: the stratum of each item. Any two parts differ by at most one item of a stratum, and by at most one item in
    all. Of every `parts` neighbours in a stratum each part gets one, so that what varies with an item's place there (a
    needle's depth) is spread over all parts too. Which one is random, by `seed`.
    """
    rng = random.Random(seed)
    dealt: list[list[int]] = [[] for _ in range(parts)]
    owed = list(range(parts))  # who has not had an item in the round that is open
    for stratum in dict.fromkeys(strata):
        items = [index for index, name in enumerate(strata) if name == stratum]
        for first in range(0, len(items), parts):
            some = items[first : first + parts]
            others = [part for part in range(parts) if part not in owed]
            turn = [*rng.sample(owed, len(owed)), *rng.sample(others, len(others))][: len(some)]
            for item, part in zip(some, turn, strict=True):
                dealt[part].append(item)
            closed = len(turn) >= len(owed)
            had = turn[len(owed) :] if closed else [*others, *turn]
            owed = [part for part in range(parts) if part not in had]
    return [np.array(sorted(items), dtype=np.int64) for items in dealt]
