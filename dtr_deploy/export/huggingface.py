"""The hybrid as a Hugging Face folder: checkpoint, tokenizer, and a model card with the run's own figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.hybrid.layout import Layout, counts, ranges
from dtr_deploy.report.schema import Report
from dtr_deploy.report.tables import ENGINE_NAMES
from dtr_deploy.run_dir import write_atomically

if TYPE_CHECKING:
    from dtr_deploy.hybrid.backbone import Backbone

CARD = "README.md"

FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [linear-attention, hybrid, dtr-deploy]
---"""

USE = """```python
import dtr_deploy.hybrid.model  # teaches transformers this architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""


def export_checkpoint(
    backbone: Backbone, layout: Layout, window: int, twins: Mapping[tuple[int, str], Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Write config, safetensors and tokenizer of the hybrid to `folder`; returns the files (the card comes later)."""
    from dtr_deploy.hybrid.model import make_hybrid, save_hybrid

    chosen = {(layer, form): twins[layer, form] for layer, form in enumerate(layout) if form is not None}
    save_hybrid(make_hybrid(backbone.model, layout, window, chosen), backbone.tokenizer, folder)
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD)


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
    parts = [
        FRONT_MATTER,
        f"# {name}",
        f"{report.backbone.spec} with {sum(forms.values())} of {len(layout)} attention layers replaced by linear "
        f"attention ({', '.join(f'{form} {count}' for form, count in forms.items()) or 'none'}; softmax window "
        f"{report.recipe['window']}{', or the tokens after @' if any('@' in form for form in forms) else ''}). Full attention stays in layers {ranges(kept) or 'none'}.",
        "Made by dtr-deploy: twins of the attention layers are distilled, then replace them where the score holds and "
        "the measured throughput pays (Distill-then-Replace, arXiv 2601.11667).",
        "## Use",
        USE,
        "`vllm serve FOLDER` works wherever `dtr-deploy` is installed (it brings the plugin `dtr_vllm`).",
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
