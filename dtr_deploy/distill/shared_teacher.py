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

Pass = Callable[[int], Activations]
"""Of the step that it begins with: what the layers saw and answered on the sequences of some steps."""


class SharedTeacher:
    """Passes of the teacher for this process's layers, in the order of their steps; every process asks for the same.

    Args:
        peers: this process and the others.
        layers: of each process's twins, by rank.
        run: this process's own pass over all these layers.
        stride: steps of one pass. steps: of all. batch_size: sequences of a step.
    """

    def __init__(
        self, peers: Alone, layers: Sequence[Sequence[int]], run: Pass, stride: int, steps: int, batch_size: int
    ) -> None:
        self.peers, self.layers, self.run = peers, layers, run
        self.stride, self.steps, self.batch_size = stride, steps, batch_size
        self._coming: dict[int, Activations] = {}

    @property
    def waiting(self) -> bool:
        """Whether there are passes that were exchanged and not asked for yet."""
        return bool(self._coming)

    def __call__(self, first: int) -> Activations:
        if first not in self._coming:
            self._coming = self._share(first)
        return self._coming.pop(first)

    def _share(self, first: int) -> dict[int, Activations]:
        """The passes that begin at `first` and after it, one of each process."""
        rank, mine = self.peers.rank, self.layers[self.peers.rank]
        starts = [start for n in range(self.peers.count) if (start := first + n * self.stride) < self.steps]
        # At the end there may be fewer passes than processes: who has none runs the first one, for its shapes only.
        own = self.run(starts[rank] if rank < len(starts) else first)
        home = next(iter(own.inputs.values())).device  # of what is exchanged, where a teacher lies on several devices
        incoming: list[tuple[int, Tensor]] = []
        received: dict[int, Activations] = {}
        for peer, start in enumerate(starts):
            if peer == rank:
                continue
            rows = self.batch_size * min(self.stride, self.steps - start)
            seen, said = (
                {layer: x[layer].new_empty(rows, *x[layer].shape[1:], device=home) for layer in mine}
                for x in (own.inputs, own.outputs)
            )
            received[start] = Activations(seen, said, own.position_embeddings)
            incoming += [(peer, x[layer]) for layer in mine for x in (seen, said)]
        outgoing = [
            (peer, x[layer].to(home).contiguous())
            for peer, theirs in enumerate(self.layers)
            if peer != rank and rank < len(starts)
            for layer in theirs
            for x in (own.inputs, own.outputs)
        ]
        self.peers.exchange(outgoing, incoming)
        passes = {start: _placed(some, own, mine) for start, some in received.items()}
        if rank < len(starts):
            passes[starts[rank]] = _placed(own, own, mine)
        return passes


def _placed(some: Activations, like: Activations, layers: Sequence[int]) -> Activations:
    """`some` of these layers, on the devices of `like`."""
    inputs, outputs = (
        {layer: x[layer].to(like.inputs[layer].device) for layer in layers} for x in (some.inputs, some.outputs)
    )
    return Activations(inputs, outputs, some.position_embeddings)
