"""The score of an lm-eval task, once more, by lm-eval itself: its evaluator and its own Hugging Face model.

Our number comes from our prompts, our batches and our reading of likelihoods; lm-eval's from none of them. Both are of
the test split's documents, and have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtr_deploy.errors import ParityFailed
from dtr_deploy.progress import Progress
from dtr_deploy.tasks.base import Split
from dtr_deploy.tasks.lm_eval_task import LmEvalTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LmEvalRow:
    """One task on `documents` of the test split. ours: the score that the search reported; lm_eval: lm-eval's, with its
    standard error."""

    task: str
    documents: int
    ours: float
    lm_eval: float
    standard_error: float

    @property
    def passed(self) -> bool:
        """Within a standard error: numerics may turn a close answer over, and nothing else may."""
        return abs(self.ours - self.lm_eval) <= max(self.standard_error, 1e-6)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"passed": self.passed}


def check_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Any],
    reported: Mapping[str, float],
    progress: Progress,
) -> list[LmEvalRow]:
    """A row for each lm-eval task among `tasks`. model: of transformers, backbone or hybrid. reported: our score on the
    test split, by task."""
    from dtr_deploy.report.schema import LmEvalReportRow

    rows = []
    for task in tasks:
        if not isinstance(task, LmEvalTask):
            continue
        with progress.bar(f"lm-eval, {task.name}"):
            values = lm_eval_values(model, tokenizer, task, "test")
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
        row = LmEvalRow(task.name, len(values), reported[task.name], float(np.mean(values)), error)
        verdict = LmEvalReportRow.model_validate(row.to_dict()).verdict
        progress.line(
            f"lm-eval, {row.task}: {row.lm_eval:.4f} on {row.documents} documents, ours {row.ours:.4f}: {verdict}"
        )
        rows.append(row)
    return rows


def gate(rows: Sequence[LmEvalRow]) -> None:
    """Raises `ParityFailed` naming the task if lm-eval finds another score."""
    for row in rows:
        if not row.passed:
            raise ParityFailed(
                f"task {row.task!r}: lm-eval scores the hybrid {row.lm_eval:.4f} on the test split, the search "
                f"{row.ours:.4f}, more than a standard error ({row.standard_error:.4f}) apart"
            )


def lm_eval_values(model: Any, tokenizer: PreTrainedTokenizerBase, task: LmEvalTask, split: Split) -> np.ndarray:
    """lm-eval's score of each document of a split, in the order of `task.documents`.

    One prompt a batch: padding on the left, as lm-eval batches, is no reference for a recurrent layer. With few-shot
    examples only "test" is in the order that makes lm-eval draw the same ones.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    documents: dict[str, list[int]] = {}
    for subtask, index, _ in task.documents(split):
        documents.setdefault(subtask, []).append(index)
    answer: Any = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=task.max_length),
        tasks=[task.spec],
        num_fewshot=task.shots,
        # In ascending order: lm-eval runs chosen documents in it, and names them in the order they were asked for.
        samples={subtask: sorted(indices) for subtask, indices in documents.items()},
        task_manager=TaskManager(include_defaults=not task.spec.endswith((".yaml", ".yml"))),
        fewshot_random_seed=task.seed,
        bootstrap_iters=0,
        log_samples=True,
        verbosity=None,
    )
    found: dict[tuple[str, int], float] = {}
    for subtask, samples in answer["samples"].items():
        chosen = task.chosen_filter(list(dict.fromkeys(sample["filter"] for sample in samples)))
        for sample in samples:
            if sample["filter"] == chosen:
                results = {metric: sample[metric] for metric in sample["metrics"]}
                found[subtask, sample["doc_id"]] = task.value(task.subtasks[subtask], results)
    return np.array([found[subtask, index] for subtask, index, _ in task.documents(split)])
