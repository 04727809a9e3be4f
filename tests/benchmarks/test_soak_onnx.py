"""The soak of the plain onnxruntime runner: passes on a working one, and fails on a broken one."""

import json
import mmap
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks import soak_onnx
from benchmarks.soak_load import EVEN_LENGTHS, plan_load
from dtr_deploy.engines.ort_runner import OrtRunner
from dtr_deploy.engines.ort_states import StatePool
from dtr_deploy.export.onnx import export_model
from tiny import tiny_hybrid, tiny_tokenizer

OPTIONS = ("--requests", 40, "--slots", 4, "--longest", 120, "--new-tokens", 12, "--prefill-chunk", 32, "--threads", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("soak") / "fp32"
    export_model(tiny_hybrid(), tiny_tokenizer(), out, "fp32")
    return out


def run(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    with patch.dict(os.environ):
        result = CliRunner().invoke(soak_onnx.app, [str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return result


def test_every_answer_is_compared(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "soak.json"
    result = run(folder, *OPTIONS, "--aborted", 0.2, "--json", file)
    assert result.exit_code == 0, result.output
    assert "40 answers equal, 0 ties, 0 wrong" in result.output and result.output.endswith("passed\n")
    assert "8 to be aborted" in result.output and "4 slots free" in result.output
    written = json.loads(file.read_text())
    assert written["verdict"]["equal"] == list(range(40)) and written["result"]["hits"] > 0
    assert sum(written["result"]["cached"]) > 0


def test_a_part_of_the_answers(folder: Path) -> None:
    result = run(folder, *OPTIONS, "--verify", 10)
    assert result.exit_code == 0 and "10 answers equal" in result.output, result.output


def test_slots_that_are_not_cleared_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StatePool, "clear", lambda pool, slot: None)
    result = run(folder, *OPTIONS)
    assert result.exit_code == 1 and "FAILED: request" in result.output, result.output


def test_memory_that_is_lost_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = []
    step = OrtRunner.step

    def losing(runner: OrtRunner) -> list:
        # Mapped and written, not allocated: an allocator may hand out pages that this process holds already.
        lost.append(mmap.mmap(-1, 2**21))
        lost[-1].write(b"\1" * 2**21)
        return step(runner)

    monkeypatch.setattr(OrtRunner, "step", losing)
    result = run(folder, *OPTIONS, "--verify", 0, "--prefix-mib", 0, "--slack-mib", 20)
    assert result.exit_code == 1 and "FAILED: memory grew by" in result.output, result.output


def test_slots_that_are_lost_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = soak_onnx.run_soak
    monkeypatch.setattr(soak_onnx, "run_soak", lambda *arguments: replace(soak(*arguments), free_slots=3))
    result = run(folder, *OPTIONS, "--verify", 0)
    assert result.exit_code == 1 and "FAILED: 3 of 4 slots are free at the end" in result.output, result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    (
        (("--verify", "some"), "--verify"),
        (("--verify", 50), "--requests, 40"),
        (("--json", "/nowhere/at/all.json"), "/nowhere/at"),
        (("--slots", 0), "--slots"),
    ),
)
def test_wrong_arguments_give_one_line(arguments: tuple, words: str, folder: Path) -> None:
    result = run(folder, *OPTIONS, *arguments)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and words in result.stderr, result.stderr


def test_load_is_as_described() -> None:
    options = {"longest": 7000, "new_tokens": (16, 32), "shared": 0.3, "aborted": 0.1}
    load = plan_load(2000, np.arange(100, 200), seed=5, **options)
    assert load == plan_load(2000, np.arange(100, 200), seed=5, **options)
    assert load[0] != plan_load(2000, np.arange(100, 200), seed=6, **options)[0]
    lengths = np.array([len(planned.prompt) for planned in load])
    assert 1 <= lengths.min() < 5 and 6500 < lengths.max() <= 7000
    assert {planned.new_tokens for planned in load} == set(range(16, 33))
    assert sum(planned.aborted for planned in load) == 200
    assert 0.25 < np.mean([planned.shared > 0 for planned in load]) < 0.35
    beginnings = {tuple(planned.prompt[: planned.shared]) for planned in load if planned.shared}
    assert len(beginnings) == 8
    alone = lengths[[planned.shared == 0 for planned in load]]
    # Of the log-uniform ones half are below the square root of 7,000, of the even ones 1.2%.
    assert abs(np.mean(alone < 84) - (0.5 * (1 - EVEN_LENGTHS) + 0.012 * EVEN_LENGTHS)) < 0.05
