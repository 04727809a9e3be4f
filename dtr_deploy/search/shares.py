"""The batches of a part of a split, dealt among processes that score it together.

Layouts of one call have most layers in common, so it is items that are dealt and not layouts: every process runs all
layouts of a call on its own batches, and keeps hidden states of those between calls. Batches are not cut: what a
process computes is what one process alone would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from dtr_deploy.search.evaluator import Finished
from dtr_deploy.tasks.request_task import Part
from dtr_deploy.tasks.scoring import ScoringBatch

TEXT = -1
"""Among numbers of tasks: the held-out text of a screening."""

Share = tuple[tuple[int, tuple[int, ...] | None], ...]
"""Of tasks, by number: which batches of the part, or None for all of a task that is not run by batches."""


class Piece(NamedTuple):
    """What is not cut. batch: None for a whole task. beginning: the columns that neighbouring batches share, run once
    by whoever has one of them; what it costs is not part of `cost`."""

    task: int
    batch: int | None
    cost: float
    beginning: tuple[int, bytes] | None = None
    beginning_cost: float = 0.0


def pieces_of(task: int, batches: Sequence[ScoringBatch], hidden_size: int) -> list[Piece]:
    """A task's batches. hidden_size: of the model, by which the cost of attention is weighed against products."""
    return [
        Piece(
            task,
            number,
            _cost(batch.tokens, batch.input_ids.shape[1], hidden_size),
            (task, batch.input_ids[0, : batch.shared].numpy().tobytes()) if batch.shared else None,
            _cost(batch.shared, batch.shared, hidden_size),
        )
        for number, batch in enumerate(batches)
    ]


def whole_piece(task: int, batches: Sequence[ScoringBatch], hidden_size: int) -> list[Piece]:
    """A task that one process runs as a whole. batches: about what that takes."""
    cost = sum(_cost(batch.tokens, batch.input_ids.shape[1], hidden_size) for batch in batches)
    return [Piece(task, None, cost)]


def _cost(tokens: int, width: int, hidden_size: int) -> float:
    """Of a layer over so many tokens of rows of this width: products with about 12 H^2 weights, causal attention with
    H / 2 of its two products for each token before."""
    return tokens * (1 + width / (12 * hidden_size))


def dealt(pieces: Sequence[Piece], loads: list[float]) -> list[Share]:
    """A share for each load, of about equal cost together with what they have. loads: are added to.

    The largest come first, each to who is done with it first. Pieces with a common beginning stay together, unless
    they are more than a process's share of the part.
    """
    mine: list[list[Piece]] = [[] for _ in loads]
    groups = _groups(pieces)
    fair = sum(map(_together, groups)) / len(loads)
    units = [some for group in groups for some in ([group] if _together(group) <= fair else [[one] for one in group])]
    for unit in sorted(units, key=_together, reverse=True):

        def added(number: int, unit: Sequence[Piece] = unit) -> float:
            begun = unit[0].beginning is not None and any(unit[0].beginning == one.beginning for one in mine[number])
            return sum(piece.cost for piece in unit) + (0.0 if begun else unit[0].beginning_cost)

        number = min(range(len(loads)), key=lambda number: (loads[number] + added(number), number))
        loads[number] += added(number)
        mine[number] += unit
    return [_share(some) for some in mine]


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Those with a common beginning together, each other one alone."""
    groups: dict[object, list[Piece]] = {}
    for number, piece in enumerate(pieces):
        groups.setdefault(number if piece.beginning is None else piece.beginning, []).append(piece)
    return list(groups.values())


def _together(group: Sequence[Piece]) -> float:
    """Cost of pieces with a common beginning, run by one process."""
    return sum(piece.cost for piece in group) + group[0].beginning_cost


def _share(pieces: Sequence[Piece]) -> Share:
    tasks = sorted({piece.task for piece in pieces})
    batches = {task: [piece.batch for piece in pieces if piece.task == task] for task in tasks}
    return tuple(
        (task, None if None in some else tuple(sorted(number for number in some if number is not None)))
        for task, some in batches.items()
    )


def part_of(part: Part, batches: Sequence[int]) -> tuple[Part, np.ndarray]:
    """Some batches of a part as one of its own (whose `items` are those of the whole part), and the places int64 of its
    requests among the part's."""
    chosen = [part.batches[number] for number in batches]
    at = np.unique(np.concatenate([batch.requests.numpy() for batch in chosen]))
    renumbered = [
        replace(batch, requests=batch.requests.new_tensor(np.searchsorted(at, batch.requests.numpy())))
        for batch in chosen
    ]
    return Part(part.items, part.requests[at], renumbered), at


def summed(results: Sequence[Finished], number: int) -> Finished:
    """Work, time and scalars of a layout's shares."""
    scalars: dict[str, Any] = {}
    for result in results:
        scalars |= result.scalars
    work = sum(result.layer_forwards for result in results)
    return Finished(number, {}, scalars, work, sum(result.seconds for result in results))


def joined_arrays(
    shares: Sequence[Share], results: Sequence[Finished], part_of_task: Callable[[int], Part]
) -> dict[str, np.ndarray]:
    """The arrays of all shares, as if everything had been run at once."""
    arrays: dict[str, np.ndarray] = {}
    for share, result in zip(shares, results, strict=True):
        for task, batches in share:
            mine = {f"{task}.{name}": array for name, array in of_task(result.arrays, task).items()}
            if batches is None or task == TEXT:
                arrays |= mine
                continue
            part = part_of_task(task)
            at = part_of(part, batches)[1]
            for name, array in mine.items():
                arrays.setdefault(name, np.zeros(len(part.requests), array.dtype))[at] = array
    return arrays


def of_task(arrays: Mapping[str, np.ndarray], number: int) -> dict[str, np.ndarray]:
    """The arrays of one task, under their own names."""
    prefix = f"{number}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
