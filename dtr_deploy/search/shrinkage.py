"""The winner's curse: by how much a chosen layout's loss is expected to be larger on new items than it looked.

The layout that wins on the search split has won partly by luck with these items, the more so the more layouts were
compared. `expected_shrinkage` estimates that part by letting chance decide again: it draws items with replacement,
repeats the *whole choice* among all layouts visited on each draw, and compares what the layout chosen there loses on
the draw with what it loses on the actual items, which stand in for the population. The mean difference is the optimism
of Efron (Estimating the error rate of a prediction rule, JASA 78, 1983, 316-331; Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, section 17.6). Where many layouts are truly equal it falls short by up to a factor of sqrt(2),
for the actual items separate them already; what was dropped on a part of the items is not repeated either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtr_deploy.search.objective import LayoutScore, Loss, Objective, Visit
from dtr_deploy.search.resampling import Group, drawn_means

RESAMPLES = 1000
"""Draws; the mean over them has a Monte Carlo error of 3% of one draw's spread."""


@dataclass(frozen=True)
class Shrinkage:
    """The layout chosen on the search split, before any walk-back: its loss there, and on items it was not chosen by.

    expected: how much larger its loss is expected to be on new items. observed: how much larger it was on the confirm
    split, with the standard error of that difference (the two splits are independent). compared: layouts visited.
    """

    replaced: int
    compared: int
    search_loss: float
    expected: float
    confirm_loss: float
    observed: float
    observed_standard_error: float

    def to_dict(self) -> dict[str, Any]:
        error = self.observed_standard_error
        return {**vars(self), "observed_standard_error": error if np.isfinite(error) else None}

    @classmethod
    def of(cls, chosen: Visit, expected: float, compared: int, confirmed: Loss) -> Shrinkage:
        return cls(
            chosen.replaced,
            compared,
            chosen.loss.combined,
            expected,
            confirmed.combined,
            confirmed.combined - chosen.loss.combined,
            float(np.hypot(confirmed.standard_error, chosen.loss.standard_error)),
        )


def expected_shrinkage(
    objective: Objective,
    base: LayoutScore,
    visits: Sequence[Visit],
    scores: Sequence[LayoutScore],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Expected rise of the chosen layout's combined loss on new items. See the module for the method.

    visits, scores: all layouts compared, the backbone among them, in one order; scores of whole splits on the items of
    `base`.
    """
    count = len(visits)
    weights = np.asarray(base.weights) / sum(base.weights)
    drawn_losses, drawn_margins, actual = [], [], []
    for task in range(len(base.tasks)):
        losses = np.stack([base.tasks[task].per_item - score.tasks[task].per_item for score in scores], axis=1)
        margins = np.stack([score.tasks[task].margins for score in scores], axis=1)
        drawn = drawn_means(_strata(base, task, np.hstack([losses, margins])), resamples, seed + task)
        drawn_losses.append(drawn[:, :count])
        drawn_margins.append(drawn[:, count:])
        actual.append(losses.mean(axis=0))
    combined = np.tensordot(weights, np.stack(drawn_losses), axes=1)
    margin = np.tensordot(weights, np.stack(drawn_margins), axes=1)
    largest = np.max(np.stack(drawn_losses), axis=0)
    loss = weights @ np.stack(actual)

    upper = objective.bound == "upper"
    reach = np.array([visit.loss.upper - visit.loss.combined if upper else 0.0 for visit in visits])
    task_reach = np.array([_task_reach(visit) if upper else 0.0 for visit in visits])
    shortfall = np.array([objective.targets.shortfall(visit.performance) for visit in visits])
    speedup = np.array([visit.speedup for visit in visits])
    backbone = np.array([visit.replaced == 0 for visit in visits])
    optimism = []
    for draw in range(resamples):
        passes = backbone | objective.within_many(combined[draw] + reach, largest[draw] + task_reach)
        chosen = objective.choose_index(passes, shortfall, speedup, -combined[draw], margin[draw])
        optimism.append(loss[chosen] - combined[draw, chosen])
    return float(np.mean(optimism))


def _strata(base: LayoutScore, task: int, values: np.ndarray) -> list[Group]:
    """Columns of one task, by stratum; shares are of the task."""
    names = np.asarray(base.tasks[task].strata or ("",) * len(values))
    return [Group(values[names == name], float(np.mean(names == name))) for name in dict.fromkeys(names.tolist())]


def _task_reach(visit: Visit) -> float:
    return max((visit.loss.task_uppers[name] - loss for name, loss in visit.loss.tasks.items()), default=0.0)
