"""Workers of a cluster that work on one thing together: all of them are there, or none begins; one that is lost ends
the attempt of all, and the next one begins with as many as the cluster still has room for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from typing import Any

from dtr_deploy.cluster.workers import RETRIES, Lost, Workers
from dtr_deploy.errors import DtrError

GRACE_SECONDS = 10.0
"""Whose peer is lost fails too, and may be heard first: so long, the loss itself is waited for."""
LOOK_SECONDS = 1.0


class Stopped(Exception):
    """The build ends for another reason."""


class Team:
    """Members are actors of `cls`, made with `arguments`. stopped: set when the build ends; whoever waits gives up."""

    def __init__(self, workers: Workers, cls: type, arguments: Sequence[Any], stopped: Event) -> None:
        self.workers, self.cls, self.arguments, self.stopped = workers, cls, arguments, stopped

    def insist(self, attempt: Callable[[], None]) -> None:
        """Call `attempt` until no worker is lost in it. Raises `DtrError` when that happens too often."""
        for left in reversed(range(RETRIES + 1)):
            try:
                return attempt()
            except Lost as error:
                if not left:
                    raise DtrError(f"cluster: a task lost its worker {RETRIES + 1} times ({error})") from error

    @contextmanager
    def assembled(self, count: int) -> Iterator[list[Any]]:
        """So many members, as close together as there is room, until the block ends. Waits for workers to be free;
        raises `Lost` where the cluster has no room for so many any more."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        workers = self.workers
        each = {"CPU": float(workers.cpus)} | ({"GPU": workers.gpus} if workers.gpus else {})
        group = placement_group([dict(each) for _ in range(count)], strategy="PACK")
        members: list[Any] = []
        try:
            ready = group.ready()
            while not ray.wait([ready], timeout=LOOK_SECONDS)[0]:
                self._go_on()
                if workers.places() < count:
                    raise Lost("the cluster has lost a node")
            options: dict[str, Any] = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "max_restarts": 0}
            for number in range(count):
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, number)
                actor: Any = ray.remote(**options)(self.cls)
                members.append(actor.remote(*self.arguments))
            yield members
        finally:
            for member in members:
                ray.kill(member)
            remove_placement_group(group)

    def get(self, reference: Any) -> Any:
        """A call's result, as `results` gives those of several."""
        return next(self.results([reference]))[1]

    def results(self, calls: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(number, result) of calls of members as they end. Raises what a call raised, `Lost` if its worker is gone."""
        import ray
        from ray import exceptions

        waiting = {call: number for number, call in enumerate(calls)}
        failures: list[exceptions.RayTaskError] = []
        until = 0.0
        while waiting:
            self._go_on()
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_SECONDS)
            for call in done:
                number = waiting.pop(call)
                try:
                    yield number, ray.get(call)
                except exceptions.RayTaskError as error:
                    if isinstance(error.cause, DtrError):
                        raise error.cause from None
                    failures.append(error)
                    until = time.monotonic() + GRACE_SECONDS
                except (
                    exceptions.WorkerCrashedError, exceptions.RayActorError, exceptions.OutOfMemoryError
                ) as error:  # fmt: skip
                    raise Lost(str(error).strip().splitlines()[0]) from error
            if failures and time.monotonic() > until:
                break
        if failures:
            raise failures[0]

    def _go_on(self) -> None:
        if self.stopped.is_set():
            raise Stopped
