"""Processes that share the teacher's passes see what each would see alone, in threads that stand for processes."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtr_deploy.distill.peers import Alone, interface_of
from dtr_deploy.distill.shared_teacher import SharedTeacher
from dtr_deploy.distill.teacher import Activations
from dtr_deploy.distill.trainer import DistillSettings, HalfWay, Trainer
from tests.tiny import tiny_backbone

WAIT = 60.0


class Threads:
    """Of a group: a queue from each rank to each other one."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.tensors: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
        self.brought: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=WAIT)

    def run(self, work: Callable[[Alone], Any]) -> list[Any]:
        """What `work` returns for each rank."""
        found: list[Any] = [None] * self.count
        failed: list[BaseException] = []

        def one(rank: int) -> None:
            try:
                found[rank] = work(Peer(self, rank))
            except BaseException as error:
                failed.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        return found


class Peer(Alone):
    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank, self.count = group, rank, group.count

    def gather(self, mine: Any) -> list[Any]:
        self.group.brought[self.rank] = mine
        self.group.barrier.wait()
        found = list(self.group.brought)
        self.group.barrier.wait()
        return found

    def exchange(self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]) -> None:
        for peer, tensor in outgoing:
            assert tensor.is_contiguous()
            self.group.tensors[self.rank, peer].put(tensor.clone())
        for peer, tensor in incoming:
            found = self.group.tensors[peer, self.rank].get(timeout=WAIT)
            assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype) and tensor.is_contiguous()
            tensor.copy_(found)


def seen(layers: Sequence[int], number: int, rows: int) -> Activations:
    """Numbers that tell layer, pass and row. Outputs have another dtype, as a fused teacher's have."""
    row = torch.arange(rows, dtype=torch.float32)[:, None, None].expand(rows, 3, 2)
    inputs = {layer: row + 100 * number + 10_000 * layer for layer in layers}
    outputs = {layer: (-row - number - 16 * layer).to(torch.bfloat16).transpose(1, 2).mT for layer in layers}
    return Activations(inputs, outputs, (torch.ones(1, 3, 4), torch.zeros(1, 3, 4)))


@pytest.mark.parametrize(("count", "rows"), [(2, [2, 2, 2, 2, 2]), (3, [3, 3, 3, 3, 1]), (3, [1]), (4, [2] * 9)])
def test_everybody_gets_its_layers_of_every_pass(count: int, rows: list[int]) -> None:
    layers = [[4, 1], [2], [0, 3, 5], [6]][:count]
    union = sorted(layer for some in layers for layer in some)
    runs: list[tuple[int, int]] = []

    def work(peer: Alone) -> list[tuple[bool, Activations]]:
        def run(number: int) -> Activations:
            runs.append((peer.rank, number))
            return seen(union, number, rows[number])

        teacher = SharedTeacher(peer, layers, run, len(rows), rows.__getitem__)
        return [(teacher.waiting, teacher(number)) for number in range(len(rows))]

    for rank, passes in enumerate(Threads(count).run(work)):
        for number, (waiting, found) in enumerate(passes):
            expected = seen(layers[rank], number, rows[number])
            assert waiting == (number % count != 0)
            assert found.inputs.keys() == expected.inputs.keys() == found.outputs.keys()
            for layer in layers[rank]:
                torch.testing.assert_close(found.inputs[layer], expected.inputs[layer], rtol=0, atol=0)
                torch.testing.assert_close(found.outputs[layer], expected.outputs[layer], rtol=0, atol=0)
            assert found.position_embeddings[0].shape == (1, 3, 4)
    assert {number for _, number in runs} == set(range(len(rows)))
    assert len(runs) == count * -(-len(rows) // count), "each runs one pass of every `count`"


def test_a_run_goes_on_from_the_last_step_that_everybody_wrote(tmp_path: Path) -> None:
    """One was killed before it had written step 8."""
    key = (1, "gla")
    for rank, steps in enumerate([(4, 8), (4,)]):
        folder = tmp_path / str(rank)
        folder.mkdir()
        for step in steps:
            trainers = {key: Trainer(tiny_backbone(), *key, 8, DistillSettings(tokens=64))}
            with torch.no_grad():
                trainers[key].mixer.q_proj.weight.fill_(step + rank)
            _step(trainers[key])
            file = HalfWay(folder)
            file.remove = lambda but=None: None  # type: ignore[method-assign,assignment]
            file.save(trainers, step, seconds=2.0 * step)
    ready = [{key: Trainer(tiny_backbone(), *key, 8, DistillSettings(tokens=64))} for _ in range(2)]

    def work(peer: Alone) -> tuple[int, float]:
        return HalfWay(tmp_path / str(peer.rank), peer).load(ready[peer.rank])

    assert Threads(2).run(work) == [(4, 8.0), (4, 8.0)]
    for rank, trainers in enumerate(ready):
        assert trainers[key].mixer.q_proj.weight.mean().item() == pytest.approx(4 + rank, abs=0.1)
    assert HalfWay(tmp_path / "0").load(ready[0]) == (8, 16.0), "alone, the last one counts"

    (tmp_path / "1" / "half_way-8.safetensors.partial").touch()  # what that kill left

    def save(peer: Alone) -> list[str]:
        HalfWay(tmp_path / str(peer.rank), peer).save(ready[peer.rank], 12, 1.0)
        return sorted(path.name for path in (tmp_path / str(peer.rank)).iterdir())

    assert Threads(2).run(save) == [["half_way-12.safetensors"]] * 2


def _step(trainer: Trainer) -> None:
    hidden = torch.randn(1, 8, trainer.mixer.q_proj.in_features)
    where = (torch.ones(1, 8, trainer.mixer.sizes.head_dim), torch.zeros(1, 8, trainer.mixer.sizes.head_dim))
    with torch.enable_grad():
        trainer.mixer(hidden, where)[0].square().sum().backward()
    trainer.optimizer.step()


def test_interfaces_are_found_by_their_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
