"""Runs side by side: `dtr-deploy compare RUN RUN`. A row for every figure that at least one of the runs has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from dtr_deploy.hybrid.layout import counts, ranges
from dtr_deploy.progress import seconds_text
from dtr_deploy.report.schema import Report
from dtr_deploy.report.tables import new_table, throughput_name

Facts = dict[str, str]


def comparison(reports: Mapping[str, Report]) -> Table:
    """Columns are runs, by name. A ratio or difference is hybrid against base within its own run: runs of different
    machines compare by these, not by tokens per second."""
    columns = {name: facts(report) for name, report in reports.items()}
    table = new_table("Runs side by side", "", *columns)
    # In the order of the first run; what only later runs have comes after what stands before it there.
    names: list[str] = []
    for column in columns.values():
        place = 0
        for name in column:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    for name in names:
        table.add_row(name, *(column.get(name, "") for column in columns.values()))
    return table


def facts(report: Report) -> Facts:
    """What there is to compare of one run, as text."""
    return dict(_facts(report))


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    layout = report.forms()
    kept = [layer for layer, form in enumerate(layout) if form is None]
    yield "model", report.backbone.spec
    yield "layers replaced", f"{len(layout) - len(kept)} of {len(layout)}"
    yield "forms", ", ".join(f"{form} {count}" for form, count in counts(layout).items()) or "none"
    yield "full attention", ranges(kept) or "none"
    if report.distill:
        errors = [row.relative_error for row in report.distill]
        yield "mean relative error", f"{sum(errors) / len(errors):.4f}"
    if report.search is not None and report.search.speedup is not None:
        yield "speedup on the target", f"{report.search.speedup:.2f}x"
    for split, score in report.scores.items():
        yield f"{split}: base", f"{score.base:.3f}"
        yield f"{split}: hybrid", f"{score.hybrid:.3f}"
        low, high = score.ci
        yield f"{split}: difference", f"{score.hybrid - score.base:+.3f} ({low:+.3f} to {high:+.3f})"
        for name, task in score.tasks.items():
            yield f"{split}: {name}", f"{task.base:.3f} -> {task.hybrid:.3f}"
    for row in report.throughput:
        for part in ("prefill", "decode"):
            if ratio := getattr(row.ratio, part):
                yield f"{throughput_name(row)}: {part}", f"{ratio:.2f}x"
    if report.memory:
        last = report.memory[-1]
        yield f"cache at {last.tokens:,} tokens", f"{last.hybrid_bytes / last.base_bytes:.1%} of the base's"
    for parity in report.parity:
        yield f"parity {parity.engine} {parity.precision}: mean KL", f"{parity.mean_kl:.1e}"
    if report.search is not None:
        yield "trials", f"{report.search.trials:,}"
    if report.seconds:
        yield "build", seconds_text(sum(report.seconds.values()))
