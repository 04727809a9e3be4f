"""`python -m benchmarks.soak_onnx FOLDER`: many requests through `OrtRunner`, each compared with what it gives alone.

Requests come as fast as slots are free, some share their beginning, some are aborted. Afterwards every answer, also
what there is of an aborted one, must equal the request's answer in a runner of its own with one slot and no stored
prefixes, where its prompt goes in from the first token on. Greedy throughout.

A batch's sums are added up in another order than a single row's, and a prompt that starts from a stored prefix is cut
elsewhere than one that does not. So where an answer differs, the request's logits at the first difference are computed
once more, alone: it is a tie, counted and printed, if the two tokens' logits are less than `--tie` apart, and else a
failure. What follows a tie is another text, and is not compared.

Exit code 1 if an answer is wrong, a slot is not free at the end, or memory grew by more than `--prefix-mib` (what the
stored prefixes had stays with the process after they are dropped) and `--slack-mib`.
"""

from __future__ import annotations

import gc
import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads
from benchmarks.soak_load import PlannedRequest, plan_load
from dtr_deploy.errors import UsageError

NAME = "benchmarks.soak_onnx"
SCHEMA = 1
REPORTS = 10

app = application()


@dataclass
class Soak:
    """What a soak gave. tokens, cached: of each request, in the load's order. memory: bytes resident."""

    tokens: list[list[int]]
    cached: list[int]
    seconds: float
    hits: int
    misses: int
    evicted: int
    free_slots: int
    memory_before: int
    memory_after: int
    bytes_per_slot: int


@dataclass
class Verdict:
    """How answers compare. Numbers of the load's requests; ties with the gap of the two logits, failures in words."""

    equal: list[int] = field(default_factory=list)
    ties: list[tuple[int, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@app.command(name=NAME, cls=Command)
def soak(
    folder: Annotated[Path, typer.Argument(help="A folder written by dtr-deploy export.")],
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Of the load.")] = 0,
    slots: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    longest: Annotated[int, typer.Option(min=1, help="Tokens of the longest prompt.")] = 7000,
    new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of an answer; at least half as many.")] = 32,
    shared: Annotated[float, typer.Option(min=0, max=1, help="Share of requests with a common beginning.")] = 0.3,
    aborted: Annotated[float, typer.Option(min=0, max=1, help="Share of requests that are aborted.")] = 0.1,
    prefix_mib: Annotated[int, typer.Option(min=0, help="For snapshots of common beginnings.")] = 256,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens of one call.")] = 512,
    verify: Annotated[str, typer.Option(help="How many answers are computed again alone: all, or a number.")] = "all",
    tie: Annotated[float, typer.Option(min=0, help="Logits closer than this are a tie.")] = 0.01,
    slack_mib: Annotated[int, typer.Option(min=0, help="What memory may grow by, above --prefix-mib.")] = 128,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Run a soak of the plain onnxruntime runner and check every answer.

    A tenth of the prompts has a length spread evenly over 1 to --longest, the others' logarithm is spread evenly.
    """
    with one_line_errors(NAME, debug):
        count = requests if verify == "all" else int(verify) if verify.isdigit() else -1
        if not 0 <= count <= requests:
            raise UsageError(f"--verify {verify!r}: accepted are all and 0 to --requests, {requests}")
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise UsageError(f"--json {json_file}: no folder {json_file.absolute().parent}")
        threads = use_threads(threads)

        import numpy as np

        from dtr_deploy.engines.ort_model import OrtModel
        from dtr_deploy.engines.ort_runner import OrtRunner

        model = OrtModel(folder, threads=threads)
        capacity = longest + new_tokens
        ordinary = np.setdiff1d(np.arange(model.vocabulary), list(model.ends))
        load = plan_load(
            requests,
            ordinary,
            seed=seed,
            longest=longest,
            new_tokens=(max(2, new_tokens // 2), new_tokens),
            shared=shared,
            aborted=aborted,
        )
        runner = OrtRunner(
            model,
            slots=slots,
            capacity=capacity,
            prefill_chunk=prefill_chunk,
            prefix_bytes=prefix_mib * 2**20,
            touch=True,
        )
        prompts = [len(planned.prompt) for planned in load]
        _say(
            f"{requests} requests of {min(prompts):,} to {max(prompts):,} tokens (mean {np.mean(prompts):,.0f}, median "
            f"{np.median(prompts):,.0f}), {sum(planned.aborted for planned in load)} to be aborted, "
            f"{sum(planned.shared > 0 for planned in load)} with a common beginning; {slots} slots of "
            f"{runner.bytes_per_slot / 2**20:.1f} MiB, {threads} threads"
        )
        result = run_soak(runner, load)
        _say(_summary(load, result))
        verdict = verify_answers(model, load, result.tokens, count, tie, capacity, prefill_chunk)
        faults = [*verdict.failures, *_faults(slots, result, prefix_mib + slack_mib)]
        _say(f"{len(verdict.equal)} answers equal, {len(verdict.ties)} ties, {len(verdict.failures)} wrong")
        for number, gap in verdict.ties:
            _say(f"request {number}: a tie, logits {gap:.2e} apart")
        for fault in faults:
            _say(f"FAILED: {fault}")
        if json_file is not None:
            settings = {"folder": str(folder), "requests": requests, "seed": seed, "slots": slots, "longest": longest}
            answer = {"schema": SCHEMA, "settings": settings, "result": result.__dict__, "verdict": verdict.__dict__}
            json_file.write_text(json.dumps(answer, indent=1))
    if faults:
        raise typer.Exit(1)
    _say("passed")


def run_soak(runner: Any, load: list[PlannedRequest]) -> Soak:
    """Put a load through a runner, twice as many requests submitted as there are slots, and abort as planned."""
    # The longest prompt first, so that onnxruntime's own memory has its size before anything is counted.
    runner.generate([max(load, key=lambda planned: len(planned.prompt)).prompt], 2, stop_tokens=())
    memory_before = _resident()
    began = time.perf_counter()
    later, steps = deque(enumerate(load)), 0
    running: dict[Any, int] = {}
    submitted: dict[int, int] = {}
    done: list[Any] = [None] * len(load)
    tell = _progress(len(load), runner, began)
    while later or running:
        while later and len(running) < 2 * runner.slots:
            number, planned = later.popleft()
            request = runner.submit(planned.prompt, planned.new_tokens, shared=planned.shared)
            running[request], submitted[number] = number, steps
        events = runner.step()
        steps += 1
        for request, number in list(running.items()):
            planned = load[number]
            by_tokens = planned.abort_tokens is not None and len(request.tokens) >= planned.abort_tokens
            by_steps = planned.abort_steps is not None and steps - submitted[number] >= planned.abort_steps
            if by_tokens or by_steps:
                runner.abort(request)
        for request, token in events:
            if token is None:
                number = running.pop(request)
                done[number] = request
                tell(len(load) - len(later) - len(running))
    seconds = time.perf_counter() - began
    prefixes = runner.prefixes
    hits, misses, evicted = prefixes.hits, prefixes.misses, prefixes.evicted
    prefixes.clear()
    gc.collect()
    return Soak(
        [request.tokens for request in done],
        [request.cached_tokens for request in done],
        seconds,
        hits,
        misses,
        evicted,
        runner.free_slots,
        memory_before,
        _resident(),
        runner.bytes_per_slot,
    )


def verify_answers(
    model: Any,
    load: list[PlannedRequest],
    answers: list[list[int]],
    count: int,
    tie: float,
    capacity: int,
    prefill_chunk: int,
) -> Verdict:
    """Compare `count` answers, evenly picked, with those of requests that are alone in a new runner."""
    from dtr_deploy.engines.ort_runner import OrtRunner

    verdict = Verdict()
    began = time.perf_counter()
    step = max(1, -(-len(load) // count)) if count else len(load) + 1
    numbers = range(0, len(load), step) if count else range(0)
    for place, number in enumerate(numbers, start=1):
        planned, ours = load[number], answers[number]
        runner = OrtRunner(model, slots=1, capacity=capacity, prefill_chunk=prefill_chunk, prefix_bytes=0)
        alone = runner.generate([planned.prompt], planned.new_tokens)[0]
        if ours == (alone[: len(ours)] if planned.aborted else alone):
            verdict.equal.append(number)
        else:
            pairs = enumerate(zip(ours, alone, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(alone)))
            text = [*planned.prompt, *alone[:at]]
            gap = _gap(model, text, prefill_chunk, _token(model, ours, at), _token(model, alone, at))
            if gap < tie:
                verdict.ties.append((number, gap))
            else:
                verdict.failures.append(f"request {number} differs at its token {at}, logits {gap:.2e} apart")
        if place % max(1, len(numbers) // REPORTS) == 0:
            _say(f"{place} of {len(numbers)} answers computed alone, {time.perf_counter() - began:.0f} s")
    return verdict


def _token(model: Any, answer: list[int], at: int) -> int:
    """The token at a place of an answer; one that ends texts, if the answer ended there."""
    return answer[at] if at < len(answer) else min(model.ends)


def _gap(model: Any, text: list[int], chunk: int, ours: int, alone: int) -> float:
    """How far apart two tokens' logits are after a text."""
    import numpy as np

    from dtr_deploy.engines.ort_states import StatePool

    pool = StatePool(model, 1, len(text))
    for begin in range(0, len(text), chunk):
        piece = np.array([text[begin : begin + chunk]], np.int64)
        logits = pool.call(0, piece, np.ones((1, begin + piece.shape[1]), np.int64))[0, -1]
    return float(abs(logits[ours] - logits[alone]))


def _summary(load: list[PlannedRequest], result: Soak) -> str:
    prompt, cached = sum(len(planned.prompt) for planned in load), sum(result.cached)
    new = sum(map(len, result.tokens))
    return (
        f"{prompt:,} prompt tokens, {cached:,} of them from snapshots ({result.hits} hits, {result.misses} misses, "
        f"{result.evicted} evicted), and {new:,} new ones in {result.seconds:.0f} s: "
        f"{(prompt + new) / result.seconds:,.0f} tokens/s\n"
        f"memory {result.memory_before / 2**20:,.0f} MiB at the start, {result.memory_after / 2**20:,.0f} MiB at the "
        f"end; {result.free_slots} slots free"
    )


def _faults(slots: int, result: Soak, allowed_mib: int) -> list[str]:
    faults = []
    grown = (result.memory_after - result.memory_before) / 2**20
    if grown > allowed_mib:
        faults.append(f"memory grew by {grown:,.0f} MiB; allowed are {allowed_mib}")
    if result.free_slots != slots:
        faults.append(f"{result.free_slots} of {slots} slots are free at the end")
    return faults


def _progress(total: int, runner: Any, began: float) -> Callable[[int], None]:
    told = 0

    def tell(done: int) -> None:
        nonlocal told
        if done * REPORTS // total > told:
            told = done * REPORTS // total
            _say(
                f"{done} of {total} requests, {time.perf_counter() - began:.0f} s, {_resident() / 2**20:,.0f} MiB, "
                f"{runner.free_slots} slots free, {len(runner.prefixes)} prefixes of "
                f"{runner.prefixes.nbytes / 2**20:.0f} MiB"
            )

    return tell


def _resident() -> int:
    """Resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def _say(line: str) -> None:
    typer.echo(line)


if __name__ == "__main__":
    app()
