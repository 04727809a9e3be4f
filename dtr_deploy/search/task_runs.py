"""Raw results of one part of one task for many layouts: what `ModelEvaluator` computes, keeps and adds up.

By likelihood (`LikelihoodRuns`), by generation with drafts (`DraftRuns`), and, for tasks that cannot do without, by a
whole model (`WholeRuns`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.hybrid.model import make_hybrid
from dtr_deploy.hybrid.precision import products_in
from dtr_deploy.search.forward import LayerPool, PrefixForward
from dtr_deploy.tasks.base import Split, Task, TaskScore
from dtr_deploy.tasks.generation import GenerationTask, greedy_tokens, settled
from dtr_deploy.tasks.request_task import Part
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import RequestReader, RequestScores, ScoringBatch, plan_batches

MakeForward = Callable[[Sequence[ScoringBatch]], PrefixForward]
Head = Callable[[Tensor], Tensor]


@dataclass
class RawResult:
    """Of one layout. arrays, scalars: what the ledger keeps. layer_forwards: decoder layers run, each over one
    sequence; work that layouts shared is divided among them, so it need not be whole."""

    arrays: dict[str, np.ndarray]
    layer_forwards: float
    scalars: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class WholeModel:
    """Whole models of layouts, for what cannot be run layer by layer; they share the pool's weights."""

    pool: LayerPool
    products: torch.dtype

    @property
    def backbone(self) -> Any:
        return self.pool.backbone

    def model(self, layout: Layout) -> Any:
        """The hybrid of a layout, the backbone for one without a twin."""
        if not any(layout):
            return self.backbone
        return make_hybrid(self.backbone, layout, self.pool.window, self.pool.twins)

    def precision(self) -> torch.autocast:
        """The context in which its products have the search's dtype."""
        return products_in(self.products, self.backbone.device.type)


class TaskRuns(Protocol):
    """Runs one part of one task."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of hidden states held between calls."""
        ...

    def run(self, layouts: Sequence[Layout]) -> list[RawResult]:
        """Raw results of each layout, in order."""
        ...


class LikelihoodRuns:
    """The log-probabilities of a part's requests."""

    def __init__(self, part: Part, forward: PrefixForward, head: Head) -> None:
        self.part, self.forward, self.head = part, forward, head

    @property
    def kept_bytes(self) -> int:
        return self.forward.kept_bytes

    def run(self, layouts: Sequence[Layout]) -> list[RawResult]:
        """See `TaskRuns`."""
        readers = read_many(self.forward, layouts, len(self.part.requests), self.head)
        return [
            RawResult(request_arrays(reader.scores()), share)
            for reader, share in zip(readers, self.forward.shares, strict=True)
        ]


class DraftRuns:
    """Greedy answers to a part's items, and the log-probabilities of the right ones, in about one forward pass.

    Drafts are the right answers first, then what the first layout wrote; they are the same for all layouts of a call,
    so that these share what they have in common. When a call finds most answers of its last layout to differ from their
    drafts, that layout's answers are the next drafts. What a draft does not settle is decoded with a cache by the whole
    model.
    """

    def __init__(
        self,
        task: GenerationTask,
        split: Split,
        part: Part,
        make_forward: MakeForward,
        whole: WholeModel,
        head: Head,
    ) -> None:
        self.task, self.split, self.part = task, split, part
        self._make_forward, self._whole, self._head = make_forward, whole, head
        self._stop = task.stop(whole.backbone, split)
        requests = task.requests(split)
        self._gold = [requests[index] for index in part.requests]
        self._has_own_drafts = False
        self._draft([request.continuation for request in self._gold])

    @property
    def kept_bytes(self) -> int:
        return self._forward.kept_bytes

    def run(self, layouts: Sequence[Layout]) -> list[RawResult]:
        """See `TaskRuns`."""
        count = len(self._gold)
        readers = read_many(self._forward, layouts, 2 * count, self._head)
        results, unsettled, written = [], 0, [list(draft) for draft in self._drafts]
        for layout, reader, share in zip(layouts, readers, list(self._forward.shares), strict=True):
            written, unsettled, more = self._finish(layout, reader.best_tokens()[count:])
            scores = reader.scores()
            texts = [self._stop.text(tokens) for tokens in written]
            accepted = [
                self.task.accepts(self.split, int(item), text)
                for item, text in zip(self.part.items, texts, strict=True)
            ]
            gold = RequestScores(scores.log_probs[:count], np.array(accepted, dtype=bool), scores.lengths[:count])
            results.append(RawResult(request_arrays(gold), share + more))
        if layouts and (not self._has_own_drafts or 2 * unsettled > count):
            self._has_own_drafts = True
            if [tuple(tokens) for tokens in written] != self._drafts:
                self._draft(written)
        return results

    def _draft(self, drafts: Sequence[Sequence[int]]) -> None:
        """Plan batches that read each right answer and each draft."""
        self._drafts = [tuple(draft) for draft in drafts]
        drafted = [Request(r.context, draft) for r, draft in zip(self._gold, self._drafts, strict=True)]
        pad = self.task.tokenizer.pad_token_id
        self._forward = self._make_forward(plan_batches([*self._gold, *drafted], pad if pad is not None else 0))

    def _finish(self, layout: Layout, best: Sequence[Sequence[int]]) -> tuple[list[list[int]], int, float]:
        """Each item's answer, how many were not settled by their drafts, and the layer-forwards that those took.

        best: of each item, what greedy decoding writes at each place of the draft if it wrote the draft until there.
        """
        reached = self._stop.reached
        written = [settled(draft, tokens, reached) for draft, tokens in zip(self._drafts, best, strict=True)]
        rest = [index for index, tokens in enumerate(written) if not reached(tokens)]
        if not rest:
            return written, 0, 0.0
        prompts = [self._gold[index].context for index in rest]
        begun = [written[index] for index in rest]
        with self._whole.precision():
            ends = greedy_tokens(self._whole.model(layout), prompts, self._stop, begun=begun)
        work = 0.0
        for index, prompt, tokens in zip(rest, prompts, ends, strict=True):
            # One pass over all that was there, then tokens one by one.
            work += len(layout) * (1 + (len(tokens) - len(written[index])) / (len(prompt) + len(written[index])))
            written[index] = tokens
        return written, len(rest), work


class WholeRuns:
    """Scores of a task that needs a whole model. Its items cannot be dealt."""

    kept_bytes = 0

    def __init__(self, task: Task, split: Split, whole: WholeModel) -> None:
        self.task, self.split, self._whole = task, split, whole

    def run(self, layouts: Sequence[Layout]) -> list[RawResult]:
        """See `TaskRuns`."""
        results = []
        for layout in layouts:
            with self._whole.precision():
                score = self.task.score(self._whole.model(layout), self.split)
            arrays = {"items": score.per_item, "margins": score.margins}
            # How many sequences the task ran is its own affair: one an item is the least.
            results.append(RawResult(arrays, len(layout) * score.per_item.size, {"strata": list(score.strata)}))
        return results


def read_many(forward: PrefixForward, layouts: Sequence[Layout], count: int, head: Head) -> list[RequestReader]:
    """What each layout says of the `count` requests behind `forward.batches`."""
    readers = [RequestReader(count, head) for _ in layouts]
    for layout, batch, hidden in forward.hidden_many(layouts):
        readers[layout].add(forward.batches[batch], hidden)
    return readers


def request_arrays(scores: RequestScores) -> dict[str, np.ndarray]:
    """The arrays of `RequestScores`, by name."""
    return {"log_probs": scores.log_probs, "greedy": scores.greedy, "lengths": scores.lengths}


def joined_scores(arrays: Sequence[Mapping[str, np.ndarray]]) -> RequestScores:
    """The scores of several parts' requests, one part after another."""
    log_probs, greedy, lengths = (
        np.concatenate([part[name] for part in arrays]) for name in ("log_probs", "greedy", "lengths")
    )
    return RequestScores(log_probs.astype(np.float64), greedy.astype(bool), lengths.astype(np.int64))


def whole_score(task: Task, split: Split, result: Mapping[str, np.ndarray], strata: Sequence[str]) -> TaskScore:
    """What `WholeRuns` put into its arrays."""
    return TaskScore(task.name, split, result["items"], result["margins"], tuple(strata))
