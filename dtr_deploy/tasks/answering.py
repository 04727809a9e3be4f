"""Likelihood and generation of the same answers, from one pass over each prompt.

A prompt is read once. Copies of its cache then give the log-probabilities of the answers a task compares, as its
`score` does, and the text that greedy decoding writes. What consecutive prompts have in common (few-shot examples) is
read once too. Works with every model that transformers' `generate` works with, recurrent states included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import Split, TaskScore
from dtr_deploy.tasks.generation import EXTRA_TOKENS, Stop
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import RequestScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A cache is copied for each prompt of a group: not worth it unless the group shares most of what it reads.
_SHARED_PART = 0.5
_MIN_GROUP_PREFIX = 64


class AnsweredTask(Protocol):
    """A task of single answers: `requests` with equal contexts are one item's alternatives, in the order of items."""

    name: str
    tokenizer: PreTrainedTokenizerBase

    def requests(self, split: Split) -> list[Request]: ...

    def interpret(self, split: Split, scores: RequestScores) -> TaskScore: ...

    def accepts(self, split: Split, item: int, text: str) -> bool:
        """Whether generated `text`, to the end of its first line, answers item number `item`."""
        ...


@dataclass(frozen=True)
class Answers:
    """One model's answers to one split: both scores over the same items, and what was written.

    likelihood: as `task.score`. generation: 1 where the text that greedy decoding wrote is the answer; its margins are
    likelihood's. texts: one an item, up to the end of the line.
    """

    likelihood: TaskScore
    generation: TaskScore
    texts: tuple[str, ...]


def answer(task: AnsweredTask, model: Any, split: Split, on_item: Callable[[int, int], None] | None = None) -> Answers:
    """Score `task` on `split` by likelihood and by greedy generation, item by item.

    model: a causal language model in evaluation mode, transformers' or with the same `base_model` and caches.
    on_item: called with (items done, tokens read) after each item.
    Raises `UsageError` when a prompt and its answer do not fit the model's context.
    """
    prompts = _prompts(task, split)
    longest = max(len(prompt.context) + prompt.new_tokens for prompt in prompts)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UsageError(
            f"task {task.name!r}: a prompt and its answer of {longest} tokens do not fit the model's context of {limit}"
        )
    log_probs, greedy, lengths, texts = [], [], [], []
    for prompt, cache, hidden in _read(model, prompts, on_item):
        for request in prompt.requests:
            total, hit = _likelihood(model, cache, hidden, request)
            log_probs.append(total)
            greedy.append(hit)
            lengths.append(len(request.continuation))
        stop = Stop.of(model, task.tokenizer, ("\n",), prompt.new_tokens)
        texts.append(_generate(model, cache, hidden, stop))
    likelihood = task.interpret(split, RequestScores(np.array(log_probs), np.array(greedy), np.array(lengths)))
    hits = np.array([float(task.accepts(split, item, text)) for item, text in enumerate(texts)])
    generation = TaskScore(likelihood.task, split, hits, likelihood.margins, likelihood.strata)
    return Answers(likelihood, generation, tuple(texts))


def tokens_read(task: AnsweredTask, split: Split) -> int:
    """Tokens of prompts that `answer` runs a model over, what prompts share counted once."""
    return sum(
        shared + sum(len(prompt.context) - shared for prompt in group)
        for group, shared in _groups(_prompts(task, split))
    )


@dataclass(frozen=True)
class _Prompt:
    context: tuple[int, ...]
    requests: list[Request]

    @property
    def new_tokens(self) -> int:
        return max(len(request.continuation) for request in self.requests) + EXTRA_TOKENS


@torch.no_grad()
def _read(
    model: Any, prompts: Sequence[_Prompt], on_item: Callable[[int, int], None] | None
) -> Iterator[tuple[_Prompt, Any, Tensor]]:
    """Each prompt with the cache after it and the hidden state [H] of its last token."""
    done = tokens = 0
    for group, shared in _groups(prompts):
        prefix = None
        if shared:
            prefix, _ = _forward(model, group[0].context[:shared], None)
            tokens += shared
        for prompt in group:
            cache, hidden = _forward(model, prompt.context[shared:], copy.deepcopy(prefix))
            tokens += len(prompt.context) - shared
            yield prompt, cache, hidden[-1]
            done += 1
            if on_item is not None:
                on_item(done, tokens)


def _prompts(task: AnsweredTask, split: Split) -> list[_Prompt]:
    """One an item. Items of equal contexts in a row would be taken for one, but no two ask the same."""
    by_context = groupby(task.requests(split), lambda request: request.context)
    return [_Prompt(context, list(group)) for context, group in by_context]


def _groups(prompts: Sequence[_Prompt]) -> Iterator[tuple[list[_Prompt], int]]:
    """Runs of prompts with most of their tokens in common, and how many leading tokens those are."""
    group, shared = [prompts[0]], 0
    for prompt in prompts[1:]:
        common = _common(group[0].context, prompt.context)
        common = min(common, shared) if len(group) > 1 else common
        if common >= max(_MIN_GROUP_PREFIX, _SHARED_PART * len(prompt.context), _SHARED_PART * len(group[0].context)):
            group, shared = [*group, prompt], common
        else:
            yield group, shared
            group, shared = [prompt], 0
    yield group, shared


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Leading tokens two contexts share; at most all but the last, whose hidden state has to be computed."""
    shortest = min(len(one), len(other)) - 1
    return next((index for index in range(shortest) if one[index] != other[index]), shortest)


@torch.no_grad()
def _forward(model: Any, tokens: Sequence[int], cache: Any) -> tuple[Any, Tensor]:
    """The cache after `tokens`, and their final-norm hidden states [T, H]. A given cache is extended in place."""
    ids = torch.tensor([list(tokens)], device=model.get_input_embeddings().weight.device)
    output = model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return output.past_key_values, output.last_hidden_state[0]


def _logits(model: Any, states: Tensor) -> Tensor:
    """Float32 logits [N, V] of hidden states [N, H]; never in autocast's precision, in which candidates tie."""
    with torch.autocast(states.device.type, enabled=False):
        return model.get_output_embeddings()(states).float()


@torch.no_grad()
def _likelihood(model: Any, cache: Any, hidden: Tensor, request: Request) -> tuple[float, bool]:
    """Sum of the continuation's log-probabilities (nats), and whether each of its tokens is the argmax."""
    states = hidden[None]
    if len(request.continuation) > 1:
        _, rest = _forward(model, request.continuation[:-1], copy.deepcopy(cache))
        states = torch.cat([states, rest])
    logits = _logits(model, states)
    targets = torch.tensor(request.continuation, device=logits.device)
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    return float(values.double().sum()), bool((logits.argmax(-1) == targets).all())


@torch.no_grad()
def _generate(model: Any, cache: Any, hidden: Tensor, stop: Stop) -> str:
    """What greedy decoding writes up to `stop`. Uses `cache` up."""
    written: list[int] = []
    while True:
        written.append(int(_logits(model, hidden[None]).argmax(-1)))
        if stop.reached(written):
            return stop.text(written)
        cache, states = _forward(model, written[-1:], cache)
        hidden = states[-1]
