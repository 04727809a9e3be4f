"""The second opinion: the chosen layout on a split the search never saw, and the way back if it fails there.

Every look at the confirm split weakens it, so few are taken: when a layout fails, the last of its changes is dropped,
then the last two, four and so on, until one holds; each must also be within bounds on the search split.
"""

from __future__ import annotations

from dataclasses import dataclass

from dtr_deploy.hybrid.layout import Layout, full, swap
from dtr_deploy.search.objective import LayoutScore, Loss, Visit
from dtr_deploy.search.problem import Limits, Problem


@dataclass(frozen=True)
class Confirmation:
    """winner: the layout that held, with its scores on the confirm split; the backbone always does. chosen: the one
    that the search split alone would have taken, with its confirm loss. walked_back: layouts that failed, in order."""

    winner: Visit
    score: LayoutScore
    base: LayoutScore
    chosen: Visit
    chosen_loss: Loss
    walked_back: list[Layout]


def confirm(problem: Problem) -> Confirmation:
    """Choose among all layouts visited, confirm, and walk back along the committed changes while that fails.

    Limits end the looking, not the confirming: scoring what walking back needs is not counted against them.
    """
    problem.limits = Limits()
    scorer = problem.scorer
    base = scorer.score(full(scorer.layers), "confirm")
    chosen = problem.objective.choose(list(problem.visits.values()))
    none = Loss.none(base, problem.confidence)
    if not chosen.replaced:
        return Confirmation(chosen, base, base, chosen, none, [])
    order = _committed_order(problem, chosen.layout)
    walked_back: list[Layout] = []
    losses: list[Loss] = []
    dropped = 0
    while dropped < len(order):
        layout = chosen.layout
        for layer in order[len(order) - dropped :]:
            layout = swap(layout, layer, None)
        visit = problem.visit(layout, f"{len(order) - dropped} of {scorer.layers} layers replaced")
        dropped = max(1, 2 * dropped)
        if not visit.passes:  # only possible on the way back
            problem.reject(visit, [])
            continue
        problem.report(f"confirming {visit.replaced} of {scorer.layers} layers replaced")
        score = scorer.score(layout, "confirm")
        losses.append(Loss.between(base, score, problem.confidence))
        if problem.objective.passes(losses[-1]):
            scorer.decide(layout, "committed", "confirm")
            problem.record("confirm", visit, confirm=losses[-1].to_dict())
            return Confirmation(visit, score, base, chosen, losses[0], walked_back)
        scorer.decide(layout, "walked_back", "confirm")
        scorer.decide(layout, "walked_back")
        problem.record("walk_back", visit, confirm=losses[-1].to_dict())
        walked_back.append(layout)
    return Confirmation(problem.visits[base.layout], base, base, chosen, losses[0], walked_back)


def _committed_order(problem: Problem, layout: Layout) -> list[int]:
    """The replaced layers of a layout in the order they were committed; those that never were come last."""
    order: list[tuple[int, str]] = []
    for step in problem.steps:
        if step["action"] == "commit":
            changes = [(layer, form) for layer, form in step.get("changes", [])]
            order = [change for change in order if change not in changes] + changes
    place = {change: index for index, change in enumerate(order)}
    replaced = [(layer, form) for layer, form in enumerate(layout) if form is not None]
    return [layer for layer, _ in sorted(replaced, key=lambda change: (place.get(change, len(place)), change))]
