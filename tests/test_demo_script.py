"""docs/demo.md in a real Chromium: each line of its lists is done, and what it says appears does appear."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FLAGS

if not os.environ.get("HDMOLE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright.sync_api")
from playwright import sync_api as playwright_api
from playwright.sync_api import Page, expect

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 90_000  # ms; the machine may be busy
MAIN = {  # the main figure of a page
    "": ".voices", "transcribe": ".cards", "routing": ".js-plotly-plot", "thresholds": ".cards",
    "correspondence": ".js-plotly-plot", "compare": ".js-plotly-plot", "paper": ".js-plotly-plot",
}  # fmt: skip
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def address(start_app: Callable[[str], str]) -> str:
    """Address of the app, running on the demo model."""
    return start_app("demo")


@pytest.fixture
def page(chromium: str) -> Iterator[Page]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[*FLAGS, "--autoplay-policy=no-user-gesture-required"]
        )
        opened = browser.new_page(viewport={"width": 1280, "height": 800})
        opened.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        # a player has played as soon as it reports where it is
        opened.add_init_script("addEventListener('timeupdate', () => { window.played = true; }, true);")
        yield opened
        browser.close()


def do(page: Page, address: str, line: str) -> None:
    """Do what a line of the script says, or look for what it says appears."""
    named = re.findall(r"\*\*(.+?)\*\*", line)
    if line.startswith(("Click", "In")):  # a page that is drawn anew closes its menus
        expect(page.locator("[data-testid=stApp][data-test-script-state=notRunning]")).to_be_visible()
    if found := re.fullmatch(r"Open `(/\S*)`\.", line):
        page.goto(address + found[1])
    elif re.fullmatch(r"Click \*\*.+\*\*\.", line):
        page.evaluate("window.played = false")
        choice = page.get_by_role("button", name=named[0], exact=True)
        for role in ("link", "radio"):
            choice = choice.or_(page.get_by_role(role, name=named[0], exact=True))  # type: ignore[arg-type]
        choice.first.click()
    elif re.fullmatch(r"In \*\*.+\*\* choose \*\*.+\*\*\.", line):
        box = page.get_by_role("combobox", name=named[0])
        box.scroll_into_view_if_needed()
        page.wait_for_timeout(1_000)  # scrolling closes an open menu
        box.click()
        page.get_by_role("option", name=named[1], exact=True).click()
        page.locator("h1").first.click()  # an open menu hides the rest of the page from those who cannot see
    elif line == "You hear a voice.":
        page.wait_for_function("window.played")
    else:
        assert re.fullmatch(r"You see \*\*.+\*\*\.?", line), line
        expect(page.get_by_text(named[0]).filter(visible=True).first).to_be_visible()


def test_what_the_script_says_appears_does_appear(page: Page, address: str) -> None:
    lines = [line[2:] for line in (ROOT / "docs" / "demo.md").read_text().splitlines() if line.startswith("- ")]
    assert len(lines) > 20
    for line in lines:
        try:
            do(page, address, line)
        except playwright_api.Error as error:
            pytest.fail(f"“{line}”: {error}")
    expect(page.locator(".stException")).to_have_count(0)


def test_the_main_figure_of_each_page_is_on_the_first_screen(page: Page, address: str) -> None:
    bottoms = {}
    for path, main in MAIN.items():
        page.goto(f"{address}/{path}?model=demo")
        figure = page.locator(main).first
        expect(figure).to_be_visible()
        expect(page.locator("[data-testid=stApp][data-test-script-state=notRunning]")).to_be_visible()
        page.wait_for_timeout(1_000)  # what stands above may still grow
        bottoms[path] = figure.evaluate("shown => shown.getBoundingClientRect().bottom")
    assert {path: bottom for path, bottom in bottoms.items() if bottom > 800} == {}
