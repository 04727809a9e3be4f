"""The sections of a recipe: every key with its default, and what is accepted. `recipe.py` puts them together.

docs/recipe.md explains the keys to a person.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import LARGEST_WINDOW, parse_entry

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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layers(Section):
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


class Distill(Section):
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


class Heal(Section):
    """After stage 1: twins trained together, end to end, in hybrids of many layers drawn at random. `tokens` of the
    same corpus, 0 for none; learning_rate is that of W_v and W_o, form_learning_rate that of a form's own parameters.
    """

    tokens: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    form_learning_rate: Annotated[float, Field(gt=0)] = 3e-3


class TaskRecipe(Section):
    """One part of the score. Exactly one of `file`, `synthetic` and `lm_eval` says what it is.

    file: a folder with train.jsonl, validation.jsonl and test.jsonl (`text`, `label`), or one .jsonl file; with
    `lengths`, after as many examples as a prompt of each length holds. synthetic: `needle`, `multi_key` (one of `keys`
    needles is asked for) or `variable_tracking` (through `hops` assignments, among `keys` chains), at each of `lengths`
    prompt tokens; filler: a text to hide them in. lm_eval: the name of a task of lm-evaluation-harness. items: examples
    scored in each split; confirm_items: of synthetic tasks on the confirm and test splits, which are scored a few times
    only, so that more of them cost little. What is left out is the task's own default.
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
    confirm_items: Positive | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


class WorkloadRecipe(Section):
    prompt: Positive
    output: Positive
    concurrency: Positive = 1


TARGET_BOUNDS = ("speedup", "ttft_ms", "tpot_ms", "cache_mib")


class Target(Section):
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


class Screen(Section):
    """What ranks single swaps: divergence from the teacher on held-out sequences, and a short recall test.

    Both at once, because perplexity does not see lost recall. recall: its tasks, `needle` and `multi_key`, since a
    single needle is found by its oddness alone; recall_items of each at recall_length prompt tokens; 0 turns recall
    off.
    """

    sequences: Positive = 8
    recall: Annotated[tuple[Literal["needle", "multi_key"], ...], Field(min_length=1)] = ("needle", "multi_key")
    recall_items: Annotated[int, Field(ge=0)] = 6
    recall_length: Annotated[int, Field(ge=128)] = 1024


class Search(Section):
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


def check_entry(entry: str) -> str:
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


class VllmExport(Section):
    dtype: VllmDtype = "bfloat16"


def read_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class OnnxExport(Section):
    precision: Annotated[tuple[Literal["fp32", "fp16", "int8", "int4"], ...], BeforeValidator(read_list)] = (
        "fp32",
        "int4",
    )


class Export(Section):
    """The checkpoint is always written. A section left out, or null, is an engine that is not served."""

    vllm: VllmExport | None = None
    onnx: OnnxExport | None = None


class Parity(Section):
    """The gate: how many prompts, the longest one, and the budget of all prompts together, in tokens."""

    prompts: Positive = 64
    max_length: Annotated[int, Field(ge=2)] = 8000
    tokens: Positive = 48_000


class Bench(Section):
    """The throughput table at the end: prefill and decode at each of `prompts`, besides the target's workload."""

    prompts: tuple[Positive, ...] = (512, 4096, 8000)
    output: Annotated[int, Field(ge=2)] = 32
    repeats: Positive = 3
