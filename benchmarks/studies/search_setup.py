"""What the studies of the search share: one backbone, its twins distilled once, one cost model, tasks and a scorer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.throughput.performance import Performance

if TYPE_CHECKING:
    from dtr_deploy.hybrid.backbone import Backbone
    from dtr_deploy.search.ledger import Ledger
    from dtr_deploy.search.scorer import Scorer

REVIEWS = Path(__file__).parents[2] / "recipes/data/reviews"
FORMS = ("gated_deltanet", "gla")
WINDOW, SMALL_WINDOW = 64, 8
REVIEWS_WEIGHT, NEEDLE_WEIGHT = 3.0, 1.0
"""Few needles are a coarse judge: one of eight is 3 points of the combined score at these weights, not 6."""


@dataclass(frozen=True)
class Items:
    """Examples of a split. needle_length: prompt tokens."""

    reviews: int = 120
    needles: int = 8
    needle_length: int = 512


class AssumedCost:
    """Each replaced layer saves an equal share of the time: for `--small`, where nothing is worth timing."""

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def predicted(self, layout: Layout) -> Performance:
        ratio = 1 - 0.5 * replaced(layout) / self.layers
        return Performance(1 / ratio, ratio, ratio / 100, len(layout) - replaced(layout))

    performance = predicted

    def to_dict(self) -> dict[str, Any]:
        return {"assumed": "each replaced layer saves an equal share of half the time"}


class PredictedCost:
    """A calibrated cost whose predictions also decide: nothing is timed while strategies are compared."""

    def __init__(self, cost: Any) -> None:
        self.cost = cost

    def predicted(self, layout: Layout) -> Performance:
        return self.cost.predicted(layout)

    performance = predicted

    def to_dict(self) -> dict[str, Any]:
        return self.cost.to_dict()


class Setup:
    """Backbone, held-out text and twins. Twins are read from `distilled`, or distilled into it; finished ones are kept.

    Raises `UsageError` if `distilled` was given and lacks a twin.
    """

    def __init__(self, out: Path, model: str, distilled: Path | None, tokens: int, seed: int, small: bool) -> None:
        from benchmarks.studies.small_model import small_backbone
        from dtr_deploy.hybrid.backbone import load_backbone
        from dtr_deploy.tasks.corpus import load_corpus

        self.out, self.small, self.seed = out, small, seed
        out.mkdir(parents=True, exist_ok=True)
        self.window = SMALL_WINDOW if small else WINDOW
        self.backbone: Backbone = small_backbone() if small else load_backbone(model)
        corpus = load_corpus(
            ["pydoc"] if small else [str(REVIEWS / "corpus.txt"), "pydoc"],
            self.backbone.tokenizer,
            tokens=2048 if small else tokens,
            sequence_length=128 if small else 512,
            held_out=4 if small else 24,
            seed=seed,
        )
        self.held_out = corpus.held_out
        self.twins = self._twins(distilled, corpus.train)

    def scorer(self, ledger: Ledger, items: Items, seed: int = 0) -> Scorer:
        """A scorer of the study's two tasks. seed: of which items they are."""
        from dtr_deploy.search.model_evaluator import ModelEvaluator
        from dtr_deploy.search.scorer import Scorer, models_hash
        from dtr_deploy.tasks.divergence import SCREENING, Divergence

        evaluator = ModelEvaluator(
            self.backbone.model,
            self.twins,
            self.window,
            self.tasks(items, seed),
            Divergence(self.held_out[: 2 if self.small else 4], every=SCREENING),
            [self._needle("recall screen", items, 2, self.seed + 1000)],
            models_hash(self.backbone.fingerprint, self.twins, self.window),
            precision="float32" if self.small else "auto",
        )
        return Scorer(evaluator, ledger)

    def tasks(self, items: Items, seed: int = 0) -> list[Any]:
        """Reviews (zero-shot, calibrated) and a needle; the tiny model has the needle only."""
        from dtr_deploy.tasks.local_file import LabelledFile

        needle = self._needle("needle", items, items.needles, self.seed + seed)
        if self.small:
            return [needle]
        reviews = LabelledFile(
            "reviews",
            self.backbone.tokenizer,
            REVIEWS,
            items=items.reviews,
            metric="calibrated_accuracy",
            seed=self.seed + seed,
            weight=REVIEWS_WEIGHT,
        )
        return [reviews, needle]

    def cost(self, throughput: str, prompt: int, output: int, repeats: int) -> Any:
        """`measured`: of ONNX Runtime int4, calibrated once and kept in `throughput.sqlite`. `assumed`: see there."""
        if throughput == "assumed":
            return AssumedCost(self.backbone.layers)
        if throughput != "measured":
            raise UsageError(f"--throughput {throughput}: accepted are measured, assumed")
        from dtr_deploy.engines.base import Workload
        from dtr_deploy.progress import CountingBar, for_terminal
        from dtr_deploy.run_dir import stage_key, versions
        from dtr_deploy.search.ledger import Ledger
        from dtr_deploy.serving import layout_opener
        from dtr_deploy.throughput.cache_bytes import CacheSize, cache_dtypes
        from dtr_deploy.throughput.calibrate import calibrate
        from dtr_deploy.throughput.measure import ThroughputMeter

        workload, backbone = Workload(prompt, output), self.backbone
        opener = layout_opener(backbone.model, backbone.tokenizer, self.window, "ort", "int4", prompt + output)
        inputs = stage_key(backbone.fingerprint, self.window, "ort", "int4", repeats, versions())
        cache = CacheSize(backbone.model.config, self.window, *cache_dtypes("ort", "int4"), workload)
        with Ledger(self.out / "throughput.sqlite") as ledger, CountingBar(for_terminal(), "throughput") as report:
            meter = ThroughputMeter(opener, workload, ledger, inputs, repeats, progress=report)
            cost = calibrate(meter, backbone.layers, dict.fromkeys(FORMS, backbone.layers - 1), cache)
        return PredictedCost(cost)

    def _needle(self, name: str, items: Items, count: int, seed: int) -> Any:
        from dtr_deploy.tasks.needle import Needle

        return Needle(
            name,
            self.backbone.tokenizer,
            lengths=(items.needle_length,),
            items=count,
            seed=seed,
            weight=NEEDLE_WEIGHT,
        )

    def _twins(self, distilled: Path | None, sequences: Any) -> dict[tuple[int, str], dict[str, Any]]:
        from dtr_deploy.distill.files import twin_file
        from dtr_deploy.distill.stage import distill, load_twins
        from dtr_deploy.distill.trainer import DistillSettings
        from dtr_deploy.progress import CountingBar, for_terminal

        folder = distilled or self.out / "distilled"
        layers = range(self.backbone.layers)
        files = {(layer, form): twin_file(folder, layer, form) for layer in layers for form in FORMS}
        missing = [file for file in files.values() if not file.exists()]
        if missing and distilled is not None:
            raise UsageError(
                f"--distilled {folder}: has no {missing[0].name}; accepted: twins of {' and '.join(FORMS)}"
            )
        if missing:
            settings = DistillSettings(tokens=sequences.numel(), seed=self.seed)
            with CountingBar(for_terminal(), "distill") as report:
                distill(
                    self.backbone.model,
                    sequences,
                    self.held_out,
                    FORMS,
                    list(layers),
                    self.window,
                    settings,
                    folder,
                    report,
                )
        return load_twins(files)
