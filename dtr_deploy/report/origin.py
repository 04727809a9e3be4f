"""What a hybrid comes from, in the Hub's terms: base model, its license, data sets. Nothing here is guessed.

The license is what the backbone itself says: the model card of a hub id or of a folder, or the metadata of a GGUF file.
A backbone that says nothing has none.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dtr_deploy.recipe import Recipe
from dtr_deploy.report.schema import OriginRow

CARD = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
NOT_DATA_SETS = ("pydoc", "recall")
"""Corpus entries that are neither paths nor hub data sets."""
ANSWER_SECONDS = 10.0
"""How long a build waits for the Hub to say a license."""


def origin_of(recipe: Recipe, context: int) -> OriginRow:
    """The origin of a recipe's hybrid. context: tokens the backbone takes.

    Looks at the disk as the recipe does, because a relative folder and a hub id look alike. Asks the Hub for the
    license of a hub id; without an answer nothing is said about it.
    """
    base_model = hub_model(recipe)
    entries = [e for e in recipe.corpus if e not in NOT_DATA_SETS and not recipe.path(e).exists()]
    return OriginRow(
        base_model=base_model,
        license=license_on_hub(base_model, recipe.revision) if base_model else license_on_disk(recipe.model_spec()),
        datasets=list(dict.fromkeys(entry.partition(":")[0] for entry in entries)),
        context=context,
    )


def hub_model(recipe: Recipe) -> str | None:
    """The backbone's id if `model` is one, None for a folder, a GGUF file or a package."""
    model = recipe.model
    local = model.startswith(("package:", ".", "/", "~")) or model.endswith(".gguf") or recipe.path(model).exists()
    return None if local else model


def license_on_hub(model: str, revision: str | None = None) -> dict[str, str]:
    """The license of a model on the Hub, as its card says it; empty if the card cannot be had."""
    from huggingface_hub import HfApi

    try:
        card = HfApi().model_info(model, revision=revision, timeout=ANSWER_SECONDS).card_data
    except Exception:  # no network, no access, no such revision: whatever the reason, the license is not known
        return {}
    found = _license_keys(card.to_dict() if card else {})
    link = found.get("license_link", "")
    if link and "://" not in link:  # a file of the backbone's repository
        found["license_link"] = f"https://huggingface.co/{model}/blob/{revision or 'main'}/{link.removeprefix('./')}"
    return found


def license_on_disk(model: str) -> dict[str, str]:
    """The license of a folder, a GGUF file or a package's GGUF file, as it says itself."""
    from dtr_deploy.hybrid.backbone import locate

    folder, gguf = locate(model)
    if gguf is not None:
        return _license_of_gguf(gguf)
    found = license_of_card(Path(folder) / CARD)
    if "://" not in found.get("license_link", "://"):
        del found["license_link"]  # a file that lies beside the backbone, not beside the hybrid
    return found


def license_of_card(card: Path) -> dict[str, str]:
    """The license keys in the front matter of a model card; empty for a missing or damaged one."""
    from huggingface_hub.repocard import metadata_load

    try:
        data: dict[str, Any] = metadata_load(card) or {}
    except Exception:  # a backbone's damaged card is no reason to fail a build at its end
        return {}
    return _license_keys(data)


def _license_keys(data: dict[str, Any]) -> dict[str, str]:
    return {key: value for key in LICENSE_KEYS if isinstance(value := data.get(key), str) and value}


def _license_of_gguf(file: Path) -> dict[str, str]:
    """`general.license` if it is an identifier such as apache-2.0; a sentence would not be accepted in a card."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.license")
    value = "" if field is None else str(field.contents()).strip().lower()
    return {"license": value} if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", value) else {}
