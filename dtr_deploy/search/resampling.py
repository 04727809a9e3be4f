"""Bootstrap draws of means over items, shared by everything that is compared.

All layouts are scored on the same items, so one set of draws serves them all: a draw is how often each item was picked,
and the mean of any layout under it is one inner product. Differences between layouts are then paired by construction,
and hundreds of layouts cost a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 2000
"""The error of a 95% interval's ends from this many draws is about 5% of the interval's half width."""


@dataclass(frozen=True)
class Group:
    """Items drawn from one population: their values [n] (or [n, V], a column a layout), and the share of the combined
    score that their mean has."""

    values: np.ndarray
    share: float


def drawn_means(groups: Sequence[Group], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """`sum(share * mean)` under each draw: [resamples], or [resamples, V] for groups of V columns. float64.

    Items are drawn with replacement within each group (groups are part of the design, their sizes are not chance). A
    group of one value a column has nothing to draw and enters exactly.
    """
    total: np.ndarray | float = 0.0
    for index, group in enumerate(groups):
        if group.values.shape[0] < 2 or (np.ptp(group.values, axis=0) == 0).all():
            total = total + group.share * group.values[0]
        else:
            picks = _picks(group.values.shape[0], resamples, seed, index)
            total = total + group.share * (picks @ group.values).astype(np.float64) / group.values.shape[0]
    drawn = np.asarray(total)
    columns = groups[0].values.shape[1:]
    return np.broadcast_to(drawn, (resamples, *columns))


@lru_cache(maxsize=8)
def _picks(items: int, resamples: int, seed: int, index: int) -> np.ndarray:
    """How often each item was drawn: float32 [resamples, items] (whole numbers). index: of the group."""
    rng = np.random.default_rng((seed, index, items))
    return rng.multinomial(items, np.full(items, 1.0 / items), size=resamples).astype(np.float32)
