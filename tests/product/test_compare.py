"""`dtr-deploy compare`: every figure of every run, in its own column."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dtr_deploy import cli
from dtr_deploy.report.compare import comparison, facts
from dtr_deploy.report.schema import REPORT, Report
from tests.product.reports import full_report, small_report


def rows_of(**reports: Report) -> dict[str, list[str]]:
    table = comparison(reports)
    columns = [list(column.cells) for column in table.columns]
    return {str(name): [str(cell) for cell in cells] for name, *cells in zip(*columns, strict=True)}


def test_figures_stand_in_the_column_of_their_run() -> None:
    rows = rows_of(small=small_report(), full=full_report())
    assert rows["layers replaced"] == ["3 of 4", "3 of 4"]
    assert rows["speedup on the target"] == ["", "1.87x"]
    assert rows["test: difference"] == ["", "-0.020 (-0.060 to +0.020)"]
    assert rows["search: recall"] == ["1.000 -> 0.900"] * 2
    assert rows["mean relative error"] == [
        "0.2000",
        f"{sum(0.01 * (7 * n + m) for n in (1, 2, 3) for m in (1, 2)) / 6:.4f}",
    ]
    assert rows["cache at 2,048 tokens"][1] == f"{(1024 * 2048 + 99_000) / (4096 * 2048):.1%} of the base's"
    assert rows["ONNX Runtime GenAI int4, 512 + 64: prefill"] == ["", "1.40x"]  # 7 s and 5 s


def test_every_row_of_every_run_is_there_in_order() -> None:
    small, full = small_report(), full_report()
    for one, other in ((small, full), (full, small)):
        names = list(rows_of(a=one, b=other))
        assert set(names) == {*facts(one), *facts(other)} and len(names) == len(set(names))
        for report in (one, other):
            mine = [name for name in names if name in facts(report)]
            assert mine == list(facts(report))


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    for name, report in (("a", small_report()), ("b", full_report())):
        (tmp_path / name).mkdir()
        (tmp_path / name / REPORT).write_bytes(report.to_json())
    found = runner.invoke(cli.app, ["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert found.exit_code == 0 and "Runs side by side" in found.stdout and "1.87x" in found.stdout
    for arguments, says in ((["a"], "two runs or more"), (["a", "a"], "named twice"), (["a", "none"], "no such run")):
        bad = runner.invoke(cli.app, ["compare", *(str(tmp_path / name) for name in arguments)])
        assert bad.exit_code == 1 and says in bad.stderr and bad.stderr.count("\n") == 1


def test_a_table_fits_a_wide_terminal() -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(comparison({"a": small_report(), "b": full_report()}))
    assert max(map(len, console.export_text().splitlines())) <= 140


@pytest.mark.parametrize("number", [2, 3])
def test_runs_are_told_apart_by_where_they_are(tmp_path: Path, number: int) -> None:
    """Two runs of one name in different folders."""
    paths = [tmp_path / str(index) / "run" for index in range(number)]
    for path in paths:
        path.mkdir(parents=True)
        (path / REPORT).write_bytes(small_report().to_json())
    found = CliRunner().invoke(cli.app, ["compare", *map(str, paths)])
    assert found.exit_code == 0, found.stderr
