"""`python -m benchmarks.serving_vllm`: base and hybrid under `vllm serve`, timed by `vllm bench serve`.

Both servers run at once, and only one is asked at a time: rounds alternate, so that what the machine does meanwhile
meets both alike. A ratio is taken within a round; the table shows medians over rounds.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors
from benchmarks.vllm_server import VllmServer, vllm_command, vllm_server
from dtr_deploy.engines.base import Workload
from dtr_deploy.errors import DtrError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

NAME = "benchmarks.serving_vllm"
SCHEMA = 1
DEFAULT = ["512+64x1", "4096+64x1", "8000+64x1", "512+64x8", "4096+128x8"]
MODELS = ("base", "hybrid")

app = application()


@dataclass(frozen=True)
class Timing:
    """What `vllm bench serve` saw of one workload on one server.

    first_token: mean seconds until a request's first token. per_token: mean seconds of a request's further tokens.
    tokens_per_second: prompt and output tokens of all requests over the whole time.
    """

    first_token: float
    per_token: float
    tokens_per_second: float


@app.command(name=NAME, cls=Command)
def serving_vllm(
    base: Annotated[Path, typer.Option(help="Checkpoint folder of the unreplaced backbone.")],
    hybrid: Annotated[Path, typer.Option(help="Checkpoint folder of the hybrid.")],
    workloads: Annotated[list[str], typer.Option(help="PROMPT+OUTPUTxCONCURRENCY, in tokens.")] = DEFAULT,
    rounds: Annotated[int, typer.Option(min=1, help="Times each workload is run on each server.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    eager: Annotated[bool, typer.Option("--eager", help="Start servers with --enforce-eager.")] = False,
    kv_cache_gib: Annotated[float, typer.Option(min=0.1, help="Memory for KV and states of each, on a CPU.")] = 3.0,
    logs: Annotated[Path | None, typer.Option(help="Folder for the servers' logs; default: a temporary one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Time requests of random tokens on two servers in turn; prefix caching is off."""
    with one_line_errors(NAME, debug):
        parsed = [parse_workload(text) for text in workloads]
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UsageError(f"--json {json_file}: no folder {json_file.absolute().parent}")
        from benchmarks.machine import describe
        from benchmarks.table import console, machine_lines

        screen, environment = console(), describe("cpu", len(os.sched_getaffinity(0)))
        for line in machine_lines(environment):
            screen.print(line, soft_wrap=True, highlight=False)
        options = ["--dtype", dtype, "--no-enable-prefix-caching"]
        options += ["--max-model-len", str(max(w.prompt + w.output for w in parsed) + 8)]
        options += ["--enforce-eager"] if eager else []
        with tempfile.TemporaryDirectory(prefix="dtr-serving-") as scratch, ExitStack() as stack:
            folder = logs or Path(scratch)
            folder.mkdir(parents=True, exist_ok=True)
            servers = {
                name: stack.enter_context(vllm_server(path, options, folder / f"{name}.log", kv_cache_gib))
                for name, path in zip(MODELS, (base, hybrid), strict=True)
            }
            for server in servers.values():  # once, for caches and allocators
                bench(server, Workload(min(512, max(w.prompt for w in parsed)), 4), 0, Path(scratch))
            results = []
            for workload in parsed:
                results.append(_rounds(servers, workload, rounds, Path(scratch)))
                screen.print(_line(workload, results[-1]), soft_wrap=True, highlight=False)
        how = f"{dtype}, {'eager' if eager else 'compiled'}, {rounds} rounds"
        screen.print(f"\nvllm serve, {how}; medians, base / hybrid (ratios: smallest to largest)", style="bold")
        screen.print(table(parsed, results))
        if json_file is not None:
            settings = {"base": str(base), "hybrid": str(hybrid), "options": options, "rounds": rounds}
            rows = [
                {"workload": w.to_dict(), **{m: [asdict(t) for t in timings[m]] for m in MODELS}}
                for w, timings in zip(parsed, results, strict=True)
            ]
            answer = {"schema": SCHEMA, "environment": environment, "settings": settings, "rows": rows}
            json_file.write_text(json.dumps(answer, indent=1))


def parse_workload(text: str) -> Workload:
    """ "4096+128x8" -> 4,096 prompt and 128 output tokens, 8 requests at once."""
    found = re.fullmatch(r"(\d+)\+(\d+)(?:x(\d+))?", text)
    workload = Workload(*(int(group or 1) for group in found.groups())) if found else Workload(0, 0)
    if workload.prompt < 1 or workload.output < 2 or workload.concurrency < 1:
        raise UsageError(f"--workloads {text}: accepted are PROMPT+OUTPUTxCONCURRENCY with 2 or more output tokens")
    return workload


def _rounds(servers: dict[str, VllmServer], workload: Workload, rounds: int, scratch: Path) -> dict[str, list[Timing]]:
    """`rounds` timings of each server, in turn."""
    timings: dict[str, list[Timing]] = {name: [] for name in servers}
    for count in range(rounds):
        for name, server in servers.items():
            timings[name].append(bench(server, workload, count + 1, scratch))
    return timings


def _line(workload: Workload, timings: dict[str, list[Timing]]) -> str:
    """A workload's rounds as they are, while others are still to come."""
    found = [f"{name} {' '.join(f'{t.tokens_per_second:,.0f}' for t in timings[name])}" for name in MODELS]
    return f"{workload}: tokens/s {', '.join(found)}"


def bench(server: VllmServer, workload: Workload, seed: int, scratch: Path) -> Timing:
    """One run of `vllm bench serve`."""
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    command = [vllm_command(), "bench", "serve", "--backend", "openai", "--base-url", server.url, "--seed", str(seed)]
    command += ["--model", str(server.folder), "--dataset-name", "random", "--random-input-len", str(workload.prompt)]
    command += ["--random-output-len", str(workload.output), "--ignore-eos", "--disable-tqdm", "--temperature", "0"]
    command += ["--ready-check-timeout-sec", "0"]  # else the first request is sent twice
    command += ["--num-prompts", str(workload.concurrency), "--max-concurrency", str(workload.concurrency)]
    command += ["--save-result", "--result-dir", str(scratch), "--result-filename", result.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, Any] = json.loads(result.read_text()) if result.is_file() else {}
    if found.get("completed") != workload.concurrency:
        words = (done.stderr or done.stdout).strip().splitlines() or ["it printed nothing"]
        raise DtrError(f"vllm bench serve on {server.folder} ({workload}): {words[-1]} (server's log: {server.log})")
    return Timing(found["mean_ttft_ms"] / 1e3, found["mean_tpot_ms"] / 1e3, found["total_token_throughput"])


def table(workloads: list[Workload], results: list[dict[str, list[Timing]]]) -> Table:
    """A row a workload: base and hybrid, and how many times as fast the hybrid is."""
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False)
    for heading in ("workload", "first token, s", "faster", "a further token, ms", "faster", "all tokens/s", "faster"):
        drawn.add_column(heading, justify="left" if heading == "workload" else "right")
    for workload, timings in zip(workloads, results, strict=True):
        cells = [str(workload)]
        for field, scale, digits in (("first_token", 1, 2), ("per_token", 1e3, 1), ("tokens_per_second", 1, 0)):
            base, hybrid = ([getattr(timing, field) for timing in timings[name]] for name in MODELS)
            pairs = list(zip(base, hybrid, strict=True))
            gains = sorted(h / b if field == "tokens_per_second" else b / h for b, h in pairs)
            medians = " / ".join(f"{statistics.median(values) * scale:,.{digits}f}" for values in (base, hybrid))
            cells += [medians, f"{statistics.median(gains):.2f} ({gains[0]:.2f}-{gains[-1]:.2f})"]
        drawn.add_row(*cells)
    return drawn


if __name__ == "__main__":
    app()
