"""The twins study's tables: errors, scores with paired differences to the base, what was spent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import machine_lines
from dtr_deploy.progress import seconds_text
from dtr_deploy.run_dir import write_atomically
from dtr_deploy.search.statistics import difference_interval
from dtr_deploy.tasks.base import TaskScore

SCHEMA = 1
ALL = "all"
"""The mean of the tasks."""


def write_page(out: Path, rows: Sequence[dict[str, Any]], about: dict[str, Any], environment: dict[str, Any]) -> None:
    """`summary.json` and `twins.md` in `out`. rows: of the base, the controls and the variants, for every budget."""
    bases = {row["tokens"]: _tasks(row["scores"][0]) for row in rows if row["variant"] == "base"}
    judged = [_judged(row, bases[row["tokens"]]) for row in rows]
    spent = {
        "scorings": sum(len(row["scores"]) for row in rows),
        "scoring_seconds": sum(score["seconds"] for row in rows for score in row["scores"].values()),
        "training_seconds": sum(row.get("seconds", 0.0) for row in rows),
    }
    summary = {"schema": SCHEMA, "about": about, "environment": environment, "rows": judged, "spent": spent}
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    write_atomically(out / "twins.md", _page(judged, about, environment, spent).encode())


def _tasks(score: dict[str, Any]) -> list[TaskScore]:
    return [TaskScore.from_dict(task) for task in score["tasks"]]


def _judged(row: dict[str, Any], base: list[TaskScore]) -> dict[str, Any]:
    scores = {}
    for count, score in row["scores"].items():
        ours, weights = _tasks(score), [1.0] * len(base)
        together = difference_interval(ours, base, weights).to_dict()
        tasks = {ALL: {"mean": sum(task.mean for task in ours) / len(ours), "difference": together}}
        for one, theirs in zip(ours, base, strict=True):
            difference = difference_interval([one], [theirs], [1.0]).to_dict()
            tasks[one.task] = {"mean": one.mean, "difference": difference, "margin": one.mean_margin}
        scores[count] = {"tasks": tasks, "kl": score["kl"], "perplexity": score["perplexity"]}
    return {key: value for key, value in row.items() if key != "scores"} | {"scores": scores}


def _page(
    rows: Sequence[dict[str, Any]], about: dict[str, Any], environment: dict[str, Any], spent: dict[str, Any]
) -> str:
    items = ", ".join(f"{name} {count}" for name, count in about["items"].items())
    lines = [
        "# What a twin's parts buy",
        "",
        "`python -m benchmarks.studies.twins --out FOLDER`",
        "",
        f"Model: {about['model']}, form {about['form']}, window {about['window']} tokens, large products in "
        f"{about['precision']} precision. Requests of the confirm split: {items}. One run.",
        "",
        *machine_lines(environment),
        "",
        "Error: |y - y'|^2 / |y|^2 of a layer's attention output on held-out text, mean (and largest) over layers.",
        "Other columns: the hybrid with that many layers replaced, the same ones in every row, those that racing chose",
        "with the calibrated twins of the first budget on the search split; the mean of the tasks and each task's, and",
        "its paired difference to the base with the 95% interval; on held-out text KL(teacher || hybrid), nats a",
        "token, and perplexity. Healed twins are trained on half as many tokens again, which their row's seconds",
        "include.",
        "Student prefix: in the second half of training, twins see what a hybrid of all twins hands them. Heal of the",
        "layout: that layout's own twins, in it alone.",
    ]
    for tokens in dict.fromkeys(row["tokens"] for row in rows):
        lines += ["", f"## {tokens:,} tokens", ""]
        some = [row for row in rows if row["tokens"] == tokens]
        names = list(next(iter(some[0]["scores"].values()))["tasks"])
        kept = some[0]["kept"]
        for count in next(row for row in some if row["variant"] != "base")["scores"]:
            lines += [
                f"{count} layers replaced, attention kept in {', '.join(map(str, kept[count]))}",
                "",
                f"| | error | {' | '.join(names)} | KL | perplexity | seconds |",
                f"|---|---|{'---|' * len(names)}---|---|---|",
            ]
            lines += [_line(row, count if row["variant"] != "base" else 0, names) for row in some]
            lines.append("")
        lines += [line for row in some if (line := _checkpoints(row))]
    lines += [
        f"Spent: {spent['scorings']} scorings in {seconds_text(spent['scoring_seconds'])}, training "
        f"{seconds_text(spent['training_seconds'])} (a healed variant counts its distillation again)."
    ]
    return "\n".join(lines) + "\n"


def _checkpoints(row: dict[str, Any]) -> str:
    """What an early stop or the best of several checkpoints would have bought a variant that was watched."""
    found = row.get("checkpoints")
    if not found:
        return ""
    return (
        f'Looking at the twins of "{row["variant"]}" ten times on the way, on held-out text that nothing else uses: '
        f"{found['before_the_end']} of {found['twins']} had their lowest error before the end. With each one's best "
        f"look the mean error would be {found['best']:.4f} instead of {found['last']:.4f}. The mean error was within a "
        f"tenth of the last one at {100 * found['near']:.0f}% of the steps.\n"
    )


def _line(row: dict[str, Any], count: int, names: Sequence[str]) -> str:
    score = row["scores"][count]
    error = "" if row["error"] is None else f"{row['error']:.3f}"
    if row.get("largest") is not None:
        error += f" ({row['largest']:.3f})"
    cells = []
    for name in names:
        task = score["tasks"][name]
        difference = task["difference"]
        cell = f"{task['mean']:.3f}"
        if row["variant"] != "base":
            cell += f", {difference['estimate']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
        cells.append(cell)
    seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
    cells += [f"{score['kl']:.4f}", f"{score['perplexity']:.2f}", seconds]
    return f"| {row['variant']} | {error} | {' | '.join(cells)} |"
