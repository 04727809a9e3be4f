"""Likelihood scoring of many requests at the cost of as few token positions as possible.

- Requests whose inputs are equal, or a prefix of one another, share one row (the label words of a classification are
  read at one position of one row).
- A prefix that rows have in common (few-shot examples) is run once, and its cache is repeated over the rows of a batch.
- Rows are sorted by length and padded on the right, which a causal model cannot see.
- The output embedding is applied at the positions that are read, not at every token.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import ForwardHidden
from dtr_deploy.tasks.requests import Request

BATCH_TOKENS = 2048
"""Padded tokens a batch holds at most (rows x own length). On a CPU larger ones are no faster."""
MIN_SHARED = 32
"""Shortest common prefix worth a cache of its own."""
_LOGIT_ROWS = 256  # rows of logits alive at once: 50 MB at a vocabulary of 49,152 in float32


@dataclass(frozen=True)
class ScoringBatch:
    """Rows of one forward pass, and where in them which token's log-probability is read.

    input_ids, attention_mask: int64 [B, T], padded on the right, mask 1 = token.
    shared: number of leading columns that are equal in every row (0 = none), and in the rows of those neighbouring
        batches that have the same. A forward may run them once; hidden states of the last T - shared columns are enough
        to read from.
    rows, positions, targets, requests: int64 [P]. Read p is log p(targets[p]) from the hidden state at
        [rows[p], positions[p]] and belongs to request requests[p].
    """

    input_ids: Tensor
    attention_mask: Tensor
    shared: int
    rows: Tensor
    positions: Tensor
    targets: Tensor
    requests: Tensor

    @property
    def tokens(self) -> int:
        """Padded tokens run by a forward that shares the prefix (the prefix itself not counted)."""
        return self.input_ids.shape[0] * (self.input_ids.shape[1] - self.shared)


@dataclass(frozen=True)
class RequestScores:
    """Of each request: `log_probs` float64 [N], the sum over its continuation, in nats; `greedy` bool [N], every token
    of the continuation is the argmax; `lengths` int64 [N], tokens in the continuation."""

    log_probs: np.ndarray
    greedy: np.ndarray
    lengths: np.ndarray


def plan_batches(
    requests: Sequence[Request], pad_token_id: int, batch_tokens: int = BATCH_TOKENS
) -> list[ScoringBatch]:
    """Batches that answer `requests`, longest rows first; deterministic. `pad_token_id` may be any valid token.

    Rows that share most of what they read (the examples before them) are planned together, apart from others.
    """
    sequences, row_of = _rows(requests)
    reads: dict[int, list[int]] = {}
    for index, row in enumerate(row_of):
        reads.setdefault(row, []).append(index)
    batches = []
    for cluster in _clusters(sequences):
        first_read = min(len(requests[index].context) - 1 for row in cluster for index in reads[row])
        shared = min(_common_prefix([sequences[row] for row in cluster]), first_read)
        shared = shared if shared >= MIN_SHARED and len(cluster) > 1 else 0
        groups: list[list[int]] = []
        for row in sorted(cluster, key=lambda row: (-len(sequences[row]), row)):
            width = len(sequences[groups[-1][0]]) - shared if groups else 0
            if groups and (len(groups[-1]) + 1) * width <= batch_tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
        batches += [_batch(group, sequences, reads, requests, shared, pad_token_id) for group in groups]
    return batches


def _clusters(sequences: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Rows to plan together: runs of rows whose common prefix is at least half of each, where that is longer than what
    all rows share; and before them all others."""
    overall = _common_prefix(sequences)
    order = sorted(range(len(sequences)), key=lambda row: sequences[row])  # a long common prefix makes neighbours
    rest: list[int] = []
    clusters: list[list[int]] = []
    run, shared, longest = order[:1], 0, len(sequences[order[0]])
    for row in [*order[1:], None]:
        common = 0 if row is None else _common_prefix([sequences[run[0]], sequences[row]])
        common = common if len(run) == 1 else min(common, shared)
        reach = longest if row is None else max(longest, len(sequences[row]))
        if row is not None and common >= max(MIN_SHARED, reach / 2):
            run, shared, longest = [*run, row], common, reach
            continue
        if len(run) > 1 and shared >= overall + MIN_SHARED:
            clusters.append(run)
        else:
            rest += run
        if row is not None:
            run, shared, longest = [row], 0, len(sequences[row])
    return [rest, *clusters] if rest else clusters


def _rows(requests: Sequence[Request]) -> tuple[list[tuple[int, ...]], list[int]]:
    """Fewest sequences that cover all inputs, and the sequence of each request."""
    # In lexicographic order everything that starts with s follows s directly, so one look at the successor tells
    # whether s is a prefix of any other input.
    distinct = sorted({request.inputs for request in requests})
    sequences: list[tuple[int, ...]] = []
    place: dict[tuple[int, ...], int] = {}
    for inputs in reversed(distinct):
        if not (sequences and sequences[-1][: len(inputs)] == inputs):
            sequences.append(inputs)
        place[inputs] = len(sequences) - 1
    return sequences, [place[request.inputs] for request in requests]


def _common_prefix(sequences: Sequence[tuple[int, ...]]) -> int:
    low, high = min(sequences), max(sequences)  # every other sequence lies between them, so shares what they share
    length = 0
    while length < min(len(low), len(high)) and low[length] == high[length]:
        length += 1
    return length


def _batch(
    group: list[int],
    sequences: list[tuple[int, ...]],
    reads: dict[int, list[int]],
    requests: Sequence[Request],
    shared: int,
    pad_token_id: int,
) -> ScoringBatch:
    width = len(sequences[group[0]])
    input_ids = torch.full((len(group), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(group), width, dtype=torch.int64)
    places: list[tuple[int, int, int, int]] = []
    for i, row in enumerate(group):
        sequence = sequences[row]
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
        attention_mask[i, : len(sequence)] = 1
        for index in reads[row]:
            first = len(requests[index].context) - 1
            places += [(i, first + step, token, index) for step, token in enumerate(requests[index].continuation)]
    columns = torch.tensor(places, dtype=torch.int64).unbind(1)
    return ScoringBatch(input_ids, attention_mask, shared, *columns)


class RequestReader:
    """Scores of `count` requests, from the hidden states of one batch after another, in any order.

    lm_head: hidden [P, H] -> logits [P, V]. Log-probabilities are computed in float32 and summed in float64.
    """

    def __init__(self, count: int, lm_head: Callable[[Tensor], Tensor]) -> None:
        self._lm_head = lm_head
        self._log_probs, self._lengths = np.zeros(count), np.zeros(count, dtype=np.int64)
        self._greedy = np.ones(count, dtype=bool)
        self._best: list[list[int]] = [[] for _ in range(count)]

    def add(self, batch: ScoringBatch, hidden: Tensor) -> None:
        """hidden: [B, T, H] or its last columns [B, T - shared, H], after the final norm."""
        width = batch.input_ids.shape[1]
        if hidden.shape[0] != batch.input_ids.shape[0] or hidden.shape[1] not in (width, width - batch.shared):
            raise ValueError(
                f"hidden states {tuple(hidden.shape)} do not fit a batch of {tuple(batch.input_ids.shape)}"
            )
        values, best = _read(batch, hidden, batch.positions - (width - hidden.shape[1]), self._lm_head)
        owners = batch.requests.numpy()
        np.add.at(self._log_probs, owners, values)
        np.add.at(self._lengths, owners, 1)
        np.logical_and.at(self._greedy, owners, best == batch.targets.numpy())
        for owner, token in zip(owners.tolist(), best.tolist(), strict=True):
            self._best[owner].append(token)

    def scores(self) -> RequestScores:
        """Once all batches were added. Raises ValueError if they do not answer every request."""
        if (self._lengths == 0).any():
            raise ValueError("the batches do not answer every request")
        return RequestScores(self._log_probs, self._greedy, self._lengths)

    def best_tokens(self) -> list[list[int]]:
        """Of each request, the most likely token at each place of its continuation, given those before it there."""
        return self._best


def read_requests(
    batches: Sequence[ScoringBatch],
    hidden_per_batch: Iterable[Tensor],
    lm_head: Callable[[Tensor], Tensor],
    count: int,
) -> RequestScores:
    """Scores of the `count` requests behind `batches`, from one tensor a batch: see `RequestReader`."""
    reader = RequestReader(count, lm_head)
    for batch, hidden in zip(batches, hidden_per_batch, strict=True):
        reader.add(batch, hidden)
    return reader.scores()


@torch.no_grad()
def _read(
    batch: ScoringBatch, hidden: Tensor, columns: Tensor, lm_head: Callable[[Tensor], Tensor]
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probability (float64 [P]) and most likely token (int64 [P]) of each read; every place's logits are computed
    once."""
    flat, inverse = torch.unique(batch.rows * hidden.shape[1] + columns, return_inverse=True)
    states = hidden.reshape(-1, hidden.shape[-1])[flat.to(hidden.device)]
    values = np.empty(len(inverse))
    tokens = np.empty(len(inverse), dtype=np.int64)
    for start in range(0, len(flat), _LOGIT_ROWS):
        logits = lm_head(states[start : start + _LOGIT_ROWS]).float()
        normaliser, best = logits.logsumexp(-1), logits.argmax(-1)
        here = ((inverse >= start) & (inverse < start + _LOGIT_ROWS)).nonzero()[:, 0]
        local, targets = (inverse[here] - start).to(logits.device), batch.targets[here].to(logits.device)
        values[here.numpy()] = (logits[local, targets] - normaliser[local]).double().cpu().numpy()
        tokens[here.numpy()] = best[local].cpu().numpy()
    return values, tokens


@torch.no_grad()
def hidden_states(
    model: Any, batches: Sequence[ScoringBatch], forward_hidden: ForwardHidden | None = None
) -> Iterator[Tensor]:
    """Final-norm hidden states of each batch, lazily: [B, T - shared, H], or what `forward_hidden` returns.

    model: a Hugging Face causal language model in evaluation mode. Raises `UsageError` when a batch is longer than the
    model's context.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((batch.input_ids.shape[1] for batch in batches), default=0)
    if limit is not None and longest > limit:
        raise UsageError(f"tasks: a prompt of {longest} tokens does not fit the model's context of {limit}; shorten it")
    prefix: tuple[Tensor, Any] | None = None
    for batch in batches:
        ids, mask = batch.input_ids.to(model.device), batch.attention_mask.to(model.device)
        if forward_hidden is not None:
            yield forward_hidden(ids, mask)
        elif batch.shared == 0:
            yield model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        else:
            head = ids[:1, : batch.shared]
            if prefix is None or not torch.equal(prefix[0], head):
                prefix = head, prefix_cache(model, head)
            yield continue_from(model, prefix[1], ids, mask, batch.shared)


@torch.no_grad()
def prefix_cache(model: Any, prefix_ids: Tensor) -> Any:
    """The cache a model holds after reading `prefix_ids` [1, S]."""
    return model.base_model(input_ids=prefix_ids, use_cache=True).past_key_values


def repeat_cache(cache: Any, rows: int) -> Any:
    """A copy of a one-row cache, repeated over `rows` rows.

    `reorder_cache` is the one operation on rows that every kind of cache layer has, recurrent ones included; picking
    row 0 again and again is a repetition.
    """
    repeated = copy.deepcopy(cache)
    repeated.reorder_cache(torch.zeros(rows, dtype=torch.int64))
    return repeated


@torch.no_grad()
def continue_from(model: Any, cache: Any, input_ids: Tensor, attention_mask: Tensor, shared: int) -> Tensor:
    """Hidden states [B, T - shared, H] of the columns after the first `shared`, given the cache of those."""
    positions = torch.arange(shared, input_ids.shape[1], device=input_ids.device)[None]
    return model.base_model(
        input_ids=input_ids[:, shared:],
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=repeat_cache(cache, input_ids.shape[0]),
        use_cache=True,
    ).last_hidden_state


def fingerprint(batches: Sequence[ScoringBatch], *extra: str) -> str:
    """sha256 (hex) of the batches' tokens and reads and of `extra`."""
    digest = hashlib.sha256()
    for text in extra:
        digest.update(text.encode() + b"\0")
    for batch in batches:
        reads = (batch.rows, batch.positions, batch.targets, batch.requests)
        for tensor in (batch.input_ids, batch.attention_mask, *reads):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
