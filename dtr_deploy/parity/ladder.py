"""The parity ladder: every program that runs the hybrid, held to the Hugging Face hybrid in float32 on the same tokens.

Rungs go from the operator's float64 token loop over its other backends and the cached model to the serving engines. At
fp32 every next-token log-probability must agree within `FP32_TOLERANCE`. At reduced precision rounding is part of the
deal, so the yardstick is what the same engine at the same precision does to the *unreplaced backbone*, in the same run:
the hybrid's mean KL may be `KL_RATIO` times that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from dtr_deploy.engines.base import Engine, TokenScores
from dtr_deploy.errors import ParityFailed
from dtr_deploy.parity.metrics import Distance, distance
from dtr_deploy.progress import Progress, QuietProgress

FP32_TOLERANCE = 1e-3
"""Largest |difference of log-probabilities| at fp32, in nats."""

KL_RATIO = 1.5
"""Reduced precision: largest mean KL of the hybrid over that of the backbone."""

KL_FLOOR = 1e-6
"""nats per token: below it two programs are equal for every purpose, and a ratio of rounding errors says nothing."""

EXACT_PRECISIONS = ("fp64", "fp32")


@dataclass(frozen=True)
class Rung:
    """One program on the ladder. What the openers return is closed after scoring, so one is open at a time.

    base: the same program serving the backbone at the same precision; needed at reduced precision only.
    max_length: longer prompts are left out (for programs that are slow on purpose).
    """

    engine: str
    precision: str
    hybrid: Callable[[], Engine]
    base: Callable[[], Engine] | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class ParityRow:
    """One rung's result, a row of report.json `parity`. base_kl is None at fp32; `limit` is the bound that applied."""

    engine: str
    precision: str
    prompts: int
    tokens: int
    max_abs_dlogprob: float
    mean_kl: float
    base_kl: float | None
    greedy_agreement: float
    limit: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def reason(self) -> str:
        """Why it passed or failed, in a few words."""
        sign = "<=" if self.passed else ">"
        if self.base_kl is None:
            return f"largest |dlogprob| {self.max_abs_dlogprob:.2e} {sign} {self.limit:.0e}"
        return f"mean KL {self.mean_kl:.2e} {sign} {self.limit:.2e} ({KL_RATIO} x the backbone's {self.base_kl:.2e})"


def judge(engine: str, precision: str, hybrid: Distance, base: Distance | None) -> ParityRow:
    """Apply the bound of `precision` to a measured distance. Reduced precision needs the backbone's distance."""
    if precision in EXACT_PRECISIONS:
        base_kl, limit = None, FP32_TOLERANCE
        passed = hybrid.max_abs_dlogprob <= limit
    else:
        if base is None:
            raise ValueError(f"{engine} {precision}: parity at reduced precision needs the backbone's distance")
        base_kl, limit = base.mean_kl, KL_RATIO * max(base.mean_kl, KL_FLOOR)
        # An engine that breaks the backbone itself is no yardstick.
        passed = hybrid.mean_kl <= limit < float("inf")
    return ParityRow(
        engine=engine,
        precision=precision,
        prompts=hybrid.prompts,
        tokens=hybrid.positions + hybrid.prompts,
        max_abs_dlogprob=hybrid.max_abs_dlogprob,
        mean_kl=hybrid.mean_kl,
        base_kl=base_kl,
        greedy_agreement=hybrid.greedy_agreement,
        limit=limit,
        passed=passed,
    )


def climb(
    reference: Engine,
    base_reference: Engine | None,
    rungs: Sequence[Rung],
    prompts: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> list[ParityRow]:
    """Score `prompts` on every rung and compare; rows in the order of `rungs`. A failed rung is for `gate` to refuse.

    reference, base_reference: the Hugging Face hybrid and backbone, float32. The second may be None if no rung has a
    base.
    """
    progress = progress or QuietProgress()
    hybrid_truth, base_truth = _Truth(reference, prompts), _Truth(base_reference, prompts)
    rows = []
    with progress.bar("parity", total=len(rungs)) as bar:
        for rung in rungs:
            hybrid = hybrid_truth.distance_to(rung.hybrid, rung.max_length)
            base = None
            if rung.base is not None and rung.precision not in EXACT_PRECISIONS:
                base = base_truth.distance_to(rung.base, rung.max_length)
            rows.append(judge(rung.engine, rung.precision, hybrid, base))
            bar.advance(1, note=f"{rung.engine} {rung.precision}: {rows[-1].reason()}")
    return rows


class _Truth:
    """The reference's scores of all prompts, made when they are first needed."""

    def __init__(self, engine: Engine | None, prompts: Sequence[Sequence[int]]) -> None:
        self.engine, self.prompts = engine, prompts
        self.scores: list[TokenScores] = []

    def distance_to(self, open_engine: Callable[[], Engine], max_length: int | None) -> Distance:
        if self.engine is None:
            raise ValueError("a rung has a base engine, but there is no backbone to compare it with")
        if not self.scores:
            self.scores = self.engine.score(self.prompts)
        truth = [scores for scores in self.scores if max_length is None or len(scores.tokens) <= max_length]
        with closing(open_engine()) as engine:
            return distance(truth, engine.score([scores.tokens for scores in truth]))


def gate(rows: Sequence[ParityRow]) -> None:
    """Raise `ParityFailed`, naming every rung that failed and by how much."""
    failed = [f"{row.engine} {row.precision}: {row.reason()}" for row in rows if not row.passed]
    if failed:
        raise ParityFailed(f"parity failed on {len(failed)} of {len(rows)}: " + "; ".join(failed))
