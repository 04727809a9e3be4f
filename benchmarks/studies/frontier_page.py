"""Writes the frontier study's summary.json and frontier.md."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dtr_deploy.progress import seconds_text
from dtr_deploy.run_dir import write_atomically

REFERENCE = "exhaustive"


def write_page(out: Path, summary: Mapping[str, Any]) -> None:
    """`summary` as JSON, and as the page that a person reads."""
    write_atomically(out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    parts = [_head(summary), _costs(summary), _levels(summary), _scores(summary), _kinds(summary)]
    write_atomically(out / "frontier.md", ("\n".join(parts)).encode())


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A markdown table; all columns but the first are right-aligned."""
    columns = list(columns)
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def points(interval: Mapping[str, Any]) -> str:
    """A difference of scores in points with its interval."""
    return f"{100 * interval['estimate']:+.1f} ({100 * interval['low']:+.1f} to {100 * interval['high']:+.1f})"


def _head(summary: Mapping[str, Any]) -> str:
    searched, judged = summary["searched"], summary["judged"]
    machine = ", ".join(f"{key}: {value}" for key, value in summary["machine"].items() if not isinstance(value, dict))
    error = summary["cost_model"].get("largest_relative_error")
    model = "assumed, not measured" if error is None else f"largest error on layouts it was not fitted to {error:.1%}"
    prompt, output = summary["workload"]
    return "\n".join(
        [
            "# Frontier: score against throughput by strategy\n",
            f"`{summary['command']}`\n",
            f"Model: {summary['model']}. Machine: {machine}. Searched on {searched['reviews']} reviews and"
            f" {searched['needles']} needles of {searched['needle_length']} tokens; judged on {judged['reviews']}"
            f" reviews and {judged['needles']} needles of the test split, once a layout. Throughput: cost model for"
            f" {prompt:,} + {output:,} tokens ({model}). Intervals: 95%, paired by item. The backbone scores"
            f" {summary['base_score']:.3f} on the judging items.\n",
        ]
    )


def _costs(summary: Mapping[str, Any]) -> str:
    walks = summary["walks"]
    whole = walks[REFERENCE]["layer_forwards"]
    rows = [
        (
            name,
            f"{len(walk['visits']) - 1:,}",
            f"{walk['trials']:,}",
            f"{walk['layer_forwards']:,}",
            f"{walk['layer_forwards'] / whole:.1%}",
            seconds_text(walk["seconds"]),
        )
        for name, walk in walks.items()
    ]
    columns = ("strategy", "layouts scored", "trials", "layer-forwards", f"of {REFERENCE}", "time")
    return "## What each strategy spent\n\n" + table(columns, rows)


def _levels(summary: Mapping[str, Any]) -> str:
    rows, inside, better = [], 0, 0
    compared = [row for row in summary["rows"] if row["strategy"] == "racing" and row["minus_reference"]]
    for row in compared:
        interval = row["minus_reference"]
        inside += interval["high"] >= 0
        better += interval["low"] > 0
        rows.append((row["level"], f"{row['speedup']:.2f}x", f"{row['score']:.3f}", points(interval)))
    text = (
        f"\nRacing is within the interval of {REFERENCE}, or above it, at {inside} of {len(compared)} levels"
        f" ({better} above with confidence).\n"
    )
    columns = ("layers of one form", "at least as fast as", "racing's score", f"racing - {REFERENCE}, points")
    return "## Racing against exhaustive\n\n" + table(columns, rows) + text


def _scores(summary: Mapping[str, Any]) -> str:
    names = list(summary["walks"])
    cells = {(row["level"], row["strategy"]): points(row["minus_base"]) for row in summary["rows"]}
    speedups = {row["level"]: row["speedup"] for row in summary["rows"]}
    rows = [
        (f"{level} ({speedup:.2f}x)", *(cells.get((level, name), "not reached") for name in names))
        for level, speedup in speedups.items()
    ]
    return "## Score minus the backbone's, points\n\n" + table(("level", *names), rows)


def _kinds(summary: Mapping[str, Any]) -> str:
    ledgers = {**{name: walk["kinds"] for name, walk in summary["walks"].items()}, "judging": summary["judging"]}
    rows = [
        (name, kind, f"{spent['trials']:,}", f"{spent['layer_forwards']:,}", f"{spent['seconds']:,.0f}")
        for name, kinds in ledgers.items()
        for kind, spent in kinds.items()
    ]
    return "## The ledgers\n\n" + table(("ledger", "kind", "trials", "layer-forwards", "seconds"), rows)
