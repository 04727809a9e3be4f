"""The scoring benchmark on a tiny model: what it writes, and that neither side runs more layers than it must."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import scoring
from tiny import tiny_backbone, tiny_tokenizer


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    tiny_backbone().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_both_sides_run_and_layouts_share_layers(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "matrix_gflops", lambda: 100.0)
    file = tmp_path / "rows.json"
    options = ("--items", "4", "--lengths", "400", "--rounds", "2", "--threads", "1", "--json", str(file))
    result = CliRunner().invoke(scoring.app, ["--model", str(model_folder), *options])
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["layouts"] for row in rows] == [1, 1, 1, 1, 4]
    for row in rows:
        assert len(row["seconds"]["modules"]) == len(row["seconds"]["runs"]) == row["rounds"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"] and 0 < row["tokens"] <= row["padded_tokens"]
        # From kept borders one after another, or side by side: no more layers than with swaps in this order.
        assert row["layer_forwards"]["runs"] <= row["layer_forwards"]["modules"]
    assert "times as fast" in result.output


def test_a_model_that_is_not_there_gives_one_line() -> None:
    result = CliRunner().invoke(scoring.app, ["--model", "/no/such/model"])
    assert result.exit_code == 1
    assert result.stderr.startswith("benchmarks.scoring: ") and result.stderr.count("\n") == 1
