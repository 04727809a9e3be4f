"""What is measured: model shapes, one problem, its operands, and how much work the problem is by its definition."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Shape:
    """The attention heads of one layer of a model."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.query_heads // self.kv_heads

    def __str__(self) -> str:
        return f"{self.name} ({self.query_heads}/{self.kv_heads} heads of {self.head_dim})"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2", 9, 3, 64),
        Shape("qwen2.5-1.5b", 12, 2, 128),
        Shape("llama-3.2-3b", 24, 8, 128),
        # Not a model: small enough for the float64 token loop in tests and for trying out a command line.
        Shape("tiny", 6, 2, 32),
    )
}


@dataclass(frozen=True)
class Problem:
    """One problem that every contender solves.

    direction: "forward" and "backward" (forward and backward) are one sequence of `length` tokens; "decode" is one
        token for each of `sequences` sequences that have `length` tokens behind them (only softmax attention's cost
        depends on those).
    per_key: the decay has one value a key dimension instead of one a head.
    window: tokens of the softmax branch, in the rows that have one.
    """

    shape: Shape
    length: int
    direction: str = "forward"
    rule: str = "gated_delta"
    sequences: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    per_key: bool = False
    window: int = 64
    threads: int = 1

    @property
    def tokens(self) -> int:
        """Tokens a sequence that one call computes."""
        return 1 if self.direction == "decode" else self.length

    @property
    def batch(self) -> int:
        return self.sequences if self.direction == "decode" else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def gated(self) -> bool:
        return self.rule in ("gated", "gated_delta")

    @property
    def delta(self) -> bool:
        return self.rule in ("delta", "gated_delta")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Problem:
        return cls(**{**fields, "shape": Shape(**fields["shape"])})

    def __str__(self) -> str:
        if self.direction == "decode":
            what = f"decode, {self.sequences} sequences, {self.length:,} tokens behind each"
        else:
            what = f"{'forward and backward' if self.direction == 'backward' else 'forward'}, {self.length:,} tokens"
        return f"{self.shape}, {self.rule}, {what}"


class Inputs:
    """The operands of a problem, drawn once: float64 on the problem's device.

    q, k, v, beta and states hold values that bfloat16 represents exactly, decays values that float32 does, so that a
    contender in any of those dtypes is given the very same numbers and its error is its own.

    q [B,T,Hq,D], k (of length 1) and v [B,T,Hkv,D], log_decay [B,T,Hkv] or [B,T,Hkv,D], beta [B,T,Hkv],
    state [B,Hkv,D,D]; log_decay and beta are None where the rule has none.
    """

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        self.problem = problem
        self._generator = torch.Generator().manual_seed(seed)
        batch, tokens, s = problem.batch, problem.tokens, problem.shape
        self.q = self._rounded(F.normalize(self._normal(batch, tokens, s.query_heads, s.head_dim), dim=-1))
        self.k = self._rounded(F.normalize(self._normal(batch, tokens, s.kv_heads, s.head_dim), dim=-1))
        self.v = self._rounded(self._normal(batch, tokens, s.kv_heads, s.head_dim))
        self.log_decay = self.beta = None
        if problem.gated:
            decays = (batch, tokens, s.kv_heads, s.head_dim)[: 4 if problem.per_key else 3]
            self.log_decay = (-0.1 * torch.rand(decays, generator=self._generator)).to(problem.device).double()
        if problem.delta:
            self.beta = self._rounded(torch.rand(batch, tokens, s.kv_heads, generator=self._generator))
        self.state = self._rounded(0.1 * self._normal(batch, s.kv_heads, s.head_dim, s.head_dim))

    @cached_property
    def cotangent(self) -> Tensor:
        """[B,T,Hq,D]: gradient of the loss with respect to the output, in the backward direction."""
        return self._rounded(self._normal(*self.q.shape))

    @cached_property
    def hidden(self) -> Tensor:
        """[B,T,H*D]: a layer's input, which a form makes its decay and beta from."""
        s = self.problem.shape
        return self._rounded(self._normal(*self.q.shape[:2], s.query_heads * s.head_dim))

    def context(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `tokens` earlier tokens, [B,tokens,Hkv,D] each, in the problem's dtype."""
        s = self.problem.shape
        generator = torch.Generator().manual_seed(tokens)
        keys, values = (
            torch.randn(self.problem.batch, tokens, s.kv_heads, s.head_dim, generator=generator)
            .bfloat16()
            .to(self.problem.device, self.problem.torch_dtype)
            for _ in range(2)
        )
        return keys, values

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)

    def _rounded(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(self.problem.device).double()


def attended(length: int, window: int) -> int:
    """Pairs of a query and a key in causal attention over `length` tokens, the last `window` of them (0: all)."""
    if not window or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def flops(problem: Problem, computes: str) -> float:
    """Floating point operations of a problem by its definition, whatever a contender does to solve it.

    The rule, token by token: for each kv head D*D for the decay of the state (gated rules), 2 D*D for S^T k (delta
    rules), 2 D*D for the write k (x) u; for each query head 2 D*D for the readout. Softmax: 4 D for each pair of query
    and key. Norms, gates, exponentials are not counted. Forward and backward count as three forwards.
    """
    s, square = problem.shape, problem.shape.head_dim**2
    per_token = s.kv_heads * square * (2 + problem.gated + 2 * problem.delta) + s.query_heads * 2 * square
    rule = problem.batch * problem.tokens * per_token

    def softmax(window: int) -> int:
        if problem.direction == "decode":
            pairs = problem.batch * (min(window, problem.length + 1) if window else problem.length + 1)
        else:
            pairs = attended(problem.length, window)
        return 4 * s.head_dim * s.query_heads * pairs

    count = {
        "rule": rule,
        "form": rule,
        "form + window": rule + softmax(problem.window),
        "window": softmax(problem.window),
        "softmax": softmax(0),
    }[computes]
    return float(count) * (3 if problem.direction == "backward" else 1)


def decode_bytes(problem: Problem, computes: str, element: int) -> float:
    """Bytes that one decoding call has to move: the state read and written (float32), keys and values read.

    element: bytes of a value of the keys, values, queries and outputs in the contender's dtype.
    """
    s = problem.shape
    state = 2 * 4 * problem.batch * s.kv_heads * s.head_dim**2
    vectors = element * problem.batch * s.head_dim * (2 * s.query_heads + 2 * s.kv_heads)

    def keys_and_values(tokens: int) -> int:
        return 2 * element * problem.batch * tokens * s.kv_heads * s.head_dim

    return float(
        {
            "rule": state,
            "form": state,
            "form + window": state + keys_and_values(problem.window),
            "window": keys_and_values(problem.window),
            "softmax": keys_and_values(problem.length + 1),
        }[computes]
        + vectors
    )
