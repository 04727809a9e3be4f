"""The study of the cost model: its whole path on a tiny model, taken up where it stopped."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

from benchmarks.studies import cost_model
from dtr_deploy.hybrid.layout import counts
from dtr_deploy.search.ledger import Ledger


def run(*arguments: object) -> Result:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(cost_model.app, [str(argument) for argument in arguments])
    torch.set_num_threads(threads)
    return result


def test_the_whole_path_stopped_and_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()  # a minute passes with every look at it, however fast the machine is
    with monkeypatch.context() as patch:
        patch.setattr(cost_model, "time", SimpleNamespace(monotonic=lambda: 60.0 * next(clock)))
        stopped = run("--out", tmp_path, "--small", "--max-minutes", 5)
    assert stopped.exit_code == 1 and "the same command goes on from here" in stopped.output
    before = _stored(tmp_path)
    assert 0 < len(before) < 12
    result = run("--out", tmp_path, "--small")
    assert result.exit_code == 0, result.output
    assert _stored(tmp_path).items() >= before.items()  # nothing was measured twice
    summary = json.loads((tmp_path / "summary.json").read_text())
    (engine,) = summary["engines"]
    assert (engine["engine"], engine["precision"]) == ("ort", "int4")
    for row in engine["rows"]:
        for part in ("speedup", "prefill", "decode"):
            predicted, measured = row["predicted"][part], row["measured"][part]
            assert measured > 0 and row["error"][part] == pytest.approx(predicted / measured - 1)
    largest = max(abs(row["error"]["speedup"]) for row in engine["rows"])
    assert engine["errors"]["speedup"]["largest"] == largest
    page = (tmp_path / "cost_model.md").read_text()
    assert "`python -m benchmarks.studies.cost_model --out FOLDER --engines ort --small`" in page
    assert all(f"| {row['name']} |" in page for row in engine["rows"]) and f"largest {largest:.1%}" in page


def test_unseen_layouts_are_many_and_of_every_kind() -> None:
    layouts = cost_model.unseen_layouts(30)
    assert len(set(layouts.values())) == len(layouts) >= 8
    places = [layouts[name] for name in ("half, spread", "half, the first", "half, the last")]
    assert len(set(places)) == 3 and all(counts(layout) == {"gated_deltanet": 15} for layout in places)
    assert {entry for layout in layouts.values() for entry in layout} == {None, *cost_model.ENTRIES}
    assert all(None in layout for layout in layouts.values())


def test_an_engine_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = run("--out", tmp_path, "--small", "--engines", "tgi")
    assert result.exit_code == 1 and "--engines tgi: accepted are ort, vllm" in result.output


def _stored(folder: Path) -> dict[tuple, float]:
    with Ledger(folder / "ledger.sqlite") as ledger:
        return {trial.key.layout: trial.seconds for trial in ledger.trials(kind="throughput")}
