"""The recipe: one YAML file that says what to build. Its schema, and reading it with errors that name the line.

Every key is declared here with its default; docs/recipe.md explains them to a person. Unknown keys are refused with the
nearest known name. What needs the model (whether a layer index exists) is checked by `check_layers`, once it is loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import LARGEST_WINDOW, parse_entry
from dtr_deploy.recipe_errors import Finding, Location, YamlLines, findings_of, parse_yaml
from dtr_deploy.tasks.build import OPTIONS, kind_of, unknown_options

FormName = Literal["gated_deltanet", "gla", "jet", "hedgehog"]
EngineName = Literal["ort", "vllm"]
PrecisionName = Literal["fp32", "bf16", "fp16", "int8", "int4"]
VllmDtype = Literal["float32", "bfloat16", "float16"]

VLLM_PRECISION: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""vLLM's dtype names -> the precision names used in recipes, tables and reports."""

ENGINE_PRECISIONS: dict[str, tuple[str, ...]] = {
    "ort": ("fp32", "fp16", "int8", "int4"),
    "vllm": ("fp32", "bf16", "fp16"),
}

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layers(_Section):
    """Which layers may be replaced: `all`, a list of indices, or `{exclude: [indices]}`; negative ones from the end."""

    only: tuple[int, ...] | None = None
    exclude: tuple[int, ...] = ()

    def indices(self, num_layers: int) -> list[int]:
        """The chosen layers of a model with `num_layers`, ascending. Indices must exist: see `Recipe.check_layers`."""
        chosen = range(num_layers) if self.only is None else {index % num_layers for index in self.only}
        excluded = {index % num_layers for index in self.exclude}
        return sorted(set(chosen) - excluded)


def _read_layers(value: object) -> object:
    if value == "all":
        return {}
    if isinstance(value, list) and all(type(index) is int for index in value):
        return {"only": value}
    if isinstance(value, Layers) or (isinstance(value, dict) and set(value) <= {"exclude", "only"}):
        return value
    raise ValueError("accepted: all, a list of layer indices, or {exclude: [layer indices]}")


class Distill(_Section):
    """Stage 1. `tokens` counts corpus tokens; every chosen layer and form trains on all of them.

    learning_rate is that of the inherited projections, form_learning_rate that of a form's own parameters. held_out:
    sequences that no twin trains on; errors, screening and parity prompts come from them. precision: of the large
    products, `auto` is bfloat16 where the processor multiplies it natively.
    """

    tokens: Positive = 100_000
    sequence_length: Annotated[int, Field(ge=16)] = 512
    batch_size: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    form_learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    held_out: Positive = 24
    layers: Annotated[Layers, BeforeValidator(_read_layers)] = Layers()


class Heal(_Section):
    """After stage 1: twins trained together, end to end, in hybrids of many layers drawn at random. `tokens` of the
    same corpus, 0 for none; learning_rate is that of W_v and W_o, form_learning_rate that of a form's own parameters.
    """

    tokens: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    form_learning_rate: Annotated[float, Field(gt=0)] = 3e-3


class TaskRecipe(_Section):
    """One part of the score. Exactly one of `file`, `synthetic` and `lm_eval` says what it is.

    file: a folder with train.jsonl, validation.jsonl and test.jsonl (`text`, `label`), or one .jsonl file; with
    `lengths`, after as many examples as a prompt of each length holds. synthetic: `needle`, `multi_key` (one of `keys`
    needles is asked for) or `variable_tracking` (through `hops` assignments, among `keys` chains), at each of `lengths`
    prompt tokens; filler: a text to hide them in. lm_eval: the name of a task of lm-evaluation-harness. items: examples
    scored in each split. What is left out is the task's own default.
    """

    name: str
    file: str | None = None
    synthetic: Literal["needle", "multi_key", "variable_tracking"] | None = None
    lm_eval: str | None = None
    shots: Annotated[int, Field(ge=0)] | None = None
    metric: str | None = None
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    keys: Annotated[int, Field(ge=2)] | None = None
    hops: Positive | None = None
    filler: str | None = None
    items: Positive | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


class WorkloadRecipe(_Section):
    prompt: Positive
    output: Positive
    concurrency: Positive = 1


TARGET_BOUNDS = ("speedup", "ttft_ms", "tpot_ms", "cache_mib")


class Target(_Section):
    """What has to be reached on this engine and workload, any of: `speedup` times the backbone's end-to-end tokens per
    second; at most `ttft_ms` milliseconds until the first token and `tpot_ms` for each further one; at most `cache_mib`
    MiB of keys, values and states for all requests at once.

    Without any there is no bound to reach: the search gets what `search.max_score_loss` lets it have.
    """

    engine: EngineName = "ort"
    precision: PrecisionName = "int4"
    workload: WorkloadRecipe
    speedup: Annotated[float, Field(gt=0)] | None = None
    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    tpot_ms: Annotated[float, Field(gt=0)] | None = None
    cache_mib: Annotated[float, Field(gt=0)] | None = None

    @property
    def reached_by(self) -> tuple[str, ...]:
        """The keys of the bounds that are given."""
        return tuple(key for key in TARGET_BOUNDS if getattr(self, key) is not None)


class Screen(_Section):
    """What ranks single swaps: divergence from the teacher on held-out sequences, and a short recall test.

    Both at once, because perplexity does not see lost recall. recall: its tasks, `needle` and `multi_key`, since a
    single needle is found by its oddness alone; recall_items of each at recall_length prompt tokens; 0 turns recall
    off.
    """

    sequences: Positive = 8
    recall: Annotated[tuple[Literal["needle", "multi_key"], ...], Field(min_length=1)] = ("needle", "multi_key")
    recall_items: Annotated[int, Field(ge=0)] = 6
    recall_length: Annotated[int, Field(ge=128)] = 1024


class Search(_Section):
    """Stage 2. Losses are absolute, in units of the score (0.02 = two points), on the search and on the confirm split.

    goal: `throughput` replaces while losses stay within bounds and it pays; `score` replaces no more than the target
    takes; `frontier` replaces as long as there is a candidate and chooses among all layouts seen. max_task_loss bounds
    every task alone, so that one task's gain cannot pay for another's collapse. bound: what has to be within these, the
    `estimate` of a loss or its `upper` confidence bound. precision: of the large products
    while layouts are scored, `auto` is bfloat16 where the processor multiplies it natively.
    """

    strategy: Literal["racing", "exhaustive", "one_shot", "uniform", "random"] = "racing"
    goal: Literal["throughput", "score", "frontier"] = "throughput"
    max_score_loss: Fraction = 0.02
    max_task_loss: Fraction | None = None
    bound: Literal["estimate", "upper"] = "estimate"
    max_replaced: Positive | None = None
    max_trials: Positive | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    repeats: Positive = 3
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    screen: Screen = Screen()


def _check_entry(entry: str) -> str:
    """A form, or FORM@WINDOW for layers whose softmax window is not the recipe's."""
    forms = get_args(FormName)
    try:
        known = parse_entry(entry, 0).form in forms
    except UsageError:
        known = False
    if not known:
        near = difflib.get_close_matches(entry.partition("@")[0], forms, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near and near[0] not in entry else ""
        windows = f"each also as FORM@WINDOW with 0 to {LARGEST_WINDOW} tokens"
        raise ValueError(f"accepted: {', '.join(forms)}, {windows}{hint}")
    return entry


class VllmExport(_Section):
    dtype: VllmDtype = "bfloat16"


def _read_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class OnnxExport(_Section):
    precision: Annotated[tuple[Literal["fp32", "fp16", "int8", "int4"], ...], BeforeValidator(_read_list)] = (
        "fp32",
        "int4",
    )


class Export(_Section):
    """The checkpoint is always written. A section left out, or null, is an engine that is not served."""

    vllm: VllmExport | None = None
    onnx: OnnxExport | None = None


class Parity(_Section):
    """The gate: how many prompts, the longest one, and the budget of all prompts together, in tokens."""

    prompts: Positive = 64
    max_length: Annotated[int, Field(ge=2)] = 8000
    tokens: Positive = 48_000


class Bench(_Section):
    """The throughput table at the end: prefill and decode at each of `prompts`, besides the target's workload."""

    prompts: tuple[Positive, ...] = (512, 4096, 8000)
    output: Annotated[int, Field(ge=2)] = 32
    repeats: Positive = 3


class Recipe(_Section):
    """A whole recipe. Read it with `load_recipe`."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    model: Annotated[str, Field(min_length=1)]
    revision: str | None = None
    trust_remote_code: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    corpus: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_read_list)]
    forms: Annotated[
        tuple[Annotated[str, AfterValidator(_check_entry)], ...], Field(min_length=1), BeforeValidator(_read_list)
    ] = ("gated_deltanet",)
    window: Annotated[int, Field(ge=0, le=LARGEST_WINDOW)] = 64
    distill: Distill = Distill()
    heal: Heal = Heal()
    tasks: Annotated[tuple[TaskRecipe, ...], Field(min_length=1)]
    target: Target
    search: Search = Search()
    export: Export = Export(vllm=VllmExport(), onnx=OnnxExport())
    parity: Parity = Parity()
    bench: Bench = Bench()

    _source: Path = PrivateAttr(default=Path("recipe"))
    _lines: YamlLines | None = PrivateAttr(default=None)

    @property
    def source(self) -> Path:
        """The file it was read from."""
        return self._source

    @property
    def digest(self) -> str:
        """sha256 over every setting, defaults included: comments, order and spelling of the YAML do not count."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def path(self, name: str) -> Path:
        """A path of the recipe: from the working directory, else from the recipe's folder, else from the one above."""
        folder = self._source.resolve().parent
        tried = [Path(name).expanduser(), folder / name, folder.parent / name]
        return next((path for path in tried if path.exists()), tried[0])

    def corpus_sources(self) -> list[str]:
        """The corpus entries with paths resolved; names of built-in and hub data sets as they are."""
        return [str(self.path(source)) if self.path(source).exists() else source for source in self.corpus]

    def task_recipes(self) -> list[TaskRecipe]:
        """The tasks with paths resolved; a filler that is no path stays as it is."""
        return [
            task.model_copy(
                update={
                    key: str(self.path(name))
                    for key in ("file", "filler")
                    if (name := getattr(task, key)) and (key == "file" or self.path(name).exists())
                }
            )
            for task in self.tasks
        ]

    def model_spec(self) -> str:
        """`model`, resolved when it is a file or folder."""
        return str(self.path(self.model)) if self.path(self.model).exists() else self.model

    def error(self, location: Location, message: str) -> UsageError:
        """An error about one key: `file:line: key: message`."""
        return UsageError(Finding(location, message).text(self._source, self._lines))

    def check_layers(self, num_layers: int) -> None:
        """Raise `UsageError` if the recipe names a layer that a model of `num_layers` layers does not have."""
        layers = self.distill.layers
        for index in (*(layers.only or ()), *layers.exclude):
            if not -num_layers <= index < num_layers:
                raise self.error(
                    ("distill", "layers"),
                    f"layer {index} does not exist; accepted: 0 to {num_layers - 1} ({self.model})",
                )
        if not layers.indices(num_layers):
            raise self.error(("distill", "layers"), "leaves no layer to replace; accepted: at least one layer")
        if self.search.max_replaced is not None and self.search.max_replaced > num_layers:
            raise self.error(("search", "max_replaced"), f"accepted: 1 to {num_layers}, the layers of {self.model}")


def load_recipe(file: Path | str) -> Recipe:
    """Read and check a recipe. Raises `UsageError`, one line a mistake: file, line, key, what is accepted."""
    source = Path(file)
    try:
        text = source.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{source}: no such recipe file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"{source}: the recipe cannot be read ({reason})") from None
    data, lines = parse_yaml(text, source)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(found.text(source, lines) for found in findings_of(error, Recipe))) from None
    recipe._source, recipe._lines = source, lines
    findings = list(_check(recipe))
    if findings:
        raise UsageError("\n".join(found.text(source, lines) for found in findings))
    return recipe


RECIPE_COPY = "recipe.json"
"""In a run's folder: the recipe it was built from, every default filled in."""


def recipe_from_copy(run: Path) -> Recipe:
    """The recipe of a run. Paths in it are not checked: what reads a run needs none of them."""
    file = run / RECIPE_COPY
    try:
        return Recipe.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError(f"{file}: is missing; `dtr-deploy build` writes it") from None
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"{file}: not a recipe of this version of dtr-deploy ({first})") from None


def _check(recipe: Recipe) -> Iterator[Finding]:
    """What one key alone cannot tell: files that must exist, and keys that must fit each other."""
    for index, entry in enumerate(recipe.corpus):
        if _looks_like_file(entry) and not recipe.path(entry).exists():
            yield Finding(("corpus", index), f"no such file: {entry}")
    if _looks_like_file(recipe.model, ".gguf") and not recipe.path(recipe.model).exists():
        yield Finding(("model",), f"no such file or folder: {recipe.model}")
    mixers = [parse_entry(entry, recipe.window) for entry in recipe.forms]
    if len(set(mixers)) < len(mixers):
        yield Finding(("forms",), f"names a form twice with one window (the recipe's is {recipe.window})")

    names = [task.name for task in recipe.tasks]
    for index, task in enumerate(recipe.tasks):
        kinds = [key for key in ("file", "synthetic", "lm_eval") if getattr(task, key) is not None]
        if len(kinds) != 1:
            yield Finding(
                ("tasks", index), f"needs exactly one of file, synthetic, lm_eval (has {', '.join(kinds) or 'none'})"
            )
        if task.file is not None and not recipe.path(task.file).exists():
            yield Finding(("tasks", index, "file"), f"no such file or folder: {task.file}")
        if task.filler is not None and _looks_like_file(task.filler) and not recipe.path(task.filler).exists():
            yield Finding(("tasks", index, "filler"), f"no such file or folder: {task.filler}")
        if len(kinds) == 1:
            kind = kind_of(task)
            for key in unknown_options(task):
                yield Finding(("tasks", index, key), f"not a key of {kind} tasks; accepted: {', '.join(OPTIONS[kind])}")
        if names.index(task.name) != index:
            yield Finding(("tasks", index, "name"), f"{task.name!r} is taken; accepted: a name for each task")

    if recipe.search.goal == "score" and not recipe.target.reached_by:
        keys = ", ".join(f"target.{key}" for key in TARGET_BOUNDS)
        yield Finding(
            ("search", "goal"),
            f"score needs a speedup or another target to reach; accepted: with one of {keys}, or another goal",
        )
    if recipe.target.tpot_ms is not None and recipe.target.workload.output < 2:
        yield Finding(("target", "tpot_ms"), "a workload of one output token has no time per further token")
    engine, precision = recipe.target.engine, recipe.target.precision
    exported: dict[str, set[str]] = {
        "vllm": {VLLM_PRECISION[recipe.export.vllm.dtype]} if recipe.export.vllm else set(),
        "ort": set(recipe.export.onnx.precision) if recipe.export.onnx else set(),
    }
    if precision not in ENGINE_PRECISIONS[engine]:
        yield Finding(
            ("target", "precision"),
            f"{precision} does not exist on {engine}; accepted: {', '.join(ENGINE_PRECISIONS[engine])}",
        )
    elif precision not in exported[engine]:
        section = "vllm" if engine == "vllm" else "onnx"
        yield Finding(
            ("target", "precision"), f"{precision} on {engine} is the target, but export.{section} does not write it"
        )


def _looks_like_file(entry: str, *suffixes: str) -> bool:
    suffixes = suffixes or (".txt", ".md", ".jsonl", ".json", ".parquet", ".gz")
    return entry.startswith(("./", "../", "/", "~")) or entry.endswith(suffixes)
