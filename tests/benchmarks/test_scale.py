"""The simulation of many GPUs: one costs what its operations say, more cost less, calls are those of the ledger."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import scale
from benchmarks.scale import SHAPES, Assumed, Speeds, calls_of, makespan, simulate
from dtr_deploy.search.ledger import Ledger, TrialKey, TrialResult
from tests.tiny import tiny_backbone, tiny_tokenizer

SPEEDS = Speeds(peak=1e11, teacher=0.5, twin=0.25)
ASSUMED = Assumed(1000.0, 60.0, 10.0, 300.0, 100.0, 4, 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    """A base scored on four parts, a race of two on the first part, the winner on the rest, and an attribution."""
    file = tmp_path / "ledger.sqlite"
    layouts = [(None, None, None), ("gla", None, None), (None, "gla", None)]
    with Ledger(file) as ledger:

        def record(kind: str, layout: int, part: int, seconds: float) -> None:
            key = TrialKey(kind, layouts[layout], "search", f"{kind}{part}")
            ledger.record(key, TrialResult({"part": part}, {}, 3), seconds)

        for part in range(4):
            record("score", 0, part, 1.0)
        for layout in (1, 2):
            record("attribution", layout, 0, 5.0)
        for layout in (1, 2):
            record("score", layout, 0, 2.0)
        for part in (1, 2, 3):
            record("score", 2, part, 2.0)
        record("throughput", 1, 0, 9.0)
    return file


def test_calls_are_those_of_the_search(ledger: Path) -> None:
    calls = calls_of(ledger)
    assert [(kind, [seconds for _, seconds in call]) for kind, call in calls] == [
        ("score", [1.0] * 4),
        ("attribution", [5.0] * 2),
        ("score", [2.0] * 2),
        ("score", [2.0] * 3),
    ]
    assert [makespan(kind, call, 2, 1) for kind, call in calls] == [2.0, 5.0, 2.0, 4.0]
    assert [makespan(kind, call, 2, 2) for kind, call in calls] == [2.0, 5.0, 2.0, 3.0]
    assert [makespan(kind, call, 1, 3) for kind, call in calls] == pytest.approx([4.0, 10.0, 4.0, 6.0])


def test_one_gpu_costs_its_operations_and_more_cost_less(ledger: Path) -> None:
    shape, calls = SHAPES["llama-3.1-8b"], calls_of(ledger)
    one, eight, many = (simulate(shape, 10**6, 2048, 3, calls, 0.5, SPEEDS, ASSUMED, gpus) for gpus in (1, 8, 64))
    layer = 2 * (2 * 4096 * 128 * 40 + 3 * 4096 * 14336) + 2 * 32 * 128 * 2048
    twin = 3 * (2 * 2 * 4096 * 128 * 40 + 6 * 32 * 128**2)
    assert one.distill == pytest.approx(10**6 * (32 * layer / 0.5 + 96 * twin / 0.25) / 1e15)
    assert one.search == pytest.approx(0.5 * 24) and one.busy == pytest.approx(1.0)
    assert one.distill > eight.distill > many.distill and one.search > eight.search >= many.search
    assert eight.busy > many.busy, "groups repeat the teacher's pass and wait for one another"
    assert many.distill > 10**6 * 32 * layer / 0.5 / 1e15, "the last group runs the whole teacher"
    few = simulate(shape, 10**6, 2048, 3, calls, 0.5, SPEEDS, ASSUMED, 1, at_once=32)
    assert one.distill < few.distill < one.distill + 2 * 10**6 * 32 * layer / 0.5 / 1e15, "three passes of the teacher"


def test_gpus_that_share_a_pass_run_the_teacher_once(ledger: Path) -> None:
    shape, calls, tokens = SHAPES["llama-3.1-8b"], calls_of(ledger), 10**6
    one = simulate(shape, tokens, 2048, 3, calls, 0.5, SPEEDS, ASSUMED, 1)
    apart, shared, all_of_them = (
        simulate(shape, tokens, 2048, 3, calls, 0.5, SPEEDS, ASSUMED, 8, team=team) for team in (1, 4, 8)
    )
    # 96 twins come out even; what a GPU sends is its eighth of the tokens, of 32 layers, to seven others.
    sent = tokens / 8 * 32 * 2 * 2 * 4096 * 7 / 8 / 300e9
    assert all_of_them.distill == pytest.approx(one.distill / 8 + sent)
    assert apart.distill > shared.distill > all_of_them.distill and apart.teacher > shared.teacher > one.teacher * 0.99
    assert all_of_them.teacher == pytest.approx(one.teacher)


def test_the_command_writes_a_page(ledger: Path, tmp_path: Path) -> None:
    tiny_backbone().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    threads, page, figures = torch.get_num_threads(), tmp_path / "page.md", tmp_path / "figures.json"
    options = ["--model", tmp_path / "model", "--gpus", 1, 8, "--out", page, "--json", figures]
    with patch.dict(os.environ):
        done = CliRunner().invoke(scale.app, ["--ledger", str(ledger), *map(str, options)])
        wrong = CliRunner().invoke(scale.app, ["--ledger", str(tmp_path / "none"), "--shape", "llama-3.1-8b"])
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    rows = json.loads(figures.read_text())["rows"]
    assert [(row["gpus"], row["team"]) for row in rows] == [(1, 1), (8, 1), (8, 8)]
    assert rows[0]["distill"] > rows[1]["distill"] > 0
    text = page.read_text()
    assert "No GPU has run this" in text and "| 8 |" in text and "4 calls with 11 pieces" in text
    assert wrong.exit_code == 1 and "no such file" in wrong.output
