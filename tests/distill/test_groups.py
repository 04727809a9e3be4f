"""Twins trained in groups are the twins trained together, also when a build is stopped between and within groups."""

from pathlib import Path

import pytest
import torch

from dtr_deploy.distill.groups import HALF_WAY, distill_in_groups
from dtr_deploy.distill.stage import DistillResult, distill, load_twins
from dtr_deploy.distill.trainer import DistillSettings
from tests.tiny import tiny_backbone

FORMS, LAYERS = ("gated_deltanet", "gla"), [0, 1, 3]
SETTINGS = DistillSettings(tokens=256, teacher_sequences=1, checkpoint_seconds=0.0)


class Stopped(Exception):
    """In place of a kill."""


def tokens(rows: int = 6) -> torch.Tensor:
    return torch.randint(3, 500, (rows, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    folder = tmp_path_factory.mktemp("together")
    return distill(tiny_backbone(), tokens(), tokens(4), FORMS, LAYERS, 8, SETTINGS, folder)


def same(ours: DistillResult, theirs: DistillResult) -> None:
    assert ours.reports == theirs.reports and ours.tokens == theirs.tokens
    found = load_twins(ours.files)
    for key, twin in load_twins(theirs.files).items():
        assert found[key].keys() == twin.keys()
        assert all(torch.equal(found[key][name], tensor) for name, tensor in twin.items())


@pytest.mark.parametrize("at_once", [1, 2, 4, 100])
def test_groups_are_the_twins_trained_together(tmp_path: Path, together: DistillResult, at_once: int) -> None:
    steps: list[tuple[int, int]] = []

    def progress(done: int, total: int, message: str) -> None:
        steps.append((done, total))

    asked = (tokens(), tokens(4), FORMS, LAYERS, 8, SETTINGS, tmp_path, progress)
    same(distill_in_groups(tiny_backbone(), *asked, twins_at_once=at_once), together)
    assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == sorted(done for done, _ in steps)
    files = {file.name for file in next(iter(together.files.values())).parent.iterdir()}
    assert {file.name for file in tmp_path.iterdir()} == files, "nothing half-way stays"
    before = len(steps)
    same(distill_in_groups(tiny_backbone(), *asked, twins_at_once=at_once), together)
    assert len(steps) == before, "what is finished is not trained again"


@pytest.mark.parametrize("stop_at", [3, 8, 13])
def test_a_stopped_build_goes_on_within_its_group(tmp_path: Path, together: DistillResult, stop_at: int) -> None:
    """Three groups of 8 steps each: in the first, at its last step, in the second."""
    seen: list[int] = []

    def progress(done: int, total: int, message: str) -> None:
        assert total == 24
        seen.append(done)
        if done == stop_at and seen.count(stop_at) == 1:
            raise Stopped

    asked = (tokens(), tokens(4), FORMS, LAYERS, 8, SETTINGS, tmp_path, progress)
    with pytest.raises(Stopped):
        distill_in_groups(tiny_backbone(), *asked, twins_at_once=2)
    assert list(tmp_path.glob(f"{HALF_WAY}*"))
    # What is trained again is at most the step after the last checkpoint, and groups that were finished are not.
    same(distill_in_groups(tiny_backbone(), *asked, twins_at_once=2), together)
    again = seen[seen.index(stop_at) + 1 :]
    assert again[-1] == 24 and stop_at - 1 <= again[0] <= stop_at + 1
