"""Classification after as many labelled examples as a length of text holds.

Many-shot learning reads its examples from the whole context, not from one place of it (Agarwal et al., arXiv
2404.11018), so what a recurrent state forgets shows as lost accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import Split, TaskScore
from dtr_deploy.tasks.local_file import LabelledFile
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import RequestScores

DEFAULT_LENGTHS = (1024, 2048)
DEFAULT_ITEMS = 32


class ManyShot(LabelledFile):
    """`items` rows of a labelled file at each of `lengths`, after examples that fill the rest of the prompt.

    Score, margin and metric of an item as in `LabelledFile`; guessing scores 1 over the number of labels. Strata: the
    lengths. A prompt and its answer hold at most `length` tokens. Each split has its own rows; at every length they are
    the same rows, and the examples of a short length begin those of a longer one, so that lengths differ in the number
    of examples alone. All rows of a length follow the same examples, which can be read once: a score's error is that of
    other rows, given these examples.

    path: as in `LabelledFile`. Examples come from a folder's train.jsonl, or from half of a single .jsonl file.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Any,
        path: str | Path,
        *,
        lengths: Sequence[int] = DEFAULT_LENGTHS,
        items: int = DEFAULT_ITEMS,
        **options: Any,
    ) -> None:
        super().__init__(name, tokenizer, path, shots=None, items=items, **options)
        if not lengths:
            raise UsageError(f"task {name!r}: needs at least one length")
        self.lengths = tuple(lengths)

    def shots(self, split: Split) -> dict[int, int]:
        """How many examples stand before the rows of a split, by length."""
        # Rows differ in length: the longest one says what is left for examples.
        longest = max(self._ask(self.rows(split), []), key=_tokens)
        sizes = [len(ids) for ids in self.tokenizer(self._shots, add_special_tokens=False, verbose=False)["input_ids"]]
        upto = np.array([0, *accumulate(sizes)])
        return {length: self._count(length, length - _tokens(longest), upto) for length in self.lengths}

    def make_requests(self, split: Split) -> list[Request]:
        """Length-major, then row-major; the labels in sorted order."""
        requests = []
        for length, count in self.shots(split).items():
            # The count adds up examples tokenised apart; where tokens merge across a border the whole is shorter, and
            # it can be longer by a token or two at most.
            while _longest(asked := self._ask(self.rows(split), self._shots[:count])) > length:
                count -= 1
            requests += asked
        return requests

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        rows = self.rows(split)
        by_label = scores.log_probs.reshape(len(self.lengths), len(rows), len(self.labels))
        judged = [self._judge(rows, one_length) for one_length in by_label]
        hits, margins = (np.concatenate(parts) for parts in zip(*judged, strict=True))
        strata = tuple(str(length) for length in self.lengths for _ in rows)
        return TaskScore(self.name, split, hits, margins, strata)

    def item_strata(self, split: Split) -> Sequence[str]:
        """Length and label of each item."""
        return [f"{length}/{self._label(row)}" for length in self.lengths for row in self.rows(split)]

    def meaning(self, split: Split) -> list[str]:
        """As of a labelled file, and the lengths, which are the strata."""
        return [*super().meaning(split), *map(str, self.lengths)]

    def _count(self, length: int, room: int, upto: np.ndarray) -> int:
        """Examples that `room` tokens hold; upto: [n + 1] tokens of the first 0 .. n examples."""
        if room < upto[1]:
            raise UsageError(
                f"task {self.name!r}: lengths: {length} tokens cannot hold an example and the longest row, use "
                f"{length - room + int(upto[1])} or more"
            )
        if room >= upto[-1]:
            raise UsageError(
                f"task {self.name!r}: lengths: {length} tokens take more examples than {self.path} has "
                f"({len(upto) - 1} examples, {int(upto[-1])} tokens)"
            )
        return int(np.searchsorted(upto, room, side="right")) - 1


def _tokens(request: Request) -> int:
    return len(request.context) + len(request.continuation)


def _longest(requests: Sequence[Request]) -> int:
    return max(map(_tokens, requests))
