"""The recall study on a tiny random model: every row, resuming, and one line for a mistake."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.studies import recall
from benchmarks.studies.recall_models import of_twins
from benchmarks.studies.small_model import small_backbone
from dtr_deploy.errors import UsageError
from dtr_deploy.hybrid.model import make_hybrid, save_hybrid

SMALL = ("--small", "--threads", "1", "--precision", "float32")


def run(*arguments: object) -> Any:
    return CliRunner().invoke(recall.app, [str(argument) for argument in arguments])


def test_every_row_is_written_and_none_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = (*SMALL, "--out", tmp_path, "--lengths", 1000, 1200, "--tasks", "needle", "many_shot")
    first = run(*options)
    assert first.exit_code == 0, first.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    models = {"base", "hybrid", "hybrid no_op", "hybrid window_only"}
    assert {(row["model"], row["task"], row["length"]) for row in summary["rows"]} == {
        (model, task, length) for model in models for task in ("needle", "many_shot") for length in (1000, 1200)
    }
    for row in summary["rows"]:
        assert row["items"] == (2 if row["task"] == "needle" else 8) and row["seconds"] > 0 and row["tokens"] > 900
        for way in ("generation", "likelihood"):
            difference = row[way]["difference"]
            assert (difference is None) == (row["model"] == "base")
            base = next(
                r
                for r in summary["rows"]
                if (r["model"], r["task"], r["length"]) == ("base", row["task"], row["length"])
            )
            if difference is not None:
                assert difference["low"] <= difference["estimate"] <= difference["high"]
                assert difference["estimate"] == pytest.approx(row[way]["mean"] - base[way]["mean"])
    assert summary["spent"]["trials"] == 16 and summary["spent"]["layer_forwards"] == 4 * 4 * 2 * (2 + 8)
    page = (tmp_path / "recall.md").read_text()
    assert "--out FOLDER --lengths 1000 1200 --tasks needle many_shot --precision float32 --threads 1 --small`" in page
    assert all(f"| {model} |" in page for model in models) and page in first.output

    # A row that is lost is computed again, the others are read.
    answered: list[str] = []
    whole = recall.answers
    monkeypatch.setattr(
        recall, "answers", lambda model, task, *rest: answered.append(task.name) or whole(model, task, *rest)
    )
    (tmp_path / "rows" / "hybrid_no_op.needle.1200.json").unlink()
    assert run(*options).exit_code == 0 and answered == ["needle"]
    again = json.loads((tmp_path / "summary.json").read_text())
    for row in [*summary["rows"], *again["rows"]]:
        del row["seconds"]
    assert again["rows"] == summary["rows"]
    assert run(*options, "--seed", 1).exit_code == 0 and len(answered) == 17  # other prompts are other rows


def test_hybrids_are_read_from_checkpoints_and_runs(tmp_path: Path) -> None:
    backbone = small_backbone()
    save_hybrid(
        make_hybrid(backbone.model, ("gla@8", None, "gla", None), 16), backbone.tokenizer, tmp_path / "run/hybrid"
    )
    for path in (tmp_path / "run", tmp_path / "run/hybrid"):
        out = tmp_path / "out"
        result = run(
            *SMALL,
            "--out",
            out,
            "--lengths",
            600,
            "--items",
            2,
            "--tasks",
            "needle",
            "--no-controls",
            "--hybrid",
            f"mine={path}",
        )
        assert result.exit_code == 0, result.output
        assert [row["model"] for row in json.loads((out / "summary.json").read_text())["rows"]] == ["base", "mine"]
    assert (
        "| mine | 2 of 4 linear (gla 1, gla@8 1), full attention in 1, 3, window 16 |"
        in (out / "recall.md").read_text()
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tasks", "needles"), "--tasks needles: accepted are needle, multi_key, variable_tracking, many_shot"),
        (("--lengths", 600, 600), "--lengths: one of them twice"),
        (("--lengths", 600, 700, "--items", 2, 3, 4), "--items: accepted are one number or 2"),
        (("--hybrid", "nowhere"), "--hybrid nowhere: accepted is NAME=PATH"),
        (("--hybrid", "a=nowhere"), "--hybrid a=nowhere: nowhere is neither; accepted is NAME=PATH"),
        (("--lengths", 100), "100 tokens cannot hold a needle"),
        (("--precision", "int4"), "precision 'int4': accepted are"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, options: tuple[object, ...], says: str) -> None:
    result = run(*SMALL, "--out", tmp_path, *options)
    assert result.exit_code == 1 and says in result.output and len(result.output.strip().splitlines()) == 1


def test_a_twin_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"layer00_gla.safetensors: no such twin"):
        of_twins(small_backbone(), ("gla", None, None, None), 16, tmp_path)
