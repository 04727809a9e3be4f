"""Parts dealt among processes: nothing is left out or done twice, and the joined result is that of one process."""

import numpy as np
import pytest
import torch

from dtr_deploy.hybrid.layout import full
from dtr_deploy.search.model_evaluator import ModelEvaluator
from dtr_deploy.search.shares import TEXT, dealt, part_of, pieces_of, whole_piece
from dtr_deploy.tasks.divergence import Divergence
from dtr_deploy.tasks.needle import Needle
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import plan_batches
from tests.search.test_forward import LAYERS, WINDOW, make_twins
from tests.search.test_task_runs import Continuations
from tests.tiny import tiny_backbone, tiny_tokenizer

LAYOUTS = [full(LAYERS), ("gla", None, None, "gated_deltanet", None), ("gla", None, "jet", None, None)]


def batches_of(lengths: list[int], beginning: int = 0, most: int = 64):
    """Batches of requests of these lengths, which begin with so many equal tokens."""
    shared = tuple(range(10, 10 + beginning))
    requests = [
        Request((*shared, 100 + number, *range(3, 3 + length)), (5, 6)) for number, length in enumerate(lengths)
    ]
    return plan_batches(requests, 0, most)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_pieces_are_dealt_evenly_and_all_of_them(count: int) -> None:
    parts = [pieces_of(0, batches_of(lengths), 64) for lengths in ([60] * 5 + [20] * 4, [50, 30, 30, 20], [60] * 3)]
    loads = [0.0] * count
    for pieces in parts:
        shares = dealt(pieces, loads)
        assert sorted(number for share in shares for _, some in share for number in some or ()) == [*range(len(pieces))]
    largest, total = max(piece.cost for pieces in parts for piece in pieces), sum(loads)
    assert total == pytest.approx(sum(piece.cost for pieces in parts for piece in pieces))
    assert max(loads) - min(loads) <= largest, "what one has too little is less than a piece"


def test_a_common_beginning_keeps_batches_together() -> None:
    """Eight rows of 10 tokens after 400 that all share are run by one process, unless there is little else."""
    together = pieces_of(0, batches_of([10] * 8, beginning=400, most=16), 64)
    assert len(together) > 2 and all(piece.beginning for piece in together)
    apart = pieces_of(1, batches_of([50] * 20), 64)
    for others, by in ((apart, 1), (apart[:2], 2)):
        shares = dealt([*together, *others], [0.0, 0.0])
        assert sum(any(task == 0 for task, _ in share) for share in shares) == by
    whole = whole_piece(2, batches_of([50]), 64)
    assert dealt(whole, [0.0, 0.0]) == [((2, None),), ()]


def test_some_batches_of_a_part_are_a_part() -> None:
    part = Needle("needle", tiny_tokenizer(), lengths=(200, 300, 500), items=2, batch_tokens=512).part("search", 0, 1)
    assert len(part.batches) >= 3
    some, at = part_of(part, [0, 2])
    read = np.concatenate([part.batches[number].requests.numpy() for number in (0, 2)])
    assert set(at) == set(read) and len(at) < len(part.requests)
    np.testing.assert_array_equal(some.requests, part.requests[at])
    ours = np.concatenate([batch.requests.numpy() for batch in some.batches])
    np.testing.assert_array_equal(at[ours], read)


@pytest.fixture(scope="module")
def evaluator() -> ModelEvaluator:
    backbone, tokenizer = tiny_backbone(layers=LAYERS), tiny_tokenizer()

    class Whole(Needle):
        resumable = False

    tasks = [
        Needle("needle", tokenizer, lengths=(300, 500), items=4, batch_tokens=600),
        Continuations(),
        Needle("more", tokenizer, lengths=(200,), items=4, batch_tokens=256),
    ]
    recall = [
        Needle("recall", tokenizer, lengths=(200,), items=4, batch_tokens=256),
        Whole("w", tokenizer, lengths=(200,), items=1),
    ]
    text = torch.randint(3, 512, (6, 40), generator=torch.Generator().manual_seed(5))
    return ModelEvaluator(backbone, make_twins(backbone), WINDOW, tasks, Divergence(text, 80), recall, "hash")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_score_of_shares_is_that_of_the_part(evaluator: ModelEvaluator, count: int) -> None:
    for part in range(evaluator.parts("search")):
        shares = evaluator.shares("search", part, count)
        assert 1 <= len(shares) <= count and all(shares)
        whole = sorted(evaluator.score_part(LAYOUTS, "search", part), key=lambda done: done.number)
        found = [
            sorted(evaluator.score_part(LAYOUTS, "search", part, share), key=lambda done: done.number)
            for share in shares
        ]
        for number, expected in enumerate(whole):
            joined = evaluator.joined("search", part, shares, [results[number] for results in found], number)
            assert joined.number == number and joined.arrays.keys() == expected.arrays.keys()
            for name, array in expected.arrays.items():
                # What was generated is the draft of later calls, which read right answers in other batches.
                tolerance = 1e-5 if name.startswith("1.") else 0
                np.testing.assert_allclose(joined.arrays[name], array, rtol=0, atol=tolerance)
                assert joined.arrays[name].dtype == array.dtype


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_screening_of_shares_is_that_of_all(evaluator: ModelEvaluator, count: int) -> None:
    shares = evaluator.screening_shares(count)
    assert len(shares) == count and sum(task == TEXT for share in shares for task, _ in share) >= 1
    whole = sorted(evaluator.screen(LAYOUTS), key=lambda done: done.number)
    found = [sorted(evaluator.screen_share(LAYOUTS, share), key=lambda done: done.number) for share in shares]
    for number, expected in enumerate(whole):
        joined = evaluator.joined_screen(shares, [results[number] for results in found], number)
        assert joined.scalars == expected.scalars and not joined.arrays
