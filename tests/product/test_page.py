"""report.html: one file, whose every figure and table has the numbers of report.json; looked at by a real browser."""

import json
import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dtr_deploy import cli
from dtr_deploy.report import figures
from dtr_deploy.report.page import PAGE, page
from dtr_deploy.report.schema import REPORT, Report
from dtr_deploy.report.tables import layers_table
from tests.product.chromium import BROWSER
from tests.product.reports import full_report, small_report


class Parsed(HTMLParser):
    """The page's scripts by id, its elements, table cells and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.cells: list[str] = []
        self._into: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._into = tag if tag in ("td", "script") else self._into
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._into = None if tag == self._into else self._into

    def handle_data(self, data: str) -> None:
        if self._into == "script" and (name := self.elements[-1][1].get("id")):
            self.scripts[name] = self.scripts.get(name, "") + data
        elif self._into == "td":
            self.cells[-1] += data


def parsed(report: Report) -> Parsed:
    return Parsed(page(report))


def figure_of(report: Report, section: str) -> dict[str, Any]:
    return json.loads(parsed(report).scripts[f"{section}-figure"])


def trace(figure: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [trace for trace in figure["data"] if trace.get("name") == name]
    return found


def test_the_page_carries_the_report() -> None:
    report = full_report()
    assert Report.model_validate(json.loads(parsed(report).scripts["report"])) == report


def test_nothing_is_loaded_from_elsewhere() -> None:
    for tag, attributes in parsed(full_report()).elements:
        for name in ("src", "href", "srcset", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, value)


def test_the_frontier_and_its_intervals() -> None:
    report = full_report()
    assert report.search is not None
    figure = figure_of(report, "frontier")
    within, out = trace(figure, "within the bounds"), trace(figure, "out of bounds")
    visits = report.search.frontier
    assert within["x"] == [visits[0]["speedup"], visits[1]["speedup"]] and out["y"] == [visits[2]["score"]]
    # Of a loss of .01 from -.01 to .04 the score reaches .02 further up and .03 further down.
    assert within["error_y"]["array"] == pytest.approx([0, 0.02])
    assert within["error_y"]["arrayminus"] == pytest.approx([0, 0.03])
    star = trace(figure, "chosen, as measured")
    assert (star["x"], star["y"]) == ([report.search.speedup], [report.scores["search"].hybrid])


def test_every_layer_has_its_form_error_and_cost() -> None:
    report = full_report()
    data = figure_of(report, "layers")["data"]
    strip = {layer: one["name"] for one in data[:2] for layer in one["x"]}
    assert strip == {0: "full attention", 1: "gla", 2: "gla", 3: "gla"}
    errors, kl, recall = (
        {(one["name"], x): y for one in data[first : first + 2] for x, y in zip(one["x"], one["y"], strict=True)}
        for first in (2, 4, 6)
    )
    assert errors == {(row.form, row.layer): row.relative_error for row in report.distill}
    assert kl["gla", 2] == pytest.approx(0.022) and recall["gated_deltanet", 3] == pytest.approx(0.39)


def test_the_path_names_every_decision() -> None:
    figure = figure_of(full_report(), "path")
    assert trace(figure, "committed")["x"] == [1] and trace(figure, "rejected")["y"] == [0.79]
    assert trace(figure, "committed")["customdata"] == [[3, "layer 1: gla, layer 2: gla, layer 3: gla"]]
    assert trace(figure, "confirmed")["x"] == [3]


def test_speed_is_that_of_single_requests() -> None:
    report = full_report()
    data = figure_of(report, "speed")["data"]
    drawn = [(one["name"], x, y) for one in data for x, y in zip(one["x"], one["y"], strict=True)]
    single = [row for row in report.throughput if row.workload.concurrency == 1]
    expected = [
        (model, row.workload.prompt, getattr(getattr(row, model), part))
        for row in single
        for model in ("base", "hybrid")
        for part in ("prefill", "decode")
    ]
    assert sorted(drawn) == sorted(expected)


def test_the_ladder_shows_what_failed() -> None:
    figure = figure_of(full_report(), "parity")
    assert trace(figure, "failed")["customdata"] == [0.004] and trace(figure, "passed")["customdata"] == [1e-4]
    assert trace(figure, "limit")["x"] == [3e-4, 3e-4]


def test_an_exact_program_stays_on_the_ladder() -> None:
    """A mean KL of zero has no place on a logarithmic axis: it is drawn at its left end, and told as zero."""
    report = full_report()
    report.parity[0].mean_kl = 0.0
    point = trace(figure_of(report, "parity"), "passed")
    assert point["customdata"] == [0.0] and 0 < point["x"][0] < 3e-4


def test_memory_and_cost() -> None:
    report = full_report()
    assert trace(figure_of(report, "memory"), "hybrid")["y"] == [row.hybrid_bytes / 2**20 for row in report.memory]
    (bars,) = figure_of(report, "cost")["data"]
    assert dict(zip(bars["y"], bars["x"], strict=True)) == report.seconds


def test_every_figure_stands_beside_a_table_and_is_told_in_words() -> None:
    found = parsed(full_report())
    told = [attributes["aria-label"] or "" for _, attributes in found.elements if attributes.get("role") == "img"]
    assert len(told) == 7 and all(len(words) > 40 for words in told)
    assert sum(tag == "details" for tag, _ in found.elements) == len(told)
    for text in ("1.93x", "0.0800", "+0.0220", "rejected"):
        assert text in found.cells, text


def test_twins_of_one_form_with_two_windows_are_told_apart() -> None:
    report = full_report()
    report.distill = [report.distill[0].model_copy(update={"layer": 1, "form": form}) for form in ("gla", "gla@256")]
    table = layers_table(report)
    names, taken = (list(table.columns[column].cells) for column in (1, 2))
    assert dict(zip(names, taken, strict=True)) == {"gla": "yes", "gla@256": ""}


def test_what_a_run_does_not_have_is_left_out() -> None:
    report = small_report().model_copy(update={"scores": {}, "throughput": [], "lm_eval": [], "search": None})
    found = parsed(report)
    sections = [attributes["id"] for tag, attributes in found.elements if tag == "section"]
    assert sections == ["layers", "parity", "cost", "recipe", "environment"]
    links = [attributes["href"] for tag, attributes in found.elements if tag == "a"]
    assert links == ["#main", *(f"#{section}" for section in sections)]


def test_names_cannot_break_the_page() -> None:
    report = full_report()
    report.recipe["name"] = "</script><script>alert(1)</script>"
    report.backbone.spec = "<b>&</b>"
    found = parsed(report)
    assert sum(tag == "script" for tag, _ in found.elements) == sum(
        tag == "script" for tag, _ in parsed(full_report()).elements
    )
    assert not any(tag == "b" and "class" not in attributes and attributes for tag, attributes in found.elements)
    assert Report.model_validate(json.loads(found.scripts["report"])) == report


def test_colours_differ_where_forms_do() -> None:
    assert len(set(figures.FORMS)) == len(figures.FORMS) and figures.KEPT not in figures.FORMS


def test_the_command_writes_it_again(tmp_path: Path) -> None:
    (tmp_path / REPORT).write_bytes(small_report().to_json())
    runner = CliRunner()
    result = runner.invoke(cli.app, ["report", str(tmp_path)])
    assert result.exit_code == 0 and (tmp_path / PAGE).read_text() == page(small_report())
    elsewhere = tmp_path / "no" / "page.html"
    result = runner.invoke(cli.app, ["report", str(tmp_path), "--out", str(elsewhere)])
    assert result.exit_code == 1 and "there is no folder" in result.stderr and result.stderr.count("\n") == 1
    assert runner.invoke(cli.app, ["report", str(tmp_path / "none")]).exit_code == 1


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`look(file, *options)`: Chromium's standard output and error for a page."""
    if not BROWSER:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    profile = tmp_path_factory.mktemp("profile")

    def look(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
        quiet = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        logs = ["--enable-logging=stderr", "--v=0", f"--user-data-dir={profile}", "--virtual-time-budget=20000"]
        command = [BROWSER, *quiet, *logs, *options, file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    yield look


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1400])
def test_a_browser_draws_every_figure_without_a_complaint(tmp_path: Path, browser: Any, width: int) -> None:
    file = tmp_path / PAGE
    file.write_text(page(full_report()))
    seen = browser(file, f"--window-size={width},900", "--dump-dom")
    assert "CONSOLE" not in seen.stderr, seen.stderr
    drawn = re.findall(r'class="plot js-plotly-plot"', seen.stdout)
    assert len(drawn) == 7 and seen.stdout.count('class="main-svg"') >= 7
