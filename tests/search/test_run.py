"""Stage 2 from end to end on planted problems: confirm, walk back, target, and going on after a kill at any write."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from dtr_deploy.errors import TargetNotMet
from dtr_deploy.hybrid.layout import full
from dtr_deploy.search.ledger import Ledger
from dtr_deploy.search.objective import InfeasibleTarget, Objective
from dtr_deploy.search.run import search_layout
from dtr_deploy.search.strategies import STRATEGIES
from dtr_deploy.search.targets import Targets
from tests.search.synthetic import LinearCost, PlantedEvaluator, SyntheticScorer

LAYERS = 12
HARM = {
    (layer, form): ((200, 300) if layer in (0, 5) else (1 + layer % 3, 2 if form == "gla" else 1))
    for layer in range(LAYERS)
    for form in ("gated_deltanet", "gla")
}


def search(ledger, objective=None, evaluator=None, cost=None, strategy="racing"):
    return search_layout(
        SyntheticScorer(evaluator or PlantedEvaluator(LAYERS, HARM), ledger),
        cost or LinearCost(),
        objective or Objective(Targets(speedup=1.1), max_score_loss=0.02),
        ledger,
        strategy,
    )


def test_finds_confirms_and_measures():
    cost = LinearCost()
    result = search(Ledger(":memory:"), cost=cost)
    assert result.layout == tuple(None if layer in (0, 5) else "gated_deltanet" for layer in range(LAYERS))
    assert cost.measured == [result.layout]
    assert result.speedup == pytest.approx(1 / (1 - 0.02 * 10))
    for split in ("search", "confirm", "test"):
        scores = result.scores[split]
        assert scores.loss.low <= scores.loss.estimate <= scores.loss.high
        assert scores.base.estimate - scores.hybrid.estimate == pytest.approx(scores.loss.estimate)
    assert result.m_opt is not None and result.m_opt.layout == result.layout
    assert result.m_best is not None and result.m_best.score >= result.m_opt.score


def test_frontier_is_sorted_and_not_dominated():
    result = search(Ledger(":memory:"), strategy="exhaustive")
    speedups = [visit.speedup for visit in result.frontier]
    scores = [visit.score for visit in result.frontier]
    assert speedups == sorted(set(speedups)) and scores == sorted(set(scores), reverse=True)
    assert result.frontier[0].layout == full(LAYERS)
    assert result.layout in [visit.layout for visit in result.frontier]


def test_a_winner_that_fails_on_the_confirm_split_is_walked_back_along_the_path():
    ledger = Ledger(":memory:")
    result = search(ledger, Objective(max_score_loss=0.02), PlantedEvaluator(LAYERS, HARM, confirm_factor=2.5))
    assert result.walked_back
    assert result.scores["confirm"].loss.estimate <= 0.02 < 2.5 * 0.0145
    assert all(set(_changes(result.layout)) < set(_changes(layout)) for layout in result.walked_back)
    statuses = {(trial.key.layout, trial.key.split): trial.status for trial in ledger.trials(kind="score")}
    assert statuses[result.walked_back[0], "confirm"] == "walked_back"
    assert statuses[result.layout, "confirm"] == "committed"


def _changes(layout):
    return [(layer, form) for layer, form in enumerate(layout) if form is not None]


def test_walking_back_drops_the_last_changes_only():
    """17 of 1000 items at 1.4 times the search loss: the last layers are enough, a whole step back is not taken."""
    result = search(
        Ledger(":memory:"), Objective(max_score_loss=0.02), PlantedEvaluator(LAYERS, HARM, confirm_factor=1.4)
    )
    first = result.walked_back[0]
    assert len(result.walked_back) == 1 and sum(form is not None for form in first) - result.replaced == 1
    order = [tuple(c) for step in result.steps if step["action"] == "commit" for c in step.get("changes", [])]
    dropped = set(_changes(first)) - set(_changes(result.layout))
    assert dropped == {[change for change in order if change in _changes(first)][-1]}


def test_the_test_split_is_scored_last_and_decides_nothing():
    ledger = Ledger(":memory:")
    scorer = SyntheticScorer(PlantedEvaluator(LAYERS, HARM, test_factor=40), ledger)
    result = search_layout(scorer, LinearCost(), Objective(max_score_loss=0.02), ledger)
    splits = [split for _, _, split in scorer.calls]
    first = splits.index("test")
    assert set(splits[first:]) == {"test"} and "test" not in splits[:first]
    assert {layout for _, layout, split in scorer.calls if split == "test"} == {full(LAYERS), result.layout}
    assert result.replaced and result.scores["test"].loss.estimate > 0.3


def test_the_loss_is_expected_to_grow_and_what_it_did_is_beside_it():
    result = search(
        Ledger(":memory:"), Objective(max_score_loss=0.02), PlantedEvaluator(LAYERS, HARM, confirm_factor=1.2)
    )
    shrinkage = result.shrinkage
    assert 0 < shrinkage.search_loss <= 0.02 and shrinkage.compared > 5
    assert shrinkage.observed == pytest.approx(shrinkage.confirm_loss - shrinkage.search_loss)
    assert shrinkage.observed == pytest.approx(0.2 * shrinkage.search_loss, abs=1e-3)
    assert shrinkage.observed_standard_error > 0


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (Targets(first_token_seconds=0.1), r"target\.ttft_ms: at most 100 ms to the first token was not reached"),
        (Targets(token_seconds=0.001), r"target\.tpot_ms: at most 1 ms a token was not reached"),
        (Targets(cache_bytes=5 << 20), r"target\.cache_mib: at most 5 MiB of cache was not reached .* 20 MiB"),
        (Targets(1.1, token_seconds=1e-4), r"^target\.tpot_ms"),
    ],
)
def test_the_message_names_the_target_that_was_missed(targets, says):
    with pytest.raises(TargetNotMet, match=says) as caught:
        search(Ledger(":memory:"), Objective(targets, max_score_loss=0.02))
    assert "\n" not in str(caught.value) and "speedup:" not in str(caught.value)


def test_walks_back_to_the_backbone_when_nothing_holds():
    result = search(
        Ledger(":memory:"), Objective(max_score_loss=0.02), PlantedEvaluator(LAYERS, HARM, confirm_factor=99)
    )
    assert result.layout == full(LAYERS)
    assert result.speedup == 1.0 and result.measured is None


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_an_infeasible_target_carries_the_frontier(strategy):
    with pytest.raises(TargetNotMet, match=r"target\.speedup: 5 times") as caught:
        search(Ledger(":memory:"), Objective(Targets(speedup=5.0), max_score_loss=0.02), strategy=strategy)
    error = caught.value
    assert isinstance(error, InfeasibleTarget) and error.exit_code == 2
    assert "\n" not in str(error)
    assert len(error.frontier) > 1 and error.frontier == error.result.frontier
    assert max(visit.speedup for visit in error.frontier if visit.passes) == pytest.approx(error.result.speedup)


def test_the_target_is_judged_by_the_measurement_not_the_prediction():
    class Optimist(LinearCost):
        def predicted(self, layout):
            return replace(super().predicted(layout), speedup=10 * super().predicted(layout).speedup)

    with pytest.raises(TargetNotMet):
        search(Ledger(":memory:"), Objective(Targets(speedup=2.0), max_score_loss=0.02), cost=Optimist())


def test_result_is_json():
    result = search(Ledger(":memory:"))
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["replaced"] == 10 and data["strategy"] == "racing"
    assert data["frontier"][0]["speedup"] == 1.0
    assert {"trials", "layer_forwards", "seconds", "steps", "m_best", "m_opt", "measured"} <= set(data)


class Killed(BaseException):
    """Stands in for SIGKILL: nothing may catch it."""


class FragileLedger(Ledger):
    """Dies just before, or just after, its n-th write."""

    def __init__(self, path, writes: int, after: bool) -> None:
        super().__init__(path)
        self.left, self.after = writes, after

    def _transaction(self):
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        if self.left == -1 and self.after:
            raise Killed
        return super()._transaction()


def without_work(result: dict) -> dict:
    """Without what a resumed search cannot repeat: seconds, and layers that a kept hidden state would have saved."""
    return {key: value for key, value in result.items() if key not in ("seconds", "layer_forwards")}


@pytest.mark.parametrize("strategy", ["racing", "exhaustive"])
def test_killed_at_a_write_and_resumed_gives_the_same_result(tmp_path, strategy):
    layers = 6 if strategy == "racing" else 4
    harm = {key: (60, 60) if key[0] in (0, 5) else value for key, value in HARM.items() if key[0] < layers}
    objective = Objective(max_score_loss=0.03)

    def attempt(ledger):
        # Walks back, so that those writes are covered too.
        evaluator = PlantedEvaluator(layers, harm, items=200, confirm_factor=1.8)
        scorer = SyntheticScorer(evaluator, ledger, parts=2)
        computed.append(scorer.calls)
        return without_work(search_layout(scorer, LinearCost(), objective, ledger, strategy).to_dict())

    computed: list[list] = []
    with Ledger(tmp_path / "whole.sqlite") as ledger:
        whole = attempt(ledger)
        assert whole["walked_back"]
        total = len(ledger.trials())
        steps = ledger.steps(strategy)
    # Every write from the first to the last would take minutes: steps of a size that meets all kinds of them.
    stride, write = (11, 0) if strategy == "racing" else (5, 0)
    while True:
        write += stride
        path = tmp_path / f"{write}.sqlite"
        computed.clear()
        try:
            with FragileLedger(path, write, after=False) as ledger:
                attempt(ledger)
            break  # fewer writes than that: every one has been tried
        except Killed:
            pass
        with Ledger(path) as ledger:
            again = attempt(ledger)
            assert len(ledger.trials()) == total
            assert ledger.steps(strategy) == steps
        # At most the trial under way is computed twice.
        assert sum(map(len, computed)) <= total + 1
        assert again == whole
    assert write > total


def test_a_finished_search_computes_nothing_again(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        first = search(ledger).to_dict()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        scorer = SyntheticScorer(PlantedEvaluator(LAYERS, HARM), ledger)
        again = search_layout(scorer, LinearCost(), Objective(Targets(speedup=1.1), max_score_loss=0.02), ledger)
    assert again.to_dict() == first  # the seconds too: they are the first run's
    assert scorer.calls == []


PROGRAM = """
import json, os, signal, sys
sys.path[:0] = json.loads(sys.argv[1])
from tests.search.test_run import search
from dtr_deploy.search.ledger import Ledger

class Deadly(Ledger):
    left = int(sys.argv[3])
    def record(self, *args, **kwargs):
        super().record(*args, **kwargs)
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

with Deadly(sys.argv[2]) as ledger:
    print(json.dumps(search(ledger).to_dict()))
"""


def test_a_real_kill_9(tmp_path):
    def start(writes: int):
        arguments = [sys.executable, "-c", PROGRAM, json.dumps(sys.path), str(tmp_path / "ledger.sqlite"), str(writes)]
        return subprocess.run(arguments, capture_output=True, text=True, env=dict(os.environ))

    for writes in (5, 20):
        assert start(writes).returncode == -signal.SIGKILL
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert len(ledger.trials()) == 25
    done = start(10**6)
    assert done.returncode == 0, done.stderr
    ours, expected = json.loads(done.stdout), json.loads(json.dumps(search(Ledger(":memory:")).to_dict()))
    assert without_work(ours) == without_work(expected)
