"""Divergence from the teacher on held-out text: KL(teacher || model) a token, and perplexity.

The teacher's log-probabilities over a whole vocabulary are large (100 KB a token at 49,152 words in float16), so the
teacher is kept as its final hidden states and its output embedding; its logits are made again, a few rows at a time.
That adds one product with the output embedding a token and no forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtr_deploy.tasks.base import ForwardHidden
from dtr_deploy.tasks.scoring import BATCH_TOKENS, ScoringBatch, fingerprint, hidden_states

SCREENING = 4
"""`every` of a text that only ranks layouts: the product with the output embedding was half of a screening's time."""

_LOGIT_ROWS = 128  # two models' logits and log-probabilities at once: 100 MB at a vocabulary of 49,152 in float32


@dataclass(frozen=True)
class DivergenceScore:
    """Of each sequence, float64 [N], over its predicted tokens that are read: `kl` mean KL(teacher || model) in nats a
    token, `nll` mean negative log-likelihood of the text in nats a token."""

    kl: np.ndarray
    nll: np.ndarray

    @property
    def mean_kl(self) -> float:
        """Mean KL over all tokens, nats a token."""
        return float(self.kl.mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood over all tokens."""
        return float(np.exp(self.nll.mean()))


class Divergence:
    """Held-out text to compare models on.

    token_ids: integer [N, T], T >= 2, packed (no padding). every: of the T - 1 predicted tokens of a sequence, one in
    so many is read (its first, and every so many after it): hidden states are cheap beside a whole vocabulary, and
    neighbouring tokens tell much the same.

    Call `reference(backbone)` once; then `score(model)`, or `batches` and `read` with hidden states of one's own. The
    backbone's output embedding is held by reference: it must not change afterwards.
    """

    def __init__(self, token_ids: Tensor, batch_tokens: int = BATCH_TOKENS, every: int = 1) -> None:
        if token_ids.ndim != 2 or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
            raise ValueError(f"token_ids must be [N, T] with N >= 1 and T >= 2, got {tuple(token_ids.shape)}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.token_ids = token_ids.to(torch.int64).cpu()
        rows = max(1, batch_tokens // token_ids.shape[1])
        self._batches = [_reads(part, i * rows, every) for i, part in enumerate(self.token_ids.split(rows))]
        self._teacher: list[Tensor] | None = None
        self._teacher_head: Callable[[Tensor], Tensor] | None = None

    def batches(self) -> list[ScoringBatch]:
        """The inputs [B, T - 1], one position in `every` read; row r of the batches in order is sequence r."""
        return self._batches

    def reference(self, backbone: Any, forward_hidden: ForwardHidden | None = None) -> DivergenceScore:
        """Take `backbone` as the teacher; returns its own score (`kl` 0)."""
        hidden = hidden_states(backbone, self._batches, forward_hidden)
        self.reference_hidden([state.cpu() for state in hidden], backbone.get_output_embeddings())
        assert self._teacher is not None and self._teacher_head is not None
        return self.read(self._teacher, self._teacher_head)

    def reference_hidden(self, hidden_per_batch: Iterable[Tensor], lm_head: Callable[[Tensor], Tensor]) -> None:
        """As `reference`, from the teacher's final hidden states [B, T - 1, H] of each batch."""
        self._teacher = list(hidden_per_batch)
        self._teacher_head = lm_head

    def teacher_reads(self) -> list[Tensor]:
        """The teacher's final hidden states at each batch's reads, [P,H]. Raises RuntimeError without a reference."""
        if self._teacher is None:
            raise RuntimeError("Divergence.reference(backbone) must come first")
        return [states[batch.rows, batch.positions] for batch, states in zip(self._batches, self._teacher, strict=True)]

    def read(self, hidden_per_batch: Iterable[Tensor], lm_head: Callable[[Tensor], Tensor]) -> DivergenceScore:
        """Score from final hidden states [B, T - 1, H] of each batch. Raises RuntimeError without a reference."""
        hidden = zip(range(len(self._batches)), hidden_per_batch, strict=True)
        return join([self.read_batch(number, state, lm_head) for number, state in hidden])

    def read_batch(self, number: int, hidden: Tensor, lm_head: Callable[[Tensor], Tensor]) -> DivergenceScore:
        """Score of the sequences of one batch alone; `join` puts them together."""
        if self._teacher is None or self._teacher_head is None:
            raise RuntimeError("Divergence.reference(backbone) must come first")
        return DivergenceScore(
            *_compare(self._batches[number], hidden, lm_head, self._teacher[number], self._teacher_head)
        )

    def score(self, model: Any, forward_hidden: ForwardHidden | None = None) -> DivergenceScore:
        """KL and negative log-likelihood of a Hugging Face causal language model."""
        return self.read(hidden_states(model, self._batches, forward_hidden), model.get_output_embeddings())

    def kl(self, model: Any) -> np.ndarray:
        """Mean KL(teacher || model) of each sequence, float64 [N], nats a token."""
        return self.score(model).kl

    def perplexity(self, model: Any) -> float:
        """Perplexity of `model` on the text."""
        return self.score(model).perplexity

    def fingerprint(self) -> str:
        """sha256 of the text (not of the teacher)."""
        return fingerprint(self._batches, "divergence")


def join(scores: Sequence[DivergenceScore]) -> DivergenceScore:
    """One score of the sequences of several, in order."""
    return DivergenceScore(np.concatenate([s.kl for s in scores]), np.concatenate([s.nll for s in scores]))


def _reads(token_ids: Tensor, first: int, every: int) -> ScoringBatch:
    inputs, targets = token_ids[:, :-1], token_ids[:, 1:]
    count, width = inputs.shape
    places = torch.arange(0, width, every)
    rows = torch.arange(count).repeat_interleave(len(places))
    positions = places.repeat(count)
    mask = torch.ones_like(inputs)
    return ScoringBatch(inputs.contiguous(), mask, 0, rows, positions, targets[:, places].reshape(-1), rows + first)


@torch.no_grad()
def _compare(
    batch: ScoringBatch,
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    teacher: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
) -> tuple[np.ndarray, np.ndarray]:
    """KL and negative log-likelihood of each row, mean over its tokens that are read, float64 [B]."""
    rows, count = batch.input_ids.shape[0], len(batch.targets)
    at, positions = batch.rows, batch.positions
    student_states, teacher_states = (
        states[at.to(states.device), positions.to(states.device)] for states in (hidden, teacher)
    )
    kl = torch.empty(count, dtype=torch.float64)
    nll = torch.empty(count, dtype=torch.float64)
    for start in range(0, count, _LOGIT_ROWS):
        part = slice(start, start + _LOGIT_ROWS)
        log_q = lm_head(student_states[part]).float().log_softmax(-1)
        log_p = teacher_head(teacher_states[part].to(hidden.device)).float().log_softmax(-1)
        kl[part] = (log_p.exp() * (log_p - log_q)).sum(-1)
        nll[part] = -log_q.gather(-1, batch.targets[part, None].to(log_q.device))[:, 0]
    return kl.view(rows, -1).mean(1).numpy(), nll.view(rows, -1).mean(1).numpy()
