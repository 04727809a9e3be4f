"""`python -m benchmarks.serving_onnx`: an exported hybrid against its exported base under stock onnxruntime-genai."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads
from dtr_deploy.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

NAME = "benchmarks.serving_onnx"
SCHEMA = 1
PHASES = ("prefill", "decode")
WARM_UP_PROMPT, WARM_UP_OUTPUT = 64, 8

Run = Callable[[list[list[int]], int], tuple[list[list[int]], float, float]]
"""A batch and the number of new tokens -> the tokens, seconds until the first of them, seconds for the others."""

app = application()


@dataclass(frozen=True)
class Row:
    """One phase at one context. base, hybrid: seconds of the prefill or of one decoded token, a round each."""

    prompt: int
    phase: str
    base: list[float]
    hybrid: list[float]

    @property
    def ratios(self) -> list[float]:
        """How many times as fast the hybrid was, round by round."""
        return [base / hybrid for base, hybrid in zip(self.base, self.hybrid, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ratios": self.ratios, "ratio": self.ratio}


@app.command(name=NAME, cls=Command)
def serving_onnx(
    base: Annotated[Path, typer.Option(help="Folder of the exported backbone.")],
    hybrid: Annotated[Path, typer.Option(help="Folder of the exported hybrid.")],
    prompts: Annotated[list[int] | None, typer.Option(help="Tokens of a prompt [default: 512 4096 8000].")] = None,
    output: Annotated[int, typer.Option(min=2, help="New tokens after each prompt.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Rows that run together.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    threads: Annotated[int, typer.Option(min=0, help="Threads of one operator; 0: all cores.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time prefill and decoding of two exported folders in turns. benchmarks/README.md says what columns mean."""
    with one_line_errors(NAME, debug):
        contexts = prompts or [512, 4096, 8000]
        if min(contexts) < 1:
            raise UsageError(f"--prompts {min(contexts)}: accepted are numbers from 1")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UsageError(f"--json {json_file}: no folder {json_file.absolute().parent}")
        threads = use_threads(threads)

        from rich.status import Status

        from benchmarks.machine import describe
        from benchmarks.table import console, machine_lines
        from dtr_deploy.engines.genai import GenaiEngine

        engines = {
            name: GenaiEngine(folder, folder.name, threads=threads)
            for name, folder in (("base", base), ("hybrid", hybrid))
        }
        tokens = _shared_tokens(base, hybrid, max(contexts) + output)
        screen, environment = console(), describe("cpu", threads)
        settings = {
            "base": str(base),
            "hybrid": str(hybrid),
            "prompts": contexts,
            "output": output,
            "batch": batch,
            "repeats": repeats,
        }
        lines = [
            *machine_lines(environment),
            f"{repeats} interleaved rounds, medians; {batch} in a batch, {output} new tokens; ratio: base / hybrid in "
            "the same round, above 1 the hybrid is faster",
        ]
        for line in lines:
            screen.print(line, soft_wrap=True, highlight=False)
        with Status("", console=screen) as status:
            runs: dict[str, Run] = {name: engine.run_batch for name, engine in engines.items()}
            rows = measure(runs, tokens, contexts, output, batch, repeats, status.update)
        screen.print(table(rows))
        if json_file is not None:
            answer = {
                "schema": SCHEMA,
                "environment": environment,
                "settings": settings,
                "rows": [row.to_dict() for row in rows],
            }
            json_file.write_text(json.dumps(answer, indent=1))


def measure(
    runs: Mapping[str, Run],
    tokens: Sequence[int],
    contexts: Sequence[int],
    output: int,
    batch: int,
    repeats: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Rounds over all contexts; in each, base and hybrid on the same random prompts, in an order drawn anew.

    runs: "base" and "hybrid". tokens: what prompts are drawn from. output: new tokens, at least 2.
    """
    from benchmarks.rounds import SETTLE_SECONDS

    draw, order = random.Random(0), list(runs)
    seconds: dict[tuple[int, str, str], list[float]] = {}
    for name in order:
        progress(f"{name}: warm-up")
        runs[name]([draw.choices(tokens, k=WARM_UP_PROMPT) for _ in range(batch)], WARM_UP_OUTPUT)
    for turn in range(repeats):
        for context in contexts:
            prompts = [draw.choices(tokens, k=context) for _ in range(batch)]
            draw.shuffle(order)
            for name in order:
                progress(f"round {turn + 1} of {repeats}, {context:,} tokens: {name}")
                time.sleep(SETTLE_SECONDS)
                _, prefill, others = runs[name](prompts, output)
                seconds.setdefault((context, "prefill", name), []).append(prefill)
                seconds.setdefault((context, "decode", name), []).append(others / (output - 1))
    return [
        Row(context, phase, seconds[context, phase, "base"], seconds[context, phase, "hybrid"])
        for context in contexts
        for phase in PHASES
    ]


def table(rows: Sequence[Row]) -> Table:
    """A row a phase and context."""
    from rich import box
    from rich.table import Table

    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("prompt", "phase", "base", "spread", "hybrid", "spread", "unit", "ratio", "ratios of the rounds"):
        found.add_column(column, justify="left" if column in ("phase", "unit") else "right", no_wrap=True)
    for row in rows:
        scale, unit = (1.0, "s") if row.phase == "prefill" else (1e3, "ms a token")
        found.add_row(
            f"{row.prompt:,}",
            row.phase,
            *_cells(row.base, scale),
            *_cells(row.hybrid, scale),
            unit,
            f"{row.ratio:.2f}",
            " ".join(f"{ratio:.2f}" for ratio in row.ratios),
        )
    return found


def _cells(seconds: Sequence[float], scale: float) -> tuple[str, str]:
    values = [scale * value for value in seconds]
    return f"{statistics.median(values):.3g}", f"{min(values):.3g} to {max(values):.3g}"


def _shared_tokens(base: Path, hybrid: Path, length: int) -> range:
    """Token ids that both take, the first few (usually special) left out. Raises UsageError where the folders do not
    take the same ids, or not as many tokens."""
    models = [json.loads((folder / "genai_config.json").read_text())["model"] for folder in (base, hybrid)]
    sizes = [model["vocab_size"] for model in models]
    if sizes[0] != sizes[1]:
        raise UsageError(f"--base and --hybrid have vocabularies of {sizes[0]} and {sizes[1]}: not one model's")
    context = min(model["context_length"] for model in models)
    if length > context:
        raise UsageError(f"--prompts and --output make {length} tokens; the models take {context}")
    return range(min(16, sizes[0] // 2), sizes[0])


if __name__ == "__main__":
    app()
