"""The recall study's tables: scores with standard errors, paired differences to the base, what was spent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.studies.recall_models import BASE
from benchmarks.table import machine_lines
from dtr_deploy.progress import seconds_text
from dtr_deploy.run_dir import write_atomically
from dtr_deploy.search.statistics import difference_interval
from dtr_deploy.tasks.base import TaskScore

SCHEMA = 1
CHANCE = {
    "needle": "none",
    "multi_key": "1/6 for a number of another key",
    "variable_tracking": "1/4 for a number of another chain",
    "many_shot": "1/2",
}
WAYS = ("generation", "likelihood")


def write_page(
    out: Path, rows: Sequence[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any], layers: int
) -> None:
    """`summary.json` and `recall.md` in `out`. rows: of every model, task and length, the base's among them."""
    scores = [_scored(row, rows) for row in rows]
    spent = {
        "trials": len(rows),
        "layer_forwards": layers * sum(len(row["texts"]) for row in rows),
        "seconds": {
            kind: sum(r["seconds"] for r in rows if r["task"] == kind)
            for kind in dict.fromkeys(r["task"] for r in rows)
        },
    }
    summary = {"schema": SCHEMA, "settings": settings, "environment": environment, "rows": scores, "spent": spent}
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    write_atomically(out / "recall.md", _page(scores, settings, environment, spent).encode())


def _scored(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    base = next(r for r in rows if (r["model"], r["task"], r["length"]) == (BASE, row["task"], row["length"]))
    result = {key: row[key] for key in ("model", "task", "length", "seconds", "tokens")} | {"items": len(row["texts"])}
    for way in WAYS:
        ours, theirs = TaskScore.from_dict(row[way]), TaskScore.from_dict(base[way])
        result[way] = {
            "mean": ours.mean,
            "standard_error": ours.standard_error,
            "difference": difference_interval([ours], [theirs], [1.0]).to_dict() if row is not base else None,
        }
    return result | {"margin": TaskScore.from_dict(row["likelihood"]).mean_margin}


def _page(
    scores: Sequence[dict[str, Any]], settings: dict[str, Any], environment: dict[str, Any], spent: dict[str, Any]
) -> str:
    items = ", ".join(f"{count} at {length:,}" for length, count in settings["items"].items())
    lines = [
        "# Recall at length",
        "",
        f"`{settings['command']}`",
        "",
        f"Base: {settings['model']}. Large products in {settings['products']}; filler: {settings['filler']}; seed "
        f"{settings['seed']}. Prompts of a task, each answered once by every model: {items} tokens; of many_shot "
        "four times as many rows.",
        "",
        *machine_lines(environment),
        "",
        "| model | |",
        "|---|---|",
        *(f"| {name} | {about} |" for name, about in settings["hybrids"].items()),
        "",
        "A cell is the share of right answers by greedy generation / by log-likelihood, ± the first's standard error,",
        "then the difference to the base on the same prompts, by generation, with its 95% interval. A task's margin is",
        "the mean log-probability of the right answer, nats a token (of the right label, for many_shot).",
    ]
    for task in dict.fromkeys(score["task"] for score in scores):
        lines += [
            "",
            f"## {task}",
            "",
            f"Chance: {CHANCE[task]}.",
            "",
            *_table([s for s in scores if s["task"] == task]),
        ]
    seconds = ", ".join(f"{kind} {seconds_text(value)}" for kind, value in spent["seconds"].items())
    lines += [
        "",
        "## Spent",
        "",
        f"{spent['trials']} rows (model x task x length), {spent['layer_forwards']:,} layer-forwards (a layer over a "
        f"prompt or what of it others do not share); {seconds}.",
    ]
    return "\n".join(lines) + "\n"


def _table(scores: Sequence[dict[str, Any]]) -> list[str]:
    lengths = list(dict.fromkeys(score["length"] for score in scores))
    lines = [
        "| | " + " | ".join(f"{length:,}" for length in lengths) + " | margin at each |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for model in dict.fromkeys(score["model"] for score in scores):
        mine = {score["length"]: score for score in scores if score["model"] == model}
        margins = ", ".join(f"{mine[length]['margin']:.2f}" for length in lengths)
        lines.append(f"| {model} | " + " | ".join(_cell(mine[length]) for length in lengths) + f" | {margins} |")
    return lines


def _cell(score: dict[str, Any]) -> str:
    generation, difference = score["generation"], score["generation"]["difference"]
    text = f"{generation['mean']:.2f} / {score['likelihood']['mean']:.2f} ± {generation['standard_error']:.2f}"
    if difference is None:
        return text
    return f"{text}; {difference['estimate']:+.2f} ({difference['low']:+.2f} to {difference['high']:+.2f})"
