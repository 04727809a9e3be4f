"""Puts a run's report together from what its stages recorded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dtr_deploy.doctor import environment
from dtr_deploy.recipe import Recipe
from dtr_deploy.report.origin import origin_of
from dtr_deploy.report.schema import (
    BackboneRow,
    DistillRow,
    LayerRow,
    LmEvalReportRow,
    MemoryRow,
    ParityReportRow,
    Report,
    ScoreRow,
    SearchSummary,
    ThroughputRow,
)
from dtr_deploy.run_dir import RunDir, StageRecord

if TYPE_CHECKING:
    from dtr_deploy.hybrid.backbone import Backbone
    from dtr_deploy.hybrid.layout import Layout

SEARCH_FILE = "search.json"
SHORTEST_SEQUENCE = 512
"""Tokens, of the table of memory; every power of two from there to the model's context."""


def collect_report(recipe: Recipe, run: RunDir, backbone: Backbone) -> Report:
    """The report of a run whose stages up to `throughput` are finished."""
    stages = run.stages
    found = json.loads((run.path / SEARCH_FILE).read_text())
    return Report(
        recipe=recipe.model_dump(mode="json"),
        backbone=BackboneRow(
            spec=recipe.model,
            family=backbone.family,
            layers=backbone.layers,
            parameters=sum(parameter.numel() for parameter in backbone.model.parameters()),
            fingerprint=backbone.fingerprint,
        ),
        origin=origin_of(recipe, int(backbone.model.config.max_position_embeddings)),
        layout=[LayerRow(layer=layer, form=form) for layer, form in enumerate(found["layout"])],
        distill=[_distill_row(twin) for twin in stages["distill"].result["reports"]],
        scores={split: _score_row(scores) for split, scores in found["scores"].items()},
        throughput=_throughput(stages),
        parity=[ParityReportRow(**row) for row in stages["parity"].result["rows"]],
        lm_eval=_lm_eval(recipe, stages),
        memory=memory_rows(recipe, backbone.model.config, tuple(found["layout"])),
        search=SearchSummary(
            **{name: found[name] for name in ("strategy", "trials", "layer_forwards", "seconds", "speedup")},
            **{name: found[name] for name in ("m_best", "m_opt", "frontier", "steps")},
            walked_back=len(found["walked_back"]),
            cost_model=found["throughput"],
            shrinkage=found.get("shrinkage"),
        ),
        environment=environment(),
        seconds={name: stage.seconds for name, stage in sorted(stages.items(), key=lambda item: item[1].finished)},
    )


def _distill_row(twin: dict[str, Any]) -> DistillRow:
    controls = {name: twin[name]["relative_error"] for name in ("no_op", "window_only") if twin.get(name)}
    return DistillRow(
        layer=twin["layer"],
        form=twin["form"],
        relative_error=twin["trained"]["relative_error"],
        cosine=twin["trained"]["cosine"],
        start_relative_error=twin["start"]["relative_error"],
        start_cosine=twin["start"]["cosine"],
        controls=controls,
    )


def _score_row(scores: dict[str, Any]) -> ScoreRow:
    """search.result.SplitScores as a row; its `loss` is base - hybrid, the row's `ci` that of hybrid - base."""
    base, hybrid, loss = scores["base"], scores["hybrid"], scores["loss"]
    return ScoreRow(
        base=base["estimate"],
        hybrid=hybrid["estimate"],
        ci=(0.0 - loss["high"], 0.0 - loss["low"]),
        base_ci=(base["low"], base["high"]),
        hybrid_ci=(hybrid["low"], hybrid["high"]),
        confidence=loss["confidence"],
        tasks=scores["tasks"],
    )


def _throughput(stages: dict[str, StageRecord]) -> list[ThroughputRow]:
    rows = [row for name, stage in stages.items() if name.startswith("throughput ") for row in stage.result["rows"]]
    return [ThroughputRow.model_validate(row) for row in rows]


def _lm_eval(recipe: Recipe, stages: dict[str, StageRecord]) -> list[LmEvalReportRow]:
    """Nothing for a recipe without such tasks, even if an earlier one in the same folder had them."""
    if all(task.lm_eval is None for task in recipe.tasks):
        return []
    return [LmEvalReportRow(**row) for row in stages["lm-eval"].result["rows"]]


def memory_rows(recipe: Recipe, config: Any, layout: Layout) -> list[MemoryRow]:
    """The cache of a sequence on the target's engine, at every power of two of tokens up to the context."""
    from dtr_deploy.engines.base import Workload
    from dtr_deploy.throughput.cache_bytes import CacheSize, cache_dtypes

    target, rows = recipe.target, []
    context, tokens = int(config.max_position_embeddings), SHORTEST_SEQUENCE
    while tokens <= context:
        size = CacheSize(config, recipe.window, *cache_dtypes(target.engine, target.precision), Workload(tokens - 1, 1))
        rows.append(
            MemoryRow(
                engine=target.engine,
                precision=target.precision,
                tokens=tokens,
                base_bytes=size((None,) * len(layout)),
                hybrid_bytes=size(layout),
            )
        )
        tokens *= 2
    return rows
