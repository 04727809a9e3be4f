"""What a recipe asks of the served model: bounds on throughput, latency and memory, and how far a layout is off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dtr_deploy.throughput.performance import Performance

MIB = 1 << 20

_ROUNDING = 1e-9


class _Bound(NamedTuple):
    """key: in the recipe's `target`. ratio: of what is had to what is allowed, kept at 1 or less."""

    key: str
    ratio: float
    asked: str
    reached: str


@dataclass(frozen=True)
class Targets:
    """Bounds that the chosen layout has to keep; None is no bound.

    speedup: at least so many times the backbone's end-to-end tokens per second. first_token_seconds, token_seconds: at
    most so long until the first token, and for each further one. cache_bytes: at most so much for keys, values and
    states of all requests of the workload at once.
    """

    speedup: float | None = None
    first_token_seconds: float | None = None
    token_seconds: float | None = None
    cache_bytes: int | None = None

    @property
    def given(self) -> bool:
        """Whether there is any bound."""
        return self != Targets()

    def shortfall(self, performance: Performance) -> float:
        """The worst of the ratios asked / had (speedup) and had / allowed (the others).

        At most 1 if every bound is kept; 0 without bounds.
        """
        return max((bound.ratio for bound in self._bounds(performance)), default=0.0)

    def met(self, performance: Performance) -> bool:
        return self.shortfall(performance) <= 1 + _ROUNDING

    def missed(self, performance: Performance) -> list[str]:
        """A phrase for each bound that is not kept: its key in the recipe, what is asked, what was reached."""
        return [
            f"target.{bound.key}: {bound.asked} was not reached (the best layout found has {bound.reached})"
            for bound in self._bounds(performance)
            if bound.ratio > 1 + _ROUNDING
        ]

    def _bounds(self, has: Performance) -> list[_Bound]:
        bounds = []
        if self.speedup is not None:
            asked = f"{self.speedup:g} times the backbone"
            bounds.append(_Bound("speedup", self.speedup / has.speedup, asked, f"{has.speedup:.3g} times"))
        for key, limit, seconds, what in (
            ("ttft_ms", self.first_token_seconds, has.first_token_seconds, "to the first token"),
            ("tpot_ms", self.token_seconds, has.token_seconds, "a token"),
        ):
            if limit is not None:
                asked = f"at most {1e3 * limit:g} ms {what}"
                bounds.append(_Bound(key, seconds / limit, asked, f"{1e3 * seconds:.4g} ms"))
        if self.cache_bytes is not None:
            asked = f"at most {self.cache_bytes / MIB:g} MiB of cache"
            reached = f"{has.cache_bytes / MIB:.4g} MiB"
            bounds.append(_Bound("cache_mib", has.cache_bytes / self.cache_bytes, asked, reached))
        return bounds
