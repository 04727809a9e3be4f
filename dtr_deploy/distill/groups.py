"""Twins in groups that are trained apart: one after another where memory is short, side by side on a cluster.

Twins do not influence one another, so groups compute what one run with all twins would, to the bit where they multiply
as it does. What a group finished is written at once; a build that goes on trains the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtr_deploy.distill.evaluate import TwinReport
from dtr_deploy.distill.files import twin_file, write_safetensors, write_text
from dtr_deploy.distill.stage import SUMMARY, DistillResult, Progress, distill, load_twins
from dtr_deploy.distill.trainer import DistillSettings

if TYPE_CHECKING:
    from torch import Tensor

TWIN_PASSES = 3.0
"""What training a twin takes over the teacher's pass through one layer. A rough guess, forward and twice as much back:
it decides how layers are shared out, not what is computed."""
HALF_WAY = "group-"
"""Folders of groups that are being trained."""


class Group(NamedTuple):
    """Twins that are trained together: every form in every layer."""

    layers: tuple[int, ...]
    forms: tuple[str, ...]

    @property
    def keys(self) -> list[tuple[int, str]]:
        return [(layer, form) for layer in self.layers for form in self.forms]

    def folder(self, run: Path) -> Path:
        """Where in the folder of all twins this group keeps what is half-way."""
        return run / f"{HALF_WAY}{hashlib.sha256(repr(self).encode()).hexdigest()[:16]}"


def groups(
    layers: Sequence[int], forms: Sequence[str], workers: int, most: int | None = None, members: int = 1
) -> list[Group]:
    """Groups of about equal work: `workers` of them at most, but more where a group would have over `most` twins for
    each of the `members` that `dealt` deals it to.

    Neighbouring layers go together, since a teacher's pass ends at the last one of its group; where there are more
    workers than layers, or fewer twins allowed than forms, forms are split too.
    """
    layers = sorted(layers)
    split = min(len(forms), max(1, workers // len(layers)))
    if most is not None:
        split = max(split, math.ceil(len(forms) / most))
    shares = [tuple(forms[number::split]) for number in range(split)]
    return [
        Group(tuple(some), share)
        for share in shares
        for some in _runs_of_layers(
            layers,
            TWIN_PASSES * len(share),
            max(1, workers // split),
            len(layers) if most is None else members * (most // len(share)),
        )
    ]


def _runs_of_layers(layers: Sequence[int], twins: float, count: int, longest: int) -> list[list[int]]:
    """At most `count` runs of neighbours (more if runs of `longest` layers do not hold them), the dearest as cheap as
    can be. A run costs the teacher's layers up to its last one, and `twins` for each of its own."""
    count = max(min(count, len(layers)), math.ceil(len(layers) / longest))
    low, high = 0.0, layers[-1] + 1 + twins * len(layers)
    best = _fill(layers, twins, high, longest) or []
    for _ in range(40):  # bisection of the dearest run's cost
        allowed = (low + high) / 2
        runs = _fill(layers, twins, allowed, longest)
        if runs is not None and len(runs) <= count:
            best, high = runs, allowed
        else:
            low = allowed
    return best


def _fill(layers: Sequence[int], twins: float, allowed: float, longest: int) -> list[list[int]] | None:
    """Runs of at most `longest` that each cost at most `allowed`, as few as there can be; None if one layer alone costs
    more."""
    runs: list[list[int]] = [[]]
    for layer in layers:
        if runs[-1] and (len(runs[-1]) == longest or layer + 1 + twins * (len(runs[-1]) + 1) > allowed):
            runs.append([])
        runs[-1].append(layer)
        if layer + 1 + twins * len(runs[-1]) > allowed:
            return None
    return runs


def dealt(group: Group, members: int) -> list[Group]:
    """A group as workers train it that share its pass of the teacher: `members` parts of about as many twins each.

    There are fewer parts where layers or forms do not come out even.
    """
    split = min(len(group.forms), max(1, members // len(group.layers)))
    count = min(len(group.layers), members // split)
    size, larger = divmod(len(group.layers), count)
    starts = [number * size + min(number, larger) for number in range(count + 1)]
    return [
        Group(group.layers[start:end], group.forms[number::split])
        for number in range(split)
        for start, end in pairwise(starts)
    ]


class GroupedTwins:
    """The folder of twins that are trained in groups: which are finished, and all of them at the end."""

    def __init__(self, folder: Path, layers: Sequence[int], forms: Sequence[str]) -> None:
        self.folder, self.forms = folder, forms
        self.keys = [(layer, form) for layer in sorted(layers) for form in forms]
        self.files = {key: twin_file(folder, *key) for key in self.keys}
        folder.mkdir(parents=True, exist_ok=True)

    def finished(self) -> DistillResult | None:
        """All twins, if they are there."""
        if not ((self.folder / SUMMARY).is_file() and all(file.is_file() for file in self.files.values())):
            return None
        saved = json.loads((self.folder / SUMMARY).read_text())
        reports = [TwinReport.from_dict(report) for report in saved["reports"]]
        return DistillResult(reports, self.files, saved["tokens"], saved["seconds"])

    def left(self, workers: int, most: int | None, members: int = 1) -> list[list[Group]]:
        """What is not finished, those half-way as they were: dealt out in the same way each time. Each item is what
        `members` workers train that share a pass of the teacher. most: twins that one of them trains."""
        layers = sorted({layer for layer, _ in self.keys})
        teams = []
        for group in groups(layers, self.forms, workers // members, most, members):
            left = [some for part in dealt(group, members) for some in self._left_of(part)]
            teams += [left[first : first + members] for first in range(0, len(left), members)]
        return teams

    def _left_of(self, group: Group) -> list[Group]:
        missing = [key for key in group.keys if not (self.files[key].is_file() and self._note(key).is_file())]
        if len(missing) == len(group.keys) or (missing and group.folder(self.folder).is_dir()):
            return [group]
        # Another number of workers had other groups: only what those did not finish.
        lacking: dict[tuple[str, ...], list[int]] = {}
        for layer in sorted({layer for layer, _ in missing}):
            forms = tuple(form for form in group.forms if (layer, form) in missing)
            lacking.setdefault(forms, []).append(layer)
        return [Group(tuple(layers), forms) for forms, layers in lacking.items()]

    def take(self, group: Group) -> bool:
        """Keep a group that is finished in its own folder, if it is."""
        folder = group.folder(self.folder)
        files = {key: twin_file(folder, *key) for key in group.keys}
        if not ((folder / SUMMARY).is_file() and all(file.is_file() for file in files.values())):
            return False
        saved = json.loads((folder / SUMMARY).read_text())
        reports = {(report["layer"], report["form"]): report for report in saved["reports"]}
        self.keep(group, load_twins(files), reports, saved["tokens"], saved["seconds"])
        return True

    def keep(
        self,
        group: Group,
        weights: Mapping[tuple[int, str], dict[str, Tensor]],
        reports: Mapping[tuple[int, str], dict[str, Any]],
        tokens: int,
        seconds: float,
    ) -> None:
        """Write what a group finished. seconds: of the whole group."""
        for key in group.keys:
            write_safetensors(self.files[key], weights[key], {})
            note = {"report": reports[key], "tokens": tokens, "seconds": seconds / len(group.keys)}
            write_text(self._note(key), json.dumps(note))

    def finish(self) -> DistillResult:
        """Put the groups together once all are kept."""
        notes = [json.loads(self._note(key).read_text()) for key in self.keys]
        summary = {
            "tokens": notes[0]["tokens"],
            "seconds": sum(note["seconds"] for note in notes),
            "reports": [note["report"] for note in notes],
        }
        write_text(self.folder / SUMMARY, json.dumps(summary, indent=1))
        for key in self.keys:
            self._note(key).unlink(missing_ok=True)
        for half_way in self.folder.glob(f"{HALF_WAY}*"):
            shutil.rmtree(half_way)
        found = self.finished()
        assert found is not None
        return found

    def _note(self, key: tuple[int, str]) -> Path:
        return self.files[key].with_suffix(".json")


def distill_in_groups(
    backbone: Any,
    sequences: Tensor,
    held_out: Tensor,
    forms: Sequence[str],
    layers: Sequence[int],
    window: int,
    settings: DistillSettings,
    folder: str | Path,
    progress: Progress = lambda done, total, message: None,
    twins_at_once: int = 1,
) -> DistillResult:
    """`stage.distill` with at most so many twins, and what their training needs, in memory: the same files and
    reports, for one pass of the teacher a group."""
    twins = GroupedTwins(Path(folder), layers, forms)
    if (found := twins.finished()) is not None:
        return found
    left = [group for team in twins.left(1, twins_at_once) for group in team]
    total = max(len(left), len(groups(layers, forms, 1, twins_at_once)))
    for number, group in enumerate(left, total - len(left)):

        def tell(done: int, steps: int, message: str, before: int = number) -> None:
            progress(before * steps + done, total * steps, f"{message}, group {before + 1} of {total}")

        result = distill(
            backbone, sequences, held_out, group.forms, group.layers, window, settings, group.folder(twins.folder), tell
        )
        reports = {(report.layer, report.form): report.to_dict() for report in result.reports}
        twins.keep(group, load_twins(result.files), reports, result.tokens, result.seconds)
        shutil.rmtree(group.folder(twins.folder))
    return twins.finish()
