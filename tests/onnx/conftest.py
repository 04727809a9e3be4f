"""Exports of tiny models, each made once a session, and the engines over them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtr_deploy.engines.ort import OrtEngine
from dtr_deploy.export.onnx import export_model
from tiny import VOCABULARY, tiny_backbone, tiny_hybrid, tiny_tokenizer

MIXED = (None, "gated_deltanet", "gla", "gated_deltanet")


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """Random prompts of the given lengths."""

    def make(*lengths: int) -> list[list[int]]:
        random = torch.Generator().manual_seed(0)
        return [torch.randint(8, VOCABULARY, (length,), generator=random).tolist() for length in lengths]

    return make


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """(model, folder) of a hybrid with the given forms, or of a backbone for forms=None."""
    made: dict[tuple, tuple[Any, Path]] = {}

    def export(
        family: str = "llama",
        forms: tuple[str | None, ...] | None = MIXED,
        window: int = 64,
        group: int = 3,
        precision: str = "fp32",
        provider: str = "cpu",
        **sizes: int,
    ) -> tuple[Any, Path]:
        key = (family, forms, window, group, precision, provider, *sizes.items())
        if key not in made:
            model = (
                tiny_backbone(family, group, **sizes)
                if forms is None
                else tiny_hybrid(family, forms, window, group, **sizes)
            )
            folder = tmp_path_factory.mktemp("onnx") / precision
            export_model(model, tiny_tokenizer(), folder, precision, provider)
            made[key] = model, folder
        return made[key]

    return export


@pytest.fixture(scope="session")
def engine() -> Callable[..., OrtEngine]:
    """An engine of one thread: several tests may share a machine."""
    return lambda folder, precision="fp32", **options: OrtEngine(folder, precision, threads=1, **options)
