"""From the tasks of a recipe to tasks that can be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.base import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dtr_deploy.tasks.haystack import Haystack

SYNTHETIC = ("needle", "multi_key", "variable_tracking")
KINDS = ("file", "synthetic", "lm_eval")

OPTIONS: dict[str, tuple[str, ...]] = {
    "file": ("shots", "items", "metric"),
    "many_shot": ("lengths", "items", "metric"),
    "needle": ("lengths", "items", "confirm_items", "filler"),
    "multi_key": ("lengths", "items", "confirm_items", "filler", "keys"),
    "variable_tracking": ("lengths", "items", "confirm_items", "filler", "keys", "hops"),
    "lm_eval": ("items", "metric", "shots"),
}
"""What each kind of task takes besides name and weight. A `file` with `lengths` is a many-shot task."""
EXACT_MATCH = "exact_match"
"""The metric of labelled files whose answers are generated instead of compared."""
OPTION_KEYS = ("shots", "metric", "lengths", "items", "confirm_items", "filler", "keys", "hops")


def build_tasks(
    task_recipes: Sequence[Any], tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int | None = None
) -> list[Task]:
    """One task a recipe entry, in order.

    task_recipes: objects with `name` and exactly one of `file` (labelled rows), `synthetic` (one of `SYNTHETIC`) and
        `lm_eval` (a task name or the path of a task YAML); `weight`, and what that kind takes (`OPTIONS`). An attribute
        that is missing or None is left at its default; `shots: 0` leaves an lm-eval task at its own number of examples.
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
    kind = kind_of(recipe)
    if given == ["synthetic"] and kind not in SYNTHETIC:
        raise UsageError(f"task {name!r}: synthetic: {kind!r} is not one of {', '.join(SYNTHETIC)}")
    if unknown := unknown_options(recipe):
        raise UsageError(f"task {name!r}: {unknown[0]}: not a key of {kind}; accepted are {', '.join(OPTIONS[kind])}")
    options = {key: value for key in OPTIONS[kind] if (value := getattr(recipe, key, None)) is not None}
    if kind in SYNTHETIC:
        return synthetic_task(kind)(name, tokenizer, **common, **options)
    if kind == "file":
        from dtr_deploy.tasks.generation import GeneratedAnswers
        from dtr_deploy.tasks.local_file import LabelledFile

        generated = options.get("metric") == EXACT_MATCH
        if generated:
            del options["metric"]
        task = LabelledFile(name, tokenizer, recipe.file, **common, **options)
        return GeneratedAnswers(task) if generated else task
    if kind == "many_shot":
        from dtr_deploy.tasks.many_shot import ManyShot

        return ManyShot(name, tokenizer, recipe.file, **common, **options)
    from dtr_deploy.tasks.lm_eval_task import LmEvalTask

    if not options.get("shots", 1):
        del options["shots"]
    return LmEvalTask(name, tokenizer, recipe.lm_eval, max_length=max_length, **common, **options)


def kind_of(recipe: Any) -> str:
    """The key of `OPTIONS` for a recipe entry with one of `KINDS`, or what `synthetic` says."""
    if (synthetic := getattr(recipe, "synthetic", None)) is not None:
        return str(synthetic)
    if getattr(recipe, "file", None) is not None:
        return "file" if getattr(recipe, "lengths", None) is None else "many_shot"
    return "lm_eval"


def unknown_options(recipe: Any) -> list[str]:
    """Keys that a recipe entry gives and its kind of task does not take."""
    return [
        key for key in OPTION_KEYS if getattr(recipe, key, None) is not None and key not in OPTIONS[kind_of(recipe)]
    ]


def synthetic_task(kind: str) -> type[Haystack]:
    """The class of a synthetic task."""
    from dtr_deploy.tasks.multi_key import MultiKey
    from dtr_deploy.tasks.needle import Needle
    from dtr_deploy.tasks.variable_tracking import VariableTracking

    classes: dict[str, type[Haystack]] = {"needle": Needle, "multi_key": MultiKey}
    return (classes | {"variable_tracking": VariableTracking})[kind]
