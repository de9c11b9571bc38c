"""The app in a real Chromium: what Streamlit's test driver cannot do, such as clicks in a figure and the microphone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import soundfile
from conftest import FLAGS
from tiny import speech_like

if not os.environ.get("HDMOLE_REQUIRE_BROWSER"):
    pytest.importorskip("playwright.sync_api")
from playwright import sync_api as playwright_api
from playwright.sync_api import Browser, Page, expect

PATIENCE = 60_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def browser(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    voice = tmp_path_factory.mktemp("voice") / "voice.wav"
    soundfile.write(voice, speech_like(3.0, 2), 48_000)  # what the fake microphone hears
    with playwright_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=[*FLAGS, f"--use-file-for-fake-audio-capture={voice}"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800}, permissions=["microphone"])
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    expect.set_options(timeout=PATIENCE)
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    yield opened
    context.close()
    assert not errors


def test_a_file_can_be_uploaded(page: Page, app_url: str, tmp_path: Path) -> None:
    audio = tmp_path / "mine.flac"
    soundfile.write(audio, speech_like(1.5, 5), 44_100)
    page.goto(f"{app_url}/transcribe")
    expect(page.locator(".card")).to_have_count(5)
    page.get_by_text("Upload", exact=True).click()
    page.locator("input[type=file]").set_input_files(audio)
    expect(page.get_by_label("What was said").first).to_have_value("")
    expect(page.locator(".card .heard")).to_have_count(5)
    expect(page.get_by_text("Transcripts (JSON)")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_text("Transcripts (JSON)").click()
    assert download.value.suggested_filename == "mine.json"
    assert '"file": "mine.flac"' in Path(download.value.path()).read_text()


def test_speech_can_be_recorded(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/transcribe")
    expect(page.locator(".card")).to_have_count(5)
    page.get_by_text("Microphone", exact=True).click()
    page.get_by_role("button", name="Record").click()
    page.wait_for_timeout(2_000)
    page.get_by_role("button", name=re.compile("Stop")).click()
    expect(page.get_by_label("What was said").first).to_have_value("")
    expect(page.locator(".card .heard")).to_have_count(5)
    expect(page.get_by_text("Transcripts (JSON)")).to_be_visible()
    expect(page.locator(".stAlert", has_text="failed")).to_have_count(0)


def test_clicking_the_heatmap_plays_that_moment(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/routing?sample=indian_1&layer=layers.0.fc1")
    heatmap = page.locator(".js-plotly-plot").first
    expect(page.locator(".js-plotly-plot")).to_have_count(6)
    expect(page.get_by_text("click a cell, to hear that moment")).to_be_visible()
    assert page.locator("audio").count() == 0
    plot = heatmap.locator(".nsewdrag").first
    plot.scroll_into_view_if_needed()  # the tiny model's words may be long
    page.wait_for_timeout(500)
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
    expect(page.locator("audio")).to_have_count(1)
    expect(page.get_by_text(re.compile(r"^[01]\.\d\d s, .*combined gate"))).to_be_visible()
    assert "sample=indian_1" in page.url and "layer=layers.0.fc1" in page.url


def test_every_figure_can_be_saved_as_an_image_and_its_data_as_a_table(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/routing?sample=indian_1&layer=layers.0.fc1")
    expect(page.get_by_role("button", name="Save")).to_have_count(1)  # the other figures are folded
    cameras = page.locator(".modebar-btn[data-title*='PNG']")
    expect(cameras).to_have_count(6)
    with page.expect_download() as image:
        cameras.first.click()
    assert image.value.suggested_filename == "indian_1-layers.0.fc1-gate.png"
    assert Path(image.value.path()).read_bytes()[1:4] == b"PNG"
    page.get_by_role("button", name="Save").first.click()
    with page.expect_download() as table:
        page.get_by_text("Data (CSV)").click()
    assert Path(table.value.path()).read_text().startswith("call,time,frame,expert,accent,gate,layer,word\n")
    page.get_by_role("radio", name="SVG").click()
    page.keyboard.press("Escape")
    page.wait_for_timeout(1_000)  # the figure is drawn anew
    with page.expect_download() as drawing:
        page.locator(".modebar-btn[data-title*='Download plot']").first.click()
    assert Path(drawing.value.path()).read_text().startswith("<svg")


def test_clicking_the_overview_chooses_the_layer(page: Page, app_url: str) -> None:
    page.goto(f"{app_url}/routing?sample=german_1&layer=linear_1")
    expect(page.locator(".js-plotly-plot")).to_have_count(6)
    page.get_by_text("All layers, mean over time").click()
    overview = page.locator("[class*='st-key-overview'] .js-plotly-plot").first
    area = overview.locator(".nsewdrag").first
    area.hover()  # it waits until the part is unfolded and stands still
    box = area.bounding_box()
    assert box is not None
    last = {"x": 0.5 * box["width"], "y": 0.97 * box["height"]}  # the last layer's row
    area.hover(position=last)
    area.click(position=last)
    page.wait_for_url(re.compile("layer=linear_2"))


def test_the_tour_leads_through_the_pages_and_presentation_mode_can_be_left(page: Page, app_url: str) -> None:
    page.goto(app_url)
    page.get_by_role("button", name="Start the tour").click()
    for path in ("transcribe", "routing", "thresholds", "correspondence", "compare"):
        page.wait_for_url(re.compile(path))
        if path != "compare":
            page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Done").click()
    expect(page.locator(".st-key-tour")).to_have_count(0)
    page.get_by_text("Presentation mode").click()
    expect(page.locator("[data-testid=stSidebar]")).to_be_hidden()
    page.get_by_role("button", name="Leave presentation mode").click()
    expect(page.locator("[data-testid=stSidebar]")).to_be_visible()


def test_every_page_works_by_keyboard_and_on_a_phone(page: Page, app_url: str) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    for path in ("", "transcribe", "routing", "thresholds", "compare", "correspondence", "corpus", "report", "about"):
        page.goto(f"{app_url}/{path}")
        shown = {
            "": "[data-testid=stImage] img", "transcribe": ".cards",
            "correspondence": "[data-testid=stAlert]",  # these results hold no routing
            "corpus": "[data-testid=stFileUploader]", "report": "iframe",
        }  # fmt: skip
        expect(page.locator(shown.get(path, ".js-plotly-plot")).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") != "BODY"
    expect(page.locator(".stException")).to_have_count(0)
