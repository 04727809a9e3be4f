"""Strategies: in which order layers are tried. One file each, one interface, no knowledge of models or engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from dtr_deploy.errors import UsageError
from dtr_deploy.search.problem import OutOfBudget, Problem
from dtr_deploy.search.strategies.baselines import OneShot, Random, Uniform
from dtr_deploy.search.strategies.exhaustive import Exhaustive
from dtr_deploy.search.strategies.racing import Racing


class Strategy(Protocol):
    """Visits layouts of a problem and commits the ones it goes on from; `problem.path` is its result."""

    name: ClassVar[str]

    def run(self, problem: Problem) -> None: ...


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "racing": Racing,
    "exhaustive": Exhaustive,
    "one_shot": OneShot,
    "uniform": Uniform,
    "random": Random,
}


def make_strategy(name: str) -> Strategy:
    """A strategy with its default settings. Raises `UsageError` for an unknown name."""
    if name not in STRATEGIES:
        raise UsageError(f"search.strategy: {name!r} is unknown; accepted: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]()


def run(strategy: Strategy, problem: Problem) -> None:
    """Run a strategy until it has nothing left to try or the search's limits are reached."""
    try:
        strategy.run(problem)
    except OutOfBudget as end:
        problem.record("out_of_budget", reason=str(end))


__all__ = ["STRATEGIES", "Exhaustive", "OneShot", "Racing", "Random", "Strategy", "Uniform", "make_strategy", "run"]
