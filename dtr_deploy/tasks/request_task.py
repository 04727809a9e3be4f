"""Base of the tasks that are scored by log-likelihood: a task says what its requests are and what their scores mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from dtr_deploy.tasks.base import ForwardHidden, Split, TaskScore, check_split
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


class RequestTask(ABC):
    """`batches`, `read`, `score` and `fingerprint` of `Task`, from two methods that a subclass gives."""

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
            pad = self.tokenizer.pad_token_id
            requests = self.requests(split)
            self._batches[split] = plan_batches(requests, pad if pad is not None else 0, self._batch_tokens)
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


def log_softmax(values: np.ndarray) -> np.ndarray:
    """log(softmax) over the last axis, float64."""
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
