"""A report as tables in a terminal: `dtr-deploy show`, and the end of every build.

Every figure shown is in the report; nothing is measured, and nothing but ratios of shown figures is computed here.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dtr_deploy.hybrid.layout import counts, ranges
from dtr_deploy.progress import seconds_text
from dtr_deploy.report.schema import DECISIONS, Report, ThroughputRow

ENGINE_NAMES = {"ort": "ONNX Runtime", "genai": "ONNX Runtime GenAI", "vllm": "vLLM", "torch": "Hugging Face"}


def parts(report: Report) -> Iterable[RenderableType]:
    """All tables of a report; parts that a run does not have are left out."""
    yield layout_summary(report)
    if report.scores:
        yield scores_table(report)
    if report.throughput:
        yield throughput_table(report)
    if report.parity:
        yield parity_table(report)
    if report.lm_eval:
        yield lm_eval_table(report)
    if report.seconds:
        yield seconds_table(report)


def new_table(title: str, *columns: str, numbers_from: int = 1) -> Table:
    """An empty table in the style of all of them; columns from index `numbers_from` on are right-aligned."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index >= numbers_from else "left")
    return table


def layout_summary(report: Report) -> RenderableType:
    """The model, how many layers of which form, which layers keep full attention, and a strip of one letter a layer."""
    layout = report.forms()
    forms = counts(layout)
    letters = {
        form: form[:1].upper() if len({f[:1] for f in forms}) == len(forms) else str(n) for n, form in enumerate(forms)
    }
    strip = Text()
    for form in layout:
        strip.append("-" if form is None else letters[form], style="dim" if form is None else "bold green")
    legend = ", ".join(f"{letters[form]} {form}" for form in forms)
    kept = [layer for layer, form in enumerate(layout) if form is None]
    forms_text = ", ".join(f"{form} {count}" for form, count in forms.items()) or "none"
    model = f"{report.backbone.spec} ({report.backbone.family})"
    keys = f"- full attention{', ' + legend if legend else ''}"
    lines = [
        Text.assemble((str(report.recipe.get("name", "")), "bold"), f"  {model}"),
        Text(f"{sum(forms.values())} of {len(layout)} layers replaced: {forms_text}"),
        Text(f"full attention in layers {ranges(kept) or 'none'}"),
        Text.assemble("layers 0 to ", f"{len(layout) - 1}: ", strip, "   ", keys),
    ]
    return Group(*lines)


def scores_table(report: Report) -> Table:
    """Each split's combined score and each task's, base and hybrid, with the interval of the paired difference."""
    table = new_table("Scores", "split", "task", "base", "hybrid", "difference", "its interval", numbers_from=2)
    for split, row in report.scores.items():
        table.add_row(
            split,
            "all",
            _with_interval(row.base, row.base_ci),
            _with_interval(row.hybrid, row.hybrid_ci),
            f"{row.hybrid - row.base:+.3f}",
            f"{row.ci[0]:+.3f} to {row.ci[1]:+.3f} ({row.confidence:.0%})",
            style="bold",
        )
        for name, task in row.tasks.items():
            table.add_row("", name, f"{task.base:.3f}", f"{task.hybrid:.3f}", f"{task.hybrid - task.base:+.3f}", "")
    return table


def _with_interval(value: float, interval: tuple[float, float] | None) -> str:
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def throughput_table(report: Report) -> Table:
    return throughput_rows_table(report.throughput)


def throughput_rows_table(rows: Iterable[ThroughputRow]) -> Table:
    """Tokens per second, base -> hybrid, with the ratio of each part; the target's workload in bold."""
    table = new_table(
        "Throughput, tokens per second (base -> hybrid)",
        "engine",
        "workload",
        "prefill",
        "decode",
        "end to end",
        numbers_from=2,
    )
    for row in rows:
        table.add_row(
            f"{ENGINE_NAMES.get(row.engine, row.engine)} {row.precision}",
            _workload_text(row),
            *(_rates_text(row, part) for part in ("prefill", "decode", "end_to_end")),
            style="bold" if row.target else "",
        )
    return table


def throughput_name(row: ThroughputRow) -> str:
    """Engine, precision and workload of a row."""
    return f"{ENGINE_NAMES.get(row.engine, row.engine)} {row.precision}, {_workload_text(row)}"


def _workload_text(row: ThroughputRow) -> str:
    text = f"{row.workload.prompt:,} + {row.workload.output:,}"
    return text if row.workload.concurrency == 1 else f"{text}, {row.workload.concurrency} at once"


def _rates_text(row: ThroughputRow, part: str) -> str:
    base, hybrid, ratio = (getattr(rates, part) for rates in (row.base, row.hybrid, row.ratio))
    return f"{_rate(base)} -> {_rate(hybrid)} ({ratio:.2f}x)" if base else "-"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def parity_table(report: Report) -> Table:
    """Every program against the Hugging Face hybrid in float32."""
    table = new_table(
        "Parity with the Hugging Face hybrid (fp32)",
        "engine",
        "prompts",
        "tokens",
        "max |dlogprob|",
        "mean KL",
        "backbone's KL",
        "same greedy token",
        "gate",
    )
    for row in report.parity:
        name = row.engine if row.engine.startswith("torch ") else ENGINE_NAMES.get(row.engine, row.engine)
        table.add_row(
            f"{name} {row.precision}",
            f"{row.prompts:,}",
            f"{row.tokens:,}",
            f"{row.max_abs_dlogprob:.1e}",
            f"{row.mean_kl:.1e}",
            "" if row.base_kl is None else f"{row.base_kl:.1e}",
            f"{row.greedy_agreement:.2%}",
            Text("passed", style="green") if row.passed else Text("FAILED", style="bold red"),
        )
    return table


def lm_eval_table(report: Report) -> Table:
    """The hybrid's test scores as the search found them, and as lm-eval itself does."""
    table = new_table("The hybrid by lm-eval itself (test split)", "task", "documents", "ours", "lm-eval", "gate")
    for row in report.lm_eval:
        gate = Text(row.verdict, style="green" if row.passed else "bold red")
        theirs = f"{row.lm_eval:.4f} (standard error {row.standard_error:.4f})"
        table.add_row(row.task, f"{row.documents:,}", f"{row.ours:.4f}", theirs, gate)
    return table


def layers_table(report: Report) -> Table:
    """Every twin: whether it was taken, its error and the controls', and what its swap alone was estimated to cost."""
    costs = {(swap["layer"], swap["form"]): swap for swap in (report.search.swaps if report.search else [])}
    layout = report.forms()
    table = new_table(
        "Layers", "layer", "form", "in the layout", "relative error", "no-op", "window only", "KL added", "recall lost"
    )
    for row in sorted(report.distill, key=lambda row: (row.layer, row.form)):
        cost = costs.get((row.layer, row.form), {})
        taken = layout[row.layer] == row.form
        controls = (f"{row.controls[name]:.3f}" if name in row.controls else "" for name in ("no_op", "window_only"))
        found = (f"{cost[name]:+.4f}" if name in cost else "" for name in ("kl", "recall"))
        table.add_row(str(row.layer), row.form, "yes" if taken else "", f"{row.relative_error:.4f}", *controls, *found)
    return table


def path_tables(report: Report) -> list[Table]:
    """The search's steps that have a score, in order."""
    table = new_table("", "step", "what", "layers replaced", "score", "loss", "speedup", numbers_from=2)
    decisions = report.search.decisions if report.search else []
    for number, step in enumerate(decisions):
        loss, speedup = step.get("loss"), step.get("speedup")
        table.add_row(
            str(number),
            DECISIONS[step["action"]],
            str(step.get("replaced", 0)),
            f"{step['score']:.3f}",
            "" if loss is None else f"{loss:+.3f}",
            "" if speedup is None else f"{speedup:.2f}x",
        )
    return [table] if decisions else []


def memory_table(report: Report) -> Table:
    table = new_table("Cache of one sequence, MiB", "tokens", "base", "hybrid", "hybrid over base", numbers_from=0)
    for row in report.memory:
        base, hybrid = row.base_bytes / 2**20, row.hybrid_bytes / 2**20
        table.add_row(f"{row.tokens:,}", f"{base:,.2f}", f"{hybrid:,.2f}", f"{hybrid / base:.2f}")
    return table


def seconds_table(report: Report) -> Table:
    table = new_table("Time", "stage", "duration")
    for stage, seconds in report.seconds.items():
        table.add_row(stage, seconds_text(seconds))
    table.add_row("all stages", seconds_text(sum(report.seconds.values())), style="bold")
    return table


def frontier_table(frontier: Iterable[dict[str, object]]) -> Table:
    """What the search reached, when nothing meets the target: score lost against speedup, slowest first."""
    table = new_table(
        "Frontier: what is within reach", "replaced", "score", "loss", "speedup", "within the bounds", numbers_from=0
    )
    for visit in frontier:
        table.add_row(
            str(visit["replaced"]),
            f"{visit['score']:.3f}",
            f"{visit['loss']:+.3f}",
            f"{visit['speedup']:.2f}x",
            "yes" if visit["passes"] else "no",
        )
    return table
