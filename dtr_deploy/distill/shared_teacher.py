"""One teacher's pass for several processes that each train twins of other layers.

Sequences are dealt: every process runs the teacher on its own part of them, up to the last layer that anybody trains,
and sends each of the others what the layers of its twins saw and answered. Next to exchanging gradients of twins that
all processes hold, this moves less (for Llama-3.1-8B and 8,192 tokens a step 134 MB a layer in bfloat16, whatever the
number of forms, in place of 168 MB a form and layer in float32, there and back), keeps no twin twice, and computes what
one process computes, to the bit: a part is what that process takes in one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dtr_deploy.distill.peers import Alone
from dtr_deploy.distill.teacher import Activations

if TYPE_CHECKING:
    from torch import Tensor


class SharedTeacher:
    """Passes of the teacher for this process's layers. Every process asks for the same ones, one after another.

    Args:
        peers: this process and the others.
        layers: of each process's twins, by rank.
        run: the pass of this number over all these layers, by this process.
        passes: how many there are. rows: sequences of the pass of this number.
    """

    def __init__(
        self,
        peers: Alone,
        layers: Sequence[Sequence[int]],
        run: Callable[[int], Activations],
        passes: int,
        rows: Callable[[int], int],
    ) -> None:
        self.peers, self.layers, self.run, self.passes, self.rows = peers, layers, run, passes, rows
        self._coming: dict[int, Activations] = {}

    @property
    def waiting(self) -> bool:
        """Whether there are passes that were exchanged and not asked for yet."""
        return bool(self._coming)

    def __call__(self, number: int) -> Activations:
        """What this process's layers saw and answered in a pass."""
        if number not in self._coming:
            self._coming = self._share(number)
        return self._coming.pop(number)

    def _share(self, first: int) -> dict[int, Activations]:
        """The pass `first` and those after it, one of each process."""
        rank, mine = self.peers.rank, self.layers[self.peers.rank]
        numbers = range(first, min(first + self.peers.count, self.passes))
        # At the end there may be fewer passes than processes: who has none runs the first one, for its shapes only.
        own = self.run(numbers[rank] if rank < len(numbers) else first)
        home = next(iter(own.inputs.values())).device  # of what is exchanged, where a teacher lies on several devices
        incoming: list[tuple[int, Tensor]] = []
        received: dict[int, Activations] = {}
        for peer, number in enumerate(numbers):
            if peer == rank:
                continue
            seen, said = (
                {layer: x[layer].new_empty(self.rows(number), *x[layer].shape[1:], device=home) for layer in mine}
                for x in (own.inputs, own.outputs)
            )
            received[number] = Activations(seen, said, own.position_embeddings)
            incoming += [(peer, x[layer]) for layer in mine for x in (seen, said)]
        outgoing = [
            (peer, x[layer].to(home).contiguous())
            for peer, theirs in enumerate(self.layers)
            if peer != rank and rank < len(numbers)
            for layer in theirs
            for x in (own.inputs, own.outputs)
        ]
        self.peers.exchange(outgoing, incoming)
        passes = {number: _placed(some, own, mine) for number, some in received.items()}
        if rank < len(numbers):
            passes[numbers[rank]] = _placed(own, own, mine)
        return passes


def _placed(some: Activations, like: Activations, layers: Sequence[int]) -> Activations:
    """`some` of these layers, on the devices of `like`."""
    inputs, outputs = (
        {layer: x[layer].to(like.inputs[layer].device) for layer in layers} for x in (some.inputs, some.outputs)
    )
    return Activations(inputs, outputs, some.position_embeddings)
