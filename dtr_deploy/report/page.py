"""`report.html`: a run's report as one file that opens anywhere, offline, without a server.

Every figure stands beside a table of the same numbers, which is what a screen reader reads. Nothing is computed here
that `report.json`, which the page carries whole, does not have.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from rich.table import Table
from rich.text import Text

from dtr_deploy import __version__
from dtr_deploy.hybrid.layout import counts, ranges
from dtr_deploy.progress import seconds_text
from dtr_deploy.report import figures, tables
from dtr_deploy.report.schema import Report

PAGE = "report.html"


@dataclass(frozen=True)
class Section:
    """A part of the page. figure, tables: what shows its numbers; the section is left out where there are none.
    words: one or two sentences that say what is seen, without the figure too."""

    name: str
    title: str
    words: Callable[[Report], str]
    figure: figures.Figure | None = None
    tables: Callable[[Report], list[Table]] = lambda report: []


def page(report: Report) -> str:
    """The whole file."""
    name = str(report.recipe.get("name", "report"))
    parts = [(section, body) for section in SECTIONS if (body := _section(section, report)) is not None]
    links = "".join(f'<li><a href="#{section.name}">{escape(section.title)}</a></li>' for section, _ in parts)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{escape(name)}: dtr-deploy report</title>\n<link rel="icon" href="data:,">',
            f"<style>\n{_resource('page.css')}</style>\n</head>\n<body>",
            '<a class="skip" href="#main">Skip to the report</a>',
            f"<header>\n<h1>{escape(name)}</h1>\n<p>{escape(_opening(report))}</p>\n{_cards(report)}\n</header>",
            f'<nav aria-label="Parts of the report"><ul>{links}</ul></nav>',
            '<main id="main">',
            *(body for _, body in parts),
            "</main>",
            f"<footer>Written by dtr-deploy {__version__} from report.json, which this file contains.</footer>",
            f'<script type="application/json" id="report">{_script_json(report.model_dump(mode="json"))}</script>',
            f"<script>{_plotly()}</script>",
            f"<script>\n{_resource('page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _opening(report: Report) -> str:
    layout = report.forms()
    forms = ", ".join(f"{form} {count}" for form, count in counts(layout).items()) or "none"
    kept = [layer for layer, form in enumerate(layout) if form is None]
    return (
        f"{report.backbone.spec} ({report.backbone.family}, {report.backbone.parameters:,} parameters) with "
        f"{len(layout) - len(kept)} of {len(layout)} attention layers replaced: {forms}. "
        f"Full attention stays in layers {ranges(kept) or 'none'}."
    )


def _cards(report: Report) -> str:
    """The answer to the first questions: how much, how fast, at what price, and whether it is the same model."""
    layout = report.forms()
    cards = [(f"{sum(form is not None for form in layout)} of {len(layout)}", "layers replaced")]
    if report.search is not None and report.search.speedup is not None:
        workload = report.recipe.get("target", {}).get("workload", {})
        on = f" at {workload['prompt']:,} + {workload['output']:,} tokens" if workload else ""
        cards.append((f"{report.search.speedup:.2f}x", f"tokens per second end to end{on}, measured by the search"))
    if row := report.scores.get("test"):
        interval = f"{row.ci[0]:+.3f} to {row.ci[1]:+.3f}"
        cards.append((f"{row.hybrid - row.base:+.3f}", f"score on the test split, {row.confidence:.0%}: {interval}"))
    if report.parity:
        passed = sum(row.passed for row in report.parity)
        cards.append((f"{passed} of {len(report.parity)}", "programs compute the same (parity)"))
    items = "".join(f'<li class="card"><b>{escape(value)}</b><span>{escape(what)}</span></li>' for value, what in cards)
    return f'<ul class="cards">{items}</ul>'


def _section(section: Section, report: Report) -> str | None:
    figure = section.figure(report) if section.figure is not None else None
    found = section.tables(report)
    if figure is None and not found:
        return None
    title, words = escape(section.title), escape(section.words(report))
    parts = [f'<section id="{section.name}" aria-labelledby="{section.name}-title">']
    parts += [f'<h2 id="{section.name}-title">{title}</h2>', f"<p>{words}</p>"]
    if figure is not None:
        data = f"{section.name}-figure"
        parts += [
            # Not the marks and axes that are drawn inside, one by one: the table has the numbers.
            f'<div role="img" aria-label="{title}. {words}">'
            f'<div class="plot" aria-hidden="true" data-figure="{data}"></div></div>',
            f'<script type="application/json" id="{data}">{_script_json(json.loads(figure.to_json()))}</script>',
        ]
    body = "".join(_table(table, section.title) for table in found)
    if body and figure is not None:
        body = f"<details><summary>The same numbers as a table</summary>{body}</details>"
    return "\n".join([*parts, body, "</section>"])


def _table(table: Table, name: str) -> str:
    """A table of the terminal in HTML. name: where it has no title."""
    numbers = ['class="number"' if column.justify == "right" else "" for column in table.columns]
    head = "".join(
        f'<th scope="col" {number}>{escape(str(column.header))}</th>'
        for column, number in zip(table.columns, numbers, strict=True)
    )
    rows = zip(*(column.cells for column in table.columns), strict=True)
    body = "".join(
        f"<tr>{''.join(f'<td {number}>{_cell(cell)}</td>' for cell, number in zip(row, numbers, strict=True))}</tr>"
        for row in rows
    )
    title = f"<caption>{escape(str(table.title))}</caption>" if table.title else ""
    # On a narrow screen it scrolls, for those without a pointer too.
    place = f'class="scroll" tabindex="0" role="group" aria-label="Table: {escape(str(table.title or name))}"'
    return f"<div {place}><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: Any) -> str:
    if isinstance(cell, Text):
        style = "bad" if "red" in str(cell.style) else "good" if "green" in str(cell.style) else ""
        return f'<span class="{style}">{escape(cell.plain)}</span>'
    return escape(str(cell))


def _frontier_words(report: Report) -> str:
    search = report.search
    assert search is not None
    fastest = max((visit for visit in search.frontier if visit["passes"]), key=lambda v: v["speedup"], default=None)
    within = "" if fastest is None else f" The fastest within the bounds has {fastest['replaced']} layers replaced."
    return (
        f"Layouts that no other beats in both score and speed, of {search.trials:,} trials of strategy "
        f"{search.strategy}.{within} Bars are {_confidence(report):.0%} intervals of the difference from the base."
    )


def _frontier_tables(report: Report) -> list[Table]:
    visits = report.search.frontier if report.search else []
    return [tables.frontier_table(visits)] if visits else []


def _confidence(report: Report) -> float:
    """Confidence of the report's intervals."""
    return next((row.confidence for row in report.scores.values()), 0.95)


def _layers_words(report: Report) -> str:
    worst = max(report.distill, key=lambda row: row.relative_error, default=None)
    words = "From the top: the form of every layer, the error of the twins on held-out text"
    words += (
        ", and what a swap of that layer alone was estimated to cost." if report.search and report.search.swaps else "."
    )
    if worst is not None:
        words += f" The largest error is {worst.relative_error:.3f}, in layer {worst.layer}."
    return words


def _path_words(report: Report) -> str:
    search = report.search
    taken = [] if search is None else [step for step in search.steps if step["action"] == "commit"]
    back = 0 if search is None else search.walked_back
    return (
        f"Layouts in the order they were decided on. Steps committed: {len(taken)}. Layouts walked back because they "
        f"failed on the confirm split: {back}."
    )


def _speed_words(report: Report) -> str:
    target = next((row for row in report.throughput if row.target), None)
    words = "Tokens per second of base and hybrid against the length of the prompt, one request at a time."
    if target is not None:
        words += f" On the target's workload ({tables.throughput_name(target)}) the hybrid is "
        words += f"{target.ratio.end_to_end:.2f} times as fast end to end."
    return words


def _parity_words(report: Report) -> str:
    failed = [row for row in report.parity if not row.passed]
    verdict = "All programs pass." if not failed else f"Failed: {len(failed)} of {len(report.parity)}."
    return f"Every program is held to the Hugging Face hybrid in float32 on the same tokens. {verdict}"


def _memory_words(report: Report) -> str:
    last = report.memory[-1]
    return (
        f"Keys, values and states that one sequence needs on {tables.ENGINE_NAMES.get(last.engine, last.engine)}: at "
        f"{last.tokens:,} tokens the hybrid takes {last.hybrid_bytes / last.base_bytes:.0%} of the base's."
    )


def _cost_words(report: Report) -> str:
    return f"All stages together took {seconds_text(sum(report.seconds.values()))}."


def _environment_table(report: Report) -> list[Table]:
    table = tables.new_table("", "what", "value", numbers_from=2)
    for name, value in _flat(report.environment):
        table.add_row(name, value)
    return [table] if table.rows else []


def _flat(value: Any, name: str = "") -> Iterable[tuple[str, str]]:
    """(dotted name, text) of everything in nested dictionaries."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, str(value)


def _recipe(report: Report) -> list[Table]:
    table = tables.new_table("", "key", "value", numbers_from=2)
    for name, value in _flat({key: part for key, part in report.recipe.items() if key != "tasks"}):
        table.add_row(name, value)
    for task in report.recipe.get("tasks", []):
        told = ", ".join(f"{key} {value}" for key, value in task.items() if value is not None and key != "name")
        table.add_row(f"tasks.{task.get('name')}", told)
    return [table] if table.rows else []


def _resource(name: str) -> str:
    return (files("dtr_deploy.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def _script_json(data: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


SECTIONS = (
    Section(
        "scores", "Scores", lambda report: "Base and hybrid on the same items. The search chose by the search split, "
        "the confirm split could only refuse, and the test split was looked at once.",
        tables=lambda report: [tables.scores_table(report)] if report.scores else [],
    ),
    Section(
        "frontier", "Score against speed", _frontier_words, figures.frontier,
        _frontier_tables,
    ),
    Section("layers", "Layers", _layers_words, figures.layers, lambda report: [tables.layers_table(report)]),
    Section("path", "The search as a path", _path_words, figures.path, lambda report: tables.path_tables(report)),
    Section(
        "speed", "Speed against context", _speed_words, figures.speed,
        lambda report: [tables.throughput_table(report)] if report.throughput else [],
    ),
    Section(
        "memory", "Memory of a sequence", _memory_words, figures.memory,
        lambda report: [tables.memory_table(report)] if report.memory else [],
    ),
    Section(
        "parity", "Parity", _parity_words, figures.parity,
        lambda report: [tables.parity_table(report)] if report.parity else [],
    ),
    Section(
        "lm-eval", "lm-eval", lambda report: "The hybrid's score as the search found it, and as lm-eval itself does.",
        tables=lambda report: [tables.lm_eval_table(report)] if report.lm_eval else [],
    ),
    Section(
        "cost", "What the build took", _cost_words, figures.cost,
        lambda report: [tables.seconds_table(report)] if report.seconds else [],
    ),
    Section("recipe", "Recipe", lambda report: "What was asked for, defaults included.", tables=_recipe),
    Section("environment", "Environment", lambda report: "What it was run on.", tables=_environment_table),
)  # fmt: skip
