"""What every swap would change, from one pass back through the layers: attribution patching.

Another attention in one layer changes what that layer hands on by delta = twin(x) - attention(x), which takes no more
than the layer itself. What this does to a score read at the end is, to first order, the score's gradient there times
delta. So one pass forward and one back price the swaps of all layers and forms, where trying them takes half a pass
each (Nanda 2023, neelnanda.io/attribution-patching; Syed, Rager and Conmy, arXiv 2310.10348).

First order alone misleads twice, and both have a remedy:

- The log-probability of an answer that the model is sure of is flat, though a swap can destroy it. Changes are taken in
  log-odds, which are not flat, and turned back.
- KL from the teacher is at its minimum where the layout is the teacher. Its second order is half the variance of
  (gradient of log q(y)) x delta over tokens y drawn from the model itself (Fisher information), and is added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.placement import moved
from dtr_deploy.hybrid.precision import products_in
from dtr_deploy.search.forward import LayerPool
from dtr_deploy.search.layer_runs import ModuleRuns
from dtr_deploy.tasks.scoring import ScoringBatch

Swap = tuple[int, str | None]
"""A layer and what it gets instead: a form, or None for the backbone's own attention."""

Head = Callable[[Tensor], Tensor]
SLOTS = 4
"""Requests that one row may answer: each takes a pass back of its own."""
READS = 128
"""Reads whose logits are there at once."""


@dataclass(frozen=True)
class Answers:
    """Of the start layout, and of each swap on top of it (rows in the order asked for): log-probabilities of requests.

    before: float64 [requests]; after: float64 [swaps, requests], an estimate. layer_forwards: decoder layers run, a
    pass back through one counted as two.
    """

    before: Tensor
    after: Tensor
    layer_forwards: int

    @classmethod
    def of(cls, parts: Sequence[Answers]) -> Answers:
        """The sum of what batches add."""
        before, after = parts[0].before.clone(), parts[0].after.clone()
        for part in parts[1:]:
            before += part.before
            after += part.after
        return cls(before, after, sum(part.layer_forwards for part in parts))


@dataclass(frozen=True)
class RowDivergences:
    """`Divergences` of single rows: before float64 [rows], first and second float64 [swaps, rows]."""

    before: Tensor
    first: Tensor
    second: Tensor
    layer_forwards: int


@dataclass(frozen=True)
class Divergences:
    """KL(teacher || model), nats a token, of the start layout, and what each swap adds to it, by orders: float64
    [swaps]. layer_forwards as in `Answers`."""

    before: float
    first: Tensor
    second: Tensor
    layer_forwards: int

    @classmethod
    def of(cls, parts: Sequence[RowDivergences]) -> Divergences:
        """The mean over the rows of batches."""
        first = torch.cat([part.first for part in parts], 1).mean(1)
        second = torch.cat([part.second for part in parts], 1).mean(1)
        before = float(torch.cat([part.before for part in parts]).mean())
        return cls(before, first, second, sum(part.layer_forwards for part in parts))

    @property
    def after(self) -> Tensor:
        """An estimate, float64 [swaps]. Never below 0, which KL is not."""
        return (self.before + self.first + self.second).clamp(min=0)


class Attribution:
    """Prices swaps on top of any layout of `pool`, by its modules, on every device.

    products: dtype that linear layers multiply in. head: output embedding.
    """

    def __init__(self, pool: LayerPool, products: torch.dtype, head: Head) -> None:
        self.pool, self.products, self.head = pool, products, head
        self.runs = ModuleRuns(pool.backbone, pool.layers, pool.window, products)

    @staticmethod
    def fits(batches: Sequence[ScoringBatch]) -> bool:
        """Whether it is cheaper than trying: rows with few requests, and no long beginning that many rows share."""
        slots = max((int(_slots(batch).max()) + 1 for batch in batches), default=0)
        whole = sum(batch.input_ids.numel() for batch in batches)
        return slots <= SLOTS and whole <= 2 * sum(batch.tokens for batch in batches)

    def answers(self, layout: Layout, swaps: Sequence[Swap], batches: Sequence[ScoringBatch], count: int) -> Answers:
        """Log-probabilities of the `count` requests behind `batches`."""
        lengths = tokens_of(batches, count)
        return Answers.of([self.answers_of(layout, swaps, batch, lengths) for batch in batches])

    def answers_of(self, layout: Layout, swaps: Sequence[Swap], batch: ScoringBatch, lengths: Tensor) -> Answers:
        """What one batch adds to the `answers` of all. lengths: `tokens_of` all batches."""
        before = torch.zeros(len(lengths), dtype=torch.float64)
        after = torch.zeros(len(swaps), len(lengths), dtype=torch.float64)
        slots = _slots(batch)
        odds, changes, work = self._odds(layout, swaps, batch, slots)
        before.index_add_(0, batch.requests, F.logsigmoid(odds))
        # Of a request's change, each of its tokens is taken to have the same part.
        share = changes[:, slots, batch.rows] / lengths[batch.requests]
        after.index_add_(1, batch.requests, F.logsigmoid(odds + share))
        return Answers(before, after, work)

    def divergences(
        self,
        layout: Layout,
        swaps: Sequence[Swap],
        batches: Sequence[ScoringBatch],
        teacher: Sequence[Tensor],
        samples: int,
        seed: int = 0,
    ) -> Divergences:
        """KL from the teacher at the reads of `batches`. teacher: final hidden states at these, [P,H] of each batch.

        samples: draws of every token for the second order; its relative standard error is about sqrt(2 / (rows x
        samples)).
        """
        pairs = enumerate(zip(batches, teacher, strict=True))
        return Divergences.of(
            [self.divergences_of(layout, swaps, batch, states, samples, (seed, n)) for n, (batch, states) in pairs]
        )

    def divergences_of(
        self,
        layout: Layout,
        swaps: Sequence[Swap],
        batch: ScoringBatch,
        states: Tensor,
        samples: int,
        seed: tuple[int, int],
    ) -> RowDivergences:
        """Those of one batch's rows. seed: and the batch's number; each batch draws for itself, so that it does not
        matter where and when the others are run."""
        generator = torch.Generator().manual_seed(seed[0] * 1_000_003 + seed[1])
        rows = batch.input_ids.shape[0]
        reads = torch.bincount(batch.rows, minlength=rows).double()
        values = torch.zeros(len(batch.rows), dtype=torch.float64)

        def gradients(hidden: Tensor) -> list[Tensor]:
            found = [torch.zeros_like(hidden) for _ in range(1 + samples)]
            for part, read, logits in self._reads(hidden, batch):
                log_q = logits.detach().log_softmax(-1)
                log_p = _wide(self.head(states[part].to(hidden.device)).detach()).log_softmax(-1)
                q, p = log_q.exp(), log_p.exp()
                values[part] = (p * (log_p - log_q)).sum(-1).double().cpu()
                drawn = torch.multinomial(q.cpu(), samples, replacement=True, generator=generator).to(q.device)
                wanted = [q - p, *(F.one_hot(y, q.shape[-1]).to(q) - q for y in drawn.T)]
                for number, (into, towards) in enumerate(zip(found, wanted, strict=True)):
                    (grad,) = torch.autograd.grad(logits, read, towards, retain_graph=number < samples)
                    _scatter(into, batch, part, grad)
            return found

        changes, work = self._sweep(layout, swaps, batch, gradients)
        before = torch.zeros(rows, dtype=torch.float64).index_add_(0, batch.rows, values) / reads
        second = 0.5 * changes[:, 1:].square().mean(1) / reads
        return RowDivergences(before, changes[:, 0] / reads, second, work)

    def _odds(
        self, layout: Layout, swaps: Sequence[Swap], batch: ScoringBatch, slots: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Log-odds of each read float64 [P], what each swap changes of the sum over a slot's reads float64
        [swaps, slots, B], and the work."""
        odds = torch.zeros(len(batch.rows), dtype=torch.float64)

        def gradients(hidden: Tensor) -> list[Tensor]:
            found = [torch.zeros_like(hidden) for _ in range(int(slots.max()) + 1)]
            for part, read, logits in self._reads(hidden, batch):
                targets = batch.targets[part, None].to(logits.device)
                others = logits.scatter(-1, targets, float("-inf"))
                value = logits.gather(-1, targets)[:, 0] - others.logsumexp(-1)
                odds[part] = value.detach().double().cpu()
                (grad,) = torch.autograd.grad(value.sum(), read)
                for number, into in enumerate(found):
                    mine = slots[part] == number
                    _scatter(into, batch, part, torch.where(mine[:, None].to(grad.device), grad, 0))
            return found

        changes, used = self._sweep(layout, swaps, batch, gradients)
        return odds, changes, used

    @torch.enable_grad()
    def _reads(self, hidden: Tensor, batch: ScoringBatch) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some reads at a time: which, their hidden states (with gradient), and their logits."""
        for start in range(0, len(batch.rows), READS):
            part = slice(start, start + READS)
            places = batch.rows[part].to(hidden.device), batch.positions[part].to(hidden.device)
            read = hidden[places].detach().requires_grad_()
            yield part, read, _wide(self.head(read))

    def _sweep(
        self,
        layout: Layout,
        swaps: Sequence[Swap],
        batch: ScoringBatch,
        gradients: Callable[[Tensor], list[Tensor]],
    ) -> tuple[Tensor, int]:
        """Forward, then back with S gradients of final hidden states [B,T,H]: changes float64 [swaps, S, B], work.

        Only borders between layers are kept on the way forward; each layer is run again on the way back.
        """
        self.pool.check(layout)
        batch = replace(batch, shared=0)
        by_layer: dict[int, dict[str | None, int]] = {}
        for number, (layer, form) in enumerate(swaps):
            by_layer.setdefault(layer, {})[form] = number
        with torch.no_grad():
            context = self.runs.context(batch)
            borders = [self.runs.embed(batch)]
            for layer, form in enumerate(layout):
                borders.append(self.runs.run(layer, form, borders[-1], context, None))
        last = borders.pop().requires_grad_()
        with torch.enable_grad():
            final = self.runs.finish(batch, last)
        wanted = gradients(final.detach())
        back = [torch.autograd.grad(final, last, grad, retain_graph=grad is not wanted[-1])[0] for grad in wanted]
        changes = torch.zeros(len(swaps), len(wanted), batch.input_ids.shape[0], dtype=torch.float64)
        lowest, work = min(by_layer, default=len(layout)), len(layout)
        for layer in range(len(layout) - 1, lowest - 1, -1):
            hidden = borders.pop().requires_grad_()
            recorder = _Recorder(self._module(layer, layout[layer]))
            with recorder, torch.enable_grad():
                out = self.runs.run(layer, layout[layer], hidden, context, None)
            at_output = [
                torch.autograd.grad(out, [hidden, recorder.added], grad, retain_graph=number + 1 < len(back))
                for number, grad in enumerate(back)
            ]
            back = [grad for grad, _ in at_output]
            for form, swap in by_layer.get(layer, {}).items():
                delta = self._attention(layer, form, recorder, context) - recorder.answer
                for number, (_, grad) in enumerate(at_output):
                    changes[swap, number] = (grad * delta).sum((1, 2), dtype=torch.float64).cpu()
            work += 1 + 2 * len(back)
        return changes, work * batch.input_ids.shape[0]

    def _module(self, layer: int, form: str | None) -> torch.nn.Module:
        return cast(torch.nn.Module, self.pool.layers[layer][form].self_attn)

    @torch.no_grad()
    def _attention(self, layer: int, form: str | None, seen: _Recorder, context: Any) -> Tensor:
        """What another attention would answer to what the layer's own was given."""
        mask = context.causal_mask if form is None else context.recurrent_mask
        with products_in(self.products, seen.answer.device.type):
            options = {**seen.options, "attention_mask": moved(mask, seen.answer.device)}
            answer = self._module(layer, form)(*seen.arguments, **options)[0]
        return cast(Tensor, answer)


class _Recorder:
    """While open, adds a zero that has a gradient to what an attention module answers, and notes what it was given."""

    def __init__(self, attention: torch.nn.Module) -> None:
        self.attention = attention
        self.arguments: tuple[Any, ...] = ()
        self.options: Mapping[str, Any] = {}
        self.answer: Tensor
        self.added: Tensor

    def __enter__(self) -> _Recorder:
        self._hook = self.attention.register_forward_hook(self._record, with_kwargs=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self._hook.remove()

    def _record(self, _: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
        self.arguments = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
        self.options = {k: x.detach() if isinstance(x, Tensor) else x for k, x in options.items()}
        self.answer = output[0].detach()
        self.added = torch.zeros_like(self.answer, requires_grad=True)
        return (output[0] + self.added, *output[1:])


def pieces(batches: Sequence[ScoringBatch], tokens: int = 1024) -> list[ScoringBatch]:
    """The same rows and reads in batches of about so many tokens, shared columns written out: rows come longest first,
    so that little of each is padding."""
    found = []
    for batch in batches:
        lengths = batch.attention_mask.sum(1)
        first = 0
        while first < len(lengths):
            last = first + max(1, tokens // int(lengths[first:].max()))
            width = int(lengths[first:last].max())
            mine = (batch.rows >= first) & (batch.rows < last)
            reads = (batch.rows[mine] - first, batch.positions[mine], batch.targets[mine], batch.requests[mine])
            rows = slice(first, last)
            found.append(ScoringBatch(batch.input_ids[rows, :width], batch.attention_mask[rows, :width], 0, *reads))
            first = last
    return found


def tokens_of(batches: Sequence[ScoringBatch], count: int) -> Tensor:
    """float64 [count]: how many tokens of each request are read in `batches`."""
    lengths = torch.zeros(count, dtype=torch.float64)
    for batch in batches:
        lengths.index_add_(0, batch.requests, torch.ones(len(batch.requests), dtype=torch.float64))
    return lengths


def _slots(batch: ScoringBatch) -> Tensor:
    """int64 [P]: the number of each read's request among those of its row."""
    slots = torch.zeros(len(batch.rows), dtype=torch.int64)
    numbers: dict[int, dict[int, int]] = {}
    for index, (row, request) in enumerate(zip(batch.rows.tolist(), batch.requests.tolist(), strict=True)):
        mine = numbers.setdefault(row, {})
        slots[index] = mine.setdefault(request, len(mine))
    return slots


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _scatter(into: Tensor, batch: ScoringBatch, part: slice, grad: Tensor) -> None:
    """Add gradients [P,H] of reads to those of hidden states [B,T,H]."""
    places = batch.rows[part].to(into.device), batch.positions[part].to(into.device)
    into.index_put_(places, grad.to(into.dtype), accumulate=True)
