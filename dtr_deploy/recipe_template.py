"""`dtr-deploy init`: a recipe to begin from, with a comment on every choice that it makes for its reader."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from dtr_deploy.errors import UsageError
from dtr_deploy.tasks.build import SYNTHETIC

TEMPLATE = """\
# {name}: written by `dtr-deploy init`. docs/recipe.md explains every key, and what this will cost is told by
# dtr-deploy plan --recipe {file}
name: {name}
model: {model}
# What the twins train on: text like what the model will read. `recall` is made text that keeps retrieval alive.
corpus: {corpus}
# The search chooses among these for each layer. Every further form costs its training once more.
forms: [gated_deltanet]
# Tokens of exact softmax attention beside the linear branch.
window: 64
# More tokens, better twins; longer sequences where recall at length matters.
distill: {{tokens: 100_000, sequence_length: 512}}
# Twins trained together; it pays where nearly every layer is to be replaced.
# heal: {{tokens: 50_000}}
# The score that has to hold: its mean decides. A task with few items is a coarse judge.
tasks:
{tasks}
# Where it will be served, and what has to get faster there. ort: fp32, fp16, int8, int4; vllm: fp32, bf16, fp16.
target:
  {{engine: {engine}, precision: {precision}, workload: {{prompt: {prompt}, output: {output}}}, speedup: {speedup:g}}}
# Two points of the score may be lost, on the search split and again on the confirm split; no task alone more than five.
search: {{strategy: racing, max_score_loss: 0.02, max_task_loss: 0.05}}
export: {{vllm: {{dtype: bfloat16}}, onnx: {{precision: [fp32, int4]}}}}
"""
RECALL = "  - {name: needle, synthetic: needle, lengths: [1024, 2048], items: 12}"
PRECISIONS = {"ort": "int4", "vllm": "bf16"}


def template(
    file: Path,
    model: str,
    tasks: Sequence[str],
    corpus: Sequence[str],
    engine: str = "ort",
    prompt: int = 4096,
    output: int = 128,
    speedup: float = 1.2,
) -> str:
    """The text of a recipe.

    tasks: each a folder or .jsonl file of labelled rows, one of `SYNTHETIC`, or the name of an lm-eval task; a needle
        is added where none asks for recall.
    Raises `UsageError` for an engine that is not there, or a task that is a path and does not exist.
    """
    if engine not in PRECISIONS:
        raise UsageError(f"--engine {engine}: accepted are {', '.join(PRECISIONS)}")
    if not tasks:
        raise UsageError("--task: name at least one: a folder of labelled rows, an lm-eval task, or needle")
    lines = [_task(task) for task in tasks]
    if not set(tasks) & set(SYNTHETIC):
        lines.append(RECALL)
    return TEMPLATE.format(
        name=_name(file.stem),
        file=file,
        model=_scalar(model),
        corpus=f"[{', '.join(map(_scalar, corpus))}]",
        tasks="\n".join(lines),
        engine=engine,
        precision=PRECISIONS[engine],
        prompt=prompt,
        output=output,
        speedup=speedup,
    )


def _task(task: str) -> str:
    if task in SYNTHETIC:
        return f"  - {{name: {task}, synthetic: {task}, lengths: [1024, 2048], items: 12}}"
    path = Path(task).expanduser()
    if path.exists():
        return f"  - {{name: {_name(path.stem)}, file: {_scalar(task)}, metric: calibrated_accuracy, items: 200}}"
    if "/" in task or task.endswith(".jsonl"):
        raise UsageError(f"--task {task}: no such file or folder")
    return f"  - {{name: {_name(task)}, lm_eval: {_scalar(task)}, items: 200}}"


def _name(text: str) -> str:
    """A name that a recipe accepts, like `text`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._") or "recipe"


def _scalar(text: str) -> str:
    """`text` as YAML inside a flow collection; quoted where it has to be."""
    return text if re.fullmatch(r"[A-Za-z0-9_./~][A-Za-z0-9_./~+-]*(:[A-Za-z0-9_./+-]+)*", text) else json.dumps(text)
