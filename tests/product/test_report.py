"""report.json, its tables and the model card: the figures in them are those that went in."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from dtr_deploy.errors import UsageError
from dtr_deploy.export.model_card import model_card
from dtr_deploy.report.collect import _score_row
from dtr_deploy.report.schema import REPORT, Report, read_report
from dtr_deploy.report.tables import frontier_table, parts
from tests.product.reports import small_report


def text_of(report: Report) -> str:
    console = Console(width=160, record=True, file=io.StringIO())
    for part in parts(report):
        console.print(part)
    return console.export_text()


def test_it_survives_a_file(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_bytes(small_report().to_json())
    assert read_report(tmp_path / REPORT) == small_report()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        ("[]", "schema_version None; accepted: 1"),
        ('{"schema_version": 1}', "recipe: Field required"),
    ],
)
def test_a_damaged_report_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / REPORT).write_text(content)
    with pytest.raises(UsageError) as caught:
        read_report(tmp_path / REPORT)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_rates_and_ratios() -> None:
    """8 -> 4 s for 2 x 4,096 prompt tokens, 20 -> 10 s for 2 x 511 tokens after the first."""
    (row,) = small_report().throughput
    assert row.base.prefill == pytest.approx(2 * 4096 / 8) and row.hybrid.prefill == pytest.approx(2 * 4096 / 4)
    assert row.base.decode == pytest.approx(2 * 511 / 20) and row.ratio.decode == pytest.approx(2.0)
    assert row.hybrid.end_to_end == pytest.approx(2 * 4608 / 14) and row.ratio.end_to_end == pytest.approx(2.0)


def test_tables_show_the_figures() -> None:
    text = text_of(small_report())
    assert "3 of 4 layers replaced: gla 3" in text and "full attention in layers 0" in text and "-GGG" in text
    assert "0.860" in text and "0.850" in text and "-0.030 to +0.010 (95%)" in text
    assert "4,096 + 512, 2 at once" in text and "1,024 -> 2,048 (2.00x)" in text and "51.1 -> 102 (2.00x)" in text
    assert "vLLM bf16" in text and "2.0e-04" in text and "99.00%" in text and "passed" in text
    assert "10 min 00 s" in text and "11 min 01 s" in text


def test_a_failed_gate_is_visible() -> None:
    report = small_report()
    report.parity[0].passed = False
    assert "FAILED" in text_of(report)


def test_parts_that_are_missing_are_left_out() -> None:
    report = small_report().model_copy(update={"scores": {}, "throughput": [], "parity": [], "seconds": {}})
    text = text_of(report)
    assert "3 of 4" in text and "Throughput" not in text and "Parity" not in text


def test_forms_with_one_initial_are_told_apart() -> None:
    report = small_report()
    report.layout[1].form = "gated_deltanet"
    assert "0 gated_deltanet" in text_of(report) or "1 gla" in text_of(report)


def test_the_frontier() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(frontier_table([{"replaced": 3, "score": 0.8, "loss": 0.06, "speedup": 1.31, "passes": False}]))
    text = console.export_text()
    assert "1.31x" in text and "+0.060" in text and "no" in text


def test_the_interval_of_a_loss_turns_into_that_of_the_difference() -> None:
    """The search reports what is lost, base - hybrid; the report says hybrid - base."""
    interval = {"standard_error": 0.01, "confidence": 0.9}
    row = _score_row(
        {
            "base": {"estimate": 0.86, "low": 0.8, "high": 0.9, **interval},
            "hybrid": {"estimate": 0.85, "low": 0.79, "high": 0.89, **interval},
            "loss": {"estimate": 0.01, "low": -0.01, "high": 0.03, **interval},
            "tasks": {"recall": {"base": 1.0, "hybrid": 0.9}},
        }
    )
    assert row.ci == (-0.03, 0.01) and row.confidence == 0.9 and row.base_ci == (0.8, 0.9)
    assert row.tasks["recall"].hybrid == 0.9


def test_the_model_card_has_the_same_figures() -> None:
    card = model_card(small_report())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for figure in (
        "3 of 4 attention layers",
        "gla 3",
        "0.860",
        "1,024.0 -> 2,048.0 (2.00x)",
        "2.0e-04",
        "2 cores of P",
    ):
        assert figure in card
