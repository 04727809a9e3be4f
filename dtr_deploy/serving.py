"""Opens the engine that serves a model: finished folders of a run, and layouts that are only measured.

The pipeline, `verify`, `bench` and the search all come here, so that what is measured, what is proven and what is
shipped is served the same way.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtr_deploy.engines.base import Engine
from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.layout import Layout, replaced

VLLM_DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class ServedModel:
    """A model's folders: `checkpoint` (Hugging Face, for vLLM and PyTorch) and `onnx/PRECISION` (ONNX Runtime)."""

    checkpoint: Path
    onnx: Path

    def onnx_folder(self, precision: str) -> Path:
        return self.onnx / precision


def hybrid_of(run: Path) -> ServedModel:
    """The hybrid in a run's folder."""
    return ServedModel(run / "hybrid", run / "onnx")


def base_of(run: Path) -> ServedModel:
    """The unreplaced backbone in a run's folder, exported the same way for comparison."""
    return ServedModel(run / "base" / "checkpoint", run / "base" / "onnx")


def open_for_scores(engine: str, precision: str, model: ServedModel, max_length: int) -> Engine:
    """The engine as the parity gate uses it: teacher-forced log-probabilities of prompts up to `max_length` tokens."""
    if engine == "vllm":
        from dtr_deploy.engines.vllm import VllmEngine

        return VllmEngine(model.checkpoint, dtype=VLLM_DTYPE[precision], max_model_len=max_length + 1)
    if engine == "ort":
        from dtr_deploy.engines.ort import OrtEngine

        return OrtEngine(model.onnx_folder(precision), precision)
    raise UsageError(f"engine {engine!r} is unknown; accepted: ort, vllm")


def open_for_speed(engine: str, precision: str, model: ServedModel, max_length: int) -> Engine:
    """The engine as it is used in production: for `ort` that is onnxruntime-genai."""
    if engine == "vllm":
        from dtr_deploy.engines.vllm import VllmEngine

        return VllmEngine(model.checkpoint, dtype=VLLM_DTYPE[precision], max_model_len=max_length)
    if engine == "ort":
        from dtr_deploy.engines.genai import GenaiEngine

        return GenaiEngine(model.onnx_folder(precision), precision)
    raise UsageError(f"engine {engine!r} is unknown; accepted: ort, vllm")


def layout_opener(
    backbone: Any, tokenizer: Any, window: int, engine: str, precision: str, max_length: int
) -> Callable[[Layout], AbstractContextManager[Engine]]:
    """A function from a layout to its engine, for measuring: throughput depends on the layout, not on the weights.

    vLLM gets a config.json and fills in random weights; ONNX Runtime gets an export with start weights. Both live in a
    temporary folder that goes with the engine.
    """

    @contextmanager
    def opened(layout: Layout) -> Iterator[Engine]:
        from dtr_deploy.hybrid.model import make_hybrid
        from dtr_deploy.hybrid.placement import free_gpu_memory

        model = make_hybrid(backbone, layout, window) if replaced(layout) else backbone
        free_gpu_memory()  # what torch keeps for itself looks taken to an engine
        with (
            tempfile.TemporaryDirectory(prefix="dtr-layout-") as folder,
            closing(_open_in(Path(folder), model)) as served,
        ):
            yield served

    def _open_in(folder: Path, model: Any) -> Engine:
        if engine == "vllm":
            from dtr_deploy.engines.vllm import VllmEngine

            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return VllmEngine(folder, dtype=VLLM_DTYPE[precision], load_format="dummy", max_model_len=max_length)
        from dtr_deploy.export.onnx import export_model

        served = ServedModel(folder, folder)
        export_model(model, tokenizer, served.onnx_folder(precision), precision)
        return open_for_speed(engine, precision, served, max_length)

    return opened


def engines_open_at_once(engine: str) -> int:
    """How many of them may be timed in alternation. A vLLM process holds memory and threads while it waits."""
    return 1 if engine == "vllm" else 2
