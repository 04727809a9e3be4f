"""`python -m benchmarks.operator`: one call of the operator against what else computes it, as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads
from dtr_deploy.errors import UsageError

if TYPE_CHECKING:
    from benchmarks.problem import Problem

NAME = "benchmarks.operator"
SCHEMA = 1
LENGTHS = {"cpu": (1, 64, 512, 2048, 8192), "cuda": (1, 64, 512, 2048, 8192, 65536)}
DECODE_CONTEXTS = (512, 8192)
DIRECTIONS = ("forward", "backward", "decode")
BASELINE = "ours auto"

app = application()


@app.command(name=NAME, cls=Command)
def operator(
    shapes: Annotated[list[str] | None, typer.Option(help="Models whose heads to use; all three if not given.")] = None,
    lengths: Annotated[
        list[int] | None,
        typer.Option(help="Tokens of a sequence; when decoding, tokens behind each sequence."),
    ] = None,
    sequences: Annotated[
        list[int] | None, typer.Option(help="Sequences that decode at once [default: 1 4 16].")
    ] = None,
    rule: Annotated[str, typer.Option(help="linear, gated, delta or gated_delta.")] = "gated_delta",
    per_key: Annotated[bool, typer.Option("--per-key", help="A decay for each key dimension, as in GLA.")] = False,
    direction: Annotated[str, typer.Option(help="forward, backward (forward and backward) or decode.")] = "forward",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16: of queries, keys and values.")] = "float32",
    window: Annotated[int, typer.Option(min=1, help="Tokens of the softmax window in the rows that have one.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds.")] = 7,
    budget: Annotated[
        float, typer.Option(min=0.0, help="Seconds a contender may take in one table; above it gets fewer rounds.")
    ] = 20.0,
    sample: Annotated[float, typer.Option(min=0.0, help="Seconds that a round repeats a short call for.")] = 0.02,
    cold: Annotated[bool, typer.Option("--cold", help="Push operands out of the caches before every call.")] = False,
    threads: Annotated[int, typer.Option(min=0, help="Threads of every contender; 0: all cores.")] = 0,
    only: Annotated[
        list[str] | None, typer.Option(help="Parts of names: leave out other contenders than these and the baseline.")
    ] = None,
    baseline: Annotated[str, typer.Option(help="The contender that ratios are to.")] = BASELINE,
    memory: Annotated[
        bool, typer.Option(help="Measure peak memory in the backward direction, each in a process of its own.")
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time one call of the linear-attention operator, and what else computes it, on the heads of real models.

    Every contender is held to a float64 token loop before it is timed. benchmarks/README.md says what columns mean.
    """
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)
        problems = make_problems(
            shapes or [], lengths or [], sequences or [], rule, per_key, direction, device, dtype, window, threads
        )
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UsageError(f"--json {json_file}: no folder {json_file.absolute().parent}")
        _check_names(problems, only or [], baseline)

        from rich.status import Status

        from benchmarks.machine import describe, last_level_cache, measure_limits
        from benchmarks.rounds import Effort
        from benchmarks.run import drift, solve
        from benchmarks.table import console, header, problem_table, problem_title

        screen = console()
        effort = Effort(repeats, sample, budget, 4 * last_level_cache() if cold else 0)
        settings = {
            "repeats": repeats,
            "sample_seconds": sample,
            "budget_seconds": budget,
            "cold": cold,
            "baseline": baseline,
            "direction": direction,
            "rule": rule,
            "per_key": per_key,
            "dtype": dtype,
            "device": device,
            "window": window,
        }
        environment = describe(device, threads)
        limits = measure_limits(device)
        for line in header(environment, settings, limits):
            screen.print(line, soft_wrap=True, highlight=False)
        rows = []
        for problem in problems:
            with Status(str(problem), console=screen) as status:
                found = solve(
                    problem,
                    effort,
                    limits,
                    baseline,
                    only or [],
                    memory,
                    lambda text, problem=problem: status.update(f"{problem}: {text}"),  # type: ignore[misc]
                )
            rows += found
            screen.print()
            screen.print(problem_title(problem, found), style="bold", soft_wrap=True, highlight=False)
            screen.print(problem_table(problem, found))
        after = measure_limits(device)
        change = drift(limits, after)
        screen.print(
            f"Limits measured again at the end differ by up to {100 * change:.0f}%"
            + (": the machine was not quiet, compare within a table only" if change > 0.1 else ""),
            soft_wrap=True,
            highlight=False,
        )
        if json_file is not None:
            answer = {
                "schema": SCHEMA,
                "environment": environment,
                "settings": settings,
                "limits": {"before": limits.to_dict(), "after": after.to_dict()},
                "rows": [row.to_dict() for row in rows],
            }
            json_file.write_text(json.dumps(answer, indent=1))


def make_problems(
    shapes: list[str],
    lengths: list[int],
    sequences: list[int],
    rule: str,
    per_key: bool,
    direction: str,
    device: str,
    dtype: str,
    window: int,
    threads: int,
) -> list[Problem]:
    """Problems in the order of the tables. Raises UsageError, in one line, for values that are not accepted."""
    import torch

    from benchmarks.problem import DTYPES, SHAPES, Problem
    from dtr_kernels.operator import RULES

    for option, value, accepted in (
        ("--rule", rule, RULES),
        ("--direction", direction, DIRECTIONS),
        ("--device", device, tuple(LENGTHS)),
        ("--dtype", dtype, tuple(DTYPES)),
        *(("--shapes", shape, tuple(SHAPES)) for shape in shapes),
    ):
        if value not in accepted:
            raise UsageError(f"{option} {value!r}: accepted are {', '.join(accepted)}")
    for option, numbers in (("--lengths", lengths), ("--sequences", sequences)):
        if any(number < 1 for number in numbers):
            raise UsageError(f"{option} {min(numbers)}: accepted are numbers from 1")
    if per_key and rule not in ("gated", "gated_delta"):
        raise UsageError(f"--per-key: rule {rule!r} has no decay; accepted with gated and gated_delta")
    if sequences and direction != "decode":
        raise UsageError("--sequences: accepted with --direction decode")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here")
    shapes = shapes or [name for name in SHAPES if name != "tiny"]
    lengths = lengths or list(DECODE_CONTEXTS if direction == "decode" else LENGTHS[device])
    counts = (sequences or [1, 4, 16]) if direction == "decode" else [1]
    return [
        Problem(SHAPES[shape], length, direction, rule, count, dtype, device, per_key, window, threads)
        for shape in shapes
        for length in lengths
        for count in counts
    ]


def _check_names(problems: list[Problem], only: list[str], baseline: str) -> None:
    from benchmarks.contenders import contenders

    names = list(dict.fromkeys(c.name for problem in problems for c in contenders(problem)))
    for part in only:
        if not any(part in name for name in names):
            raise UsageError(f"--only {part!r}: no contender is called so; there are {', '.join(names)}")
    if baseline not in names:
        raise UsageError(f"--baseline {baseline!r}: no such contender; there are {', '.join(names)}")


if __name__ == "__main__":
    app()
