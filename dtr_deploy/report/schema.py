"""`report.json`: one file a run with everything that was decided and measured. The schema is versioned.

Nothing here measures; the pipeline fills it in and `report.tables` shows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dtr_deploy.engines.base import Throughput
from dtr_deploy.errors import UsageError

REPORT = "report.json"
SCHEMA_VERSION = 1


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BackboneRow(_Row):
    """fingerprint: sha256 of configuration and weights."""

    spec: str
    family: str
    layers: int
    parameters: int
    fingerprint: str


class OriginRow(_Row):
    """What the hybrid comes from, in the Hub's terms, for the model card.

    base_model: the backbone's id if it was read from the Hub, not for folders, GGUF files and packages. license: the
    keys `license`, `license_name` and `license_link` of the backbone's own card or GGUF, those that it has. datasets:
    hub data sets of the corpus. context: tokens the model takes.
    """

    base_model: str | None = None
    license: dict[str, str] = Field(default_factory=dict)
    datasets: list[str] = Field(default_factory=list)
    context: int | None = None


class LayerRow(_Row):
    """form: None is full attention."""

    layer: int
    form: str | None


class DistillRow(_Row):
    """One twin on held-out text, after training and (start_...) before.

    relative_error: squared error of the attention output over its squared norm. controls: the same, had nothing
    (`no_op`) or the teacher's attention cut to the window (`window_only`) been put in the layer's place.
    """

    layer: int
    form: str
    relative_error: float
    cosine: float
    start_relative_error: float
    start_cosine: float
    controls: dict[str, float]


class TaskRow(_Row):
    base: float
    hybrid: float


class ScoreRow(_Row):
    """A split's combined score. ci: of the paired difference hybrid - base; base_ci, hybrid_ci: of each alone."""

    base: float
    hybrid: float
    ci: tuple[float, float]
    base_ci: tuple[float, float] | None = None
    hybrid_ci: tuple[float, float] | None = None
    confidence: float = 0.95
    tasks: dict[str, TaskRow] = Field(default_factory=dict)


class WorkloadRow(_Row):
    prompt: int
    output: int
    concurrency: int = 1


class Rates(_Row):
    """Tokens per second (or, in `ratio`, hybrid's over base's). decode is 0 for workloads of one output token."""

    prefill: float
    decode: float
    end_to_end: float

    @classmethod
    def of(cls, measured: Throughput) -> Rates:
        return cls(
            prefill=measured.prefill_tokens_per_second,
            decode=measured.decode_tokens_per_second,
            end_to_end=measured.tokens_per_second,
        )


class ThroughputRow(_Row):
    engine: str
    precision: str
    workload: WorkloadRow
    repeats: int
    base: Rates
    hybrid: Rates
    ratio: Rates
    target: bool = False

    @classmethod
    def compare(cls, base: Throughput, hybrid: Throughput, target: bool = False) -> ThroughputRow:
        """A row from two measurements of one workload on one engine. target: it is the recipe's own workload."""
        ours, theirs = Rates.of(hybrid), Rates.of(base)
        ratio = {
            name: getattr(ours, name) / value if (value := getattr(theirs, name)) else 0.0
            for name in Rates.model_fields
        }
        return cls(
            engine=hybrid.engine,
            precision=hybrid.precision,
            workload=WorkloadRow(**hybrid.workload.to_dict()),
            repeats=hybrid.repeats,
            base=theirs,
            hybrid=ours,
            ratio=Rates(**ratio),
            target=target,
        )


class ParityReportRow(_Row):
    """Against the Hugging Face hybrid in float32. base_kl: the unreplaced backbone's mean KL, None at fp32."""

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


class LmEvalReportRow(_Row):
    """The hybrid on documents of a task's test split: as the search scored them (ours) and as lm-eval does."""

    task: str
    documents: int
    ours: float
    lm_eval: float
    standard_error: float
    passed: bool

    @property
    def verdict(self) -> str:
        """For a person: the same number, close enough to pass, or neither."""
        if abs(self.ours - self.lm_eval) <= 1e-6:
            return "equal"
        return "within a standard error" if self.passed else "DIFFERENT"


class MemoryRow(_Row):
    """Bytes of keys, values and states of one sequence of so many tokens, as the target's engine holds them."""

    engine: str
    precision: str
    tokens: int
    base_bytes: int
    hybrid_bytes: int


DECISIONS = {
    "base": "base",
    "commit": "committed",
    "between_steps": "between steps",
    "reject": "rejected",
    "walk_back": "walked back",
    "confirm": "confirmed",
}
"""Actions of a search's steps that decide on a layout -> what a reader is told."""


class SearchSummary(_Row):
    """How the layout was found. seconds: of scoring and screening; frontier, m_best, m_opt, steps, cost_model,
    shrinkage: as `search.result.SearchResult` has them."""

    strategy: str
    trials: int
    layer_forwards: int
    seconds: float
    speedup: float | None = None
    walked_back: int = 0
    m_best: dict[str, Any] | None = None
    m_opt: dict[str, Any] | None = None
    frontier: list[dict[str, Any]] = Field(default_factory=list)
    steps: list[dict[str, Any]] = Field(default_factory=list)
    cost_model: dict[str, Any] = Field(default_factory=dict)
    shrinkage: dict[str, Any] | None = None

    @property
    def swaps(self) -> list[dict[str, Any]]:
        """What each swap alone was estimated to cost (layer, form, kl, recall), where a strategy ranks by it."""
        return next((step["swaps"] for step in self.steps if step.get("swaps")), [])

    @property
    def decisions(self) -> list[dict[str, Any]]:
        """The steps in which a layout was decided on."""
        return [step for step in self.steps if step["action"] in DECISIONS and step.get("score") is not None]


class Report(_Row):
    schema_version: Literal[1] = 1
    recipe: dict[str, Any]
    backbone: BackboneRow
    origin: OriginRow | None = None
    layout: list[LayerRow]
    distill: list[DistillRow] = Field(default_factory=list)
    scores: dict[str, ScoreRow] = Field(default_factory=dict)
    throughput: list[ThroughputRow] = Field(default_factory=list)
    parity: list[ParityReportRow] = Field(default_factory=list)
    lm_eval: list[LmEvalReportRow] = Field(default_factory=list)
    memory: list[MemoryRow] = Field(default_factory=list)
    search: SearchSummary | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)

    def forms(self) -> tuple[str | None, ...]:
        """The layout as hybrid.layout has it."""
        return tuple(row.form for row in sorted(self.layout, key=lambda row: row.layer))

    def to_json(self) -> bytes:
        return (json.dumps(self.model_dump(mode="json"), indent=1) + "\n").encode()


def read_report(file: Path) -> Report:
    """Read a report. Raises `UsageError` if it is missing, not a report, or of another schema version."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{file}: no report yet; `dtr-deploy build` writes it at the end") from None
    except ValueError as error:
        raise UsageError(f"{file}: not JSON ({error})") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{file}: schema_version {version!r}; accepted: {SCHEMA_VERSION}")
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{file}: {key}: {first['msg']}") from None
