"""From the tasks of a recipe to tasks that can be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYNTHETIC = ("needle",)
KINDS = ("file", "synthetic", "lm_eval")


def build_tasks(
    task_recipes: Sequence[Any], tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int | None = None
) -> list[Task]:
    """One task a recipe entry, in order.

    task_recipes: objects with `name` and exactly one of `file` (labelled rows), `synthetic` ("needle") and `lm_eval` (a
        task name or the path of a task YAML); `weight`, and what that kind takes: file: shots, items, metric;
        synthetic: lengths, items; lm_eval: shots, items, metric. An attribute that is missing or None is left at its
        default; `shots: 0` leaves an lm-eval task at its own number of examples.
    max_length: the model's context in tokens, to which lm-eval prompts are cut on the left.
    Raises `UsageError` naming the task and the key.
    """
    if not task_recipes:
        raise UsageError("tasks: name at least one")
    tasks = [_build(recipe, tokenizer, seed, max_length) for recipe in task_recipes]
    names = [task.name for task in tasks]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"tasks: two are named {name!r}; names must differ")
    return tasks


def _build(recipe: Any, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int | None) -> Task:
    name = recipe.name
    given = [kind for kind in KINDS if getattr(recipe, kind, None) is not None]
    if len(given) != 1:
        raise UsageError(f"task {name!r}: needs exactly one of the keys {', '.join(KINDS)}; it has {given or 'none'}")
    weight = getattr(recipe, "weight", None)
    common: dict[str, Any] = {"seed": seed, "weight": 1.0 if weight is None else float(weight)}
    if common["weight"] < 0:
        raise UsageError(f"task {name!r}: weight must be >= 0, got {weight}")
    if given == ["file"]:
        from dtr_deploy.tasks.local_file import LabelledFile

        return LabelledFile(name, tokenizer, recipe.file, **common, **_options(recipe, "shots", "items", "metric"))
    if given == ["synthetic"]:
        from dtr_deploy.tasks.needle import Needle

        if recipe.synthetic not in SYNTHETIC:
            raise UsageError(f"task {name!r}: synthetic: {recipe.synthetic!r} is not one of {', '.join(SYNTHETIC)}")
        return Needle(name, tokenizer, **common, **_options(recipe, "lengths", "items"))
    from dtr_deploy.tasks.lm_eval_task import LmEvalTask

    options = _options(recipe, "items", "metric")
    if shots := getattr(recipe, "shots", None):
        options["shots"] = shots
    return LmEvalTask(name, tokenizer, recipe.lm_eval, max_length=max_length, **common, **options)


def _options(recipe: Any, *keys: str) -> dict[str, Any]:
    return {key: value for key in keys if (value := getattr(recipe, key, None)) is not None}
