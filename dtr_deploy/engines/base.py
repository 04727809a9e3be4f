"""What every serving engine offers to the rest of dtr-deploy, and the records it returns.

The search asks an engine for `Throughput`, the parity gate for `TokenScores`; nothing else in the package knows which
program is behind it. The adapters live beside this file, one module an engine, each with `available() -> (bool,
reason)` that answers without importing the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

TOP_K = 32
"""How many of the most likely next tokens `Engine.score` reports at every position."""


@dataclass(frozen=True)
class Workload:
    """What one measurement serves: `concurrency` requests at once, each of `prompt` tokens in and `output` out."""

    prompt: int
    output: int
    concurrency: int = 1

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Workload:
        return cls(int(data["prompt"]), int(data["output"]), int(data.get("concurrency", 1)))

    def __str__(self) -> str:
        text = f"{self.prompt:,} + {self.output:,} tokens"
        return text if self.concurrency == 1 else f"{text} x {self.concurrency}"


@dataclass(frozen=True)
class Throughput:
    """Medians over `repeats` runs of one workload, in seconds.

    `prefill_seconds` is the time until the first output token of every request is there, `decode_seconds` the time of
    the other `output - 1` tokens, `end_to_end_seconds` the whole. The three medians are taken apart, so they need not
    add up.
    """

    engine: str
    precision: str
    workload: Workload
    repeats: int
    prefill_seconds: float
    decode_seconds: float
    end_to_end_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return _rate(self.workload.prompt * self.workload.concurrency, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first of each request, over the time they took; 0.0 for a workload of one output token."""
        return _rate((self.workload.output - 1) * self.workload.concurrency, self.decode_seconds)

    @property
    def tokens_per_second(self) -> float:
        """End to end: prompt and output tokens of all requests over the whole time."""
        return _rate((self.workload.prompt + self.workload.output) * self.workload.concurrency, self.end_to_end_seconds)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Throughput:
        return cls(**{**data, "workload": Workload.from_dict(data["workload"])})


@dataclass(frozen=True)
class TokenScores:
    """Teacher-forced scores of one prompt of T tokens: position t holds the distribution of token t + 1.

    tokens: the prompt, T ids. logprobs: [T-1] float32, natural log, of the actual next token. top_ids: [T-1, K]
    int32, most likely first. top_logprobs: [T-1, K] float32. K is `TOP_K`, or the vocabulary when that is smaller.
    """

    tokens: list[int]
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@runtime_checkable
class Engine(Protocol):
    """A loaded model in one serving program. Close it when done: some hold a process or gigabytes of memory."""

    name: str
    precision: str

    def score(self, prompts: Sequence[Sequence[int]]) -> list[TokenScores]:
        """Teacher-forced scores, one per prompt, in order. Prompts may be of any lengths from 1 token on."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of exactly `max_new_tokens` tokens, end-of-text ignored, batched as the engine likes."""
        ...

    def throughput(self, workload: Workload, repeats: int) -> Throughput:
        """Medians over `repeats` runs on random token ids (greedy, end-of-text ignored), after a warm-up run."""
        ...

    def close(self) -> None: ...


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0
