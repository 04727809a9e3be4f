"""Base of the tasks that are scored by log-likelihood: a task says what its requests are and what their scores mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dtr_deploy.tasks.base import ForwardHidden, Split, TaskScore, check_split
from dtr_deploy.tasks.parts import deal
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import (
    BATCH_TOKENS,
    RequestScores,
    ScoringBatch,
    fingerprint,
    hidden_states,
    plan_batches,
    read_requests,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Part:
    """Some items of a split. items, requests: int64, their numbers in the split, ascending. batches: answer those
    requests, which they number from 0."""

    items: np.ndarray
    requests: np.ndarray
    batches: list[ScoringBatch]


class RequestTask(ABC):
    """`batches`, `read`, `score` and `fingerprint` of `Task`, from two methods that a subclass gives.

    Items can be dealt into parts (`part`), which are scored on their own and interpreted together (`interpret_items`).
    """

    resumable = True

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerBase, weight: float = 1.0, batch_tokens: int = BATCH_TOKENS
    ) -> None:
        self.name = name
        self.weight = weight
        self.tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._requests: dict[str, list[Request]] = {}
        self._batches: dict[str, list[ScoringBatch]] = {}
        self._parts: dict[tuple[str, int], list[Part]] = {}

    @abstractmethod
    def make_requests(self, split: Split) -> list[Request]:
        """Requests of a split, in a fixed order. Called once a split."""

    @abstractmethod
    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """What the scores of `make_requests(split)` say."""

    def requests(self, split: Split) -> list[Request]:
        """Requests of a split, made at the first call."""
        if check_split(split) not in self._requests:
            self._requests[split] = self.make_requests(split)
        return self._requests[split]

    def batches(self, split: Split) -> list[ScoringBatch]:
        """See `Task.batches`."""
        if check_split(split) not in self._batches:
            self._batches[split] = self._plan(self.requests(split))
        return self._batches[split]

    def read(self, split: Split, hidden_per_batch: Iterable[Tensor], lm_head: Callable[[Tensor], Tensor]) -> TaskScore:
        """See `Task.read`."""
        count = len(self.requests(split))
        return self.interpret(split, read_requests(self.batches(split), hidden_per_batch, lm_head, count))

    def score(self, model: Any, split: Split, forward_hidden: ForwardHidden | None = None) -> TaskScore:
        """See `Task.score`."""
        hidden = hidden_states(model, self.batches(split), forward_hidden)
        return self.read(split, hidden, model.get_output_embeddings())

    def fingerprint(self, split: Split) -> str:
        """See `Task.fingerprint`."""
        return fingerprint(self.batches(split), type(self).__name__, split, *self.meaning(split))

    def meaning(self, split: Split) -> list[str]:
        """What `interpret` depends on beside the scores (right answers, metric): part of the fingerprint."""
        return []

    def request_items(self, split: Split) -> np.ndarray:
        """int64 [requests]: the number of the item each request belongs to. Here: as many of each item, one item after
        another."""
        count = len(self.requests(split))
        items = self._empty_score(split).per_item.size
        if count % items:
            raise ValueError(f"{self.name}: {count} requests of {items} items: request_items must say which is whose")
        return np.arange(count) // (count // items)

    def item_strata(self, split: Split) -> Sequence[str]:
        """The stratum of each item, for dealing. Here: the strata of the task's scores, or one for all items."""
        score = self._empty_score(split)
        return score.strata or ("",) * score.per_item.size

    def part(self, split: Split, number: int, parts: int) -> Part:
        """Part `number` of the split's items dealt into `parts`; an item's requests stay together."""
        if (split, parts) not in self._parts:
            owners, requests = self.request_items(split), self.requests(split)
            dealt = deal(self.item_strata(split), parts, f"{self.name}/{split}")
            made = []
            for items in dealt:
                mine = np.flatnonzero(np.isin(owners, items))
                made.append(Part(items, mine, self._plan([requests[index] for index in mine]) if mine.size else []))
            self._parts[split, parts] = made
        return self._parts[split, parts][number]

    def interpret_items(self, split: Split, scores: RequestScores, parts: Sequence[Part]) -> TaskScore:
        """What the scores of the requests of some parts (one after another) say of their items, which come in the order
        they have in the split. All parts give what `interpret` gives for the whole split.

        A metric that centres scores over a stratum centres them over the items present: `interpret` sees, for each
        request of an absent item, the mean of the same request of the items present in its stratum.
        """
        owners = self.request_items(split)
        known = np.concatenate([part.requests for part in parts])
        present = np.sort(np.concatenate([part.items for part in parts]))
        log_probs, greedy = np.zeros(len(owners)), np.zeros(len(owners), dtype=bool)
        lengths = np.array([len(request.continuation) for request in self.requests(split)])
        log_probs[known], greedy[known], lengths[known] = scores.log_probs, scores.greedy, scores.lengths
        absent = np.setdiff1d(np.arange(len(owners)), known)
        if absent.size:
            strata = np.asarray(self._empty_score(split).strata or ("",) * (owners.max() + 1))[owners]
            place = np.arange(len(owners)) - np.searchsorted(owners, owners)  # of a request among its item's
            groups = np.unique(strata, return_inverse=True)[1] * (place.max() + 1) + place
            for group in np.unique(groups[absent]):
                there = known[groups[known] == group]
                log_probs[absent[groups[absent] == group]] = log_probs[there].mean() if there.size else 0.0
        score = self.interpret(split, RequestScores(log_probs, greedy, lengths))
        names = tuple(score.strata[item] for item in present) if score.strata else ()
        return TaskScore(score.task, score.split, score.per_item[present], score.margins[present], names)

    def _empty_score(self, split: Split) -> TaskScore:
        """The shape of a score: what requests without scores say."""
        requests = self.requests(split)
        lengths = np.array([len(request.continuation) for request in requests])
        return self.interpret(split, RequestScores(np.zeros(len(requests)), np.zeros(len(requests), bool), lengths))

    def _plan(self, requests: Sequence[Request]) -> list[ScoringBatch]:
        pad = self.tokenizer.pad_token_id
        return plan_batches(requests, pad if pad is not None else 0, self._batch_tokens)


def log_softmax(values: np.ndarray) -> np.ndarray:
    """log(softmax) over the last axis, float64."""
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
