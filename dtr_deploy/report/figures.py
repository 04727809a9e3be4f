"""The figures of `report.html`. Each is made of numbers of the report alone, and is None where a run has none of them.

Colours of texts, lines and backgrounds are left to the page, which has a dark and a light scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from dtr_deploy.hybrid.layout import counts
from dtr_deploy.report.schema import DECISIONS, Report, ThroughputRow
from dtr_deploy.report.tables import ENGINE_NAMES

# After Okabe and Ito, told apart with any kind of colour vision; the blue is lighter, to be seen on black as on white.
BASE, HYBRID, CHOSEN, BAD = "#999999", "#2b8cc4", "#d55e00", "#cc3311"
FORMS = ("#2b8cc4", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
KEPT = "#bbbbbb"

Figure = Callable[[Report], "go.Figure | None"]


def frontier(report: Report) -> go.Figure | None:
    """Score against speedup of the layouts that no other beats in both; intervals are of the paired difference."""
    search = report.search
    if search is None or not search.frontier:
        return None
    visits = search.frontier
    figure = _figure("speedup over the base, end to end", "score on the search split")
    for name, color, passes in (("within the bounds", HYBRID, True), ("out of bounds", BAD, False)):
        some = [visit for visit in visits if visit["passes"] == passes]
        if not some:
            continue
        above, below = zip(*(_from_score(visit) for visit in some), strict=True)
        figure.add_scatter(
            x=[visit["speedup"] for visit in some],
            y=[visit["score"] for visit in some],
            error_y={"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 1},
            customdata=[visit["replaced"] for visit in some],
            hovertemplate="%{customdata} layers replaced<br>%{x:.2f}x, score %{y:.3f}",
            mode="lines+markers",
            marker={"color": color, "size": 8},
            line={"color": color, "width": 1, "dash": "dot"},
            name=name,
        )
    score = report.scores.get("search")
    if score is not None:
        figure.add_scatter(
            x=[search.speedup or 1.0], y=[score.hybrid], mode="markers", name="chosen, as measured",
            marker={"color": CHOSEN, "size": 15, "symbol": "star"},
            hovertemplate="chosen<br>%{x:.2f}x, score %{y:.3f}",
        )  # fmt: skip
        figure.add_hline(y=score.base, line={"color": BASE, "dash": "dash", "width": 1})
        figure.add_annotation(
            x=1, xref="paper", y=score.base, text="base", showarrow=False, xanchor="right", yanchor="bottom"
        )
    return figure


def layers(report: Report) -> go.Figure | None:
    """Layer by layer: its form, the twins' errors, and what its swap alone costs in divergence and recall."""
    found = report.search.swaps if report.search else []
    rows: list[tuple[str, list[tuple[str, list[int], list[float]]]]] = []
    if report.distill:
        rows.append(("relative error", _by_form((row.form, row.layer, row.relative_error) for row in report.distill)))
    if found:
        rows.append(("KL added, nats", _by_form((swap["form"], swap["layer"], swap["kl"]) for swap in found)))
        rows.append(("recall lost, nats", _by_form((swap["form"], swap["layer"], swap["recall"]) for swap in found)))
    layout = report.forms()
    colors = _colors(report)
    figure = make_subplots(
        rows=1 + len(rows), cols=1, shared_xaxes=True, vertical_spacing=0.06,
        row_heights=[0.3, *[1.0] * len(rows)],
    )  # fmt: skip
    for form in (*counts(layout), None):
        mine = [layer for layer, chosen in enumerate(layout) if chosen == form]
        if mine:
            name = form or "full attention"
            figure.add_bar(
                x=mine, y=[1] * len(mine), marker={"color": colors.get(form, KEPT)}, name=name, legendgroup=name,
                hovertemplate=f"layer %{{x}}: {name}<extra></extra>", row=1, col=1,
            )  # fmt: skip
    figure.update_yaxes(showticklabels=False, showgrid=False, row=1, col=1)
    shown = set(counts(layout))
    for number, (title, by_form) in enumerate(rows, start=2):
        for form, mine, values in by_form:
            figure.add_bar(
                x=mine, y=values, marker={"color": colors[form]}, name=form, legendgroup=form,
                showlegend=form not in shown, hovertemplate=f"layer %{{x}}, {form}: %{{y:.3g}}<extra></extra>",
                row=number, col=1,
            )  # fmt: skip
            shown.add(form)
        figure.update_yaxes(title=title, row=number, col=1)
    figure.update_xaxes(title="layer", dtick=5, row=1 + len(rows), col=1)
    return _styled(figure, height=180 + 150 * len(rows))


MARKERS = {
    "base": (BASE, "square"),
    "commit": (HYBRID, "circle"),
    "between_steps": ("#56b4e9", "circle-open"),
    "reject": (BAD, "x"),
    "walk_back": ("#e69f00", "triangle-left"),
    "confirm": (CHOSEN, "star"),
}
"""Colour and symbol of each of the search's decisions."""


def path(report: Report) -> go.Figure | None:
    """The search, step by step: the search-split score of every layout that was decided on."""
    scored = report.search.decisions if report.search else []
    if not scored:
        return None
    figure = _figure("step", "score on the search split")
    walk = [(number, step) for number, step in enumerate(scored) if step["action"] in ("base", "commit")]
    figure.add_scatter(
        x=[number for number, _ in walk], y=[step["score"] for _, step in walk], mode="lines", showlegend=False,
        line={"color": HYBRID, "width": 1}, hoverinfo="skip",
    )  # fmt: skip
    for action, (color, symbol) in MARKERS.items():
        mine = [(number, step) for number, step in enumerate(scored) if step["action"] == action]
        if mine:
            figure.add_scatter(
                x=[number for number, _ in mine],
                y=[step["score"] for _, step in mine],
                customdata=[[step.get("replaced", 0), _changes(step)] for _, step in mine],
                hovertemplate="%{customdata[0]} layers replaced, score %{y:.3f}<br>%{customdata[1]}",
                mode="markers",
                marker={"color": color, "size": 9, "symbol": symbol},
                name=DECISIONS[action],
            )
    return figure


def speed(report: Report) -> go.Figure | None:
    """Tokens per second against prompt length, base and hybrid, on every engine; one request at a time."""
    single = [row for row in report.throughput if row.workload.concurrency == 1]
    engines = list(dict.fromkeys((row.engine, row.precision) for row in single))
    if not engines:
        return None
    names = ENGINE_NAMES | {"genai": "GenAI"}  # two of the long one do not fit side by side on a phone
    titles = [f"{names.get(e, e)} {p}: {part}" for e, p in engines for part in ("prefill", "decode")]
    figure = make_subplots(
        rows=len(engines), cols=2, subplot_titles=titles, vertical_spacing=0.35 / len(engines), horizontal_spacing=0.12
    )
    for number, (engine, precision) in enumerate(engines, start=1):
        rows = [row for row in single if (row.engine, row.precision) == (engine, precision)]
        for column, part in enumerate(("prefill", "decode"), start=1):
            for model, color in (("base", BASE), ("hybrid", HYBRID)):
                points = _points(rows, model, part)
                figure.add_scatter(
                    x=[prompt for prompt, _ in points], y=[rate for _, rate in points], mode="lines+markers",
                    name=model, legendgroup=model, showlegend=(number, column) == (1, 1), line={"color": color},
                    hovertemplate=f"{model}: %{{y:,.1f}} tokens/s at %{{x:,}} tokens<extra></extra>",
                    row=number, col=column,
                )  # fmt: skip
    prompts = sorted({row.workload.prompt for row in single})
    figure.update_xaxes(type="log", tickvals=prompts, ticktext=[f"{prompt:,}" for prompt in prompts])
    figure.update_yaxes(rangemode="tozero")
    figure.update_xaxes(title="prompt, tokens", row=len(engines))
    figure.update_yaxes(title="tokens per second", col=1)
    return _styled(figure, height=60 + 240 * len(engines)).update_layout(margin={"t": 80})


def parity(report: Report) -> go.Figure | None:
    """The ladder: mean KL of every program from the Hugging Face hybrid, with the limit of each."""
    rows = report.parity[::-1]  # plotly begins at the bottom
    if not rows:
        return None
    names = [f"{ENGINE_NAMES.get(row.engine, row.engine)} {row.precision}" for row in rows]
    least = min([row.limit for row in rows] + [row.mean_kl for row in rows if row.mean_kl > 0]) / 10
    figure = _figure("mean KL, nats a token", "")
    for name, color, passed in (("passed", HYBRID, True), ("failed", BAD, False)):
        mine = [index for index, row in enumerate(rows) if row.passed == passed]
        if mine:
            figure.add_scatter(
                x=[max(rows[index].mean_kl, least) for index in mine],
                y=[names[index] for index in mine],
                customdata=[rows[index].mean_kl for index in mine],
                hovertemplate="%{y}: %{customdata:.1e}<extra></extra>",
                mode="markers", name=name, marker={"color": color, "size": 11},
            )  # fmt: skip
    for name, symbol, values in (
        ("limit", "line-ns-open", [row.limit for row in rows]),
        ("the unreplaced backbone's", "diamond-open", [row.base_kl for row in rows]),
    ):
        given = [(label, value) for label, value in zip(names, values, strict=True) if value]
        if given:
            figure.add_scatter(
                x=[value for _, value in given], y=[label for label, _ in given], mode="markers", name=name,
                marker={"color": BASE, "size": 14 if name == "limit" else 9, "symbol": symbol},
                hovertemplate="%{y}: %{x:.1e}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(type="log", exponentformat="power", dtick=1)
    figure.update_yaxes(categoryorder="array", categoryarray=names)
    figure.update_layout(height=140 + 34 * len(rows))
    return figure


def memory(report: Report) -> go.Figure | None:
    """Cache of one sequence against its length, base and hybrid."""
    if not report.memory:
        return None
    figure = _figure("tokens of a sequence", "MiB of keys, values and states")
    for name, color in (("base", BASE), ("hybrid", HYBRID)):
        figure.add_scatter(
            x=[row.tokens for row in report.memory],
            y=[getattr(row, f"{name}_bytes") / 2**20 for row in report.memory],
            mode="lines+markers", name=name, line={"color": color},
            hovertemplate=f"{name}: %{{y:,.1f}} MiB at %{{x:,}} tokens<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(rangemode="tozero", tickformat=",")
    figure.update_yaxes(rangemode="tozero")
    return figure


def cost(report: Report) -> go.Figure | None:
    """Seconds of every stage."""
    if not report.seconds:
        return None
    stages = list(report.seconds)[::-1]
    figure = _figure("seconds", "")
    figure.add_bar(
        x=[report.seconds[stage] for stage in stages], y=stages, orientation="h", marker={"color": HYBRID},
        hovertemplate="%{y}: %{x:,.1f} s<extra></extra>",
    )  # fmt: skip
    figure.update_layout(height=110 + 26 * len(stages))
    return figure


def _figure(x: str, y: str) -> go.Figure:
    figure = _styled(go.Figure(), height=400)
    figure.update_xaxes(title=x)
    figure.update_yaxes(title=y)
    return figure


def _styled(figure: go.Figure, height: int) -> go.Figure:
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        template="none",
        height=height,
        paper_bgcolor=clear,
        plot_bgcolor=clear,
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 10, "r": 10, "t": 50, "b": 10},
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 1, "x": 0, "bgcolor": clear},
        hoverlabel={"namelength": -1},
    )
    figure.update_xaxes(automargin=True, gridcolor="#888", zeroline=False, title_standoff=8)
    figure.update_yaxes(automargin=True, gridcolor="#888", zeroline=False, title_standoff=8)
    return figure


def _from_score(visit: dict[str, Any]) -> tuple[float, float]:
    """How far the interval reaches above and below a visit's score; 0 where it is not known."""
    interval = visit.get("interval")
    if interval is None:
        return 0.0, 0.0
    return max(0.0, visit["loss"] - interval[0]), max(0.0, interval[1] - visit["loss"])


def _by_form(rows: Iterable[tuple[str, int, float]]) -> list[tuple[str, list[int], list[float]]]:
    """(form, layers, values) of each form, in the order of layers."""
    found: dict[str, list[tuple[int, float]]] = {}
    for form, layer, value in rows:
        found.setdefault(form, []).append((layer, value))
    return [
        (form, [layer for layer, _ in sorted(of)], [value for _, value in sorted(of)]) for form, of in found.items()
    ]


def _colors(report: Report) -> dict[str | None, str]:
    forms = dict.fromkeys([*(row.form for row in report.distill), *counts(report.forms())])
    return {form: FORMS[number % len(FORMS)] for number, form in enumerate(forms)}


def _changes(step: dict[str, Any]) -> str:
    return ", ".join(f"layer {layer}: {form}" for layer, form in step.get("changes", []))


def _points(rows: Sequence[ThroughputRow], model: str, part: str) -> list[tuple[int, float]]:
    """(prompt tokens, tokens per second); of the largest output where a prompt was measured twice."""
    chosen: dict[int, ThroughputRow] = {}
    for row in rows:
        before = chosen.get(row.workload.prompt)
        if before is None or row.workload.output > before.workload.output:
            chosen[row.workload.prompt] = row
    rates = [(prompt, getattr(getattr(row, model), part)) for prompt, row in sorted(chosen.items())]
    return [(prompt, rate) for prompt, rate in rates if rate]
