"""Prefix-cache hits of base and hybrid in vLLM under a load of shared system prompts.

    python -m benchmarks.serving_cache BASE HYBRID
    python -m benchmarks.serving_cache BASE HYBRID --prefix-tokens 3000 --engine max_num_batched_tokens=512

Requests begin with one of a few long prefixes and end in a tail of their own. They come in waves, the requests of a
wave at once. Every checkpoint gets the same requests, in an engine of its own in this process.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = range(10, 400)  # ids that every tokenizer has
HEADER = ["checkpoint", "block", "prompt tokens", "cached", "hit rate", "after wave 1", "possible", "seconds"]


@dataclass(frozen=True)
class Load:
    """requests in waves; prefixes and tails are random tokens, tails of half to all of `tail_tokens`."""

    prefixes: int
    prefix_tokens: int
    tail_tokens: int
    requests: int
    wave: int
    output_tokens: int
    seed: int

    def waves(self) -> list[list[list[int]]]:
        """Prompts, in the order they are sent."""
        draw = random.Random(self.seed)
        prefixes = [draw.choices(VOCABULARY, k=self.prefix_tokens) for _ in range(self.prefixes)]
        prompts = [
            draw.choice(prefixes)
            + draw.choices(VOCABULARY, k=draw.randint(max(1, self.tail_tokens // 2), self.tail_tokens))
            for _ in range(self.requests)
        ]
        return [prompts[start : start + self.wave] for start in range(0, len(prompts), self.wave)]


@dataclass(frozen=True)
class Result:
    """Tokens of prompts and how many of them came from the cache, wave by wave."""

    name: str
    block: int
    prompt_tokens: list[int]
    cached_tokens: list[int]
    seconds: float

    def rate(self, first_wave: int = 0) -> float:
        """Cached tokens over prompt tokens, from this wave on; 0 when there is none."""
        return sum(self.cached_tokens[first_wave:]) / max(1, sum(self.prompt_tokens[first_wave:]))


def possible_rate(waves: Sequence[Sequence[Sequence[int]]], prefix_tokens: int) -> float:
    """Hit rate of a cache that finds every prefix from its second use on, to the token."""
    seen: set[tuple[int, ...]] = set()
    found = total = 0
    for prompt in (prompt for wave in waves for prompt in wave):
        prefix = tuple(prompt[:prefix_tokens])
        found += prefix_tokens if prefix in seen else 0
        total += len(prompt)
        seen.add(prefix)
    return found / total


def run(folder: Path, load: Load, options: dict[str, Any]) -> Result:
    """Serve the load from one checkpoint. Options are those of `vllm.LLM`."""
    import dtr_vllm

    dtr_vllm.register()
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    longest = load.prefix_tokens + load.tail_tokens + load.output_tokens
    llm = LLM(
        str(folder),
        **{"max_model_len": longest, "enable_prefix_caching": True, "skip_tokenizer_init": True, **options},
    )
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)  # loads what is loaded at first use
        prompt_tokens, cached_tokens = [], []
        began = time.monotonic()
        for wave in load.waves():
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in wave], sampling, use_tqdm=False)
            prompt_tokens.append(sum(len(prompt) for prompt in wave))
            cached_tokens.append(sum(output.num_cached_tokens or 0 for output in outputs))
        seconds = time.monotonic() - began
        block = llm.llm_engine.vllm_config.cache_config.block_size
        return Result(str(folder), block, prompt_tokens, cached_tokens, seconds)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def table(results: Sequence[Result], possible: float) -> str:
    """One row a checkpoint."""
    rows = [HEADER]
    for result in results:
        rows.append(
            [
                result.name,
                f"{result.block}",
                f"{sum(result.prompt_tokens):,}",
                f"{sum(result.cached_tokens):,}",
                f"{result.rate():.1%}",
                f"{result.rate(1):.1%}",
                f"{possible:.1%}",
                f"{result.seconds:.1f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def engine_option(text: str) -> tuple[str, Any]:
    """'max_num_batched_tokens=512' -> its name and value, a Python literal or else a string."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def positive(text: str) -> int:
    """An argument that has to be 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: accepted are 1 or more")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving_cache", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", type=Path, nargs="+", help="folders, such as the base and the hybrid")
    parser.add_argument("--prefixes", type=positive, default=3, help="shared system prompts")
    parser.add_argument("--prefix-tokens", type=positive, default=1500)
    parser.add_argument("--tail-tokens", type=positive, default=120, help="the longest tail")
    parser.add_argument("--requests", type=positive, default=48)
    parser.add_argument("--wave", type=positive, default=8, help="requests at once")
    parser.add_argument("--output-tokens", type=positive, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--engine", type=engine_option, nargs="*", default=[], help="NAME=VALUE options of vllm.LLM")
    chosen = parser.parse_args(arguments)
    if missing := [folder for folder in chosen.checkpoints if not (folder / "config.json").is_file()]:
        print(f"serving_cache: {missing[0]}: no config.json there", file=sys.stderr)
        return 1
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    load = Load(
        chosen.prefixes,
        chosen.prefix_tokens,
        chosen.tail_tokens,
        chosen.requests,
        chosen.wave,
        chosen.output_tokens,
        chosen.seed,
    )
    options = {
        "dtype": chosen.dtype,
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(chosen.kv_cache_gib * 2**30),
        **dict(chosen.engine),
    }
    results = [run(folder, load, options) for folder in chosen.checkpoints]
    print(table(results, possible_rate(load.waves(), load.prefix_tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
