"""The hybrid as a Hugging Face folder: checkpoint and tokenizer. The card beside them is `model_card`'s."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.export.model_card import CARD
from dtr_deploy.hybrid.layout import Layout

if TYPE_CHECKING:
    from dtr_deploy.hybrid.backbone import Backbone


def export_checkpoint(
    backbone: Backbone, layout: Layout, window: int, twins: Mapping[tuple[int, str], Mapping[str, Any]], folder: Path
) -> list[Path]:
    """Write config, safetensors and tokenizer of the hybrid to `folder`; returns the files (the card comes later)."""
    from dtr_deploy.hybrid.model import make_hybrid, save_hybrid

    chosen = {(layer, form): twins[layer, form] for layer, form in enumerate(layout) if form is not None}
    save_hybrid(make_hybrid(backbone.model, layout, window, chosen), backbone.tokenizer, folder)
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CARD)
