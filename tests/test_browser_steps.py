"""From page to page in a real Chromium: the sidebar, Back, a reload, a talk, and a microphone that is refused."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import soundfile
from conftest import FLAGS
from tiny import speech_like

if not os.environ.get("HDMOLE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright.sync_api")
from playwright import sync_api as playwright_api
from playwright.sync_api import Browser, Page, expect

PATIENCE = 90_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    flags = [flag for flag in FLAGS if flag != "--use-fake-ui-for-media-stream"]  # which would allow the microphone
    with playwright_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """One visitor for all tests, who walks on from where the last test ended."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert not errors


def sidebar(page: Page, name: str) -> None:
    page.get_by_test_id("stSidebarNav").get_by_text(name, exact=True).click()


def shows_results(page: Page, path: str) -> None:
    """The page has this path, and shows figures of results."""
    page.wait_for_url(re.compile(rf"/{path}(\?|$)"))
    if path == "report":
        expect(page.frame_locator("iframe").get_by_text("Where this comes from")).to_be_attached()
        expect(page.frame_locator("iframe").get_by_text("Word error rate by accent")).to_be_attached()
    else:
        title = {"compare": "Is HDMoLE better", "correspondence": "Does each expert serve"}[path]
        expect(page.get_by_role("heading", name=re.compile(title))).to_be_visible()
        expect(page.locator(".js-plotly-plot").first).to_be_visible()
    expect(page.get_by_text("There are no results of this kind yet")).to_have_count(0)


def test_pages_of_results_show_them_by_the_sidebar_and_by_back(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/correspondence")
    page.get_by_role("button", name="Measure it on the samples").click(timeout=2 * PATIENCE)  # the app loads its model first
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    for name in ("Compare", "Report", "Correspondence", "Compare"):
        sidebar(page, name)
        shows_results(page, name.lower())
    for path in ("correspondence", "report", "compare"):
        page.go_back()
        shows_results(page, path)
    page.go_forward()
    shows_results(page, "report")


def test_a_reload_keeps_an_upload_and_back_undoes_choices(page: Page, app_url: str, tmp_path: Path) -> None:
    audio = tmp_path / "mine.flac"
    soundfile.write(audio, speech_like(1.2, 5), 16_000)
    page.goto(f"{app_url}/transcribe?sample=indian_1")
    expect(page.locator(".card .heard")).to_have_count(5)
    page.get_by_text("Upload", exact=True).click()
    page.locator("input[type=file]").set_input_files(audio)
    page.wait_for_url(re.compile("clip="))
    sidebar(page, "Routing")
    page.wait_for_url(re.compile(r"/routing\?clip=.*gate=gate"))
    layer = page.url
    page.get_by_role("radio", name="Local").click()
    page.wait_for_url(re.compile("gate=local_gate"))
    page.reload()
    expect(page.get_by_role("heading", name=re.compile("Local router .*over time"))).to_be_visible()
    expect(page.get_by_placeholder("mine.flac (yours)")).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name=re.compile("Combined gate .*over time"))).to_be_visible()
    assert page.url == layer
    page.go_back()
    expect(page.get_by_text("Now shown: mine.flac")).to_be_visible()
    page.go_back()
    expect(page.get_by_label("What was said").first).not_to_have_value("")
    assert "sample=indian_1" in page.url


def test_a_talk_has_its_pages_and_the_controls_that_it_speaks_of(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/thresholds?sample=indian_1")
    expect(page.get_by_test_id("stSlider").first).to_be_visible()
    page.get_by_text("Presentation mode").click()
    expect(page.get_by_test_id("stSidebar")).to_be_hidden()
    expect(page.get_by_test_id("stSlider").first).to_be_visible()
    expect(page.locator(".js-plotly-plot").first).to_be_visible()
    leave = page.get_by_role("button", name="Leave presentation mode")
    box = leave.bounding_box()
    first = page.locator(".stMainBlockContainer h1").bounding_box()
    assert box and first and box["y"] + box["height"] <= first["y"]  # in the bar above the page, over no figure
    page.get_by_test_id("stHeader").get_by_text("Routing", exact=True).click()
    expect(page.get_by_role("heading", name=re.compile("Which expert worked when"))).to_be_visible()
    expect(page.get_by_test_id("stMain").get_by_test_id("stButtonGroup").first).to_be_visible()
    leave.click()
    expect(page.get_by_test_id("stSidebar")).to_be_visible()


def test_a_refused_microphone_gets_a_plain_sentence(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/transcribe?sample=indian_1")
    page.get_by_text("Microphone", exact=True).click()
    page.get_by_role("button", name="Record").click()
    expect(page.locator(".mic[data-why=denied]")).to_be_visible()


def test_the_job_of_a_closed_tab_is_gone_within_five_seconds(
    browser: Browser, app_url: str, apps: dict[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, speech_like(900.0, 3), 16_000)
    app = psutil.Process(apps[app_url].pid)

    def share(seconds: float) -> float:
        """The share of a core that the app takes in the next seconds."""
        before, began = app.cpu_times(), time.monotonic()
        time.sleep(seconds)
        after = app.cpu_times()
        return (after.user + after.system - before.user - before.system) / (time.monotonic() - began)

    expect.set_options(timeout=PATIENCE)
    first, second = (browser.new_context(viewport={"width": 1280, "height": 800}) for _ in range(2))
    tab = first.new_page()
    tab.set_default_timeout(PATIENCE)
    tab.goto(f"{app_url}/transcribe?sample=indian_1")
    expect(tab.locator(".card .heard")).to_have_count(5)
    tab.get_by_text("Upload", exact=True).click()
    tab.locator("input[type=file]").set_input_files(long)
    tab.wait_for_url(re.compile("clip="))
    expect(tab.get_by_text("is listening")).to_be_visible()
    busy = share(2.0)
    assert busy > 0.1
    tab.close()
    closed = time.monotonic()
    while share(0.4) > busy / 4:
        assert time.monotonic() - closed < 5
    other = second.new_page()
    other.set_default_timeout(PATIENCE)
    other.goto(f"{app_url}/transcribe?sample=scottish_1")
    expect(other.get_by_text("Transcripts (JSON)")).to_be_visible()
    first.close()
    second.close()
