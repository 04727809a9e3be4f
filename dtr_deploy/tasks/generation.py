"""Tasks that are scored by what greedy decoding writes (exact match), and greedy decoding itself.

A generated answer is checked rather than generated wherever a draft of it is at hand: one forward pass over prompt and
draft says which token greedy decoding would have written at each place of the draft, and is right up to the first that
differs. `dtr_deploy.search.task_runs` does that for many layouts at once; what comes after the draft is decoded with a
cache by `greedy_tokens`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import ForwardHidden, Split, TaskScore
from dtr_deploy.tasks.request_task import RequestTask
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import (
    BATCH_TOKENS,
    RequestReader,
    RequestScores,
    hidden_states,
    plan_batches,
    read_requests,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRA_TOKENS = 4
"""Tokens generated beyond the longest right answer: enough to see that a number does not end where it ought."""


@dataclass(frozen=True)
class Stop:
    """Where greedy decoding ends: after one of the token ids `ends`, once the text holds one of `texts`, or at
    `max_tokens`."""

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    texts: tuple[str, ...]
    max_tokens: int

    @classmethod
    def of(cls, model: Any, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int) -> Stop:
        """With the end-of-text tokens that a model's `generate` stops at."""
        ends = model.generation_config.eos_token_id
        known = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        return cls(tokenizer, frozenset(known), tuple(texts), max_tokens)

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether decoding ends after `tokens`."""
        if len(tokens) >= self.max_tokens or (tokens and tokens[-1] in self.ends):
            return True
        text = self._decode(tokens) if self.texts and tokens else ""
        return any(stop in text for stop in self.texts)

    def text(self, tokens: Sequence[int]) -> str:
        """What was written, without what ended it."""
        text = self._decode(tokens[:-1] if tokens and tokens[-1] in self.ends else tokens)
        for stop in self.texts:
            text = text.split(stop)[0]
        return text

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


class GenerationTask(RequestTask):
    """Score of an item: 1 if what greedy decoding writes after its prompt is accepted. Margin: mean log-probability of
    the right answer's tokens given the prompt, nats a token.

    `make_requests` gives one request an item: the prompt, and the right answer as its continuation. In the
    `RequestScores` that are interpreted, `greedy` says whether the text that was generated is accepted.
    stops: texts that end an answer. max_tokens: tokens an answer has at most.
    """

    resumable = False  # hidden states of fixed batches are not enough: the text is needed

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        weight: float = 1.0,
        batch_tokens: int = BATCH_TOKENS,
        stops: Sequence[str] = ("\n",),
        max_tokens: int = 32,
    ) -> None:
        super().__init__(name, tokenizer, weight, batch_tokens)
        if max_tokens < 1:
            raise UsageError(f"task {name!r}: max_tokens must be >= 1, got {max_tokens}")
        self.stops, self.max_tokens = tuple(stops), max_tokens

    @abstractmethod
    def accepts(self, split: Split, item: int, text: str) -> bool:
        """Whether generated `text`, cut at the first of `stops`, answers item number `item`."""

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        return TaskScore(self.name, split, scores.greedy.astype(float), scores.log_probs / scores.lengths)

    def stop(self, model: Any, split: Split) -> Stop:
        """Where the answers of a split end."""
        return Stop.of(model, self.tokenizer, self.stops, self.max_tokens)

    def read(self, split: Split, hidden_per_batch: Iterable[Tensor], lm_head: Callable[[Tensor], Tensor]) -> TaskScore:
        """Raises `UsageError`: see `resumable`."""
        raise UsageError(f"task {self.name!r}: generates text, which cannot be read from hidden states; use score()")

    def score(self, model: Any, split: Split, forward_hidden: ForwardHidden | None = None) -> TaskScore:
        """See `Task.score`."""
        requests, stop = self.requests(split), self.stop(model, split)
        hidden = hidden_states(model, self.batches(split), forward_hidden)
        gold = read_requests(self.batches(split), hidden, model.get_output_embeddings(), len(requests))
        written = greedy_tokens(model, [request.context for request in requests], stop, self._batch_tokens)
        accepted = [self.accepts(split, item, stop.text(tokens)) for item, tokens in enumerate(written)]
        return self.interpret(split, RequestScores(gold.log_probs, np.array(accepted), gold.lengths))

    def meaning(self, split: Split) -> list[str]:
        """What ends an answer."""
        return [*self.stops, str(self.max_tokens)]


class Answered(Protocol):
    """A task of single answers: neighbouring `requests` with equal contexts are one item's alternatives."""

    name: str
    weight: float
    tokenizer: PreTrainedTokenizerBase

    def requests(self, split: Split) -> list[Request]: ...

    def item_strata(self, split: Split) -> Sequence[str]: ...

    def meaning(self, split: Split) -> list[str]: ...

    def accepts(self, split: Split, item: int, text: str) -> bool: ...


class GeneratedAnswers(GenerationTask):
    """The items of a likelihood task (labelled rows, recall), answered by generation to the end of the line.

    The right answer is the one of an item's alternatives that the task accepts. Strata are the task's own, and the
    longest right answer says how many tokens are generated.
    """

    def __init__(self, task: Answered, batch_tokens: int = BATCH_TOKENS) -> None:
        super().__init__(task.name, task.tokenizer, task.weight, batch_tokens)
        self.task = task

    def make_requests(self, split: Split) -> list[Request]:
        """The right one of each item's requests."""
        made = []
        groups = groupby(self.task.requests(split), lambda request: request.context)
        for item, (_, alternatives) in enumerate(groups):
            given = list(alternatives)
            right = [r for r in given if self.accepts(split, item, str(self.tokenizer.decode(r.continuation)))]
            if not right:
                raise UsageError(f"task {self.name!r}: item {item} of {split}: none of its answers is accepted")
            made.append(right[0])
        return made

    def accepts(self, split: Split, item: int, text: str) -> bool:
        """As the task itself."""
        return self.task.accepts(split, item, text)

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore:
        """See the class."""
        strata = tuple(self.item_strata(split))
        names = strata if len(set(strata)) > 1 else ()
        return TaskScore(self.name, split, scores.greedy.astype(float), scores.log_probs / scores.lengths, names)

    def item_strata(self, split: Split) -> Sequence[str]:
        """As of the task itself."""
        return self.task.item_strata(split)

    def stop(self, model: Any, split: Split) -> Stop:
        """See the class."""
        longest = max(len(request.continuation) for request in self.requests(split))
        return Stop.of(model, self.tokenizer, self.stops, longest + EXTRA_TOKENS)

    def meaning(self, split: Split) -> list[str]:
        """As of the task itself, and what ends an answer."""
        return [*self.stops, *self.task.meaning(split)]


Drafts = dict[tuple[int, ...], tuple[int, ...]]
"""By prompt, the tokens that a model wrote after it: likely what the next model writes."""


def settled(draft: Sequence[int], best: Sequence[int], reached: Callable[[Sequence[int]], bool]) -> list[int]:
    """The beginning of the greedy answer that a draft settles: up to its end, or to the first token that differs from
    the draft, that token included. best: what greedy decoding writes at each place if it wrote the draft until there.
    """
    written: list[int] = []
    for drafted, token in zip(draft, best, strict=True):
        written.append(token)
        if token != drafted or reached(written):
            break
    return written


def checked_tokens(
    model: Any, prompts: Sequence[Sequence[int]], stop: Stop, drafts: Drafts, batch_tokens: int = BATCH_TOKENS
) -> list[list[int]]:
    """As `greedy_tokens`, with one pass over what `drafts` has for these prompts; `drafts` is brought up to date."""
    keys = [tuple(prompt) for prompt in prompts]
    begun: list[list[int]] = [[] for _ in keys]
    drafted = [index for index, key in enumerate(keys) if drafts.get(key)]
    if drafted:
        requests = [Request(keys[index], drafts[keys[index]]) for index in drafted]
        batches = plan_batches(requests, 0, batch_tokens)
        reader = RequestReader(len(requests), model.get_output_embeddings())
        for batch, hidden in zip(batches, hidden_states(model, batches), strict=True):
            reader.add(batch, hidden)
        for index, best in zip(drafted, reader.best_tokens(), strict=True):
            begun[index] = settled(drafts[keys[index]], best, stop.reached)
    written = greedy_tokens(model, prompts, stop, batch_tokens, begun)
    drafts.update(zip(keys, map(tuple, written), strict=True))
    return written


@torch.no_grad()
def greedy_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stop: Stop,
    batch_tokens: int = BATCH_TOKENS,
    begun: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """What greedy decoding writes after each prompt, with a cache; where it ends is part of it.

    model: a Hugging Face causal language model in evaluation mode. begun: of each prompt, the first tokens that are
    written anyway (of an answer not at its end); they are part of what is returned.
    Raises `UsageError` when a prompt and its answer do not fit the model's context.
    """
    written = [list(tokens) for tokens in begun] if begun is not None else [[] for _ in prompts]
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(prompt) for prompt in prompts), default=0) + stop.max_tokens
    if limit is not None and longest > limit:
        raise UsageError(
            f"tasks: a prompt and its answer of {longest} tokens do not fit the model's context of {limit}"
        )
    going = [i for i in range(len(prompts)) if not written[i] or not stop.reached(written[i])]
    order = sorted(going, key=lambda i: -len(prompts[i]) - len(written[i]))
    while order:
        width = len(prompts[order[0]]) + len(written[order[0]])
        count = max(1, batch_tokens // width)
        _decode_batch(model, [(prompts[i], written[i]) for i in order[:count]], stop)
        order = order[count:]
    return written


def _decode_batch(model: Any, rows: Sequence[tuple[Sequence[int], list[int]]], stop: Stop) -> None:
    """Extend the second of each pair to its end; rows are padded on the left."""
    device = model.get_input_embeddings().weight.device
    width = max(len(prompt) + len(written) for prompt, written in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, written) in enumerate(rows):
        tokens = [*prompt, *written]
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    ids, mask, cache = ids.to(device), mask.to(device), None
    going = [True] * len(rows)
    while any(going):
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        output = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        best = model.get_output_embeddings()(output.last_hidden_state[:, -1]).float().argmax(-1)
        for row, (_, written) in enumerate(rows):
            if going[row]:
                written.append(int(best[row]))
                going[row] = not stop.reached(written)
        ids, mask = best[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
