"""Ranks single swaps by what they cost per second saved, from cheap screening scores.

Cost is divergence from the teacher *and* recall lost. Perplexity alone hides lost recall: on SmolLM2-135M one layer
(18) carries needle retrieval, costs almost no perplexity, and replacing it early makes every later layout fail.
"""

from __future__ import annotations

from collections.abc import Sequence

from dtr_deploy.hybrid.layout import Layout, full
from dtr_deploy.search.problem import Candidate, Problem, apply

DIVERGENCE_WEIGHT = 3.0
"""Nats of KL per token over nats of recall margin. A single swap's KL is a few hundredths of a nat, the margin a
bad swap loses is whole nats; at 3, twenty layers of SmolLM2-135M were replaced without losing recall."""


def harms(
    problem: Problem, start: Layout, candidates: Sequence[Candidate], divergence_weight: float = DIVERGENCE_WEIGHT
) -> dict[Candidate, float]:
    """Harm (nats) of each candidate alone on top of `start`, over what its form saves."""
    savings = form_savings(problem)
    before = problem.screen(start, "screening the layout so far")
    result = {}
    # Deepest layer first: the scorer keeps the hidden states of the layout it ran last, and this order shares most.
    for change in sorted(candidates, reverse=True):
        after = problem.screen(apply(start, [change]), f"screening {change}")
        result[change] = after.harm_beyond(before, divergence_weight) / savings[change.form]
    return result


def form_savings(problem: Problem) -> dict[str, float]:
    """Form -> time saved per layer when it is everywhere it can be, over that of the best form (1.0).

    A single layer's saving would mislead where costs are not a sum (vLLM's cache groups make the first replacements
    slower). A form that saves nothing gets a small positive number and so comes last.
    """
    layers = problem.scorer.layers
    saved = {}
    for form in sorted({candidate.form for candidate in problem.scorer.candidates}):
        changes = [candidate for candidate in problem.scorer.candidates if candidate.form == form]
        changes = changes[: layers - 1]
        everywhere = apply(full(layers), changes)
        saved[form] = (1.0 - 1.0 / problem.cost.predicted_speedup(everywhere)) / len(changes)
    best = max(saved.values())
    if best <= 0:
        return dict.fromkeys(saved, 1.0)
    return {form: max(value / best, 1e-3) for form, value in saved.items()}


def in_order(harm: dict[Candidate, float]) -> list[Candidate]:
    """Least harm first; equal harm in the order of layers."""
    return sorted(harm, key=lambda candidate: (harm[candidate], candidate))
