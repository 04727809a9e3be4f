"""The twins study on a tiny random model: its whole path, resumed; its figures are worth nothing there."""

import json
from pathlib import Path

from typer.testing import CliRunner

from benchmarks.studies.twins import app


def test_every_variant_is_trained_scored_and_kept(tmp_path: Path) -> None:
    command = ["--out", str(tmp_path), "--small", "--threads", "1"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["variant"]: row for row in summary["rows"]}
    assert list(rows) == [
        "base", "no-op", "window only", "form only", "form + window", "+ calibration", "+ heal",
    ]  # fmt: skip
    assert rows["base"]["scores"]["0"]["kl"] == 0.0
    assert rows["no-op"]["error"] == 1.0
    assert all(row["scores"]["2"]["kl"] > 0 for name, row in rows.items() if name != "base")
    assert rows["+ heal"]["error"] != rows["+ calibration"]["error"]
    page = (tmp_path / "twins.md").read_text()
    assert "2 layers replaced" in page and "no-op" in page

    scores = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json") if path.name != "summary.json"}
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert scores == {path: path.stat().st_mtime_ns for path in scores}
    assert json.loads((tmp_path / "summary.json").read_text())["rows"] == summary["rows"]


def test_a_count_the_model_does_not_have_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--out", str(tmp_path), "--small", "--replaced", "4"])
    assert done.exit_code == 1 and "--replaced" in done.output and "Traceback" not in done.output
