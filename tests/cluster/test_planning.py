"""How a cluster's room and a stage's work are divided. No cluster is started."""

from typing import Any

import pytest

from dtr_deploy.cluster.workers import Workers, room
from dtr_deploy.distill.groups import TWIN_PASSES, Group, dealt, groups
from dtr_deploy.errors import UsageError
from dtr_deploy.recipe_sections import Cluster


def nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": found} for found in resources]


@pytest.mark.parametrize(
    ("resources", "settings", "expected"),
    [
        ([{"CPU": 1.0}, {"CPU": 1.0}], {}, Workers(2, 1, 0.0, 2)),
        ([{"CPU": 16.0}, {"CPU": 16.0}], {}, Workers(2, 16, 0.0, 2)),
        ([{"CPU": 16.0}], {"cpus": 4}, Workers(4, 4, 0.0, 4)),
        ([{"CPU": 64.0, "GPU": 8.0}] * 8, {}, Workers(64, 8, 1.0, 8)),
        ([{"CPU": 64.0, "GPU": 8.0}] * 8, {"workers": 10}, Workers(10, 8, 1.0, 8)),
        ([{"CPU": 64.0, "GPU": 8.0}], {"gpus": 2}, Workers(4, 16, 2.0, 4)),
        ([{"CPU": 64.0, "GPU": 8.0}] * 8, {"share_teacher": 16}, Workers(64, 8, 1.0, 16)),
        ([{"CPU": 64.0, "GPU": 8.0}] * 8, {"workers": 6}, Workers(6, 8, 1.0, 6)),
        ([{"CPU": 1.0}, {"CPU": 1.0}], {"share_teacher": 1}, Workers(2, 1, 0.0, 1)),
        # A head node without GPUs gets no workers where the others have some.
        ([{"CPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}], {}, Workers(4, 8, 1.0, 4)),
        ([{"CPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}], {"gpus": 0}, Workers(5, 8, 0.0, 5)),
    ],
)
def test_room(resources: list[dict[str, float]], settings: dict[str, Any], expected: Workers) -> None:
    assert room(nodes(*resources), Cluster(**settings)) == expected


def test_no_room() -> None:
    with pytest.raises(UsageError, match=r"cluster.cpus: no node has 8 cores; accepted: at most 4"):
        room(nodes({"CPU": 4.0}), Cluster(cpus=8))
    with pytest.raises(UsageError, match=r"cluster.gpus: no node has 1 GPUs"):
        room(nodes({"CPU": 4.0}), Cluster(gpus=1))
    with pytest.raises(UsageError, match="no node of it has a CPU"):
        room([{"Alive": False, "Resources": {"CPU": 4.0}}], Cluster())


def cost(group: Group) -> float:
    return group.layers[-1] + 1 + TWIN_PASSES * len(group.keys)


@pytest.mark.parametrize(("layers", "forms", "workers"), [(30, 1, 2), (30, 2, 7), (32, 3, 64), (3, 2, 8), (1, 1, 4)])
def test_groups_are_all_twins_in_shares_of_equal_work(layers: int, forms: int, workers: int) -> None:
    names = ["gated_deltanet", "gla", "jet"][:forms]
    found = groups(range(layers), names, workers)
    keys = [key for group in found for key in group.keys]
    assert sorted(keys) == sorted((layer, form) for layer in range(layers) for form in names)
    assert len(found) <= workers
    if workers <= layers:
        assert len(found) == workers
        # A layer more or less is all that shares differ by.
        assert max(map(cost, found)) <= min(map(cost, found)) + (TWIN_PASSES + 1) * forms
    alone = cost(groups(range(layers), names, 1)[0])
    if layers >= 2 * workers:
        assert max(map(cost, found)) <= 1.25 * alone / workers + TWIN_PASSES * forms + layers


@pytest.mark.parametrize(
    ("layers", "forms", "workers", "most"), [(32, 3, 1, 32), (32, 3, 1, 2), (32, 3, 64, 1), (4, 2, 1, 3), (30, 1, 2, 7)]
)
def test_a_group_has_no_more_twins_than_memory_holds(layers: int, forms: int, workers: int, most: int) -> None:
    names = ["gated_deltanet", "gla", "jet"][:forms]
    found = groups(range(layers), names, workers, most)
    keys = [key for group in found for key in group.keys]
    assert sorted(keys) == sorted((layer, form) for layer in range(layers) for form in names)
    assert max(len(group.keys) for group in found) <= most
    assert len(found) <= 2 * max(workers, -(-layers * forms // most))


@pytest.mark.parametrize(
    ("layers", "forms", "members", "most"), [(30, 1, 2, 15), (32, 3, 8, 12), (32, 3, 64, 2), (4, 3, 8, 2), (1, 3, 8, 1)]
)
def test_a_group_is_dealt_to_those_who_share_its_teacher(layers: int, forms: int, members: int, most: int) -> None:
    names = ("gated_deltanet", "gla", "jet")[:forms]
    whole = Group(tuple(range(layers)), names)
    parts = dealt(whole, members)
    assert sorted(key for part in parts for key in part.keys) == sorted(whole.keys)
    assert len(parts) <= members and max(len(part.keys) for part in parts) == most


@pytest.mark.parametrize(
    ("forms", "workers", "members", "most"), [(3, 1, 1, 32), (3, 8, 8, 5), (2, 8, 4, 3), (3, 6, 3, 1)]
)
def test_no_member_has_more_twins_than_memory_holds(forms: int, workers: int, members: int, most: int) -> None:
    names = ("gated_deltanet", "gla", "jet")[:forms]
    found = [
        part for group in groups(range(32), names, workers // members, most, members) for part in dealt(group, members)
    ]
    assert sorted(key for part in found for key in part.keys) == sorted((i, form) for i in range(32) for form in names)
    assert max(len(part.keys) for part in found) <= most
