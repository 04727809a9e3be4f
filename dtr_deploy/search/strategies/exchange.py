"""The last pass of a search: is every layer of the chosen layout worth its place?

Layers were committed one after another, each on top of what was there then. At the end, the layers of the chosen layout
that cost most *there* are put back to full attention, given another form, or exchanged with the best layers that were
left out. A change is kept if it scores better with confidence at no loss of performance, or as well at a gain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dtr_deploy.hybrid.layout import Layout, replaced, swap
from dtr_deploy.search.objective import Objective, Visit
from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.statistics import cautious_difference
from dtr_deploy.search.strategies.race import Entry, race
from dtr_deploy.search.strategies.ranking import harms, in_order, one_per_layer, tried
from dtr_deploy.throughput.performance import Performance

NEWCOMERS = 2
"""Layers with full attention that are tried in place of others."""
SAME_PERFORMANCE = 1e-3
"""Relative difference below which two layouts are equally fast: far below what a measurement can tell."""


def exchange(problem: Problem, gain: Mapping[Candidate, float], exchanges: int, divergence_weight: float) -> None:
    """Try to improve on `objective.choose` of what was visited; a layout that is better is appended to the path.

    At most `exchanges` layers are tried, the most harmful first, each on top of the changes kept before.
    """
    current = problem.objective.choose(list(problem.visits.values()))
    if current.replaced < 2:
        return
    if problem.scorer.attributable:
        newcomers, harmful = _estimated(problem, current.layout, gain, divergence_weight)
    else:
        newcomers = _newcomers(problem, current.layout, gain, divergence_weight)
        harmful = _most_harmful(problem, current.layout, divergence_weight)
    for layer in harmful[:exchanges]:
        entries = _entries(problem, current, layer, newcomers)
        if not entries:
            continue
        outcome = race(problem, current.layout, entries, f"in place of layer {layer}", no_worse=True)
        if outcome.winner is None or outcome.visit is None:
            continue
        if _better(problem, outcome.visit, current):
            problem.commit(outcome.visit, outcome.winner.changes, taken_back=[[layer, current.layout[layer]]])
            current = outcome.visit
            newcomers = [new for new in newcomers if current.layout[new.layer] is None]
        else:
            problem.reject(outcome.visit, outcome.winner.changes, taken_back=[[layer, current.layout[layer]]])


def _estimated(
    problem: Problem, layout: Layout, gain: Mapping[Candidate, float], divergence_weight: float
) -> tuple[list[Candidate], list[int]]:
    """`_newcomers` and `_most_harmful`, by attribution on top of `layout`."""
    left = [candidate for candidate in sorted(problem.scorer.candidates) if layout[candidate.layer] is None]
    taken = [layer for layer, form in enumerate(layout) if form is not None]
    layouts = [apply(layout, [candidate]) for candidate in left] + [swap(layout, layer, None) for layer in taken]
    whole, *changed = problem.attribute_many(layout, [layout, *layouts], False, "estimating exchanges")
    screenings = [estimate.screening for estimate in changed]
    harm = {
        candidate: screening.harm_beyond(whole.screening, divergence_weight) / gain[candidate]
        for candidate, screening in zip(left, screenings, strict=False)
    }
    back = dict(zip(taken, screenings[len(left) :], strict=True))
    harmful = sorted(taken, key=lambda layer: (-whole.screening.harm_beyond(back[layer], divergence_weight), layer))
    return one_per_layer(in_order(harm))[:NEWCOMERS], harmful


def _newcomers(
    problem: Problem, layout: Layout, gain: Mapping[Candidate, float], divergence_weight: float
) -> list[Candidate]:
    """The best candidates among the layers that kept full attention, on top of `layout`."""
    left = [candidate for candidate in sorted(problem.scorer.candidates) if layout[candidate.layer] is None]
    if not left:
        return []
    harm = harms(tried(problem, layout, left, "screening the layers left out"), gain, divergence_weight)
    return one_per_layer(in_order(harm))[:NEWCOMERS]


def _most_harmful(problem: Problem, layout: Layout, divergence_weight: float) -> list[int]:
    """Replaced layers, first those whose return to full attention helps the screening most."""
    order = [layer for layer, form in enumerate(layout) if form is not None][::-1]  # deepest first: most is shared
    message = "screening the layers of the chosen layout"
    whole, *without = problem.screen_many([layout, *(swap(layout, layer, None) for layer in order)], message)
    harm = {
        layer: whole.harm_beyond(screening, divergence_weight) for layer, screening in zip(order, without, strict=True)
    }
    return sorted(order, key=lambda layer: (-harm[layer], layer))


def _entries(problem: Problem, current: Visit, layer: int, newcomers: Sequence[Candidate]) -> list[Entry]:
    """`layer` with full attention, with its other forms, and each newcomer in its place, if performance allows."""
    without = swap(current.layout, layer, None)
    others = [c for c in problem.scorer.candidates if c.layer == layer and c.form != current.layout[layer]]
    changes: list[tuple[Candidate, ...]] = [(), *((change,) for change in [*others, *newcomers])]
    entries = [Entry(apply(without, change), change, 1.0) for change in changes]
    allowed = _allowed(problem.objective, current.performance)
    return [
        entry
        for entry in entries
        if replaced(entry.layout) and problem.objective.burden(problem.cost.performance(entry.layout)) <= allowed
    ]


def _allowed(objective: Objective, performance: Performance) -> float:
    """The largest burden a change may lead to: that of now, or for goal "score" the targets just met."""
    now = objective.burden(performance) * (1 + SAME_PERFORMANCE)
    return max(now, 1.0) if objective.goal == "score" else now


def _better(problem: Problem, new: Visit, current: Visit) -> bool:
    scores = [problem.scorer.score(visit.layout) for visit in (new, current)]
    gained = cautious_difference(scores[0].tasks, scores[1].tasks, scores[0].weights, confidence=problem.confidence)
    if gained.low > 0:
        return True
    burden = problem.objective.burden
    faster = burden(new.performance) < burden(current.performance) * (1 - SAME_PERFORMANCE)
    return faster and new.score >= current.score
