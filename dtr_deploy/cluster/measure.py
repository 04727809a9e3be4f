"""Measurements on a cluster: a layout beside the backbone on one machine, as many at a time as there are machines.

Ratios to the backbone are taken within one machine, so machines of one kind may share the work. One machine measures
one thing at a time, whatever room Ray sees on it, and no replica works meanwhile: the search waits for the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from dtr_deploy.cluster.workers import RETRIES, Source, Workers, load, results, use_cores
from dtr_deploy.engines.base import Workload
from dtr_deploy.hybrid.layout import Layout
from dtr_deploy.throughput.measure import Comparison, Progress, compare_with_base

SEES_GPUS = {"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}}
"""Ray hides a machine's GPUs from a task that asks for none of them; engines want to see all."""


class Served(NamedTuple):
    """What `serving.layout_opener` takes besides a model."""

    window: int
    engine: str
    precision: str
    max_length: int


def compare_on(workers: Workers, source: Source, served: Served) -> Callable[..., Iterator[Comparison]]:
    """`throughput.measure.compare_with_base`, by machines of a cluster."""
    return partial(_compare, workers, source, served)


def _compare(
    workers: Workers,
    source: Source,
    served: Served,
    _: Any,
    layouts: Sequence[Layout],
    workload: Workload,
    repeats: int,
    max_open: int = 2,
    progress: Progress | None = None,
) -> Iterator[Comparison]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    machines = {
        node["NodeManagerHostname"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")
    }
    # Replicas keep their share of a node's resources; they are idle now, so a measurement asks for none.
    remote = ray.remote(num_cpus=0, num_gpus=0, max_retries=RETRIES, runtime_env=SEES_GPUS)(_measure)
    size = max(1, max_open - 1)
    waiting = [list(layouts[first : first + size]) for first in range(0, len(layouts), size)]
    done, free = 0, list(machines.values())
    while waiting:
        now = [(free[number], waiting.pop(0)) for number in range(min(len(free), len(waiting)))]
        calls = [
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)).remote(
                source, served, some, workload, repeats, max_open, int(node["Resources"]["CPU"])
            )
            for node, some in now
        ]
        if progress is not None:
            progress(done, len(layouts), f"measuring throughput of {sum(len(some) for _, some in now)} layouts")
        for _, found in results(calls):
            done += len(found)
            yield from found


def _measure(
    source: Source, served: Served, layouts: list[Layout], workload: Workload, repeats: int, max_open: int, cpus: int
) -> list[Comparison]:
    """In a worker."""
    from dtr_deploy.serving import layout_opener

    use_cores(cpus)
    backbone = load(replace(source, device="cpu"))  # only its shapes are wanted
    opener = layout_opener(backbone.model, backbone.tokenizer, *served)
    return list(compare_with_base(opener, layouts, workload, repeats, max_open))
