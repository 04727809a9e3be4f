"""A Ray cluster as a build sees it: how to reach it, how many workers it has room for, and what they load."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtr_deploy.errors import DtrError, UsageError

if TYPE_CHECKING:
    from dtr_deploy.hybrid.backbone import Backbone
    from dtr_deploy.recipe_sections import Cluster

HERE, AUTO = "none", "auto"
ANSWER_SECONDS = 10.0
"""How long an address may take to answer."""
RETRIES = 5
"""Times that a task is begun anew after its worker was lost. One that fails by itself is not repeated."""


class Lost(Exception):
    """A worker is gone, or the room for it."""


@dataclass(frozen=True)
class Workers:
    """count: processes at once. cpus, gpus: of each. team: how many of them share a pass of the teacher."""

    count: int
    cpus: int
    gpus: float
    team: int = 1

    def places(self) -> int:
        """How many there is room for now, busy or not: fewer than `count` after a node was lost."""
        import ray

        return min(self.count, sum(_places(ray.nodes(), self.cpus, self.gpus)))

    def task(self, function: Callable[..., Any], **options: Any) -> Any:
        """A function as a remote one, with a worker's resources."""
        import ray

        return ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES, **options)(function)

    def actor(self, cls: type, **options: Any) -> Any:
        """A class as one whose objects live in workers; lost ones are made again, and their calls repeated."""
        import ray

        return ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=-1, max_task_retries=RETRIES, **options)(
            cls
        )


@contextmanager
def connected(settings: Cluster, tell: Callable[[str], None]) -> Iterator[Workers | None]:
    """The workers of the recipe's cluster while the block runs; None where everything is to run in this process.

    Raises `UsageError` for a cluster that cannot be reached or has no room for a worker, and where `ray` is missing.
    """
    if settings.address == HERE:
        yield None
        return
    if find_spec("ray") is None:
        if settings.address != AUTO:
            raise UsageError("cluster: needs the Python package ray: pip install 'dtr-deploy[cluster]'")
        tell("cluster: ray is not installed, everything runs in this process")
        yield None
        return
    import ray

    joined = not ray.is_initialized()
    if joined and not _join(settings.address):
        tell("cluster: no Ray cluster is running, everything runs in this process")
        yield None
        return
    try:
        workers = room(ray.nodes(), settings)
        gpus = f", {workers.gpus:g} GPUs" if workers.gpus else ""
        tell(f"cluster: {workers.count} workers with {workers.cpus} cores{gpus} each")
        yield workers
    finally:
        if joined:
            ray.shutdown()


def _join(address: str) -> bool:
    """Whether `address` (`auto`: any cluster that runs here) was joined."""
    import ray

    accepted = "accepted: none, auto, or HOST:PORT of a Ray cluster"
    if address != AUTO:
        _answers(address, accepted)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, namespace="dtr-deploy")
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address == AUTO and isinstance(error, ConnectionError):
            return False
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"cluster.address: {address} cannot be joined ({reason}); {accepted}") from error
    return True


def _answers(address: str, accepted: str) -> None:
    """Raise `UsageError` unless something listens at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"cluster.address: {address} is no address; {accepted}")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"cluster.address: {address} cannot be joined ({error}); {accepted}") from error


def room(nodes: Sequence[Mapping[str, Any]], settings: Cluster) -> Workers:
    """How many workers fit, by what the recipe and the nodes say: one a GPU where there are any, else one a node."""
    found = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    if not found:
        raise UsageError("cluster: no node of it has a CPU to give")
    gpus = settings.gpus
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU") for node in found) else 0.0
    able = [node for node in found if node.get("GPU", 0) >= gpus]
    if not able:
        raise UsageError(f"cluster.gpus: no node has {gpus:g} GPUs; accepted: at most what a node has")
    smallest = min(int(node["CPU"] // max(1, node.get("GPU", 0) // gpus if gpus else 1)) for node in able)
    cpus = settings.cpus or max(1, smallest)
    places = _places(nodes, cpus, gpus)
    if not places:
        raise UsageError(
            f"cluster.cpus: no node has {cpus} cores; accepted: at most {int(max(n['CPU'] for n in able))}"
        )
    count = min(sum(places), settings.workers or sum(places))
    # Between machines GPUs would wait for activations; what CPUs compute arrives faster than they compute it.
    team = settings.share_teacher or (min(places) if gpus else count)
    return Workers(count, cpus, gpus, min(team, count))


def _places(nodes: Sequence[Mapping[str, Any]], cpus: int, gpus: float) -> list[int]:
    """Workers of this size that each node has room for, without nodes that have none."""
    found = [node["Resources"] for node in nodes if node["Alive"]]
    room = [
        min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else node.get("CPU", 0)) for node in found
    ]
    return [int(places) for places in room if places >= 1]


@dataclass(frozen=True)
class Source:
    """Where a worker finds the backbone, and what it has to be."""

    spec: str
    revision: str | None
    trust_remote_code: bool
    fingerprint: str
    device: str = "auto"
    """Of the recipe; a worker sees the GPUs that Ray gave it."""

    @classmethod
    def of(
        cls, backbone: Backbone, revision: str | None = None, trust_remote_code: bool = False, device: str = "auto"
    ) -> Source:
        spec = str(Path(backbone.spec).resolve()) if Path(backbone.spec).exists() else backbone.spec
        return cls(spec, revision, trust_remote_code, backbone.fingerprint, device)


@lru_cache(maxsize=1)
def load(source: Source) -> Backbone:
    """The backbone, once in each worker. Raises `UsageError` where a worker finds another one than the build has."""
    from dtr_deploy.hybrid.backbone import load_backbone

    backbone = load_backbone(
        source.spec, revision=source.revision, trust_remote_code=source.trust_remote_code, device=source.device
    )
    if backbone.fingerprint != source.fingerprint:
        raise UsageError(f"model {source.spec!r} is another one on the node {os.uname().nodename}")
    return backbone


def use_cores(cpus: int) -> None:
    """Give torch as many threads as the worker has cores."""
    import torch

    torch.set_num_threads(cpus)


def results(references: Sequence[Any], poll: Callable[[], None] | None = None, seconds: float = 1.0) -> Iterator[Any]:
    """(number, result) of remote calls as they end. poll: called every so many seconds meanwhile.

    Raises what a call raised, as it was raised there, `DtrError` when workers are lost too often, and `Lost` when an
    actor does not answer.
    """
    import ray

    waiting = {reference: number for number, reference in enumerate(references)}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=seconds)
            if poll is not None:
                poll()
            for reference in done:
                yield waiting.pop(reference), _get(reference)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=False)


def dispatched(
    methods: Sequence[Any],
    calls: Sequence[tuple[int, tuple[Any, ...]]],
    poll: Callable[[], None] | None = None,
    seconds: float = 1.0,
) -> Iterator[Any]:
    """(number, result) of calls, given by number and arguments, as they end. methods: of one actor each, which takes
    the next call when it is free. poll, and what is raised: as in `results`."""
    import ray

    waiting, free, running = list(reversed(calls)), list(methods), dict[Any, tuple[int, Any]]()
    try:
        while waiting or running:
            while waiting and free:
                number, arguments = waiting.pop()
                method = free.pop(0)
                running[method.remote(*arguments)] = number, method
            ready, _ = ray.wait(list(running), num_returns=1, timeout=seconds)
            if poll is not None:
                poll()
            for done in ready:
                number, method = running.pop(done)
                free.append(method)
                yield number, _get(done)
    finally:
        for reference in running:
            ray.cancel(reference, force=False)


def _get(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None if isinstance(error.cause, DtrError) else error
    except ray.exceptions.ActorUnavailableError as error:  # its node may be gone
        raise Lost(str(error).strip().splitlines()[0]) from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DtrError(f"cluster: a task lost its worker {RETRIES + 1} times ({reason})") from error
