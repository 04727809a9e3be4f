"""States of prompts' beginnings, so that requests that begin alike compute the common part once.

A recurrent state cannot be cut back to an earlier token, as a KV cache can. So a prefix can only be reused at lengths
at which its states were copied, and the caller says which those are.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dtr_deploy.engines.ort_states import Snapshot


class PrefixStore:
    """Snapshots by their tokens, at most `budget` bytes of them: the ones not used for longest make room.

    Attributes:
        budget, nbytes: bytes allowed and held.
        hits, misses, evicted: lookups that found a prefix or did not, and snapshots that were dropped for others.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = self.hits = self.misses = self.evicted = 0
        self._snapshots: OrderedDict[tuple[int, ...], Snapshot] = OrderedDict()
        self._lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._snapshots)

    def longest(self, prompt: Sequence[int]) -> Snapshot | None:
        """The longest stored beginning of a prompt that leaves at least its last token to compute."""
        for length in sorted(self._lengths, reverse=True):
            if length >= len(prompt):
                continue
            tokens = tuple(prompt[:length])
            if tokens in self._snapshots:
                self._snapshots.move_to_end(tokens)
                self.hits += 1
                return self._snapshots[tokens]
        self.misses += 1
        return None

    def __contains__(self, tokens: Sequence[int]) -> bool:
        return tuple(tokens) in self._snapshots

    def put(self, snapshot: Snapshot) -> bool:
        """Keep a snapshot, and drop old ones until the budget holds. False if it alone is over the budget."""
        if snapshot.nbytes > self.budget:
            return False
        self._drop(snapshot.tokens)
        while self.nbytes + snapshot.nbytes > self.budget:
            self._drop(next(iter(self._snapshots)))
            self.evicted += 1
        self._snapshots[snapshot.tokens] = snapshot
        self.nbytes += snapshot.nbytes
        length = len(snapshot.tokens)
        self._lengths[length] = self._lengths.get(length, 0) + 1
        return True

    def clear(self) -> None:
        """Drop everything."""
        self._snapshots.clear()
        self._lengths.clear()
        self.nbytes = 0

    def _drop(self, tokens: tuple[int, ...]) -> None:
        snapshot = self._snapshots.pop(tokens, None)
        if snapshot is None:
            return
        self.nbytes -= snapshot.nbytes
        self._lengths[len(tokens)] -= 1
        if not self._lengths[len(tokens)]:
            del self._lengths[len(tokens)]
