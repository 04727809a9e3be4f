"""Synthetic recall: a number hidden in filler text must be repeated at the end ("needle in a haystack").

Perplexity hides lost recall, and recall is what linear attention loses first; this task sees it at each context length.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import Split, TaskScore
from dtr_deploy.tasks.request_task import RequestTask
from dtr_deploy.tasks.requests import Request, encode_pairs
from dtr_deploy.tasks.scoring import BATCH_TOKENS, RequestScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
NEEDLE = "\nThe special magic number is {number}. Remember it.\n"
QUESTION = "\nQuestion: What is the special magic number?\nAnswer: The special magic number is"
DEFAULT_LENGTHS = (1024, 2048)
DEFAULT_ITEMS = 16


class Needle(RequestTask):
    """`items` prompts at each of `lengths`; every split has its own numbers and depths.

    Score of an item: 1 if each token of the number is the argmax given those before it (so greedy decoding would write
    it), else 0. Margin: mean log-probability of the number's tokens, nats a token. Strata: the lengths.

    A prompt with its answer holds at most `length` tokens, and fewer than one filler sentence less. Depths are spread
    evenly with jitter, so that few items still cover the whole haystack.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lengths: Sequence[int] = DEFAULT_LENGTHS,
        items: int = DEFAULT_ITEMS,
        seed: int = 0,
        weight: float = 1.0,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        super().__init__(name, tokenizer, weight, batch_tokens)
        if items < 1 or not lengths:
            raise UsageError(
                f"task {name!r}: needs items >= 1 and at least one length, got {items} and {list(lengths)}"
            )
        self.lengths = tuple(lengths)
        self.items = items
        self.seed = seed

    def make_requests(self, split: Split) -> list[Request]:
        """Length-major: all items of the first length, then of the next."""
        requests = []
        for length in self.lengths:
            rng = random.Random(f"needle/{self.seed}/{split}/{length}")
            for item in range(self.items):
                depth = (item + rng.random()) / self.items
                requests.append(self._fit(length, depth, str(rng.randint(1_000_000, 9_999_999))))
        return requests

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        strata = tuple(str(length) for length in self.lengths for _ in range(self.items))
        return TaskScore(self.name, split, scores.greedy.astype(float), scores.log_probs / scores.lengths, strata)

    def _fit(self, length: int, depth: float, number: str) -> Request:
        """The longest prompt of at most `length` tokens, answer included."""
        tokens = {count: self._encode(count, depth, number) for count in (0, len(FILLER), 2 * len(FILLER))}
        size = {count: len(request.inputs) + 1 for count, request in tokens.items()}
        if size[0] > length:
            raise UsageError(
                f"task {self.name!r}: lengths: {length} tokens cannot hold a needle, use {size[0]} or more"
            )
        per_round = size[2 * len(FILLER)] - size[len(FILLER)]
        count = max(0, (length - size[0]) * len(FILLER) // per_round)
        request = self._encode(count, depth, number)
        # The estimate is off by what tokens differ between sentences and at the borders: walk to the exact count.
        while len(request.inputs) + 1 > length:
            count -= 1
            request = self._encode(count, depth, number)
        while len((longer := self._encode(count + 1, depth, number)).inputs) + 1 <= length:
            count, request = count + 1, longer
        return request

    def _encode(self, count: int, depth: float, number: str) -> Request:
        sentences = [FILLER[index % len(FILLER)] for index in range(count)]
        before = int(depth * (count + 1))
        prompt = " ".join(sentences[:before]) + NEEDLE.format(number=number) + " ".join(sentences[before:]) + QUESTION
        return encode_pairs(self.tokenizer, [(prompt, f" {number}")])[0]


def mean_by_length(score: TaskScore) -> dict[int, float]:
    """Exact match at each length of a needle score."""
    return {int(length): mean for length, mean in score.by_stratum().items()}


def mean_margin_by_length(score: TaskScore) -> dict[int, float]:
    """Mean margin (nats a token) at each length of a needle score."""
    names = np.asarray(score.strata)
    return {int(length): float(score.margins[names == length].mean()) for length in dict.fromkeys(score.strata)}
