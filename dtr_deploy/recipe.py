"""The recipe: one YAML file that says what to build, read with errors that name the line.

Keys and their defaults are declared in `recipe_sections`; unknown ones are refused with the nearest known name. What
needs the model (whether a layer index exists) is checked by `check_layers`, once it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import LARGEST_WINDOW, parse_entry
from dtr_deploy.recipe_errors import Finding, Location, YamlLines, findings_of, parse_yaml
from dtr_deploy.recipe_sections import (
    ENGINE_PRECISIONS,
    TARGET_BOUNDS,
    VLLM_PRECISION,
    Bench,
    Cluster,
    ClusterSection,
    Distill,
    Export,
    Heal,
    OnnxExport,
    Parity,
    Search,
    Section,
    Target,
    TaskRecipe,
    VllmExport,
    check_device,
    check_entry,
    read_list,
)
from dtr_deploy.tasks.build import OPTIONS, kind_of, unknown_options


class Recipe(Section):
    """What to build: a model, what it is to be good at, and where it is to be served."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Of the run; its folder is runs/NAME."""
    model: Annotated[str, Field(min_length=1)]
    """The backbone: a Hugging Face id, a local folder, a .gguf file, or package:NAME."""
    revision: str | None = None
    """Of a Hugging Face id."""
    trust_remote_code: bool = False
    """Whether code from the model's repository may run while loading."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of everything random."""
    device: Annotated[str, AfterValidator(check_device)] = "auto"
    """Where twins are trained and layouts scored: `cpu`, `cuda`, `cuda:N`, `spread` (layers over all GPUs, what does
    not fit on the CPU), or `auto`: a GPU where there is one, all of them where the model does not fit one."""
    corpus: Annotated[
        tuple[str, ...],
        Field(min_length=1),
        BeforeValidator(read_list, json_schema_input_type=str | tuple[str, ...]),
    ]
    """What the twins train on: files, folders, hub data sets owner/name[:config[:split]], pydoc, recall."""
    forms: Annotated[
        tuple[Annotated[str, AfterValidator(check_entry)], ...],
        Field(min_length=1),
        BeforeValidator(read_list, json_schema_input_type=str | tuple[str, ...]),
    ] = ("gated_deltanet",)
    """Linear mixers to distil: gated_deltanet, gla, jet, hedgehog, each also as FORM@WINDOW. The search mixes them."""
    window: Annotated[int, Field(ge=0, le=LARGEST_WINDOW)] = 64
    """Tokens of the softmax branch beside the linear one; 0 for none."""
    distill: Distill = Distill()
    """Stage 1: twins."""
    heal: Heal = Heal()
    """Twins trained together."""
    tasks: Annotated[tuple[TaskRecipe, ...], Field(min_length=1)]
    """The score: the weighted mean of these."""
    target: Target
    """What has to get faster."""
    search: Search = Search()
    """Stage 2: the layout."""
    export: Export = Export(vllm=VllmExport(), onnx=OnnxExport())
    """What is written for which engine."""
    parity: Parity = Parity()
    """The gate."""
    bench: Bench = Bench()
    """The table at the end."""
    cluster: ClusterSection = Cluster()
    """Where stages 1 and 2 run."""

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
        # Of `auto` nobody knows yet what it will be: a target on vLLM needs a dtype that is named.
        "vllm": {VLLM_PRECISION.get(recipe.export.vllm.dtype, "")} if recipe.export.vllm else set(),
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
