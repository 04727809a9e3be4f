"""The whole way from a recipe to two served models. This is the only place that knows the order of the stages.

Every stage is keyed by the hash of what it depends on and recorded in the run's manifest when it is finished, so a
second build does only what changed, and a build that was killed goes on from the last finished stage (stages that
take long keep their own partial results: distillation its step, the search its ledger).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy import __version__
from dtr_deploy.cluster.workers import connected
from dtr_deploy.errors import UsageError
from dtr_deploy.progress import CountingBar, Progress, QuietProgress, seconds_text
from dtr_deploy.recipe import RECIPE_COPY, Recipe
from dtr_deploy.run_dir import RunDir, StageRecord, StageWork, stage_key, versions, write_atomically

if TYPE_CHECKING:
    from dtr_deploy.cluster.workers import Workers
    from dtr_deploy.hybrid.backbone import Backbone
    from dtr_deploy.report.schema import Report
    from dtr_deploy.tasks.corpus import Corpus

STAGES = ("distill", "heal", "search", "hybrid", "lm-eval", "export", "parity", "throughput", "report")

SEARCH_FILE = "search.json"


def build(recipe: Recipe, run: RunDir, progress: Progress | None = None, until: str = "report") -> Report | None:
    """Build `recipe` in `run`, up to and with stage `until`; returns the report if that was reached.

    Raises:
        UsageError: wrong input, a missing engine, a damaged artefact, a run that another process works on.
        TargetNotMet: no layout reaches the target (`frontier` holds what is within reach).
        ParityFailed: an exported model does not compute what was trained, or lm-eval finds another score.
    """
    job = Build(recipe, run, progress or QuietProgress())
    steps = {
        "distill": job.distill,  # linear twins of the attention layers, from one teacher pass
        "heal": job.heal,  # the same twins, trained together end to end
        "search": job.search,  # which layers to replace, by score and measured throughput
        "hybrid": job.assemble,  # the checkpoint, which vLLM serves as it is
        "lm-eval": job.evaluate,  # its score on lm-eval's tasks by lm-eval itself, equal to ours or the build fails
        "export": job.export,  # the backbone beside it, and both for ONNX Runtime
        "parity": job.prove,  # every program computes what was trained, or the build fails
        "throughput": job.measure,  # base and hybrid, on the engines that serve them
        "report": job.report,
    }
    with run.lock(), connected(recipe.cluster, job.progress.line) as workers:
        job.workers = workers
        job.prepare()
        for name, step in steps.items():
            step()
            if name == until:
                break
    return job.read_report() if until == "report" else None


class Build:
    """One build: what the stages share (recipe, folder, loaded backbone, corpus), and one method a stage."""

    def __init__(self, recipe: Recipe, run: RunDir, progress: Progress) -> None:
        self.recipe, self.run, self.progress = recipe, run, progress
        self.workers: Workers | None = None

    # --- what stages share

    def prepare(self) -> None:
        """Refuse what cannot work before anything expensive starts."""
        from dtr_deploy.plan import check_disk, check_engines

        check_engines(self.recipe)
        from dtr_deploy.layout_search import recall_screen  # needs what has just been checked

        self.recipe.check_layers(self.backbone.layers)
        # A task that cannot be built is refused now, not after distillation.
        self.tasks  # noqa: B018
        for task in recall_screen(self.recipe, self.backbone):
            task.requests("search")
        check_disk(self.recipe, self.run, self.backbone.model.config)
        write_atomically(
            self.run.path / RECIPE_COPY, json.dumps(self.recipe.model_dump(mode="json"), indent=1).encode()
        )
        self.run.describe(self.recipe.name, self.recipe.digest)

    @cached_property
    def backbone(self) -> Backbone:
        from dtr_deploy.hybrid.backbone import load_backbone
        from dtr_deploy.hybrid.placement import choose

        recipe = self.recipe
        # On a cluster the workers compute, perhaps on this machine's GPUs.
        device = "cpu" if self.workers is not None and recipe.device == "auto" else recipe.device
        try:
            choose(device, 0)
        except UsageError as error:
            raise recipe.error(("device",), str(error).removeprefix("device ")) from error
        self.progress.line(f"loading {recipe.model}")
        return load_backbone(
            recipe.model_spec(),
            revision=recipe.revision,
            trust_remote_code=recipe.trust_remote_code,
            device=device,
        )

    @property
    def context(self) -> int:
        """Longest prompt and output the model takes, tokens."""
        return int(self.backbone.model.config.max_position_embeddings)

    @cached_property
    def corpus(self) -> Corpus:
        from dtr_deploy.tasks.corpus import load_corpus

        settings = self.recipe.distill
        return load_corpus(
            self.recipe.corpus_sources(),
            self.backbone.tokenizer,
            tokens=settings.tokens,
            sequence_length=settings.sequence_length,
            held_out=settings.held_out,
            seed=self.recipe.seed,
        )

    @property
    def layers(self) -> list[int]:
        """The layers that may be replaced."""
        return self.recipe.distill.layers.indices(self.backbone.layers)

    def _stage(self, name: str, key: str, work: StageWork, folder: str | None = None) -> StageRecord:
        """`RunDir.stage`, telling what was done before and how long the rest took."""
        record = self.run.finished(name, key)
        if record is None:
            record = self.run.stage(name, key, work, folder=folder)
            self.progress.line(f"{name}: {seconds_text(record.seconds)}")
        else:
            self.progress.line(f"{name}: finished before ({seconds_text(record.seconds)})")
        return record

    # --- stage 1: twins

    @cached_property
    def distill_key(self) -> str:
        settings = self.recipe.distill.model_dump(mode="json", exclude={"layers", "twins_at_once"})
        if settings["calibrate"]:
            del settings["calibrate"]  # runs from before it was a choice keep their twins
        texts = [
            hashlib.sha256(part.numpy().tobytes()).hexdigest() for part in (self.corpus.train, self.corpus.held_out)
        ]
        return stage_key(
            "distill",
            __version__,
            self.backbone.fingerprint,
            texts,
            self.recipe.forms,
            self.layers,
            self.recipe.window,
            settings,
            self.recipe.seed,
        )

    def distill(self) -> StageRecord:
        """Train a twin of every chosen (layer, form); `distilled/layerNN_FORM.safetensors`."""

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.distill.groups import distill_in_groups
            from dtr_deploy.distill.stage import DistillResult, distill
            from dtr_deploy.distill.trainer import DistillSettings

            recipe, at_once = self.recipe, self.recipe.distill.twins_at_once
            settings = DistillSettings(
                tokens=recipe.distill.tokens,
                batch_size=recipe.distill.batch_size,
                learning_rate=recipe.distill.learning_rate,
                form_learning_rate=recipe.distill.form_learning_rate,
                calibrate=recipe.distill.calibrate,
                precision=recipe.distill.precision,
                seed=recipe.seed,
            )
            train: Callable[..., DistillResult] = partial(distill, self.backbone.model)
            if at_once is not None:
                train = partial(distill_in_groups, self.backbone.model, twins_at_once=at_once)
            if self.workers is not None:
                from dtr_deploy.cluster.distill import distill_on
                from dtr_deploy.layout_search import source_of

                source = source_of(recipe, self.backbone)
                train = partial(distill_on, self.workers, source, twins_at_once=at_once)
            with CountingBar(self.progress, "distill") as report:
                result = train(
                    self.corpus.train,
                    self.corpus.held_out,
                    recipe.forms,
                    self.layers,
                    recipe.window,
                    settings,
                    folder,
                    report,
                )
            reports = [twin.to_dict() for twin in result.reports]
            return sorted(result.files.values()), {"tokens": result.tokens, "reports": reports}

        return self._stage("distill", self.distill_key, work, folder="distilled")

    def heal(self) -> StageRecord | None:
        """Train the twins together; `healed/layerNN_FORM.safetensors`. None if the recipe has no tokens for it."""
        recipe = self.recipe
        if not recipe.heal.tokens:
            return None
        settings = recipe.heal.model_dump(mode="json", exclude={"checkpointing"})  # which changes no result
        key = stage_key("heal", self.run.stages["distill"].key, settings)

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.distill.heal import HealSettings, heal

            settings = HealSettings(
                tokens=recipe.heal.tokens,
                learning_rate=recipe.heal.learning_rate,
                form_learning_rate=recipe.heal.form_learning_rate,
                precision=recipe.distill.precision,
                checkpointing=recipe.heal.checkpointing,
                seed=recipe.seed,
            )
            twins = self._load_twins(self.run.path / "distilled")
            with CountingBar(self.progress, "heal") as report:
                result = heal(
                    self.backbone.model, twins, recipe.window, self.corpus.train, settings, folder, progress=report
                )
            return sorted(result.files.values()), {"tokens": result.tokens, "divergences": result.divergences}

        return self._stage("heal", key, work, folder="healed")

    @cached_property
    def twins(self) -> dict[tuple[int, str], dict[str, Any]]:
        """Weights of every twin, by (layer, form), healed if the recipe has it."""
        folder = self.run.path / ("healed" if self.recipe.heal.tokens else "distilled")
        return self._load_twins(folder)

    def _load_twins(self, folder: Path) -> dict[tuple[int, str], dict[str, Any]]:
        from dtr_deploy.distill.files import twin_file
        from dtr_deploy.distill.stage import load_twins

        return load_twins(
            {(layer, form): twin_file(folder, layer, form) for layer in self.layers for form in self.recipe.forms}
        )

    @property
    def twins_key(self) -> str:
        """Of the stage that made `twins`."""
        return self.run.stages["heal" if self.recipe.heal.tokens else "distill"].key

    # --- stage 2: the layout

    def search(self) -> StageRecord:
        """Choose the layout; every trial is in `ledger.sqlite`, the result with its evidence in `search.json`."""
        recipe = self.recipe
        from dtr_deploy.tasks.base import SPLITS

        tasks = self.tasks
        settings = [recipe.target.model_dump(mode="json"), recipe.search.model_dump(mode="json")]
        fingerprints = [(task.name, task.weight, *(task.fingerprint(split) for split in SPLITS)) for task in tasks]
        key = stage_key("search", self.twins_key, fingerprints, settings, versions())

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.layout_search import choose_layout

            ledger, held_out = folder / "ledger.sqlite", self.corpus.held_out
            result = choose_layout(
                recipe, self.backbone, self.twins, held_out, tasks, ledger, self.progress, self.workers
            )
            write_atomically(folder / SEARCH_FILE, json.dumps(result.to_dict(), indent=1).encode())
            return [folder / SEARCH_FILE], {"layout": list(result.layout), "speedup": result.speedup}

        return self._stage("search", key, work)

    @cached_property
    def tasks(self) -> list[Any]:
        from dtr_deploy.tasks.build import build_tasks

        recipe = self.recipe
        return build_tasks(recipe.task_recipes(), self.backbone.tokenizer, recipe.seed, max_length=self.context)

    @property
    def layout(self) -> tuple[str | None, ...]:
        return tuple(self.run.stages["search"].result["layout"])

    # --- what is shipped

    def assemble(self) -> StageRecord:
        """The checkpoint of the hybrid, in `hybrid/`."""
        key = stage_key("hybrid", self.twins_key, self.layout)

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.export.huggingface import export_checkpoint

            return export_checkpoint(self.backbone, self.layout, self.recipe.window, self.twins, folder), {}

        return self._stage("hybrid", key, work, folder="hybrid")

    def evaluate(self) -> StageRecord | None:
        """lm-eval's own score of the checkpoint on each of its tasks. None if the recipe has none of them."""
        tasks = [task.name for task in self.recipe.tasks if task.lm_eval is not None]
        if not tasks:
            return None
        key = stage_key("lm-eval", __version__, self.run.stages["search"].key, self.run.stages["hybrid"].key, tasks)

        def work(_: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.hybrid.model import load_hybrid
            from dtr_deploy.hybrid.placement import place_like
            from dtr_deploy.hybrid.precision import products_dtype, products_in
            from dtr_deploy.serving import hybrid_of
            from dtr_deploy.tasks.lm_eval_check import check_scores, gate

            hybrid, tokenizer = load_hybrid(hybrid_of(self.run.path).checkpoint)
            place_like(hybrid, self.backbone.model)
            scores = json.loads((self.run.path / SEARCH_FILE).read_text())["scores"]["test"]["tasks"]
            ours = {name: scores[name]["hybrid"] for name in tasks}
            with products_in(products_dtype(self.recipe.search.precision, hybrid.device.type), hybrid.device.type):
                rows = check_scores(hybrid, tokenizer, self.tasks, ours, self.progress)
            gate(rows)
            return [], {"rows": [row.to_dict() for row in rows]}

        return self._stage("lm-eval", key, work)

    def export(self) -> None:
        """The backbone as a folder in `base/`, and both models for ONNX Runtime in `onnx/` and `base/onnx/`."""
        from dtr_deploy.hybrid.placement import bring_back
        from dtr_deploy.parity.rungs import base_precisions, served_precisions
        from dtr_deploy.serving import base_of, hybrid_of

        bring_back(self.backbone.model)  # nothing computes with it from here on, and engines want the GPU's memory
        base, hybrid = base_of(self.run.path), hybrid_of(self.run.path)
        base_key = stage_key("base", self.backbone.fingerprint)

        def save_base(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            self.backbone.save(folder)
            return [folder], {}

        self._stage("base", base_key, save_base, folder=self._relative(base.checkpoint))
        exports = [
            *(
                ("onnx", hybrid, self.run.stages["hybrid"].key, p)
                for e, p in served_precisions(self.recipe)
                if e == "ort"
            ),
            *(("base onnx", base, base_key, p) for e, p in base_precisions(self.recipe) if e == "ort"),
        ]
        for name, model, source_key, precision in exports:
            self._export_onnx(f"{name} {precision}", model, source_key, precision)

    def _export_onnx(self, name: str, model: Any, source_key: str, precision: str) -> None:
        found = versions()
        engine = [found.get(package) for package in ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnx")]
        key = stage_key(name, __version__, source_key, precision, engine)

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.export.onnx import export_onnx

            with self.progress.bar(name):
                export_onnx(model.checkpoint, folder, precision)
            return [folder], {}

        self._stage(name, key, work, folder=self._relative(model.onnx_folder(precision)))

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.run.path).as_posix()

    # --- the proof and the figures

    def _shipped_keys(self) -> list[str]:
        return [self.run.stages[name].key for name in sorted(self.run.stages) if name == "hybrid" or "onnx" in name]

    def prove(self) -> StageRecord:
        """The parity gate; prompts in `parity/prompts.json`, rows in `parity/parity.json` (also when it fails)."""
        from dtr_deploy.hybrid.layout import windows
        from dtr_deploy.parity.prompts import parity_prompts
        from dtr_deploy.parity.prove import PROMPTS, prove
        from dtr_deploy.parity.rungs import served_precisions

        recipe, wanted = self.recipe, self.recipe.parity
        prompts = parity_prompts(
            self.corpus.held_out.flatten().tolist(),
            wanted.prompts,
            min(wanted.max_length, self.context - 1),
            wanted.tokens,
            windows(recipe.forms, recipe.window),
            recipe.seed,
        )
        served = served_precisions(recipe)
        key = stage_key("parity", __version__, self._shipped_keys(), prompts, served, versions())

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            write_atomically(self.run.path / PROMPTS, json.dumps(prompts).encode())
            rows = prove(recipe, self.run.path, prompts, self.progress)
            return [self.run.path / PROMPTS], {"rows": [row.to_dict() for row in rows]}

        return self._stage("parity", key, work, folder="parity")

    def measure(self) -> None:
        """Throughput of base and hybrid on every engine that serves them."""
        from dtr_deploy.benchmark import benchmark
        from dtr_deploy.parity.rungs import benchmarked

        wanted = [self.recipe.bench.model_dump(), self.recipe.target.workload.model_dump()]
        for engine, precision in benchmarked(self.recipe):
            key = stage_key("throughput", __version__, self._shipped_keys(), engine, precision, wanted, versions())

            def work(_: Path, engine: str = engine, precision: str = precision) -> tuple[list[Path], dict[str, Any]]:
                rows = benchmark(self.recipe, self.run.path, engine, precision, self.context, self.progress)
                return [], {"rows": [row.model_dump(mode="json") for row in rows]}

            self._stage(f"throughput {engine}", key, work)

    # --- what a person reads

    def report(self) -> StageRecord:
        """`report.json`, and with the same figures `report.html` and the model card, `hybrid/README.md`."""
        key = stage_key(
            "report",
            __version__,
            self.recipe.digest,
            {name: s.key for name, s in self.run.stages.items() if name != "report"},
        )

        def work(folder: Path) -> tuple[list[Path], dict[str, Any]]:
            from dtr_deploy.export.model_card import write_model_card
            from dtr_deploy.report.collect import collect_report
            from dtr_deploy.report.page import PAGE, page
            from dtr_deploy.report.schema import REPORT

            report = collect_report(self.recipe, self.run, self.backbone)
            write_atomically(folder / REPORT, report.to_json())
            write_atomically(folder / PAGE, page(report).encode())
            card = write_model_card(report, folder / "hybrid")
            return [folder / REPORT, folder / PAGE, card], {}

        return self._stage("report", key, work)

    def read_report(self) -> Report:
        from dtr_deploy.report.schema import REPORT, read_report

        return read_report(self.run.path / REPORT)
