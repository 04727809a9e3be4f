"""Scores of layouts, each computed once and remembered in the ledger.

`Scorer` is what a search talks to: it knows keys, the ledger and what has been spent. What a score takes is behind
`Evaluator`; `ModelEvaluator` is the real one, made of a backbone, its twins, the tasks and a text to compare with the
teacher on.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dtr_deploy.hybrid.layout import Layout, full
from dtr_deploy.hybrid.model import Twins, make_hybrid
from dtr_deploy.hybrid.precision import products_dtype
from dtr_deploy.search.forward import LayerPool, PrefixForward
from dtr_deploy.search.ledger import Ledger, Status, Trial, TrialKey, TrialResult
from dtr_deploy.search.objective import LayoutScore, Screening
from dtr_deploy.search.problem import Candidate
from dtr_deploy.tasks.base import Split, Task, TaskScore
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.scoring import ScoringBatch

BORDER_BYTES = 2 << 30
"""Memory that a search may fill with hidden states between layers, over all its tasks."""

SCORE, SCREEN = "score", "screen"


class Evaluator(Protocol):
    """Computes scores. `layer_forwards` grows with the work done; `fingerprint` tells one evaluator from another."""

    @property
    def layers(self) -> int: ...

    @property
    def candidates(self) -> Sequence[Candidate]: ...

    @property
    def weights(self) -> tuple[float, ...]: ...

    @property
    def layer_forwards(self) -> int: ...

    def score(self, layout: Layout, split: Split) -> Sequence[TaskScore]: ...

    def screen(self, layout: Layout) -> Screening: ...

    def fingerprint(self, kind: str, split: str) -> str:
        """Hash of everything a result depends on but the layout."""
        ...


class Scorer:
    """An evaluator with a memory. Every result it returns was read from the ledger, also the first time.

    `spent_*` count each trial once, whether it was computed now or by an earlier run of the same search.
    """

    def __init__(self, evaluator: Evaluator, ledger: Ledger) -> None:
        self.evaluator, self.ledger = evaluator, ledger
        self.layers, self.candidates = evaluator.layers, sorted(evaluator.candidates)
        self._spent: dict[TrialKey, Trial] = {}

    @property
    def spent_trials(self) -> int:
        return len(self._spent)

    @property
    def spent_seconds(self) -> float:
        return sum(trial.seconds for trial in self._spent.values())

    @property
    def spent_layer_forwards(self) -> int:
        return sum(trial.layer_forwards for trial in self._spent.values())

    def score(self, layout: Layout, split: Split = "search") -> LayoutScore:
        """Scores of all tasks on one split."""

        def compute() -> TrialResult:
            before = self.evaluator.layer_forwards
            scores = self.evaluator.score(layout, split)
            arrays: dict[str, np.ndarray] = {}
            for number, score in enumerate(scores):
                arrays |= {f"{number}.items": score.per_item, f"{number}.margins": score.margins}
            scalars = {"tasks": [{"task": score.task, "strata": list(score.strata)} for score in scores]}
            return TrialResult(scalars, arrays, self.evaluator.layer_forwards - before)

        trial = self._trial(self._key(SCORE, layout, split), compute)
        tasks = tuple(
            TaskScore(
                entry["task"],
                split,
                trial.arrays[f"{number}.items"],
                trial.arrays[f"{number}.margins"],
                tuple(entry["strata"]),
            )
            for number, entry in enumerate(trial.scalars["tasks"])
        )
        return LayoutScore(layout, split, tasks, self.evaluator.weights)

    def screen(self, layout: Layout) -> Screening:
        """Cheap scores for ranking."""

        def compute() -> TrialResult:
            before = self.evaluator.layer_forwards
            result = self.evaluator.screen(layout)
            scalars = {"kl": result.kl, "perplexity": result.perplexity, "recall": dict(result.recall)}
            return TrialResult(scalars, {}, self.evaluator.layer_forwards - before)

        scalars = self._trial(self._key(SCREEN, layout, "search"), compute).scalars
        return Screening(layout, scalars["kl"], scalars["perplexity"], scalars["recall"])

    def decide(self, layout: Layout, status: Status, split: Split = "search") -> None:
        """Note in the ledger what became of a scored layout."""
        self.ledger.set_status(self._key(SCORE, layout, split), status)

    def _trial(self, key: TrialKey, compute: Any) -> Trial:
        trial = self.ledger.memoised(key, compute)
        self._spent.setdefault(key, trial)
        return trial

    def _key(self, kind: str, layout: Layout, split: str) -> TrialKey:
        return TrialKey(kind, layout, split, self.evaluator.fingerprint(kind, split))


class ModelEvaluator:
    """Scores layouts of a backbone and its twins.

    Args:
        backbone: causal LM in evaluation mode; not modified.
        twins: state dictionaries of `HybridMixer` by (layer, form); each is a candidate.
        window: the twins' softmax window, tokens.
        tasks: what the score is made of, weighted by `task.weight`.
        divergence: held-out text for screening; the backbone is made its reference.
        recall: tasks whose margins on their search split are screened besides (few, short items do). Every margin a
            swap loses counts against it.
        models_hash: hash of the backbone's and the twins' weights, for the ledger's keys.
        border_bytes: memory for hidden states between layers, screening first. Where not all fit, only every second,
            third, ... border is kept.
        precision: of the products of linear layers, see `hybrid.precision`. Log-probabilities are read in float32.
    """

    def __init__(
        self,
        backbone: Any,
        twins: Twins,
        window: int,
        tasks: Sequence[Task],
        divergence: Divergence,
        recall: Sequence[Task],
        models_hash: str,
        border_bytes: int = BORDER_BYTES,
        precision: str = "float32",
    ) -> None:
        self.backbone, self.tasks, self.divergence, self.recall = backbone, list(tasks), divergence, list(recall)
        self.pool = LayerPool(backbone, twins, window)
        self.products = products_dtype(precision, backbone.device.type)
        self.layers = len(self.pool.layers)
        self.candidates = sorted(Candidate(layer, form) for layer, form in twins)
        self.weights = tuple(float(task.weight) for task in tasks)
        self.models_hash = models_hash
        self._head = backbone.get_output_embeddings()
        self._forwards: dict[str, PrefixForward] = {}
        self._other_forwards = 0
        screened = [*divergence.batches(), *self._search_batches(self.recall)]
        screening_bytes = PrefixForward.border_bytes(screened, backbone.config)
        search_bytes = PrefixForward.border_bytes(self._search_batches(self.tasks), backbone.config)
        self.screen_stride = self._stride(screening_bytes, border_bytes)
        left = border_bytes - screening_bytes // (self.screen_stride or 1)
        self.search_stride = self._stride(search_bytes, left)
        self._has_reference = False
        self._fingerprints: dict[tuple[str, str], str] = {}

    @property
    def layer_forwards(self) -> int:
        return self._other_forwards + sum(forward.layer_forwards for forward in self._forwards.values())

    @property
    def kept_bytes(self) -> int:
        """Bytes of hidden states held between layers now."""
        return sum(forward.kept_bytes for forward in self._forwards.values())

    def score(self, layout: Layout, split: Split) -> list[TaskScore]:
        """One score per task, in order."""
        # Only the search split is run often enough to keep anything for.
        stride = self.search_stride if split == "search" else 0
        return [self._score(task, layout, split, f"{split}/{task.name}", stride) for task in self.tasks]

    def screen(self, layout: Layout) -> Screening:
        """Divergence from the teacher, and the recall tasks' mean margins."""
        forward = self._forward("screen/divergence", self.divergence.batches(), self.screen_stride)
        if not self._has_reference:  # not in __init__: a search that finds all its trials in the ledger runs no model
            self.divergence.reference_hidden(list(forward.hidden(full(self.layers))), self._head)
            self._has_reference = True
        divergence = self.divergence.read(forward.hidden(layout), self._head)
        recall = {
            task.name: self._score(task, layout, "search", f"screen/{task.name}", self.screen_stride).mean_margin
            for task in self.recall
        }
        return Screening(layout, divergence.mean_kl, divergence.perplexity, recall)

    def fingerprint(self, kind: str, split: str) -> str:
        if (kind, split) not in self._fingerprints:
            self._fingerprints[kind, split] = self._fingerprint(kind, split)
        return self._fingerprints[kind, split]

    def _fingerprint(self, kind: str, split: str) -> str:
        digest = hashlib.sha256(f"{self.models_hash}/{kind}/{split}/{self.products}".encode())
        if kind == SCREEN:
            digest.update(self.divergence.fingerprint().encode())
        for task in self.recall if kind == SCREEN else self.tasks:
            digest.update(f"/{task.name}/{task.fingerprint(split)}".encode())  # type: ignore[arg-type]
        return digest.hexdigest()

    def _score(self, task: Task, layout: Layout, split: Split, name: str, stride: int) -> TaskScore:
        if not task.resumable:  # tasks that generate need a whole model
            hybrid = self.backbone
            if any(layout):
                hybrid = make_hybrid(self.backbone, layout, self.pool.window, self.pool.twins)
            self._other_forwards += self.layers
            return task.score(hybrid, split)
        forward = self._forward(name, task.batches(split), stride)
        return task.read(split, forward.hidden(layout), self._head)

    def _forward(self, name: str, batches: Sequence[ScoringBatch], stride: int) -> PrefixForward:
        if name not in self._forwards:
            self._forwards[name] = PrefixForward(self.pool, batches, stride, self.products)
        return self._forwards[name]

    def _stride(self, needed: int, available: int) -> int:
        """Every how many layers hidden states are kept, so that `needed` bytes of them fit; 0 if none do."""
        if available <= 0:
            return 0
        stride = math.ceil(needed / available)
        return max(1, stride) if stride < self.layers else 0

    @staticmethod
    def _search_batches(tasks: Sequence[Task]) -> list[ScoringBatch]:
        return [batch for task in tasks if task.resumable for batch in task.batches("search")]


def models_hash(backbone_fingerprint: str, twins: Mapping[tuple[int, str], Mapping[str, Any]], window: int) -> str:
    """sha256 over a backbone's fingerprint and every twin's weights."""
    digest = hashlib.sha256(f"{backbone_fingerprint}/{window}".encode())
    for (layer, form), weights in sorted(twins.items()):
        for name, tensor in sorted(weights.items()):
            digest.update(f"/{layer}/{form}/{name}/{tensor.dtype}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().float().numpy().tobytes())
    return digest.hexdigest()
