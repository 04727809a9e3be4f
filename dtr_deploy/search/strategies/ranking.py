"""Ranks single swaps by what they cost per unit of performance gained, from cheap screening scores.

Cost is divergence from the teacher *and* recall lost. Perplexity alone hides lost recall: on SmolLM2-135M one layer
(18) carries needle retrieval, costs almost no perplexity, and replacing it early makes every later layout fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dtr_deploy.hybrid.layout import Layout, full
from dtr_deploy.search.objective import LayoutScore, Screening
from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.statistics import margin_standard_error

DIVERGENCE_WEIGHT = 3.0
"""Nats of KL per token over nats of recall margin. A single swap's KL is a few hundredths of a nat, the margin a
bad swap loses is whole nats; at 3, twenty layers of SmolLM2-135M were replaced without losing recall."""

SMALLEST_GAIN = 1e-3
"""Of a candidate that gains nothing, over the best one's: it comes last without dividing by zero."""


@dataclass(frozen=True)
class SwapCost:
    """What a single swap costs. kl: nats a token of divergence from the teacher added; recall: nats of margin lost over
    the recall tasks; margin: nats of the score's margin lost, with its standard error, where items of the score were
    looked at."""

    kl: float
    recall: float
    margin: float | None = None
    margin_error: float = 0.0

    @classmethod
    def of(cls, before: Screening, after: Screening) -> SwapCost:
        return cls(after.kl - before.kl, after.recall_lost(before))

    def harm(self, divergence_weight: float) -> float:
        """See `Screening.harm_beyond`."""
        return divergence_weight * self.kl + self.recall

    @property
    def price(self) -> float | None:
        """Margin lost; a loss below its standard error counts as one standard error."""
        return None if self.margin is None else max(self.margin, self.margin_error)

    def to_dict(self) -> dict[str, float | None]:
        return {"kl": self.kl, "recall": self.recall, "margin": self.margin}


def tried(
    problem: Problem, start: Layout, candidates: Sequence[Candidate], message: str = "screening single swaps"
) -> dict[Candidate, SwapCost]:
    """Cost of each candidate alone on top of `start`, from a screening of each."""
    # Deepest layer first: a scorer keeps the hidden states of the layout it ran last, and this order shares most.
    order = sorted(candidates, reverse=True)
    before, *after = problem.screen_many([start, *(apply(start, [change]) for change in order)], message)
    return {change: SwapCost.of(before, screening) for change, screening in zip(order, after, strict=True)}


def estimated(
    problem: Problem, start: Layout, candidates: Sequence[Candidate], priced: bool = False
) -> dict[Candidate, SwapCost]:
    """`tried` by attribution, and (if `priced`) with margins on the first part of the items, for about what three swaps
    cost to try. Only of a scorer that is `attributable`."""
    layouts = [start, *(apply(start, [change]) for change in candidates)]
    before, *after = problem.attribute_many(start, layouts, priced, "estimating all swaps at once")
    costs = {}
    for change, estimate in zip(candidates, after, strict=True):
        costs[change] = SwapCost.of(before.screening, estimate.screening)
        if before.score is not None and estimate.score is not None:
            costs[change] = with_margin(costs[change], before.score, estimate.score)
    return costs


def with_margin(cost: SwapCost, start: LayoutScore, score: LayoutScore) -> SwapCost:
    """`cost` with the margin that a change of `start` loses."""
    noise = margin_standard_error(start.tasks, score.tasks, score.weights)
    return replace(cost, margin=start.margin - score.margin, margin_error=noise if math.isfinite(noise) else 0.0)


def price(start: LayoutScore, score: LayoutScore, gain: float) -> float:
    """Margin (nats) that a change of `start` loses, over its gain. See `SwapCost.price`."""
    found = with_margin(SwapCost(0.0, 0.0), start, score).price
    assert found is not None
    return found / gain


def harms(
    costs: Mapping[Candidate, SwapCost], gain: Mapping[Candidate, float], divergence_weight: float = DIVERGENCE_WEIGHT
) -> dict[Candidate, float]:
    """Harm (nats) of each candidate over its gain."""
    return {candidate: cost.harm(divergence_weight) / gain[candidate] for candidate, cost in costs.items()}


def gains(problem: Problem) -> dict[Candidate, float]:
    """How much each candidate lowers the objective's burden, over the candidate that lowers it most (1.0).

    A single swap on the backbone would mislead where costs are not a sum (vLLM's cache groups make the first
    replacements slower). So a form's gain is that of all layers that can have it, shared equally; what tells its
    layers apart is what each adds to half of the others.
    """
    burden = problem.objective.burden
    layers = problem.scorer.layers
    base = burden(problem.cost.predicted(full(layers)))
    gain: dict[Candidate, float] = {}
    for form in sorted({candidate.form for candidate in problem.scorer.candidates}):
        changes = [candidate for candidate in problem.scorer.candidates if candidate.form == form]
        most = min(len(changes), layers - 1)
        share = (base - burden(problem.cost.predicted(apply(full(layers), changes[:most])))) / most
        # Every layer is added to the half of the others that it is not in; both halves are equally large.
        halves = [apply(full(layers), changes[start::2][: len(changes) // 2]) for start in (1, 0)]
        before = [burden(problem.cost.predicted(half)) for half in halves]
        own = [
            before[index % 2] - burden(problem.cost.predicted(apply(halves[index % 2], [change])))
            for index, change in enumerate(changes)
        ]
        gain |= {change: share + its_own - float(np.mean(own)) for change, its_own in zip(changes, own, strict=True)}
    best = max(gain.values())
    if best <= 0:
        return dict.fromkeys(gain, 1.0)
    return {change: max(value / best, SMALLEST_GAIN) for change, value in gain.items()}


class Belief:
    """What is believed of every candidate's harm, from two signs: the screening, and the price on items of the score.

    Either alone misleads: the screening is of other text, the price of few items. So they are averaged as logarithms,
    prices scaled to harms by the median of their ratios. A harm below a tenth of the median counts as that: no harm
    seen in a screening does not outweigh any price.
    """

    def __init__(self, harm: Mapping[Candidate, float]) -> None:
        self.harm = dict(harm)
        self.price: dict[Candidate, float] = {}

    def of(self, candidates: Iterable[Candidate]) -> dict[Candidate, float]:
        """Harm believed of each; of those without a price yet, as screened."""
        floor = 0.1 * max(float(np.median(list(self.harm.values()))), 0.0)
        harm = {candidate: max(value, floor) for candidate, value in self.harm.items()}
        ratios = [price / harm[candidate] for candidate, price in self.price.items() if harm[candidate] > 0]
        scale = float(np.median(ratios)) if ratios else 0.0
        if scale <= 0:
            return {candidate: self.harm[candidate] for candidate in candidates}
        return {
            candidate: math.sqrt(harm[candidate] * self.price[candidate] / scale)
            if candidate in self.price
            else harm[candidate]
            for candidate in candidates
        }


def in_order(harm: Mapping[Candidate, float]) -> list[Candidate]:
    """Least harm first; equal harm in the order of layers."""
    return sorted(harm, key=lambda candidate: (harm[candidate], candidate))


def one_per_layer(order: Iterable[Candidate]) -> list[Candidate]:
    """The first candidate of each layer, order kept."""
    first: dict[int, Candidate] = {}
    for candidate in order:
        first.setdefault(candidate.layer, candidate)
    return list(first.values())
