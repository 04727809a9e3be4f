"""report.html as a screen reader gets it, and on paper: what Chromium's accessibility tree and printing say."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from dtr_deploy.report.page import PAGE, page
from tests.product.chromium import BROWSER, Tab, opened
from tests.product.reports import full_report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    if not BROWSER:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    folder = tmp_path_factory.mktemp("page")
    file = folder / PAGE
    file.write_text(page(full_report()))
    # A dark desktop: paper is white all the same.
    with opened(file, folder / "profile", "--force-dark-mode") as tab:
        yield tab


def nodes(tab: Tab) -> list[tuple[str, str, dict[str, Any]]]:
    """(role, name, properties) of everything that is told to a screen reader."""
    found = []
    for node in tab.ask("Accessibility.getFullAXTree")["nodes"]:
        if not node.get("ignored"):
            properties = {one["name"]: one["value"].get("value") for one in node.get("properties", [])}
            found.append((node["role"]["value"], node.get("name", {}).get("value", ""), properties))
    return found


def test_a_screen_reader_is_told_everything(tab: Tab) -> None:
    told = nodes(tab)
    roles = [role for role, _, _ in told]
    assert roles.count("main") == 1 and ("navigation", "Parts of the report") in {(r, n) for r, n, _ in told}
    levels = [properties["level"] for role, _, properties in told if role == "heading"]
    assert levels.count(1) == 1 and set(levels) == {1, 2}, "one title, and parts below it"
    regions = [name for role, name, _ in told if role == "region"]
    assert len(regions) == levels.count(2) and all(regions), "each part is a landmark under its heading's name"
    images = [name for role, name, _ in told if role == "image"]
    assert len(images) == 7 and all(len(name) > 40 for name in images), "figures are told in words"
    for role, name, properties in told:
        if properties.get("focusable") and role not in ("RootWebArea", "generic"):
            assert name, f"a {role} that can be reached has no name"
    # Figures' axes and marks would be read out as loose numbers.
    assert not any(role.startswith("Svg") or role == "graphics-document" for role in roles)


def test_tables_are_told_with_their_columns(tab: Tab) -> None:
    tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    told = nodes(tab)
    heads = [name for role, name, _ in told if role == "columnheader"]
    assert {"layer", "form"} <= set(heads) and all(heads)
    assert sum(role == "table" for role, _, _ in told) == tab.evaluate("document.querySelectorAll('table').length")
    tab.evaluate("document.querySelectorAll('details').forEach(part => { part.open = false })")


def test_tables_that_scroll_can_be_reached_by_keyboard(tab: Tab) -> None:
    script = "[...document.querySelectorAll('.scroll')].every(part => part.tabIndex == 0 && part.ariaLabel)"
    assert tab.evaluate(script)


def test_paper_has_the_tables_and_dark_ink(tab: Tab) -> None:
    assert tab.evaluate("document.querySelectorAll('details[open]').length") == 0
    printed = tab.ask("Page.printToPDF", printBackground=True)
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    assert tab.evaluate("document.querySelectorAll('details:not([open])').length") == 0, "what is folded is printed"
    tab.ask("Emulation.setEmulatedMedia", media="print")
    colour = "getComputedStyle(document.{}).{}"
    assert tab.evaluate(colour.format("body", "backgroundColor")) == "rgb(255, 255, 255)"
    assert tab.evaluate(colour.format("body", "color")) == "rgb(0, 0, 0)"
    assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    ink = "getComputedStyle(document.querySelector('.plot .infolayer text')).fill"
    assert tab.evaluate(ink) == "rgb(0, 0, 0)"
    wide = (
        "[...document.querySelectorAll('.plot svg')].filter(x => x.getBoundingClientRect().right > innerWidth).length"
    )
    assert tab.evaluate(wide) == 0
    tab.ask("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)  # A4
    tables = "[...document.querySelectorAll('table')]"
    assert tab.evaluate(f"{tables}.every(x => x.getBoundingClientRect().right <= innerWidth)")
    assert tab.evaluate(f"{tables}.every(x => getComputedStyle(x.parentElement).overflowX == 'visible')")
