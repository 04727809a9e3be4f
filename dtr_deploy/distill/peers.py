"""Processes that train one group of twins together, as `stage.distill` sees them: on a cluster several, else one.

What they tell one another goes through `torch.distributed`: tensors by NCCL between GPUs, everything else by gloo.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(days=1)
"""How long members wait for one another, for one that still fetches the model too. Who runs them sees who is lost."""


class Alone:
    """One process, which has nobody to wait for."""

    rank, count = 0, 1

    def gather(self, mine: Any) -> list[Any]:
        """What every process brings, in order of ranks."""
        return [mine]

    def exchange(self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]) -> None:
        """Send tensors to ranks and fill those that come from them. Of two ranks' tensors, sender and receiver name the
        same ones in the same order, contiguous and of the same shapes and dtypes."""


class Together(Alone):
    """A member of a `torch.distributed` group. Every method is called by all members."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def gather(self, mine: Any) -> list[Any]:
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found

    def exchange(self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]) -> None:
        import torch.distributed as dist

        # gloo tells messages between two ranks apart by their tags; NCCL by their order.
        numbers: dict[tuple[str, int], int] = {}
        operations = []
        for kind, call, some in (("send", dist.isend, outgoing), ("receive", dist.irecv, incoming)):
            for peer, tensor in some:
                tag = numbers.get((kind, peer), 0)
                numbers[kind, peer] = tag + 1
                operations.append(dist.P2POp(call, tensor, peer, tag=tag))
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()


def meeting_place(host: str) -> tuple[Any, tuple[str, int]]:
    """A store on this machine, to be kept alive, and the (host, port) where the other members find it."""
    from torch.distributed import TCPStore

    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    return store, (host, store.port)


@contextmanager
def members_of(rank: int, count: int, place: tuple[str, int], host: str, store: Any = None) -> Iterator[Alone]:
    """The members of a group while the block runs.

    Args:
        rank, count: of this member, and how many there are.
        place: where rank 0 keeps `meeting_place`'s store.
        host: an address of this machine that the others reach.
        store: of rank 0, which has it already.
    """
    if count == 1:
        yield Alone()
        return
    import torch
    import torch.distributed as dist

    # gloo would take the address that this machine's name stands for, which on many systems is only its own.
    if (name := interface_of(host)) is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    gpus = torch.cuda.is_available()
    store = store if store is not None else dist.TCPStore(*place, is_master=False, timeout=PATIENCE)
    backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, store=store, rank=rank, world_size=count)
    try:
        yield Together(rank, count)
    finally:
        dist.destroy_process_group()


def interface_of(host: str) -> str | None:
    """The network interface with this IPv4 address; None if there is none such, or the system does not say."""
    try:
        import fcntl
    except ImportError:
        return None
    wanted, get_address = socket.inet_aton(host), 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
                if answer[20:24] == wanted:
                    return name
    return None
