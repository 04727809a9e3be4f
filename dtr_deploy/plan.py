"""What a build will cost, without running it: tokens, evaluations, measurements, time and disk.

Counts follow from the recipe and the model's configuration. Times are a rough estimate from them and from how fast this
machine multiplies matrices; they are for deciding whether to start, not for promises.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr_deploy.engines import require
from dtr_deploy.errors import UsageError
from dtr_deploy.packages import require_build_packages
from dtr_deploy.parity.rungs import base_precisions, benchmarked, served_precisions
from dtr_deploy.recipe import Recipe
from dtr_deploy.run_dir import RunDir

BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.1, "int4": 0.65}
"""Of the large projections: blocks of 32 share a scale and a zero point. Embeddings stay at 4 bytes."""

TRAINING_PASSES = 3.0
"""Forward and backward of a projection, in forwards."""

ENGINE_START_SECONDS = {"vllm": 20.0, "ort": 5.0}
RACING_SCREENS_A_LAYER, RACING_SCORINGS_A_LAYER = 1.0, 1.3
"""Of the default strategy besides ranking all swaps: what is screened again, and whole scorings of groups and races,
for each layer that may be replaced. Counted on a search over 30 layers and two forms."""
RACING_RANKING = 20
"""Ranking all swaps takes as long as so many screenings, however many there are, where tasks have gradients: all are
priced in passes back through the model. Tasks that generate have none, and every swap is tried."""

TWIN_SIZE = 1.125
"""Parameters of a twin over those of the projections it inherits, at most: jet has the most, its generator of taps."""

LOGITS = 4
"""Copies of a sequence's logits that healing holds: two distributions, their difference, a temporary one."""

EFFICIENCY = 0.5
"""Share of the matrix multiplication speed that whole models reach."""


@dataclass(frozen=True)
class ModelSizes:
    """Counts of parameters: all, one layer's attention projections, embeddings (tied ones once)."""

    layers: int
    parameters: int
    attention: int
    embedding: int
    hidden: int
    family: str

    @classmethod
    def of(cls, config: Any) -> ModelSizes:
        """From a configuration alone."""
        hidden, heads = config.hidden_size, config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        attention = 2 * hidden * head_dim * (heads + config.num_key_value_heads)
        embedding = config.vocab_size * hidden
        layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
        tied = 1 if config.tie_word_embeddings else 2
        return cls(
            layers=config.num_hidden_layers,
            parameters=config.num_hidden_layers * layer + tied * embedding + hidden,
            attention=attention,
            embedding=embedding,
            hidden=hidden,
            family=config.model_type,
        )


@dataclass(frozen=True)
class StagePlan:
    """One line of the plan. work: what the stage does, in counts."""

    stage: str
    work: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """memory_bytes: of training where it needs most, on the device that trains."""

    stages: list[StagePlan]
    disk_bytes: int
    memory_bytes: int
    twins: int

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)


def model_config(recipe: Recipe) -> Any:
    """The model's configuration, without its weights. Raises `UsageError` if it cannot be read or used."""
    from transformers import AutoConfig

    from dtr_deploy.hybrid.backbone import check_family, locate

    source, gguf = locate(recipe.model_spec())
    try:
        if gguf is not None:
            config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        else:
            config = AutoConfig.from_pretrained(
                source, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise recipe.error(("model",), f"{recipe.model} cannot be read: {str(error).splitlines()[0]}") from error
    check_family(recipe.model, config)
    return config


def check_engines(recipe: Recipe) -> None:
    """Raise `UsageError` if the recipe needs an engine, or any stage a package, that cannot be used here."""
    require_build_packages()
    require(recipe.target.engine, f"{recipe.source}: target.engine")
    if recipe.export.vllm is not None:
        require("vllm", f"{recipe.source}: export.vllm")
    if recipe.export.onnx is not None:
        require("ort", f"{recipe.source}: export.onnx")
        require("genai", f"{recipe.source}: export.onnx")


def check_disk(recipe: Recipe, run: RunDir, config: Any) -> None:
    """Raise `UsageError` if the rest of the build does not fit on the disk."""
    needed = disk_bytes(recipe, ModelSizes.of(config)) - _bytes_in(run.path)
    free = shutil.disk_usage(run.path).free
    if needed > free:
        raise UsageError(
            f"{run.path}: disk too full, the build needs about {gigabytes(needed)} more and {gigabytes(free)} are free"
        )


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def disk_bytes(recipe: Recipe, sizes: ModelSizes) -> int:
    """What a finished run holds: twins, both checkpoints, every export, and one export in the making."""
    twins = len(recipe.distill.layers.indices(sizes.layers)) * len(recipe.forms)
    checkpoint = 4.0 * sizes.parameters
    exports = [p for e, p in [*served_precisions(recipe), *base_precisions(recipe)] if e == "ort"]
    onnx = [4.0 * sizes.embedding + BYTES_PER_WEIGHT[precision] * sizes.parameters for precision in exports]
    # A stopped distillation keeps the optimiser's two moments beside every weight.
    copies = 6 if recipe.heal.tokens else 3
    distilled = copies * 4.0 * twins * TWIN_SIZE * sizes.attention
    return int(distilled + 2 * checkpoint + sum(onnx) + max(onnx, default=0.0))


def make_plan(recipe: Recipe, config: Any, multiply_flops: float, items: int | None = None) -> Plan:
    """The plan of a recipe for a model.

    config: the model's configuration. multiply_flops: floating point operations per second of a large matrix product
    here, or on each worker of a cluster. items: examples in the search split of all tasks, where known.
    """
    sizes = ModelSizes.of(config)
    flops = multiply_flops * EFFICIENCY
    layers = len(recipe.distill.layers.indices(sizes.layers))
    twins = layers * len(recipe.forms)
    per_token = 2.0 * (sizes.parameters - sizes.embedding)

    workers = planned_workers(recipe)
    own = math.ceil(twins / workers)
    # Each group of twins has a pass of the teacher of its own, which a team of workers shares.
    passes_of_teacher = math.ceil(own / min(own, recipe.distill.twins_at_once or own)) / planned_team(recipe)
    training = passes_of_teacher * per_token + TRAINING_PASSES * 2.0 * sizes.attention * own
    distill_flops = recipe.distill.tokens * training
    # A pass of the teacher, the hybrid's, and back through it; the output embedding for both, and back.
    heal_flops = recipe.heal.tokens * (3 * per_token + 3 * 2.0 * sizes.embedding)
    screen_tokens = recipe.search.screen.sequences * recipe.distill.sequence_length
    screen = recipe.search.screen
    screen_tokens += len(screen.recall) * screen.recall_items * screen.recall_length
    task_tokens = _task_tokens(recipe.tasks, items)
    evaluated = [task for task in recipe.tasks if task.lm_eval is not None]
    # A swap of layer i reuses what lies before it: half of the layers on average.
    screens, scores = _evaluations(recipe, twins, layers)
    search_seconds = 0.5 * per_token * (screens * screen_tokens + scores * task_tokens) / flops / workers
    shared = f" on {workers} workers" if workers > 1 else ""
    searched = f"about {screens:,} screenings, {scores:,} scorings ({recipe.search.strategy}){shared}"
    if (minutes := recipe.search.minutes) is not None:
        search_seconds = min(search_seconds, 60 * minutes)
        searched += f", at most {minutes:g} minutes of them"

    target = recipe.target
    workload = target.workload.concurrency * (target.workload.prompt + target.workload.output)
    # The backbone, a layout of each form, a check, and what padding and vLLM's cache groups take besides.
    layouts = 3 + len(recipe.forms) + (2 if target.engine == "vllm" else 0)
    runs = layouts * 2 * recipe.search.repeats
    start = ENGINE_START_SECONDS[target.engine]
    measure_seconds = runs * workload * per_token / flops + layouts * 2 * start
    served = served_precisions(recipe)
    passes = 2 + len(served) + sum(1 for pair in base_precisions(recipe) if pair in served)
    parity_seconds = passes * recipe.parity.tokens * per_token / flops
    parity_seconds += sum(ENGINE_START_SECONDS[engine] for engine, _ in served)
    bench_tokens = sum(recipe.bench.prompts) + recipe.bench.output * len(recipe.bench.prompts) + workload
    tables = benchmarked(recipe)
    bench_seconds = len(tables) * 2 * recipe.bench.repeats * bench_tokens * per_token / flops
    bench_seconds += sum(2 * ENGINE_START_SECONDS[engine] for engine, _ in tables)
    exports = [pair for pair in [*served, *base_precisions(recipe)] if pair[0] == "ort"]

    work = {
        "distill": f"{recipe.distill.tokens:,} tokens, {twins} twins ({layers} layers){shared}",
        "heal": f"{recipe.heal.tokens:,} tokens in random hybrids",
        "throughput curve": f"{layouts} layouts, {runs} runs of {workload:,} tokens on {target.engine}",
        "search": searched,
        "lm-eval": f"the test split of {len(evaluated)} tasks",
        "export": f"2 checkpoints, {len(exports)} ONNX exports",
        "parity": f"{recipe.parity.prompts} prompts, {recipe.parity.tokens:,} tokens, {passes} passes",
        "throughput": f"{len(recipe.bench.prompts) + 1} workloads on {len(tables)} engines",
    }
    export_seconds = ENGINE_START_SECONDS["ort"] * len(exports)
    seconds = [
        distill_flops / flops,
        heal_flops / flops,
        measure_seconds,
        search_seconds,
        # The whole of each prompt, once for each answer: lm-eval shares nothing between prompts.
        2.0 * per_token * _task_tokens(evaluated, items) / flops,
        export_seconds,
        parity_seconds,
        bench_seconds,
    ]
    stages = [StagePlan(stage, text, time) for (stage, text), time in zip(work.items(), seconds, strict=True)]
    left_out = {"heal"} if not recipe.heal.tokens else set()
    left_out |= {"lm-eval"} if not evaluated else set()
    planned = [stage for stage in stages if stage.stage not in left_out]
    return Plan(planned, disk_bytes(recipe, sizes), memory_bytes(recipe, sizes), twins)


def planned_workers(recipe: Recipe) -> int:
    """Workers of the recipe's cluster where it says how many; else 1, since that is known on the cluster only."""
    return 1 if recipe.cluster.address == "none" else recipe.cluster.workers or 1


def planned_team(recipe: Recipe) -> int:
    """Of those workers, how many share the teacher's passes: all, unless the recipe says otherwise. (With GPUs it is
    those of a machine.)"""
    workers = planned_workers(recipe)
    return min(workers, recipe.cluster.share_teacher or workers)


def memory_bytes(recipe: Recipe, sizes: ModelSizes) -> int:
    """Of stage 1 or of healing, whichever needs more, with the backbone in float32.

    Stage 1: the twins that are trained at once, and what the layers of one pass of the teacher saw and answered.
    Healing: all twins, with the optimiser's moments of what is trained, and the logits of a sequence, which are there
    several times. Other activations, and the workspace of products, come on top."""
    from dtr_deploy.distill.trainer import DistillSettings

    twins = len(recipe.distill.layers.indices(sizes.layers)) * len(recipe.forms)
    own = math.ceil(twins / planned_workers(recipe))
    at_once = min(own, recipe.distill.twins_at_once or own)
    # Weights and the optimiser's two moments; one twin at a time has gradients.
    trained = 4.0 * TWIN_SIZE * sizes.attention * (3 * at_once + 1)
    pass_tokens = max(recipe.distill.batch_size, DistillSettings.teacher_sequences) * recipe.distill.sequence_length
    # A team's worker has all layers of its own pass, and its share of the layers of everybody's.
    passes = 1 if planned_team(recipe) == 1 else 2
    distilling = trained + passes * 2 * 4.0 * pass_tokens * sizes.hidden * sizes.layers
    healing = 0.0
    if recipe.heal.tokens:
        # W_v, W_o and the forms: half of the projections, and what forms add.
        moved = twins * (TWIN_SIZE - 0.5) * sizes.attention
        logits = recipe.distill.sequence_length * sizes.embedding / sizes.hidden
        healing = 4.0 * (twins * TWIN_SIZE * sizes.attention + 2 * moved + LOGITS * logits)
    return int(4.0 * sizes.parameters + max(distilling, healing))


def _task_tokens(tasks: Sequence[Any], items: int | None) -> int:
    """Prompt tokens of one scoring of these tasks on one split: 200 short items where the recipe does not say."""
    tokens = 0
    for task in tasks:
        if task.synthetic is not None or task.lengths is not None:
            tokens += sum(task.lengths or (1024, 2048)) * (task.items or 16)
        else:
            tokens += (task.items or items or 200) * 60
    return tokens


def _evaluations(recipe: Recipe, twins: int, layers: int) -> tuple[int, int]:
    """(screenings, scorings) of a strategy, about."""
    if recipe.search.strategy == "exhaustive":
        # Every step scores every candidate that is left.
        screens, scores = 0, twins * (layers + 1) // 2
    elif recipe.search.strategy == "racing":
        screens = RACING_RANKING + round(RACING_SCREENS_A_LAYER * layers)
        scores = round(RACING_SCORINGS_A_LAYER * layers)
    else:
        screens, scores = twins, layers
    limit = recipe.search.max_trials
    return (screens, scores) if limit is None else (min(screens, limit), min(scores, limit))


def matrix_flops(device: str = "cpu") -> float:
    """Floating point operations per second of a matrix product on this machine, in about 0.5 s: float32 on a CPU,
    bfloat16 on a GPU that multiplies it, as training does there.

    The fastest of several: what else runs on the machine only makes them slower.
    """
    import time

    import torch

    from dtr_deploy.hybrid.precision import products_dtype

    gpu = torch.device(device).type != "cpu"
    size, dtype = (8192, products_dtype("auto", "cuda")) if gpu else (1024, torch.float32)
    a, b = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    fastest, until = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        began = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - began)
    return 2.0 * size**3 / fastest


def trains_on(recipe: Recipe, config: Any) -> str:
    """The torch device that most of the work would run on here. Raises `UsageError` for one that is not there."""
    from dtr_deploy.hybrid.placement import SPREAD, choose

    try:
        device = choose(recipe.device, int(4 * ModelSizes.of(config).parameters))
    except UsageError as error:
        raise recipe.error(("device",), str(error).removeprefix("device ")) from error
    return "cuda:0" if device == SPREAD else device


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
