"""Puts the search together for a recipe: scores from the twins and tasks, throughput from the target's engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.engines.base import Workload
from dtr_deploy.hybrid.mixer import form_config
from dtr_deploy.progress import CountingBar, Progress
from dtr_deploy.recipe import Recipe
from dtr_deploy.run_dir import stage_key, versions
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.objective import Objective
from dtr_deploy.search.problem import Limits
from dtr_deploy.search.result import SearchResult
from dtr_deploy.search.run import search_layout
from dtr_deploy.search.scorer import Evaluator, ModelEvaluator, Scorer, models_hash
from dtr_deploy.search.targets import MIB, Targets
from dtr_deploy.serving import engines_open_at_once, layout_opener
from dtr_deploy.tasks.build import synthetic_task
from dtr_deploy.tasks.divergence import SCREENING, Divergence
from dtr_deploy.tasks.haystack import Haystack
from dtr_deploy.throughput.cache_bytes import CacheSize, cache_dtypes
from dtr_deploy.throughput.calibrate import CalibratedCost, calibrate
from dtr_deploy.throughput.measure import ThroughputMeter, compare_with_base
from dtr_deploy.throughput.vllm_groups import vllm_group_count

if TYPE_CHECKING:
    from torch import Tensor

    from dtr_deploy.cluster.workers import Source, Workers
    from dtr_deploy.hybrid.backbone import Backbone

RECALL_SCREEN = "recall screen"


def choose_layout(
    recipe: Recipe,
    backbone: Backbone,
    twins: Mapping[tuple[int, str], Mapping[str, Any]],
    held_out: Tensor,
    tasks: Sequence[Any],
    ledger_file: Path,
    progress: Progress,
    workers: Workers | None = None,
) -> SearchResult:
    """Search as `recipe` says. held_out: [M,T] tokens for screening. Every trial is in `ledger_file`. workers: of a
    cluster, where it is not this process that scores and measures.

    Raises `InfeasibleTarget` if no layout reaches the target.
    """
    settings = recipe.search
    evaluator = ModelEvaluator(
        backbone.model,
        twins,
        recipe.window,
        tasks,
        Divergence(held_out[: settings.screen.sequences], every=SCREENING),
        recall_screen(recipe, backbone),
        models_hash(backbone.fingerprint, twins, recipe.window),
        precision=settings.precision,
    )
    with Ledger(ledger_file) as ledger:
        with CountingBar(progress, "throughput curve") as report:
            layers = sorted({layer for layer, _ in twins})
            cost = throughput_curve(recipe, backbone, layers, ledger, report, workers)
        _tell(cost, progress)
        with CountingBar(progress, "search") as report, replicated(evaluator, recipe, backbone, twins, workers) as who:
            return search_layout(
                Scorer(who, ledger),
                cost,
                objective_of(recipe),
                ledger,
                settings.strategy,
                Limits(settings.max_trials, settings.minutes),
                settings.confidence,
                report,
            )


def replicated(
    evaluator: ModelEvaluator,
    recipe: Recipe,
    backbone: Backbone,
    twins: Mapping[tuple[int, str], Mapping[str, Any]],
    workers: Workers | None,
) -> AbstractContextManager[Evaluator]:
    """The evaluator, or its replicas in the workers of a cluster."""
    if workers is None:
        return nullcontext(evaluator)
    from dtr_deploy.cluster.evaluator import ClusterEvaluator

    return ClusterEvaluator(workers, source_of(recipe, backbone), evaluator, twins, recipe.search.precision)


def source_of(recipe: Recipe, backbone: Backbone) -> Source:
    """Where the workers of a cluster find the recipe's backbone."""
    from dtr_deploy.cluster.workers import Source

    return Source.of(backbone, recipe.revision, recipe.trust_remote_code, recipe.device)


def objective_of(recipe: Recipe) -> Objective:
    """The recipe's `target` and bounds in the search's units (seconds, bytes)."""
    settings, target = recipe.search, recipe.target
    return Objective(
        targets=Targets(
            speedup=target.speedup,
            first_token_seconds=None if target.ttft_ms is None else target.ttft_ms / 1e3,
            token_seconds=None if target.tpot_ms is None else target.tpot_ms / 1e3,
            cache_bytes=None if target.cache_mib is None else int(target.cache_mib * MIB),
        ),
        max_score_loss=settings.max_score_loss,
        max_task_loss=settings.max_task_loss,
        max_replaced=settings.max_replaced,
        goal=settings.goal,
        bound=settings.bound,
    )


def recall_screen(recipe: Recipe, backbone: Backbone) -> list[Haystack]:
    """The short recall tests that single swaps are ranked by, or nothing if the recipe turns them off."""
    screen = recipe.search.screen
    if not screen.recall_items:
        return []
    return [
        synthetic_task(kind)(
            f"{RECALL_SCREEN}: {kind}",
            backbone.tokenizer,
            lengths=(screen.recall_length,),
            items=screen.recall_items,
            seed=recipe.seed + 1,  # other numbers and depths than the recipe's own recall task
        )
        for kind in screen.recall
    ]


def throughput_curve(
    recipe: Recipe,
    backbone: Backbone,
    layers: Sequence[int],
    ledger: Ledger,
    report: CountingBar,
    workers: Workers | None = None,
) -> CalibratedCost:
    """Measured throughput over how many of `layers` are replaced, on the target's engine for its workload."""
    target = recipe.target
    workload = Workload(**target.workload.model_dump())
    served = (recipe.window, target.engine, target.precision, workload.prompt + workload.output)
    opener = layout_opener(backbone.model, backbone.tokenizer, *served)
    compare: Any = compare_with_base
    if workers is not None:
        from dtr_deploy.cluster.measure import Served, compare_on

        compare = compare_on(workers, source_of(recipe, backbone), Served(*served))
    meter = ThroughputMeter(
        opener,
        workload,
        ledger,
        inputs=stage_key(backbone.fingerprint, recipe.window, target.engine, target.precision, versions()),
        repeats=recipe.search.repeats,
        max_open=engines_open_at_once(target.engine),
        progress=report,
        compare=compare,
    )
    # One layer always keeps full attention: engines count a sequence's tokens by it.
    most = min(len(layers), backbone.layers - 1)
    cache = CacheSize(backbone.model.config, recipe.window, *cache_dtypes(target.engine, target.precision), workload)
    groups = None
    if target.engine == "vllm":
        # Costs are not a sum over layers there: each group of its cache costs a metadata build a step.
        sizes = form_config(backbone.model.config, recipe.window)
        state_bytes = max(map(cache.state_bytes, recipe.forms))
        groups = vllm_group_count(sizes.num_kv_heads, sizes.head_dim, state_bytes, workload.prompt + workload.output)
    cost = calibrate(
        meter, backbone.layers, dict.fromkeys(recipe.forms, most), cache, groups=groups, padded=cache.padded
    )
    meter.progress = None  # what is measured later belongs to the search's own bar
    return cost


def _tell(cost: CalibratedCost, progress: Progress) -> None:
    error = f"largest relative error {cost.largest_relative_error:.1%} on layouts it was not fitted to"
    does = "predicts throughput" if cost.trusted else "does not predict throughput well enough, layouts are measured"
    progress.line(f"the throughput curve {does}: {error}")
