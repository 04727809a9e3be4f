"""The serving benchmark over two tiny exports, and its arithmetic over runs whose times are known."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks import serving_onnx
from benchmarks.serving_onnx import Row, measure, table
from dtr_deploy.export.onnx import export_model
from tiny import tiny_backbone, tiny_hybrid, tiny_tokenizer


@pytest.fixture(autouse=True)
def threads_of_this_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    with patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("exports")
    export_model(tiny_backbone(layers=2), tiny_tokenizer(), folder / "base", "int4")
    export_model(tiny_hybrid(forms=(None, "gated_deltanet")), tiny_tokenizer(), folder / "hybrid", "int4")
    return folder / "base", folder / "hybrid"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(serving_onnx.app, [str(argument) for argument in arguments])


def test_prints_a_table_and_writes_json(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, hybrid = folders
    file = tmp_path / "rows.json"
    options = ("--prompts", 20, 40, "--output", 4, "--repeats", 2, "--threads", 1, "--batch", 2, "--json", file)
    result = run("--base", base, "--hybrid", hybrid, *options)
    assert result.exit_code == 0, result.output
    assert "Processor: " in result.output and "2 interleaved rounds" in result.output
    written = json.loads(file.read_text())
    assert written.keys() == {"schema", "environment", "settings", "rows"}
    assert written["settings"]["prompts"] == [20, 40]
    assert [(row["prompt"], row["phase"]) for row in written["rows"]] == [
        (prompt, phase) for prompt in (20, 40) for phase in ("prefill", "decode")
    ]
    for row in written["rows"]:
        assert len(row["base"]) == len(row["hybrid"]) == len(row["ratios"]) == 2
        assert min(row["base"] + row["hybrid"]) > 0
        assert row["ratios"] == pytest.approx([b / h for b, h in zip(row["base"], row["hybrid"], strict=True)])


def test_both_run_the_same_prompts_in_every_round() -> None:
    calls: dict[str, list[tuple]] = {"base": [], "hybrid": []}

    def fake(name: str, prefill: float, others: float):
        def call(batch: list[list[int]], new: int):
            calls[name].append((tuple(map(tuple, batch)), new))
            return [], prefill * len(batch[0]), others

        return call

    runs = {"base": fake("base", 0.2, 3.0), "hybrid": fake("hybrid", 0.1, 2.0)}
    rows = measure(runs, range(5, 9), [7, 11], output=5, batch=3, repeats=4)
    # A warm-up on prompts of their own, then the same for both
    assert calls["base"][1:] == calls["hybrid"][1:] and len(calls["base"]) == 1 + 4 * 2
    assert [(len(batch), len(batch[0]), new) for batch, new in calls["base"][1:3]] == [(3, 7, 5), (3, 11, 5)]
    assert {token for batch, _ in calls["base"] for row in batch for token in row} == set(range(5, 9))
    prefill, decode = rows[2:]
    assert (prefill.prompt, prefill.phase, prefill.base) == (11, "prefill", pytest.approx([2.2] * 4))
    assert decode.base == [0.75] * 4 and decode.hybrid == [0.5] * 4 and decode.ratio == 1.5


def test_a_ratio_is_the_median_of_ratios_within_rounds() -> None:
    row = Row(8, "decode", base=[1.0, 4.0, 9.0], hybrid=[1.0, 2.0, 1.0])
    assert row.ratios == [1.0, 2.0, 9.0] and row.ratio == 2.0
    assert [column._cells for column in table([row]).columns][-2:] == [["2.00"], ["1.00 2.00 9.00"]]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--prompts", "0"], ["--prompts 0", "from 1"]),
        (["--prompts", "8190", "--output", "9"], ["8199 tokens", "8192"]),
        (["--output", "1"], ["--output"]),
        (["--json", "/nowhere/at/all.json"], ["--json", "/nowhere/at"]),
        (["--base", "/no/such/folder"], ["/no/such/folder", "model.onnx"]),
    ],
)
def test_wrong_arguments_give_one_line(folders: tuple[Path, Path], arguments: list[str], names: list[str]) -> None:
    base, hybrid = folders
    result = run("--base", base, "--hybrid", hybrid, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("benchmarks.serving_onnx: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(name in result.stderr for name in names), result.stderr


def test_folders_of_different_models(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, hybrid = folders
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).symlink_to(file)
    (other / "genai_config.json").unlink()
    (other / "genai_config.json").write_text(
        (base / "genai_config.json").read_text().replace('"vocab_size": 512', '"vocab_size": 600')
    )
    result = run("--base", other, "--hybrid", hybrid)
    assert result.exit_code == 1 and "vocabularies of 600 and 512" in result.stderr
