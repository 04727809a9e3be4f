"""The models of the recall study: the base, hybrids, and the controls of each hybrid's layout, opened one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.backbone import Backbone
from dtr_deploy.hybrid.controls import CONTROLS, make_control
from dtr_deploy.hybrid.layout import Layout, describe, entries
from dtr_deploy.hybrid.model import load_hybrid, make_hybrid

BASE = "base"
ABOUT = {
    "no_op": "the same layers without attention",
    "window_only": "the same layers with the base's own attention cut to their windows",
}
HYBRID_FORMS = (
    "NAME=PATH, PATH a run's folder, a hybrid checkpoint, or a JSON file {layout: [...], window: W, distilled: FOLDER}"
)


@dataclass(frozen=True)
class Contender:
    """key: tells this model from every other; about: one line for the page; open: makes it, in evaluation mode."""

    name: str
    key: str
    about: str
    open: Callable[[], Any]


def contenders(backbone: Backbone, hybrids: Sequence[str], controls: bool) -> list[Contender]:
    """The base first, then each hybrid (`HYBRID_FORMS`) with its controls.

    Raises `UsageError` for a path that is none of these, a layout that does not fit the backbone, or a name used twice.
    """
    found = [Contender(BASE, backbone.fingerprint, "the unreplaced backbone", lambda: backbone.model)]
    for given in hybrids:
        name, separator, place = given.partition("=")
        if not separator or not name or name == BASE or any(name == other.name for other in found):
            raise UsageError(f"--hybrid {given}: accepted is {HYBRID_FORMS}, each name once and none {BASE!r}")
        found += of_layout(backbone, name, *_read(backbone, given, Path(place)), controls)
    return found


def of_layout(
    backbone: Backbone, name: str, layout: Layout, window: int, key: str, open_model: Callable[[], Any], controls: bool
) -> list[Contender]:
    """A hybrid and, if asked for, its layout with no-op and window-only layers."""
    if len(layout) != backbone.layers:
        raise UsageError(f"--hybrid {name}: a layout of {len(layout)} layers, the model has {backbone.layers}")
    found = [Contender(name, key, f"{describe(layout)}, window {window}", open_model)]
    for control in CONTROLS if controls else ():
        # What a control computes depends on which layers it replaces and on their windows, not on their forms.
        windows = [entry and (entry.window if control == "window_only" else 0) for entry in entries(layout, window)]
        made = partial(make_control, backbone.model, layout, control, window)
        found.append(
            Contender(f"{name} {control}", _hash(backbone.fingerprint, control, windows), ABOUT[control], made)
        )
    return found


def _read(backbone: Backbone, given: str, path: Path) -> tuple[Layout, int, str, Callable[[], Any]]:
    """Layout, window, key and opener of what `--hybrid` names."""
    folder = path / "hybrid" if (path / "hybrid" / "config.json").is_file() else path
    if (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder)
        if not hasattr(config, "dtr"):
            raise UsageError(f"--hybrid {given}: {folder / 'config.json'} has no key 'dtr'; accepted is {HYBRID_FORMS}")
        weights = sorted(folder.glob("*.safetensors"))
        key = _hash(config.dtr, *(hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in weights))
        return config.layout, config.window, key, lambda: load_hybrid(folder)[0]
    if not path.is_file():
        raise UsageError(f"--hybrid {given}: {path} is neither; accepted is {HYBRID_FORMS}")
    written = _json(path)
    try:
        layout, window, distilled = tuple(written["layout"]), int(written["window"]), Path(written["distilled"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--hybrid {given}: {path}: {error!r}; accepted is {HYBRID_FORMS}") from None
    return of_twins(backbone, layout, window, distilled if distilled.is_absolute() else path.parent / distilled)


def of_twins(
    backbone: Backbone, layout: Layout, window: int, distilled: Path
) -> tuple[Layout, int, str, Callable[[], Any]]:
    """A layout whose twins lie in the folder `distilled`."""
    from dtr_deploy.distill.files import twin_file
    from dtr_deploy.distill.stage import load_twins

    files = {(layer, form): twin_file(distilled, layer, form) for layer, form in enumerate(layout) if form is not None}
    if missing := [file for file in files.values() if not file.is_file()]:
        raise UsageError(f"{missing[0]}: no such twin")
    digests = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files.values()]
    key = _hash(backbone.fingerprint, layout, window, *digests)
    return layout, window, key, lambda: make_hybrid(backbone.model, layout, window, load_twins(files))


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file}: not JSON ({error})") from None


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
