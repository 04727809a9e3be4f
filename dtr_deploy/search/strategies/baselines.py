"""Simple orders to compare with: rank once, spread evenly, shuffle. The longest prefix of the order that is good
enough.

With a target to reach and nothing else (goal "score"), the shortest prefix that reaches it is taken unseen, as these
methods do in the literature. For the frontier, every third prefix is scored. Otherwise the prefix is found by
bisection, which supposes that more layers score less.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from dtr_deploy.search.problem import Candidate, Problem, apply
from dtr_deploy.search.strategies.ranking import DIVERGENCE_WEIGHT, gains, harms, in_order, one_per_layer, tried

FRONTIER_STEP = 3
"""Layers between two prefixes of a frontier."""


@dataclass(frozen=True)
class OneShot:
    """All layers in the order of their single-swap harm, ranked once."""

    divergence_weight: float = DIVERGENCE_WEIGHT
    name: ClassVar[str] = "one_shot"

    def run(self, problem: Problem) -> None:
        candidates = sorted(problem.scorer.candidates)
        problem.expected = 1 + len(candidates) + 6
        costs = tried(problem, problem.committed.layout, candidates)
        harm = harms(costs, gains(problem), self.divergence_weight)
        take_prefix(problem, one_per_layer(in_order(harm)))


@dataclass(frozen=True)
class Uniform:
    """Layers spread evenly over the depth, however many are taken; the first form (in the order of names) of each."""

    name: ClassVar[str] = "uniform"

    def run(self, problem: Problem) -> None:
        problem.expected = 6
        candidates = one_per_layer(sorted(problem.scorer.candidates))
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
        take_prefix(problem, one_per_layer(candidates))


def take_prefix(problem: Problem, order: list[Candidate]) -> None:
    """Commit prefixes of `order` as the goal asks: see the module."""
    order = order[: problem.room]
    if problem.objective.goal == "score":
        _shortest_that_is_enough(problem, order)
    elif problem.objective.goal == "frontier":
        _every_third(problem, order)
    else:
        _longest_within_bounds(problem, order)


def _shortest_that_is_enough(problem: Problem, order: list[Candidate]) -> None:
    start, targets = problem.committed.layout, problem.objective.targets
    for count in range(1, len(order) + 1):
        if count == len(order) or targets.met(problem.cost.performance(apply(start, order[:count]))):
            problem.commit(problem.visit(apply(start, order[:count])), order[:count])
            return


def _every_third(problem: Problem, order: list[Candidate]) -> None:
    counts = sorted({*range(FRONTIER_STEP, len(order) + 1, FRONTIER_STEP), len(order)} - {0})
    problem.expected += len(counts)
    start, done = problem.committed.layout, 0
    for count in counts:
        visit = problem.visit(apply(start, order[:count]), f"{count} of {problem.scorer.layers} layers replaced")
        problem.commit(visit, order[done:count])
        done = count


def _longest_within_bounds(problem: Problem, order: list[Candidate]) -> None:
    start = problem.committed.layout
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
