"""Items dealt into parts: balanced, complete, and interpreted together as the whole."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from dtr_deploy.tasks.base import TaskScore
from dtr_deploy.tasks.parts import deal
from dtr_deploy.tasks.request_task import RequestTask
from dtr_deploy.tasks.requests import Request
from dtr_deploy.tasks.scoring import RequestScores

LABELS = 3


class Centred(RequestTask):
    """Three requests an item; each request's log-probability is centred over the items of its stratum."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__("centred", SimpleNamespace(pad_token_id=0))
        self.strata = [name for name, size in sizes.items() for _ in range(size)]

    def make_requests(self, split: str) -> list[Request]:
        return [Request((1, 2, item, label), (5,)) for item in range(len(self.strata)) for label in range(LABELS)]

    def interpret(self, split: str, scores: RequestScores) -> TaskScore:
        values = scores.log_probs.reshape(-1, LABELS)
        names = np.array(self.strata)
        for name in set(self.strata):
            values[names == name] -= values[names == name].mean(0)
        return TaskScore(self.name, split, values.argmax(1).astype(float), values.max(1), tuple(self.strata))


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_every_part_has_its_share_of_every_stratum(parts: int) -> None:
    strata = ["a"] * 10 + ["b"] * 21 + ["c"] * 3
    dealt = deal(strata, parts, "seed")
    assert sorted(np.concatenate(dealt)) == list(range(34))
    sizes = [len(part) for part in dealt]
    assert max(sizes) - min(sizes) <= 1
    for name in "abc":
        counts = [Counter(strata[item] for item in part)[name] for part in dealt]
        assert max(counts) - min(counts) <= 1
    # A stratum's own order is spread too: means of places differ by less than one neighbourhood.
    places = [np.mean([item - 10 for item in part if strata[item] == "b"]) for part in dealt]
    assert max(places) - min(places) <= parts + 21 / parts


def test_dealing_is_seeded() -> None:
    strata = ["a"] * 40
    first, again, other = (deal(strata, 4, seed) for seed in ("x", "x", "y"))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_items_requests_stay_together_and_are_numbered_from_zero() -> None:
    task = Centred({"short": 9, "long": 8})
    for number in range(4):
        part = task.part("search", number, 4)
        assert np.array_equal(part.requests, (part.items[:, None] * LABELS + np.arange(LABELS)).ravel())
        read = np.unique(np.concatenate([batch.requests.numpy() for batch in part.batches]))
        assert np.array_equal(read, np.arange(len(part.requests)))


def scores_of(task: Centred, requests: np.ndarray) -> RequestScores:
    values = np.random.default_rng(0).normal(size=len(task.requests("search")))[requests]
    return RequestScores(values, np.ones(len(values), dtype=bool), np.ones(len(values), dtype=np.int64))


def test_all_parts_are_the_whole() -> None:
    task = Centred({"short": 9, "long": 8})
    parts = [task.part("search", number, 4) for number in range(4)]
    requests = np.concatenate([part.requests for part in parts])
    together = task.interpret_items("search", scores_of(task, requests), parts)
    whole = task.interpret("search", scores_of(task, np.arange(len(requests))))
    np.testing.assert_array_equal(together.margins, whole.margins)
    assert together.strata == whole.strata


def test_some_parts_are_a_split_of_their_items_alone() -> None:
    task = Centred({"short": 9, "long": 8})
    parts = [task.part("search", number, 4) for number in (0, 1)]
    items = np.sort(np.concatenate([part.items for part in parts]))
    some = task.interpret_items("search", scores_of(task, np.concatenate([p.requests for p in parts])), parts)
    smaller = Centred({name: int(np.sum(np.array(task.strata)[items] == name)) for name in ("short", "long")})
    requests = (items[:, None] * LABELS + np.arange(LABELS)).ravel()
    alone = smaller.interpret("search", scores_of(task, requests))
    np.testing.assert_allclose(some.margins, alone.margins, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(some.per_item, alone.per_item)
    assert some.strata == alone.strata
