"""`python -m benchmarks.scoring`: what scoring a layout costs, by modules under autocast and by the search's own runs.

Both sides are `PrefixForward`; one runs Hugging Face modules, one layout after another, the other runs the layers that
the search chooses for this machine, layouts side by side. They take turns in one process, so that what else the machine
does meets both alike.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads

if TYPE_CHECKING:
    from dtr_deploy.hybrid.layout import Layout
    from dtr_deploy.search.forward import LayerPool
    from dtr_deploy.tasks.request_task import RequestTask

NAME = "benchmarks.scoring"
SCHEMA = 1

app = application()


@app.command(name=NAME, cls=Command)
def scoring(
    model: Annotated[str, typer.Option(help="A local folder, a GGUF file, package:NAME or a hub id.")],
    file: Annotated[Path, typer.Option(help="Labelled rows: a folder or a .jsonl file.")] = Path(
        "recipes/data/reviews"
    ),
    items: Annotated[int, typer.Option(min=2, help="Rows of them in the search split.")] = 60,
    lengths: Annotated[list[int], typer.Option(min=1, help="Tokens of needle prompts, two of each.")] = [1024, 2048],  # noqa: B006
    form: Annotated[str, typer.Option(help="The form of every twin.")] = "gated_deltanet",
    window: Annotated[int, typer.Option(min=0, help="Tokens of the softmax window.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each side has one turn in each.")] = 3,
    step_rounds: Annotated[int, typer.Option(min=0, help="Rounds of the exhaustive step; 0 leaves it out.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time the scoring of layouts: rows of a classification, needles, and one step of an exhaustive search.

    Twins have their teachers' projections and a form at its start: no cost depends on weights.
    """
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)

        from benchmarks.machine import describe
        from benchmarks.table import console, machine_lines

        screen = console()
        environment = describe("cpu", threads)
        for line in machine_lines(environment):
            screen.print(line, soft_wrap=True, highlight=False)
        rows = []
        for row in time_scoring(model, file, items, lengths, form, window, rounds, step_rounds):
            rows.append(row)
            screen.print(_line(row), soft_wrap=True, highlight=False)
        if json_file is not None:
            json_file.write_text(json.dumps({"schema": SCHEMA, "environment": environment, "rows": rows}, indent=1))


def _line(row: dict[str, Any]) -> str:
    speeds = f"{row['modules_tokens_per_second']:>7,.0f} -> {row['runs_tokens_per_second']:>7,.0f} tokens/s"
    rounds = f"{row['rounds']} rounds, {row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
    share = f"products at {row['product_share']:.0%} of {row['matrix_gflops']:,.0f} GFLOPS"
    return f"{row['work']:<44} {speeds}, {row['ratio']:.2f} times as fast ({rounds}), {row['runs']}, {share}"


def time_scoring(
    model: str, file: Path, items: int, lengths: list[int], form: str, window: int, rounds: int, step_rounds: int
) -> Iterator[dict[str, Any]]:
    """One row a piece of work, as soon as it is there; see `_compare` for its keys."""
    from dtr_deploy.hybrid.backbone import load_backbone
    from dtr_deploy.hybrid.layout import full, swap
    from dtr_deploy.hybrid.model import make_twin
    from dtr_deploy.search.forward import LayerPool
    from dtr_deploy.tasks.local_file import LabelledFile
    from dtr_deploy.tasks.needle import Needle

    backbone = load_backbone(model)
    layers = backbone.layers
    config = backbone.model.config
    twins = {
        (i, form): make_twin(layer.self_attn, config, i, form, window).state_dict()
        for i, layer in enumerate(backbone.model.model.layers)
    }
    pool = LayerPool(backbone.model, twins, window)
    base, halves = full(layers), tuple(form if i % 2 else None for i in range(layers))
    labelled = LabelledFile("rows", backbone.tokenizer, file, items=items)
    work: list[tuple[str, RequestTask, list[Layout], int]] = [
        (f"{items} rows, full attention", labelled, [base], rounds),
        (f"{items} rows, every second layer {form}", labelled, [halves], rounds),
    ]
    for length in lengths:
        needle = Needle("needle", backbone.tokenizer, lengths=(length,), items=2)
        work.append((f"needle at {length}, full attention", needle, [base], rounds))
        work.append((f"needle at {length}, every second layer {form}", needle, [halves], rounds))
    if step_rounds:
        swaps = [swap(base, layer, form) for layer in range(layers)]
        work.append((f"{items} rows, {layers} single swaps", labelled, swaps, step_rounds))
    gflops = matrix_gflops()
    for piece in work:
        yield _compare(pool, *piece, gflops)


def _compare(
    pool: LayerPool, name: str, task: RequestTask, layouts: list[Layout], rounds: int, gflops: float
) -> dict[str, Any]:
    """tokens_per_second: tokens a pass reads (padding not counted, shared columns once) x layouts / median seconds.
    ratio: median, over rounds, of the modules' seconds over the runs' in the same round. product_share: of the speed
    `matrix_gflops` that a single bfloat16 product reaches here, what the runs' linear layers alone come to, for the
    layers that were run."""
    import torch

    from dtr_deploy.search.forward import PrefixForward
    from dtr_deploy.search.layer_runs import ModuleRuns
    from dtr_deploy.search.task_runs import read_many

    batches, count = task.batches("search"), len(task.requests("search"))
    head = pool.backbone.get_output_embeddings()
    modules = ModuleRuns(pool.backbone, pool.layers, pool.window, torch.bfloat16)
    last: dict[str, PrefixForward] = {}

    def one_by_one() -> None:
        forward = last["modules"] = PrefixForward(pool, batches, 1, runs=modules)
        for layout in layouts:
            read_many(forward, [layout], count, head)

    def together() -> None:
        forward = last["runs"] = PrefixForward(pool, batches, 1, torch.bfloat16)
        read_many(forward, layouts, count, head)

    together()  # weights are converted at the first use
    seconds = _turns({"modules": one_by_one, "runs": together}, rounds)
    shared = {tuple(batch.input_ids[0, : batch.shared].tolist()) for batch in batches if batch.shared}
    tokens = sum(int(batch.attention_mask[:, batch.shared :].sum()) for batch in batches) + sum(map(len, shared))
    ratios = [a / b for a, b in zip(seconds["modules"], seconds["runs"], strict=True)]
    layer = sum(p.numel() for p in pool.backbone.model.layers[0].parameters() if p.ndim == 2)
    rows = sum(len(batch.input_ids) for batch in batches) + len(shared)
    flops = 2.0 * layer * tokens * last["runs"].layer_forwards / rows
    return {
        "work": name,
        "tokens": tokens,
        "padded_tokens": sum(batch.tokens for batch in batches) + sum(map(len, shared)),
        "layouts": len(layouts),
        "rounds": rounds,
        "seconds": seconds,
        "layer_forwards": {side: forward.layer_forwards for side, forward in last.items()},
        "modules_tokens_per_second": tokens * len(layouts) / statistics.median(seconds["modules"]),
        "runs_tokens_per_second": tokens * len(layouts) / statistics.median(seconds["runs"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "runs": type(pool.runs(torch.bfloat16)).__name__,
        "matrix_gflops": gflops,
        "product_share": flops / statistics.median(seconds["runs"]) / 1e9 / gflops,
    }


def _turns(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, the order drawn anew in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def matrix_gflops(size: int = 2048, seconds: float = 2.0) -> float:
    """Billion floating point operations a second of bfloat16 products of size^3, one after another for `seconds`: what
    the machine keeps up, not its best moment."""
    import torch

    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    a @ b
    calls, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        a @ b
        calls += 1
    return 2.0 * size**3 * calls / (time.perf_counter() - began) / 1e9


if __name__ == "__main__":
    app()
