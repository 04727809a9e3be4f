"""The hybrid's model card, `README.md`, as the Hub expects it: front matter that its search and pages read, then text.

Every figure comes from the run's report, unrounded in the front matter. The same card serves the folder and the
repository that `dtr-deploy push` makes of it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from dtr_deploy.hybrid.layout import counts, ranges
from dtr_deploy.report.schema import OriginRow, Report
from dtr_deploy.report.tables import ENGINE_NAMES
from dtr_deploy.run_dir import write_atomically

CARD = "README.md"

PUBLISHED_SPLITS = ("test", "confirm")
"""Whose scores may stand in the front matter, the first that a run has. The search chose by its own split."""

USE = """```python
import dtr_deploy.hybrid.model  # teaches transformers this architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

source = "OWNER/NAME"  # this repository's id on the Hub, or the path of this folder
model = AutoModelForCausalLM.from_pretrained(source)
tokenizer = AutoTokenizer.from_pretrained(source)
```"""


def write_model_card(report: Report, folder: Path) -> Path:
    """Write `README.md` beside the checkpoint: what it is, how to serve it, and what was measured."""
    card = folder / CARD
    write_atomically(card, model_card(report).encode())
    return card


def model_card(report: Report) -> str:
    """The card's text."""
    layout = report.forms()
    forms = counts(layout)
    kept = [layer for layer, form in enumerate(layout) if form is None]
    window = f"softmax window {report.recipe['window']}"
    if any("@" in form for form in forms):
        window += ", or the tokens after @"
    parts = [
        f"---\n{card_data(report).to_yaml()}\n---",
        f"# {report.recipe['name']}",
        f"{_backbone(report)} with {sum(forms.values())} of {len(layout)} attention layers replaced by linear "
        f"attention ({', '.join(f'{form} {count}' for form, count in forms.items()) or 'none'}; {window}). Full "
        f"attention stays in layers {ranges(kept) or 'none'}.",
        "Made by dtr-deploy: twins of the attention layers are distilled, then replace them where the score holds and "
        "the measured throughput pays (Distill-then-Replace, [arXiv 2601.11667](https://arxiv.org/abs/2601.11667)).",
        "## Use",
        USE,
        "`vllm serve OWNER/NAME`, or with the folder's path, works wherever `dtr-deploy` is installed (it brings the "
        "plugin `dtr_vllm`). Neither needs `trust_remote_code`.",
        *_onnx(report),
        "## Intended use and limits",
        "\n".join(f"- {line}" for line in _limits(report)),
    ]
    if report.scores:
        parts += [
            "## Scores",
            "The search chose by the split `search`, its choice had to hold on `confirm`, and `test` was scored once, "
            "at the end.",
            _scores(report),
        ]
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


# --- the front matter


def card_data(report: Report) -> ModelCardData:
    """The front matter. What is not known (license, a backbone that is not on the Hub) is left out."""
    origin = _origin(report)
    results = _eval_results(report)
    forms = {form.partition("@")[0].replace("_", "-") for form in report.forms() if form is not None}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["linear-attention", "hybrid", "distillation", "dtr-deploy", *sorted(forms)],
        base_model=origin.base_model,
        base_model_relation="finetune" if origin.base_model else None,
        datasets=origin.datasets or None,
        eval_results=results or None,
        model_name=str(report.recipe["name"]) if results else None,
        license=origin.license.get("license"),
        license_name=origin.license.get("license_name"),
        license_link=origin.license.get("license_link"),
    )


def _origin(report: Report) -> OriginRow:
    """Reports of earlier versions have none: then the backbone's name alone tells whether it is a hub id."""
    if report.origin is not None:
        return report.origin
    spec = report.backbone.spec
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec) and not spec.endswith(".gguf") and not Path(spec).exists()
    return OriginRow(base_model=spec if is_id else None)


def _eval_results(report: Report) -> list[EvalResult]:
    """The hybrid's score on each task, of the first of `PUBLISHED_SPLITS`."""
    split = next((split for split in PUBLISHED_SPLITS if split in report.scores), None)
    if split is None:
        return []
    tasks = {task["name"]: task for task in report.recipe.get("tasks", [])}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=_kind(tasks.get(name, {})),
            dataset_name=name,
            dataset_config=name,
            dataset_split=split,
            metric_type=_metric(tasks.get(name, {})),
            metric_value=row.hybrid,
        )
        for name, row in report.scores[split].tasks.items()
    ]


def _kind(task: dict[str, Any]) -> str:
    return task.get("synthetic") or ("lm_eval" if task.get("lm_eval") else "custom")


def _metric(task: dict[str, Any]) -> str:
    """What a task's score is called. An lm-eval task without a metric chose its own: that is only a score."""
    if task.get("metric"):
        return task["metric"].partition(",")[0]
    if task.get("synthetic"):
        return "exact_match"
    return "accuracy" if task.get("file") else "score"


# --- the text


def _backbone(report: Report) -> str:
    """The backbone's name; of a folder or file only the last part, since a card is for others to read."""
    base_model, spec = _origin(report).base_model, report.backbone.spec
    if base_model:
        revision = report.recipe.get("revision")
        link = f"[{base_model}](https://huggingface.co/{base_model})"
        return f"{link} (revision {revision})" if revision else link
    return spec if spec.startswith("package:") else Path(spec).name


def _onnx(report: Report) -> list[str]:
    precisions = [row.precision for row in report.parity if row.engine == "ort"]
    if not precisions:
        return []
    return [
        f"For ONNX Runtime it was exported as {', '.join(precisions)}: the folders `onnx/PRECISION` of this "
        "repository, those of them that were published."
    ]


def _limits(report: Report) -> list[str]:
    recipe, origin = report.recipe, _origin(report)
    tasks = recipe.get("tasks", [])
    loss = recipe.get("search", {}).get("max_score_loss")
    names = ", ".join(task["name"] for task in tasks)
    lines = ["Meant for text generation with long prompts, where linear attention saves time and memory."]
    if tasks and loss is not None:
        lines[0] += f" The search was to keep the score within {loss} of the backbone's on: {names}."
    lines.append(
        "Measured was what stands below and nothing else: no other benchmark or language, no safety or bias. The "
        "backbone's own limits apply as well."
    )
    context = []
    if trained := recipe.get("distill", {}).get("sequence_length"):
        context.append(f"trained on sequences of {trained:,} tokens")
    if scored := [length for task in tasks for length in _lengths(task)]:
        context.append(f"scored on prompts of up to {max(scored):,} tokens")
    if report.throughput:
        context.append(f"timed with prompts of up to {max(row.workload.prompt for row in report.throughput):,} tokens")
    if context:
        takes = f"; the backbone takes {origin.context:,}" if origin.context else ""
        lines.append(f"Context: {', '.join(context)}{takes}. Nothing longer was evaluated.")
    asked = [
        f"{task['name']} ({task['synthetic']} at {', '.join(f'{length:,}' for length in _lengths(task))} tokens)"
        for task in tasks
        if task.get("synthetic")
    ]
    if asked:
        lines.append(f"Recall was measured by {', '.join(asked)}. Recall beyond what these ask was not measured.")
    else:
        lines.append("No task of the recipe was made to ask for recall from a long prompt: it was not measured.")
    return lines


def _lengths(task: dict[str, Any]) -> tuple[int, ...]:
    """Prompt tokens a task was scored at, where it has fixed ones."""
    if task.get("lengths") or not task.get("synthetic"):
        return tuple(task.get("lengths") or ())
    from dtr_deploy.tasks.haystack import DEFAULT_LENGTHS  # imports torch

    return DEFAULT_LENGTHS


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
