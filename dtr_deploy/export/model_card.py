"""The model card beside a hybrid: what it is, how to serve it, what was measured. Every figure is the report's."""

from __future__ import annotations

import re
from pathlib import Path

from dtr_deploy.hybrid.layout import counts, ranges
from dtr_deploy.report.schema import Report
from dtr_deploy.report.tables import ENGINE_NAMES
from dtr_deploy.run_dir import write_atomically

CARD = "README.md"
SPLITS = ("test", "confirm", "search")
"""The first of these that was scored is what the hub is told."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
FILES = (".gguf", ".txt", ".md", ".jsonl", ".json", ".parquet", ".gz")

USE = """```python
import dtr_deploy.hybrid.model  # teaches transformers this architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("NAME")  # this folder, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained("NAME")
```"""


def write_model_card(report: Report, folder: Path) -> Path:
    """Write `README.md` beside the checkpoint: what it is, how to serve it, and what was measured."""
    card = folder / CARD
    write_atomically(card, model_card(report).encode())
    return card


def model_card(report: Report) -> str:
    """The card's text. Every figure comes from the report."""
    layout = report.forms()
    forms = counts(layout)
    kept = [layer for layer, form in enumerate(layout) if form is None]
    name = report.recipe["name"]
    window = f"softmax window {report.recipe['window']}"
    if any("@" in form for form in forms):
        window += ", or the tokens after @"
    parts = [
        front_matter(report),
        f"# {name}",
        f"{report.backbone.spec} with {sum(forms.values())} of {len(layout)} attention layers replaced by linear "
        f"attention ({', '.join(f'{form} {count}' for form, count in forms.items()) or 'none'}; {window}). Full "
        f"attention stays in layers {ranges(kept) or 'none'}.",
        "Made by dtr-deploy: twins of the attention layers are distilled, then replace them where the score holds and "
        "the measured throughput pays (Distill-then-Replace, arXiv 2601.11667).",
        "## Use",
        USE,
        "`vllm serve NAME` works wherever `dtr-deploy` is installed (it brings the plugin `dtr_vllm`).",
        "## Limits",
        _limits(report),
    ]
    if report.scores:
        parts += ["## Scores", _scores(report)]
    if report.throughput:
        parts += [
            "## Throughput",
            "Tokens per second, base -> hybrid, on " + _machine(report) + ".",
            _throughput(report),
        ]
    if report.parity:
        parts += [
            "## Parity",
            "Against this checkpoint in Hugging Face transformers, float32, on the same tokens.",
            _parity(report),
        ]
    return "\n\n".join(parts) + "\n"


def front_matter(report: Report) -> str:
    """What the hub reads: `huggingface_hub.ModelCardData`, with the scores of the last split that was scored."""
    from huggingface_hub import EvalResult, ModelCardData

    split, scores = next(((name, report.scores[name]) for name in SPLITS if name in report.scores), ("", None))
    metrics = {task["name"]: task.get("metric") for task in report.recipe.get("tasks", ()) if "name" in task}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            dataset_split=split,
            metric_type=metrics.get(name) or "score",
            metric_value=task.hybrid,
        )
        for name, task in (scores.tasks.items() if scores is not None else ())
    ]
    spec, sources = report.backbone.spec, [str(source) for source in report.recipe.get("corpus", ())]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linear-attention", "hybrid", "dtr-deploy"],
        base_model=spec if _on_the_hub(spec) else None,
        datasets=[source.partition(":")[0] for source in sources if _on_the_hub(source.partition(":")[0])] or None,
        model_name=str(report.recipe["name"]) if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _on_the_hub(name: str) -> bool:
    """Whether this is a hub id, and no file or folder."""
    return bool(HUB_ID.fullmatch(name)) and not name.endswith(FILES) and not Path(name).exists()


def _limits(report: Report) -> str:
    recipe, lines = report.recipe, []
    tasks = [str(task["name"]) for task in recipe.get("tasks", ()) if "name" in task]
    if tasks:
        asked = f"Layers were chosen for {', '.join(tasks)}"
        lines.append(f"{asked}; what these do not ask was not looked after, recall least of all.")
    length = (recipe.get("distill") or {}).get("sequence_length")
    if length:
        lines.append(f"Twins were trained on sequences of {length:,} tokens.")
    if report.parity:
        lines.append("Engines other than those below were not compared with this checkpoint.")
    return " ".join([*lines, "Everything else that limits the backbone limits this model."])


def _machine(report: Report) -> str:
    hardware = report.environment.get("hardware", {})
    if not hardware:
        return "the machine of the build"
    gpus = ", ".join(hardware.get("gpus", ()))
    return gpus or f"{hardware['cores']} cores of {hardware['processor']}"


def _rows(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _scores(report: Report) -> str:
    rows = []
    for split, row in report.scores.items():
        interval = f"{row.ci[0]:+.3f} to {row.ci[1]:+.3f} ({row.confidence:.0%})"
        rows.append([split, "all", f"{row.base:.3f}", f"{row.hybrid:.3f}", interval])
        rows += [[split, name, f"{task.base:.3f}", f"{task.hybrid:.3f}", ""] for name, task in row.tasks.items()]
    return _rows(["split", "task", "base", "hybrid", "interval of the difference"], rows)


def _throughput(report: Report) -> str:
    rows = []
    for row in report.throughput:
        parts = [
            f"{base:,.1f} -> {hybrid:,.1f} ({ratio:.2f}x)" if base else ""
            for base, hybrid, ratio in (
                (getattr(row.base, part), getattr(row.hybrid, part), getattr(row.ratio, part))
                for part in ("prefill", "decode", "end_to_end")
            )
        ]
        workload = f"{row.workload.prompt:,} + {row.workload.output:,} x {row.workload.concurrency}"
        rows.append([f"{ENGINE_NAMES.get(row.engine, row.engine)} {row.precision}", workload, *parts])
    return _rows(["engine", "prompt + output x requests", "prefill", "decode", "end to end"], rows)


def _parity(report: Report) -> str:
    rows = [
        [
            f"{ENGINE_NAMES.get(row.engine, row.engine)} {row.precision}",
            f"{row.prompts:,}",
            f"{row.max_abs_dlogprob:.1e}",
            f"{row.mean_kl:.1e}",
            "" if row.base_kl is None else f"{row.base_kl:.1e}",
            f"{row.greedy_agreement:.2%}",
        ]
        for row in report.parity
    ]
    return _rows(
        [
            "engine",
            "prompts",
            "max abs. difference of log-probabilities",
            "mean KL",
            "backbone's mean KL",
            "same greedy token",
        ],
        rows,
    )
