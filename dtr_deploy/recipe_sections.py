"""The sections of a recipe: every key with its default, and what is accepted. `recipe.py` puts them together.

What stands under a key is what `dtr-deploy schema` and docs/recipe-reference.md say of it; docs/recipe.md explains.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import LARGEST_WINDOW, parse_entry

FormName = Literal["gated_deltanet", "gla", "jet", "hedgehog"]
EngineName = Literal["ort", "vllm"]
PrecisionName = Literal["fp32", "bf16", "fp16", "int8", "int4"]
VllmDtype = Literal["auto", "float32", "bfloat16", "float16"]

VLLM_PRECISION: dict[str, str] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""vLLM's dtype names -> the precision names used in recipes, tables and reports."""

ENGINE_PRECISIONS: dict[str, tuple[str, ...]] = {
    "ort": ("fp32", "fp16", "int8", "int4"),
    "vllm": ("fp32", "bf16", "fp16"),
}

Precision = Literal["auto", "float32", "bfloat16"]
OnnxPrecision = Literal["fp32", "fp16", "int8", "int4"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Layers(Section):
    """Which layers may be replaced: `all`, a list of indices, or `{exclude: [indices]}`; negative ones from the end."""

    only: tuple[int, ...] | None = None
    """These alone."""
    exclude: tuple[int, ...] = ()
    """All but these."""

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
    """Stage 1: twins of all chosen layers and forms, trained side by side from one pass of the teacher."""

    tokens: Positive = 100_000
    """Corpus tokens; every twin trains on all of them."""
    sequence_length: Annotated[int, Field(ge=16)] = 512
    """Tokens of a training sequence."""
    batch_size: Positive = 1
    """Sequences a step."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of the inherited projections."""
    form_learning_rate: Annotated[float, Field(gt=0)] = 2e-2
    """Of a form's own parameters."""
    precision: Precision = "auto"
    """Of the large products: `auto` is bfloat16 where the processor multiplies it natively."""
    calibrate: bool = True
    """Start forms from statistics of their teachers. Errors are lower with it; with most layers replaced, recall was
    better without (docs/studies/twins.md)."""
    held_out: Positive = 24
    """Sequences that no twin trains on; errors, screening and parity prompts come from them."""
    twins_at_once: Positive | None = None
    """Twins in training together, all if left out: where memory is short. The teacher's pass runs for each group."""
    layers: Annotated[
        Layers, BeforeValidator(_read_layers, json_schema_input_type=Literal["all"] | tuple[int, ...] | Layers)
    ] = Layers()
    """Layers that may be replaced: `all`, a list of indices, or `{exclude: [indices]}`; negative ones count from the
    end."""


class Heal(Section):
    """After stage 1: twins trained together, end to end, in hybrids of many layers drawn at random."""

    tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of the same corpus; 0 for none."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Of W_v and W_o."""
    form_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    """Of a form's own parameters."""
    checkpointing: bool = False
    """Keep only what passes between layers on the way forward and run each again on the way back: where memory is
    short. The same numbers."""


class TaskRecipe(Section):
    """One part of the score. Exactly one of `file`, `synthetic` and `lm_eval` says what it is. What is left out is the
    task's own default."""

    name: str
    """In tables and reports; another for each task."""
    file: str | None = None
    """A folder with train.jsonl, validation.jsonl and test.jsonl (`text`, `label`), or one .jsonl file; with `lengths`,
    after as many examples as a prompt of each length holds."""
    synthetic: Literal["needle", "multi_key", "variable_tracking"] | None = None
    """Something to find in a long text: a number, one of several (`multi_key`), or through assignments
    (`variable_tracking`)."""
    lm_eval: str | None = None
    """A task of lm-evaluation-harness, or the path of its YAML."""
    shots: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question."""
    metric: str | None = None
    """What counts as right: of a file `accuracy`, `calibrated_accuracy` or `exact_match`; of an lm-eval task one of its
    own."""
    lengths: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Prompt tokens."""
    keys: Annotated[int, Field(ge=2)] | None = None
    """Of `multi_key`: words with a number each; of `variable_tracking`: chains."""
    hops: Positive | None = None
    """Of `variable_tracking`: assignments in a chain."""
    filler: str | None = None
    """Of synthetic tasks: a text to hide things in, instead of five sentences over and over."""
    items: Positive | None = None
    """Examples scored in each split, of synthetic and many-shot tasks at each length."""
    confirm_items: Positive | None = None
    """Of synthetic tasks: `items` of the confirm and test splits, which are scored a few times only."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """In the mean of all tasks."""


class WorkloadRecipe(Section):
    """What is served."""

    prompt: Positive
    """Prompt tokens of a request."""
    output: Positive
    """Output tokens of a request."""
    concurrency: Positive = 1
    """Requests at once."""


TARGET_BOUNDS = ("speedup", "ttft_ms", "tpot_ms", "cache_mib")


class Target(Section):
    """Where the hybrid is to be served, and what has to be reached there, together or alone. Without a bound there is
    nothing to reach: the search takes what `search.max_score_loss` lets it have."""

    engine: EngineName = "ort"
    """ONNX Runtime or vLLM."""
    precision: PrecisionName = "int4"
    """`fp32`, `fp16`, `int8`, `int4` on ort; `fp32`, `bf16`, `fp16` on vllm; among the exports."""
    workload: WorkloadRecipe
    """What is timed."""
    speedup: Annotated[float, Field(gt=0)] | None = None
    """At least so many times the backbone's end-to-end tokens per second."""
    ttft_ms: Annotated[float, Field(gt=0)] | None = None
    """At most so many milliseconds until the first output token."""
    tpot_ms: Annotated[float, Field(gt=0)] | None = None
    """At most so many milliseconds for each further token of a request."""
    cache_mib: Annotated[float, Field(gt=0)] | None = None
    """At most so many MiB of keys, values and states for all requests at their longest."""

    @property
    def reached_by(self) -> tuple[str, ...]:
        """The keys of the bounds that are given."""
        return tuple(key for key in TARGET_BOUNDS if getattr(self, key) is not None)


class Screen(Section):
    """What ranks single swaps: divergence from the teacher on held-out sequences, and a short recall test; both,
    because perplexity does not see lost recall."""

    sequences: Positive = 8
    """Held-out sequences for the divergence."""
    recall: Annotated[tuple[Literal["needle", "multi_key"], ...], Field(min_length=1)] = ("needle", "multi_key")
    """Recall tasks; a single needle is found by its oddness alone."""
    recall_items: Annotated[int, Field(ge=0)] = 6
    """Prompts of each recall task; 0 turns recall off."""
    recall_length: Annotated[int, Field(ge=128)] = 1024
    """Their tokens."""


class Search(Section):
    """Stage 2: which layers to replace."""

    strategy: Literal["racing", "exhaustive", "one_shot", "uniform", "random"] = "racing"
    """`exhaustive` is the paper's greedy; the last three are baselines."""
    goal: Literal["throughput", "score", "frontier"] = "throughput"
    """`throughput` replaces while losses stay within bounds and it pays; `score` replaces no more than the target
    takes; `frontier` replaces as long as there is a candidate and chooses among all layouts seen."""
    max_score_loss: Fraction = 0.02
    """Absolute, in units of the score (0.02 is two points), on the search and on the confirm split."""
    max_task_loss: Fraction | None = None
    """The same for every task alone, so that one task's gain cannot pay for another's collapse."""
    bound: Literal["estimate", "upper"] = "estimate"
    """What has to be within these bounds: the estimate of a loss, or its upper confidence bound."""
    max_replaced: Positive | None = None
    """Layers."""
    max_trials: Positive | None = None
    """When to stop looking: layouts screened, estimated, or scored on one part of the items."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """When to stop looking; resumed searches count what they spent before."""
    repeats: Positive = 3
    """Timings of each layout, in rounds with the backbone; up to three times as many until so many agree within 3%."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the intervals."""
    precision: Precision = "auto"
    """Of the large products while layouts are scored, as in `distill`."""
    screen: Screen = Screen()
    """What ranks single swaps."""


def check_device(device: str) -> str:
    """A torch device that models are placed on, or how one is chosen."""
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?|spread", device) is None:
        raise ValueError("accepted: auto, cpu, cuda, cuda:N, or spread (layers over all GPUs)")
    return device


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


class Cluster(Section):
    """Where stages 1 and 2 run: `none` (in the build's process), `auto`, an address, or a mapping of these keys."""

    address: str = "none"
    """`none`; `auto`: a Ray cluster that runs on this machine, if there is one; or `HOST:PORT` of one."""
    workers: Positive | None = None
    """Processes at once; as many as there is room for if left out."""
    cpus: Positive | None = None
    """Cores of each; if left out, a node's share for each of its GPUs, or the whole node."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """GPUs of each; if left out, 1 where the cluster has any."""
    share_teacher: Positive | None = None
    """Workers that share the teacher's passes in stage 1 and send one another activations; if left out, those of a
    machine where they have GPUs, else all."""


def _read_cluster(value: object) -> object:
    return {"address": value} if isinstance(value, str) else value


ClusterSection = Annotated[Cluster, BeforeValidator(_read_cluster, json_schema_input_type=str | Cluster)]


class VllmExport(Section):
    """For vLLM, which serves the checkpoint as it is."""

    dtype: VllmDtype = "bfloat16"
    """What it is served in; `auto` is bfloat16 where the machine of the build multiplies it natively, else float32."""


def read_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class OnnxExport(Section):
    """For ONNX Runtime and onnxruntime-genai."""

    precision: Annotated[
        tuple[OnnxPrecision, ...],
        BeforeValidator(read_list, json_schema_input_type=OnnxPrecision | tuple[OnnxPrecision, ...]),
    ] = ("fp32", "int4")
    """A folder for each."""


class Export(Section):
    """The checkpoint is always written. A section left out, or null, is an engine that is not served."""

    vllm: VllmExport | None = None
    """vLLM."""
    onnx: OnnxExport | None = None
    """ONNX Runtime."""


class Parity(Section):
    """The gate: every program computes what was trained."""

    prompts: Positive = 64
    """How many."""
    max_length: Annotated[int, Field(ge=2)] = 8000
    """Tokens of the longest."""
    tokens: Positive = 48_000
    """Of all prompts together."""


class Bench(Section):
    """The throughput table at the end, which always has the target's workload too."""

    prompts: tuple[Positive, ...] = (512, 4096, 8000)
    """Prompt tokens."""
    output: Annotated[int, Field(ge=2)] = 32
    """Output tokens."""
    repeats: Positive = 3
    """Timings of each."""
