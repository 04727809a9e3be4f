"""Simple orders to compare with: rank once, spread evenly, shuffle. The longest prefix of the order that is good
enough.

With a speedup to reach and nothing else (goal "score"), the shortest prefix that is fast enough is taken unseen, as
these methods do in the literature. Otherwise the prefix is found by bisection, which supposes that more layers score
less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.strategies.ranking import DIVERGENCE_WEIGHT, harms, in_order


@dataclass(frozen=True)
class OneShot:
    """All layers in the order of their single-swap harm, ranked once."""

    divergence_weight: float = DIVERGENCE_WEIGHT
    name: ClassVar[str] = "one_shot"

    def run(self, problem: Problem) -> None:
        candidates = sorted(problem.scorer.candidates)
        problem.expected = 1 + len(candidates) + 6
        order = in_order(harms(problem, problem.committed.layout, candidates, self.divergence_weight))
        take_prefix(problem, _one_per_layer(order))


@dataclass(frozen=True)
class Uniform:
    """Layers spread evenly over the depth, however many are taken; the first form (in the order of names) of each."""

    name: ClassVar[str] = "uniform"

    def run(self, problem: Problem) -> None:
        problem.expected = 6
        candidates = _one_per_layer(sorted(problem.scorer.candidates))
        bits = max(1, (len(candidates) - 1).bit_length())

        def reversed_bits(index: int) -> int:  # van der Corput's sequence: every prefix of the order is spread evenly
            return int(f"{index:0{bits}b}"[::-1], 2)

        take_prefix(problem, [candidates[i] for i in sorted(range(len(candidates)), key=reversed_bits)])


@dataclass(frozen=True)
class Random:
    """Layers and forms in random order."""

    seed: int = 0
    name: ClassVar[str] = "random"

    def run(self, problem: Problem) -> None:
        problem.expected = 6
        candidates = sorted(problem.scorer.candidates)
        random.Random(self.seed).shuffle(candidates)
        take_prefix(problem, _one_per_layer(candidates))


def take_prefix(problem: Problem, order: list[Candidate]) -> None:
    """Commit one prefix of `order`: the shortest that is fast enough (goal "score"), else the longest within bounds."""
    order = order[: problem.room]
    start = problem.committed.layout
    objective = problem.objective
    if objective.goal == "score":
        counts = [
            n for n in range(1, len(order) + 1) if objective.fast_enough(problem.cost.speedup(apply(start, order[:n])))
        ]
        count = counts[0] if counts else len(order)
        problem.commit(problem.visit(apply(start, order[:count])), order[:count])
        return
    low, high = 0, len(order)  # prefix `low` is within bounds, prefix `high + 1` is not
    while low < high:
        middle = (low + high + 1) // 2
        visit = problem.visit(apply(start, order[:middle]), f"{middle} of {problem.scorer.layers} layers replaced")
        if visit.passes:
            low = middle
        else:
            problem.reject(visit, order[:middle])
            high = middle - 1
    if low:
        problem.commit(problem.visit(apply(start, order[:low])), order[:low])


def _one_per_layer(order: list[Candidate]) -> list[Candidate]:
    """The first candidate of each layer, order kept."""
    first: dict[int, Candidate] = {}
    for candidate in order:
        first.setdefault(candidate.layer, candidate)
    return list(first.values())
