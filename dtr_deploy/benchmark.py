"""The throughput table: backbone and hybrid of a run side by side on one engine, over several workloads."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from dtr_deploy.engines.base import Engine, Throughput, Workload
from dtr_deploy.errors import UsageError
from dtr_deploy.progress import Bar, Progress
from dtr_deploy.recipe import Recipe
from dtr_deploy.report.schema import ThroughputRow
from dtr_deploy.serving import base_of, engines_open_at_once, hybrid_of, open_for_speed


def workloads_of(recipe: Recipe, context: int) -> tuple[list[Workload], list[Workload]]:
    """The workloads to time, the target's last, and those that a model of `context` tokens cannot hold."""
    target = Workload(**recipe.target.workload.model_dump())
    wanted = list(dict.fromkeys([*(Workload(prompt, recipe.bench.output) for prompt in recipe.bench.prompts), target]))
    fitting = [workload for workload in wanted if workload.prompt + workload.output <= context]
    return fitting, [workload for workload in wanted if workload not in fitting]


def benchmark(
    recipe: Recipe, run: Path, engine: str, precision: str, context: int, progress: Progress
) -> list[ThroughputRow]:
    """Time every workload `bench.repeats` times on both models; one row a workload."""
    workloads, too_long = workloads_of(recipe, context)
    for workload in too_long:
        progress.line(f"throughput: {workload} left out, the model's context is {context:,} tokens")
    if not workloads:
        raise UsageError(f"bench.prompts: no workload fits the model's context of {context:,} tokens")
    longest = max(workload.prompt + workload.output for workload in workloads)
    models = [base_of(run), hybrid_of(run)]
    repeats = recipe.bench.repeats
    with progress.bar(f"throughput {engine} {precision}", total=2 * repeats * len(workloads)) as bar:
        if engines_open_at_once(engine) >= 2:
            with (
                closing(open_for_speed(engine, precision, models[0], longest)) as base,
                closing(open_for_speed(engine, precision, models[1], longest)) as hybrid,
            ):
                runs = _alternate([base, hybrid], workloads, repeats, bar)
        else:
            runs = []
            for model in models:
                with closing(open_for_speed(engine, precision, model, longest)) as opened:
                    runs += _alternate([opened], workloads, repeats, bar)
    target = Workload(**recipe.target.workload.model_dump())
    return [
        ThroughputRow.compare(base, hybrid, target=workload == target)
        for workload, base, hybrid in zip(workloads, *runs, strict=True)
    ]


def _alternate(
    engines: Sequence[Engine], workloads: Sequence[Workload], repeats: int, bar: Bar
) -> list[list[Throughput]]:
    """For each engine, its median of every workload. Engines take turns, so that a machine's drift meets all alike."""
    result: list[list[Throughput]] = [[] for _ in engines]
    for workload in workloads:
        runs: list[list[Throughput]] = [[] for _ in engines]
        for _ in range(repeats):
            for engine, timed in zip(engines, runs, strict=True):
                timed.append(engine.throughput(workload, 1))
                bar.advance(1, note=str(workload))
        for timed, medians in zip(runs, result, strict=True):
            medians.append(median(timed))
    return result


def median(runs: Sequence[Throughput]) -> Throughput:
    """Several measurements of one workload as one, part by part."""
    first = runs[0]
    return Throughput(
        engine=first.engine,
        precision=first.precision,
        workload=first.workload,
        repeats=sum(run.repeats for run in runs),
        prefill_seconds=statistics.median(run.prefill_seconds for run in runs),
        decode_seconds=statistics.median(run.decode_seconds for run in runs),
        end_to_end_seconds=statistics.median(run.end_to_end_seconds for run in runs),
    )
