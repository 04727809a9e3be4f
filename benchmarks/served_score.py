"""`python -m benchmarks.served_score`: a task's score, as dtr-deploy reports it and as lm-evaluation-harness finds it.

lm-eval asks `vllm serve` (its model "local-completions") for the same documents that dtr-deploy scores in this process.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors
from benchmarks.vllm_server import VllmServer, vllm_server
from dtr_deploy.errors import DtrError, UsageError

NAME = "benchmarks.served_score"

app = application()


@app.command(name=NAME, cls=Command)
def served_score(
    model: Annotated[Path, typer.Option(help="Checkpoint folder of a hybrid.")],
    task: Annotated[str, typer.Option(help="A task of lm-eval, or the path of its YAML.")],
    split: Annotated[str, typer.Option(help="search, confirm or test, as dtr-deploy deals documents out.")] = "test",
    items: Annotated[int, typer.Option(min=2, help="Documents.")] = 300,
    metric: Annotated[str, typer.Option(help="A metric of the task.")] = "acc",
    dtype: Annotated[str, typer.Option(help="Of the served model: float32, bfloat16 or float16.")] = "bfloat16",
    kv_cache_gib: Annotated[float, typer.Option(min=0.01, help="Memory for KV and states, on a CPU.")] = 2.0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Score a task in this process and through a running server; exit code 1 if they differ by more than one standard
    error."""
    with one_line_errors(NAME, debug), tempfile.TemporaryDirectory(prefix="dtr-score-") as scratch:
        os.environ.update(
            HF_DATASETS_CACHE=f"{scratch}/datasets", HF_DATASETS_OFFLINE=os.environ.get("HF_HUB_OFFLINE", "0")
        )
        if not (model / "config.json").is_file():
            raise UsageError(f"{model}: no config.json there; a Hugging Face checkpoint folder is needed")
        ours, documents = own_score(model, task, split, items, metric)
        typer.echo(f"dtr-deploy, {len(ours)} documents of {task}, {metric}: {_estimate(ours)}")
        options = ["--dtype", dtype, "--enforce-eager"]
        with vllm_server(model, options, Path(scratch) / "log", kv_cache_gib) as server:
            theirs = lm_eval_score(server, task, documents, metric)
        error = _standard_error(theirs)
        typer.echo(f"lm-eval, local-completions, the same documents, vLLM {dtype}: {_estimate(theirs)}")
        agree = sum(a == b for a, b in zip(ours, theirs, strict=True))
        typer.echo(f"{agree} of {len(ours)} documents have the same score")
        difference = abs(sum(ours) - sum(theirs)) / len(ours)
        if difference > error:
            raise DtrError(f"the scores differ by {difference:.4f}, more than a standard error of {error:.4f}")


def own_score(model: Path, task: str, split: str, items: int, metric: str) -> tuple[list[float], dict[str, list[int]]]:
    """dtr-deploy's score of each document, and which documents of which lm-eval task they are."""
    from dtr_deploy.hybrid.model import load_hybrid
    from dtr_deploy.tasks.base import SPLITS
    from dtr_deploy.tasks.lm_eval_task import LmEvalTask

    if split not in SPLITS:
        raise UsageError(f"--split {split}: accepted are {', '.join(SPLITS)}")
    loaded, tokenizer = load_hybrid(model)
    scored = LmEvalTask("served", tokenizer, task, items=items, metric=metric)
    documents: dict[str, list[int]] = {}
    for subtask, index, _ in scored.documents(split):
        documents.setdefault(subtask, []).append(index)
    return scored.score(loaded.eval(), split).per_item.tolist(), documents


def lm_eval_score(server: VllmServer, task: str, documents: dict[str, list[int]], metric: str) -> list[float]:
    """lm-eval's score of each of these documents, in their order, from a server's completions route."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    answer: dict[str, Any] = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": str(server.folder),
            "base_url": f"{server.url}/v1/completions",
            "num_concurrent": 4,
            "max_length": 8192,
            "tokenized_requests": True,
        },
        tasks=[task],
        # In ascending order: lm-eval runs chosen documents in it, and names them in the order they were asked for.
        samples={subtask: sorted(indices) for subtask, indices in documents.items()},
        task_manager=TaskManager(include_defaults=not task.endswith((".yaml", ".yml"))),
        bootstrap_iters=0,
        log_samples=True,
    )
    found = {
        (subtask, sample["doc_id"]): float(sample[metric])
        for subtask, samples in answer["samples"].items()
        for sample in samples
    }
    return [found[subtask, index] for subtask, indices in documents.items() for index in indices]


def _standard_error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return (sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values)) ** 0.5


def _estimate(values: list[float]) -> str:
    return f"{sum(values) / len(values):.4f}, standard error {_standard_error(values):.4f}"


if __name__ == "__main__":
    app()
