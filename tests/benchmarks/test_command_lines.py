"""Both command lines: what they write, and one line for a mistake."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks import distill, machine, operator
from benchmarks.command_line import spread
from benchmarks.machine import Limits
from benchmarks.run import TIMED
from benchmarks.stage_timing import PARTS
from tiny import tiny_backbone, tiny_tokenizer


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits of the machine are measured, but on small arrays; what a command sets for its process is set back."""
    measured, threads = machine.measure_limits, torch.get_num_threads()
    monkeypatch.setattr(machine, "measure_limits", lambda device: measured(device, 128, 1 << 16, 1))
    with patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)


def run(app, *arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_operator_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--repeats", 1, "--sample", 0, "--threads", 1, "--only", "chunk", "onnx", "--json", file)
    result = run(operator.app, "--shapes", "tiny", "--lengths", 1, 20, *options)
    assert result.exit_code == 0, result.output
    assert "tiny (6/2 heads of 32), gated_delta, forward, 20 tokens" in result.output
    written = json.loads(file.read_text())
    assert written.keys() == {"schema", "environment", "settings", "limits", "rows"}
    assert {"processor", "instruction_sets", "threads", "versions", "device"} <= written["environment"].keys()
    assert written["limits"].keys() == {"before", "after"}
    assert Limits(**written["limits"]["before"]).gflops > 0
    timed = [row for row in written["rows"] if row["status"] == TIMED]
    assert {row["length"] for row in timed} == {1, 20}
    assert {"ours auto", "ours chunked", "transformers chunk"} <= {row["contender"] for row in timed}
    for row in timed:
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"]
        assert row["rounds"] == 1 and row["error"] < 0.05 and row["gflops"] > 0 and row["baseline"] == "ours auto"
    for row in written["rows"]:
        assert row["status"] == TIMED or row["reason"], row


def test_decoding_counts_bytes_and_sequences(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ("--repeats", 1, "--sample", 0, "--threads", 1, "--only", "step", "SDPA", "--json", file)
    result = run(
        operator.app, "--shapes", "tiny", "--lengths", 30, "--direction", "decode", "--sequences", 1, 3, *options
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["rows"]
    assert {(row["contender"], row["sequences"]) for row in rows} == {
        (name, count)
        for name in ("ours auto", "ours step over a pool", "torch SDPA, full attention")
        for count in (1, 3)
    }
    assert all(row["gb_per_second"] > 0 and row["gflops"] is None for row in rows)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--shapes", "tiny", "huge"], ["--shapes", "huge", "smollm2"]),
        (["--rule", "softmax"], ["--rule", "gated_delta"]),
        (["--direction", "sideways"], ["--direction", "decode"]),
        (["--dtype", "int4"], ["--dtype", "bfloat16"]),
        (["--device", "tpu"], ["--device", "cuda"]),
        (["--lengths", "64", "0"], ["--lengths 0"]),
        (["--lengths", "long"], ["--lengths", "integer"]),
        (["--rule", "delta", "--per-key"], ["--per-key", "decay"]),
        (["--sequences", "4"], ["--sequences", "decode"]),
        (["--only", "nobody"], ["--only", "ours chunked"]),
        (["--baseline", "nobody"], ["--baseline", "ours chunked"]),
        (["--json", "/nowhere/at/all.json"], ["--json", "/nowhere/at"]),
        (["--unknown"], ["--unknown", "--help"]),
    ],
)
def test_wrong_arguments_give_one_line(arguments: list[str], names: list[str]) -> None:
    result = run(operator.app, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("benchmarks.operator: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(name in result.stderr for name in names), result.stderr


def test_several_values_after_an_option() -> None:
    arguments = ["--lengths", "1", "64", "--rule", "delta", "--shapes", "a", "--lengths=7", "8"]
    expected = ["--lengths", "1", "--lengths", "64", "--rule", "delta", "--shapes", "a", "--lengths=7", "8"]
    assert spread(arguments, {"--lengths", "--shapes"}) == expected


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_backbone().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("backend", ["auto", "chunked"])
def test_distill_splits_a_step(model_folder: Path, tmp_path: Path, backend: str) -> None:
    file = tmp_path / "steps.json"
    options = ("--layers", 2, "--tokens", 64, "--length", 32, "--window", 8, "--steps", 2, "--threads", 1)
    result = run(distill.app, "--model", model_folder, *options, "--backend", backend, "--json", file)
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["settings"]["layer_indices"] == [0, 2] and written["seen"] == sorted(PARTS)
    assert len(written["steps"]) == 2
    for step in written["steps"]:
        assert all(step[part] > 0 for part in PARTS)
        assert step["total"] == pytest.approx(sum(step[part] for part in (*PARTS, "other")))


def test_distill_can_compile_its_twins(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    compile_it = torch.compile

    def traced(function: Any, **options: Any) -> Any:
        compiled.append(function)
        return compile_it(function, backend="eager", **options)  # inductor takes a minute

    monkeypatch.setattr(torch, "compile", traced)
    file = tmp_path / "steps.json"
    options = ("--layers", 2, "--tokens", 64, "--length", 32, "--steps", 1, "--threads", 1, "--compile")
    result = run(distill.app, "--model", model_folder, *options, "--json", file)
    assert result.exit_code == 0 and "torch.compile" in result.output, result.output
    assert [function.__qualname__ for function in compiled] == ["HybridMixer.forward"]
    assert json.loads(file.read_text())["seen"] == sorted(PARTS)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--model", "/no/such/model"], ["/no/such/model"]),
        (["--model", "x", "--form", "nope"], ["--form", "gated_deltanet"]),
        (["--model", "x", "--backend", "nope"], ["--backend", "chunked"]),
        (["--model", "x", "--tokens", "100", "--length", "64"], ["--tokens 100", "--length, 64"]),
        ([], ["--model"]),
    ],
)
def test_wrong_arguments_of_distill_give_one_line(arguments: list[str], names: list[str]) -> None:
    result = run(distill.app, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("benchmarks.distill: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(name in result.stderr for name in names), result.stderr
