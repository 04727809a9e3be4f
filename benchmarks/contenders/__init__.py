"""Who takes part. A new contender is a file here with a `contenders` function, and a line below."""

from __future__ import annotations

from benchmarks.contenders import forms, full_attention, gpu, hugging_face, onnx_runtime, ours, vllm_cpu
from benchmarks.contenders.base import Contender, graphed
from benchmarks.problem import Problem


def contenders(problem: Problem) -> list[Contender]:
    """Every contender of the problem's direction and device, in the order of the table. Whether each is installed
    and computes the rule shows when it prepares."""
    rows = [
        *ours.contenders(problem.device),
        *forms.contenders(problem.rule, problem.window),
        *hugging_face.contenders(),
        *onnx_runtime.contenders(problem),
        *(gpu.contenders() if problem.device == "cuda" else vllm_cpu.contenders()),
        *full_attention.contenders(),
    ]
    rows = [row for row in rows if row.takes_part(problem)]
    if problem.device == "cuda" and problem.direction == "decode":
        rows += [graphed(row) for row in rows if row.graph]
    return rows
