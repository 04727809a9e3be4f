"""Rows as tables in a terminal. Every figure shown is in the JSON; nothing is measured here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.machine import Limits
from benchmarks.problem import Problem
from benchmarks.run import TIMED, Row


def console() -> Console:
    """stdout. Piped output is wide and plain, so that tables are not folded."""
    import sys

    return Console() if sys.stdout.isatty() else Console(width=180)


def machine_lines(environment: dict[str, Any]) -> list[str]:
    """Processor, instruction sets, threads and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    sets = ", ".join(environment["instruction_sets"]) or "none that engines choose kernels by"
    return [
        f"Processor: {environment['processor']} ({sets}); {environment['threads']} threads of {environment['cores']} "
        f"cores; device: {environment['device']}",
        f"Versions: {versions}",
    ]


def header(environment: dict[str, Any], settings: dict[str, Any], limits: Limits) -> list[str]:
    """The lines above the tables: machine, versions, limits, effort."""
    cache = "cold" if settings["cold"] else "warm"
    return [
        *machine_lines(environment),
        f"Limits measured now: {limits.gflops:,.1f} GFLOP/s float32 matrix product, {limits.triad_gb_per_second:,.1f} "
        f"GB/s triad, {limits.copy_gb_per_second:,.1f} GB/s copy",
        f"{settings['repeats']} interleaved rounds, medians; spread: fastest to slowest round; caches {cache}",
    ]


def problem_title(problem: Problem, rows: Sequence[Row]) -> str:
    """The line above a problem's table."""
    baseline = next((row.baseline for row in rows if row.baseline), "")
    return f"{problem}{f'; ratio: time / time of {baseline}' if baseline else ''}"


def problem_table(problem: Problem, rows: Sequence[Row]) -> Table:
    """One problem's contenders."""
    decode, backward = problem.direction == "decode", problem.direction == "backward"
    speed = "GB/s" if decode else "GFLOP/s"
    columns = ["contender", "computes", "dtype", "error", "µs" if decode else "ms", "spread", "ratio", speed]
    columns += ["of limit", *(["peak MiB"] if backward else []), "rounds", "note"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        text = index < 3 or column == "note"
        table.add_column(column, justify="left" if text else "right", no_wrap=column != "note")
    for row in rows:
        table.add_row(*_cells(row, decode, backward), style=None if row.status == TIMED else "dim")
    return table


def _cells(row: Row, decode: bool, backward: bool) -> list[str]:
    scale = 1e6 if decode else 1e3
    error = "" if row.error is None else f"{row.error:.1e}"
    cells = [row.contender, row.computes, row.dtype, error]
    if row.seconds is None or row.seconds_low is None or row.seconds_high is None or row.share_of_limit is None:
        return [*cells, row.status, *[""] * (5 if backward else 4), "", row.reason]
    speed = row.gb_per_second if decode else row.gflops
    cells += [
        _figure(row.seconds * scale),
        f"{_figure(row.seconds_low * scale)} to {_figure(row.seconds_high * scale)}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if speed is None else _figure(speed),
        f"{100 * row.share_of_limit:.0f}%",
    ]
    if backward:
        cells.append("" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.1f}")
    return [*cells, str(row.rounds), row.reason]


def _figure(value: float) -> str:
    """Three significant figures, no exponent."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"
