"""The recipe's targets and bounds in the search's units, and one line for those that do not fit."""

from pathlib import Path

import pytest

from dtr_deploy.errors import UsageError
from dtr_deploy.layout_search import objective_of
from dtr_deploy.recipe import load_recipe
from dtr_deploy.search.targets import Targets
from tests.product.recipes import write_recipe


def test_targets_are_read_in_seconds_and_bytes(tmp_path: Path) -> None:
    file = write_recipe(tmp_path, ", speedup: 1.2", ", ttft_ms: 250, tpot_ms: 12.5, cache_mib: 96")
    file.write_text(file.read_text().replace("strategy: racing", "goal: score, bound: upper"))
    objective = objective_of(load_recipe(file))
    assert objective.targets == Targets(None, 0.25, 0.0125, 96 << 20)
    assert (objective.goal, objective.bound, objective.max_score_loss) == ("score", "upper", 0.02)


@pytest.mark.parametrize("target", ["speedup: 1.2", "ttft_ms: 100", "tpot_ms: 10", "cache_mib: 64"])
def test_any_target_will_do_for_the_goal_score(tmp_path: Path, target: str) -> None:
    file = write_recipe(tmp_path, "speedup: 1.2", target)
    file.write_text(file.read_text().replace("strategy: racing", "goal: score"))
    assert objective_of(load_recipe(file)).targets.given


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("speedup: 1.2", "ttft_ms: 0", "target.ttft_ms: accepted: greater than 0"),
        ("speedup: 1.2", "tpot: 10", "unknown key; did you mean 'tpot_ms'?"),
        ("max_score_loss: 0.02", "bound: lower", "search.bound: accepted: 'estimate', 'upper'"),
        ("output: 512, concurrency: 1}, speedup: 1.2", "output: 1}, tpot_ms: 9", "target.tpot_ms: a workload of one"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, old: str, new: str, says: str) -> None:
    file = write_recipe(tmp_path, old, new)
    with pytest.raises(UsageError) as caught:
        load_recipe(file)
    assert says in str(caught.value) and "\n" not in str(caught.value)
