"""The studies of the search on a tiny random model: the whole path, going on after a loss, one line a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.studies import frontier, selection

SMALL = ("--small", "--threads", "1")


def run(app: Any, *arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_strategy_has_a_frontier_and_nothing_is_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(frontier.app, *SMALL, "--out", tmp_path)
    assert first.exit_code == 0, first.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = {"racing", "one_shot", "uniform", "random 0", "random 1", "random 2", "exhaustive"}
    assert set(summary["walks"]) == names
    for row in summary["rows"]:
        assert row["layout_speedup"] >= row["speedup"] * (1 - 1e-9)
        low, estimate, high = (row["minus_base"][key] for key in ("low", "estimate", "high"))
        assert low <= estimate <= high and estimate == pytest.approx(row["score"] - summary["base_score"])
        if row["strategy"] == "exhaustive":
            assert row["minus_reference"]["estimate"] == 0
    assert {row["level"] for row in summary["rows"] if row["strategy"] == "racing"} == {1, 2, 3}
    whole = summary["walks"]["exhaustive"]
    assert len(whole["visits"]) == 1 + 8 + 6 + 4 and whole["layer_forwards"] > 0
    assert all(walk["kinds"]["score"]["layer_forwards"] > 0 for walk in summary["walks"].values())
    assert "| racing |" in (tmp_path / "frontier.md").read_text()

    # One strategy's file is lost: it is read from its ledger, the others from their files; no model runs again.
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to compute")

    (tmp_path / "walks" / "racing.json").unlink()
    monkeypatch.setattr("dtr_deploy.search.model_evaluator.ModelEvaluator.score", refuse)
    monkeypatch.setattr("dtr_deploy.search.model_evaluator.ModelEvaluator.screen", refuse)
    assert run(frontier.app, *SMALL, "--out", tmp_path).exit_code == 0
    again = json.loads((tmp_path / "summary.json").read_text())
    assert again["rows"] == summary["rows"]
    assert again["walks"]["racing"]["layer_forwards"] == summary["walks"]["racing"]["layer_forwards"]


def test_winners_are_scored_on_three_splits(tmp_path: Path) -> None:
    found = run(selection.app, *SMALL, "--out", tmp_path, "--seeds", 2, "--strategies", "racing", "random")
    assert found.exit_code == 0, found.output
    rows = json.loads((tmp_path / "selection.json").read_text())["rows"]
    assert [(row["strategy"], row["needles"], row["seed"]) for row in rows] == [
        (name, needles, seed) for needles in (4, 8) for seed in (0, 1) for name in ("racing", "random")
    ]
    for row in rows:
        assert set(row["losses"]) == {"search", "confirm", "test"} and row["losses"]["search"]["loss"] <= 0.02
    page = (tmp_path / "selection.md").read_text()
    assert "rise expected" in page and "--out FOLDER --seeds 2 --strategies racing random --small`" in page


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(frontier.app, *SMALL, "--out", tmp_path / "out", "--distilled", tmp_path / "empty")
    assert result.exit_code == 1 and "has no layer00_gated_deltanet.safetensors" in result.stderr
    assert "\n" not in result.stderr.strip()
