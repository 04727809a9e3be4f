"""`python -m benchmarks.soak_vllm`: many requests at once through the OpenAI client, each compared with itself alone.

One server takes them concurrently, with prefix caching, some sharing prefixes, some hung up on midway. A second one,
without prefix caching and one request at a time, says what each answer should have been.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors
from benchmarks.vllm_server import VllmServer, vllm_server
from dtr_deploy.errors import DtrError, UsageError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

NAME = "benchmarks.soak_vllm"
CORPUS = Path(__file__).parent.parent / "recipes" / "data" / "reviews" / "corpus.txt"
PREFIXES = 5
"""Shared beginnings; two requests in five start with one of them."""
TIE = 1e-3
"""Two answers may part where the two tokens' log-probabilities lie closer than this: float32 sums in another order
decide there. They are counted and shown; anything else is a failure."""
LEAK_MIB = 256.0
"""How much more than the cache's own blocks, which become resident as they are first used, the server's memory may grow
from a quarter of the requests to the end."""

app = application()


@dataclass
class Job:
    """One request: its prompt, and after how many tokens the client hangs up (0: never). `streamed` ones are read token
    by token; all that hang up are."""

    prompt: list[int]
    hang_up: int = 0
    streamed: bool = False
    tokens: list[int] = field(default_factory=list)


@app.command(name=NAME, cls=Command)
def soak(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")],
    requests: Annotated[int, typer.Option(min=4, help="How many.")] = 500,
    concurrency: Annotated[int, typer.Option(min=1, help="At once.")] = 16,
    longest: Annotated[
        int, typer.Option(min=1, help="Most tokens of a prompt; from 1, uniform in the logarithm.")
    ] = 7000,
    output: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 16,
    abort: Annotated[float, typer.Option(min=0, max=0.9, help="Share of requests that are hung up on midway.")] = 0.1,
    dtype: Annotated[str, typer.Option(help="float32 makes answers comparable token by token.")] = "float32",
    kv_cache_gib: Annotated[float, typer.Option(min=0.01, help="Memory for KV and states, on a CPU.")] = 3.0,
    corpus: Annotated[Path, typer.Option(help="Text that prompts are cut from.")] = CORPUS,
    seed: Annotated[int, typer.Option(help="Of prompts, order and aborts.")] = 0,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Serve many mixed requests and compare every completed greedy answer with the same request alone.

    Exit code 1 if an answer differs, a request or a cache block is left behind, memory grows, or the server dies.
    """
    with one_line_errors(NAME, debug):
        jobs = make_jobs(model, corpus, requests, longest, output, abort, seed)
        options = ["--dtype", dtype, "--enforce-eager", "--max-model-len", str(longest + output + 8)]
        with tempfile.TemporaryDirectory(prefix="dtr-soak-") as scratch:
            log = Path(scratch) / "log"
            with vllm_server(model, [*options, "--max-num-seqs", str(concurrency)], log, kv_cache_gib) as server:
                faults = asyncio.run(_soak(server, jobs, concurrency, output, kv_cache_gib * 1024))
            alone = ["--no-enable-prefix-caching", "--max-num-seqs", "1"]
            with vllm_server(model, [*options, *alone], log, kv_cache_gib) as server:
                faults += asyncio.run(_compare(server, jobs, output))
        for fault in faults:
            typer.echo(f"FAULT: {fault}")
        if faults:
            raise DtrError(f"{len(faults)} faults")
        typer.echo("no faults")


def make_jobs(
    model: Path, corpus: Path, requests: int, longest: int, output: int, abort: float, seed: int
) -> list[Job]:
    """Prompts cut from the corpus's tokens, in random order.

    Raises:
        UsageError: the model's folder has no tokenizer, or the corpus is shorter than the longest prompt.
    """
    from tokenizers import Tokenizer

    for path in (model / "tokenizer.json", corpus):
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
    text = Tokenizer.from_file(str(model / "tokenizer.json")).encode(corpus.read_text(), add_special_tokens=False).ids
    if len(text) <= longest:
        raise UsageError(f"--corpus {corpus}: {len(text):,} tokens, fewer than --longest {longest:,}")
    draw = random.Random(seed)

    def cut(length: int) -> list[int]:
        start = draw.randrange(len(text) - length)
        return text[start : start + length]

    prefixes = [cut(max(1, longest * (i + 1) // (4 * PREFIXES))) for i in range(PREFIXES)]
    jobs = []
    for i in range(requests):
        length = round(longest ** draw.random())
        prefix = draw.choice(prefixes)
        shares = draw.random() < 0.4 and len(prefix) < longest
        prompt = prefix + cut(min(length, longest - len(prefix))) if shares else cut(length)
        if i < 2:  # the ends of the range are always there
            prompt = cut(1 if i == 0 else longest)
        jobs.append(Job(prompt, streamed=draw.random() < 0.5))
    for job in draw.sample(jobs, round(abort * requests)):
        job.hang_up = draw.randrange(1, output)
    draw.shuffle(jobs)
    return jobs


async def _soak(server: VllmServer, jobs: list[Job], concurrency: int, output: int, cache_mib: float) -> list[str]:
    """Send all, `concurrency` at once, and look at what the server says of itself before, meanwhile and afterwards."""
    from openai import AsyncOpenAI

    at_once, began, done = asyncio.Semaphore(concurrency), time.monotonic(), 0
    faults = []
    early, start = 0.0, resident_mib(server)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0) as client:

        async def send(job: Job) -> None:
            nonlocal done, early
            async with at_once:
                await ask(client, server, job, output)
            done += 1
            if done == len(jobs) // 4:
                early = resident_mib(server)
            if done % max(1, len(jobs) // 10) == 0:
                seconds = time.monotonic() - began
                left = seconds / done * (len(jobs) - done)
                typer.echo(
                    f"{done} of {len(jobs)} requests, {seconds:.0f} s, about {left:.0f} s left; "
                    f"{resident_mib(server):,.0f} MiB resident"
                )

        await asyncio.gather(*(send(job) for job in jobs))
        await _idle(server)
        seconds, metrics, late = time.monotonic() - began, server.metrics(), resident_mib(server)
        again = Job(jobs[0].prompt)
        await ask(client, server, again, output)
    if not server.alive:
        faults.append("the server is not healthy")
    kept, asked = (metrics.get(f"vllm:prefix_cache_{x}_total", 0.0) for x in ("hits", "queries"))
    prompts = sum(len(job.prompt) for job in jobs)
    hung_up = [job for job in jobs if job.hang_up]
    typer.echo(
        f"{len(jobs)} requests of {min(len(j.prompt) for j in jobs)} to {max(len(j.prompt) for j in jobs):,} tokens, "
        f"{prompts:,} in all, {concurrency} at once, {len(hung_up)} hung up on, in {seconds:.0f} s\n"
        f"prefix cache: {kept:,.0f} of {asked:,.0f} tokens ({kept / max(asked, 1):.0%}); "
        f"preemptions: {metrics.get('vllm:num_preemptions_total', 0):.0f}; "
        f"resident memory: {start:,.0f} MiB at first, {early:,.0f} after a quarter, {late:,.0f} at the end"
    )
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        value = metrics.get(f"vllm:{name}")
        typer.echo(f"vllm:{name} {value}")
        if value != 0:
            faults.append(f"vllm:{name} is {value} when idle")
    # What of the cache was not touched yet after a quarter; the rest of the growth until then was activations.
    untouched = max(0.0, cache_mib - (early - start))
    if late - early > LEAK_MIB + untouched:
        faults.append(f"resident memory grew by {late - early:,.0f} MiB, more than {LEAK_MIB + untouched:,.0f}")
    if any(len(job.tokens) != output for job in jobs if not job.hang_up):
        faults.append("a request ended early")
    return faults


async def ask(client: AsyncOpenAI, server: VllmServer, job: Job, output: int) -> None:
    """One greedy completion; the job's tokens are what came. Closing the stream is how a client hangs up."""
    stream = job.streamed or job.hang_up > 0
    job.tokens = []
    answer: Any = await client.completions.create(
        model=str(server.folder),
        prompt=job.prompt,
        max_tokens=output,
        temperature=0,
        stream=stream,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    if not stream:
        job.tokens = list(answer.choices[0].token_ids)
        return
    async for chunk in answer:
        for choice in chunk.choices:
            job.tokens += getattr(choice, "token_ids", None) or []
        if job.hang_up and len(job.tokens) >= job.hang_up:
            await answer.close()
            return


async def _idle(server: VllmServer, seconds: float = 60.0) -> None:
    """Wait until nothing runs: a server sees a closed connection a moment later."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        metrics = server.metrics()
        if not any(metrics.get(f"vllm:num_requests_{state}") for state in ("running", "waiting")):
            await asyncio.sleep(2)  # the gauges are written once more
            return
        await asyncio.sleep(0.5)


async def _compare(server: VllmServer, jobs: list[Job], output: int) -> list[str]:
    """Every answer against the same request alone; of those hung up on, what had come."""
    from openai import AsyncOpenAI

    faults, ties, began = [], 0, time.monotonic()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=3600, max_retries=0) as client:
        for i, job in enumerate(jobs, start=1):
            answer: Any = await client.completions.create(
                model=str(server.folder),
                prompt=job.prompt,
                max_tokens=output,
                temperature=0,
                logprobs=2,
                # Names of tokens as ids: two tokens may have the same text.
                extra_body={"ignore_eos": True, "return_token_ids": True, "return_tokens_as_token_ids": True},
            )
            choice = answer.choices[0]
            gaps = [margin(entry) for entry in choice.logprobs.top_logprobs]
            where = first_difference(list(choice.token_ids), job.tokens)
            if where is not None and gaps[where] < TIE:
                ties += 1
            elif where is not None:
                faults.append(
                    f"a prompt of {len(job.prompt):,} tokens: token {where} differs from the isolated run, where the "
                    f"second choice is {gaps[where]:.2e} behind"
                )
            if i % max(1, len(jobs) // 10) == 0:
                seconds = time.monotonic() - began
                typer.echo(f"{i} of {len(jobs)} compared, about {seconds / i * (len(jobs) - i):.0f} s left")
    equal = len(jobs) - len(faults) - ties
    typer.echo(f"{equal} of {len(jobs)} answers equal their isolated runs token by token, {ties} part at a tie")
    return faults


def margin(top: dict[str, float]) -> float:
    """How far the second most likely token is behind the first; infinite if there is no second."""
    values = sorted(top.values(), reverse=True)
    return values[0] - values[1] if len(values) > 1 else float("inf")


def first_difference(expected: list[int], actual: list[int]) -> int | None:
    """Index of the first token of `actual` that is not `expected`'s."""
    return next((i for i, token in enumerate(actual) if i >= len(expected) or token != expected[i]), None)


def resident_mib(server: VllmServer) -> float:
    """Resident memory of the server's processes."""
    import psutil

    leader = psutil.Process(server.pid)
    total = 0
    for process in (leader, *leader.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20


if __name__ == "__main__":
    app()
