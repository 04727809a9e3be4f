"""The vocabulary of scoring: splits, per-item scores, the task protocol, the combined score.

Imports numpy only, so that recipes and reports can speak of scores without loading torch. How a task is run is in
`scoring` and `request_task`; how sure one may be of a score is in `dtr_deploy.search.statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from dtr_deploy.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from dtr_deploy.tasks.scoring import ScoringBatch

Split = Literal["search", "confirm", "test"]
SPLITS: tuple[Split, ...] = ("search", "confirm", "test")

ForwardHidden = Callable[["Tensor", "Tensor"], "Tensor"]
"""`(input_ids [B, T], attention_mask [B, T]) -> hidden [B, T, H]`: after the final norm."""


def check_split(split: str) -> Split:
    """`split` itself if it is one of `SPLITS`. Raises `UsageError` otherwise."""
    if split not in SPLITS:
        raise UsageError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    return split  # type: ignore[return-value]


@dataclass(frozen=True)
class TaskScore:
    """One model's result on one split of one task, item by item, so that two models can be compared in pairs.

    per_item: float64 [N], higher is better; 0/1 for accuracy and exact match.
    margins: float64 [N], nats, higher is better: a log-probability of the right answer. It moves before `per_item`
        does, and so ranks layouts whose `per_item` are equal within noise.
    strata: N names, one an item: groups whose sizes are fixed by the task's design (the needle's lengths, the subtasks
        of an lm-eval group). Empty = one group.
    """

    task: str
    split: str
    per_item: np.ndarray
    margins: np.ndarray
    strata: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("per_item", "margins"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            if values.ndim != 1 or values.size == 0:
                raise ValueError(f"{self.task}: {name} must be one number an item, got shape {values.shape}")
            object.__setattr__(self, name, values)
        if self.per_item.shape != self.margins.shape or len(self.strata) not in (0, self.per_item.size):
            raise ValueError(f"{self.task}: per_item, margins and strata must be of one length")

    @property
    def mean(self) -> float:
        """Mean of `per_item`."""
        return float(self.per_item.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of `mean` over items (sample standard deviation / sqrt(N)); infinite for a single item."""
        count = self.per_item.size
        return float(self.per_item.std(ddof=1) / np.sqrt(count)) if count > 1 else float("inf")

    @property
    def mean_margin(self) -> float:
        """Mean of `margins`, nats."""
        return float(self.margins.mean())

    def by_stratum(self) -> dict[str, float]:
        """Mean of `per_item` in each stratum, in the order of first appearance; empty if there are no strata."""
        names = np.asarray(self.strata)
        return {name: float(self.per_item[names == name].mean()) for name in dict.fromkeys(self.strata)}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` restores it exactly."""
        return {
            "task": self.task,
            "split": self.split,
            "per_item": self.per_item.tolist(),
            "margins": self.margins.tolist(),
            "strata": list(self.strata),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScore:
        """The inverse of `to_dict`."""
        return cls(
            task=data["task"],
            split=data["split"],
            per_item=np.asarray(data["per_item"], dtype=np.float64),
            margins=np.asarray(data["margins"], dtype=np.float64),
            strata=tuple(data.get("strata", ())),
        )


@runtime_checkable
class Task(Protocol):
    """A scored ability with three disjoint splits: `search` (read often), `confirm` and `test` (read once or twice).

    `score` is `read` over the hidden states of `batches`. A search that changes only layers from i on keeps each
    batch's input to layer i, computes the hidden states itself and calls `read`, which is the same arithmetic.
    `resumable` is False for tasks that must generate (lm-eval's `generate_until`); those have `score` only.
    """

    name: str
    weight: float
    resumable: bool

    def batches(self, split: Split) -> list[ScoringBatch]:
        """Tokenised inputs of a split, in a fixed order, made once."""
        ...

    def read(self, split: Split, hidden_per_batch: Iterable[Tensor], lm_head: Callable[[Tensor], Tensor]) -> TaskScore:
        """Score from final-norm hidden states of each batch: [B, T, H], or the last columns [B, T - shared, H]."""
        ...

    def score(self, model: Any, split: Split, forward_hidden: ForwardHidden | None = None) -> TaskScore:
        """Score of a Hugging Face causal language model (backbone or hybrid)."""
        ...

    def fingerprint(self, split: Split) -> str:
        """sha256 of everything a score of this split depends on but the model: the key of a ledger entry."""
        ...


def combined(scores: Sequence[TaskScore], weights: Sequence[float]) -> float:
    """Weighted mean of the tasks' means, `sum(w_t * mean_t) / sum(w_t)`: the score a recipe's limits are about."""
    if len(scores) != len(weights) or not scores:
        raise ValueError(f"{len(scores)} scores and {len(weights)} weights: need as many, and at least one")
    values = np.asarray(weights, dtype=np.float64)
    if (values < 0).any() or values.sum() <= 0:
        raise UsageError(f"tasks: weights must be >= 0 and not all 0, got {list(weights)}")
    return float(np.average([score.mean for score in scores], weights=values))
