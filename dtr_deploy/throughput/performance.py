"""What a layout is worth to whoever serves it: four numbers for one workload on one engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Performance:
    """speedup: end-to-end tokens per second over the backbone's. first_token_seconds: until the first token of the
    output (TTFT). token_seconds: for each further token of one request (TPOT). cache_bytes: of keys, values and linear
    states of all requests of the workload at once, at their longest."""

    speedup: float
    first_token_seconds: float
    token_seconds: float
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "speedup": self.speedup,
            "first_token_seconds": self.first_token_seconds,
            "token_seconds": self.token_seconds,
            "cache_bytes": self.cache_bytes,
        }
