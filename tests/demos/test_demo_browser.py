"""Every tab used in a real browser as a person would, on a desktop and on a phone; screenshots are kept.

Needs Chromium (``MM_CHROMIUM``, default ``/usr/bin/chromium``); where it is missing the tests fail and say so.
"""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from demo_server import Server
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from mm.data.speech import speak

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("MM_CHROMIUM", "/usr/bin/chromium")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
]
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
PATIENCE_MS = 240_000
"""For machines that others use, too."""

RECORDED_MS = 3_500
"""As long as a person holds the microphone: what it hears is a second of silence, two words, and silence."""


@pytest.fixture(scope="module")
def microphone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Chromium's microphone hears, again and again."""
    wave, rate = soundfile.read(io.BytesIO(speak("wine glass")))
    path = tmp_path_factory.mktemp("heard") / "microphone.wav"
    soundfile.write(path, np.concatenate([np.zeros(rate), wave, np.zeros(2 * rate)]), rate, subtype="PCM_16")
    return path


@pytest.fixture(scope="module")
def browser(microphone: Path) -> Iterator[Browser]:
    if not Path(CHROMIUM).is_file():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install -y chromium, or set MM_CHROMIUM")
    heard = [
        *(f"--use-fake-{what}-for-media-stream" for what in ("device", "ui")),
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS, *heard])
        yield started
        started.close()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Browser, server: Server) -> Iterator[Page]:
    """The page, opened. Afterwards nothing may have gone wrong unseen, and no other server may have been asked for anything."""
    opened = browser.new_page(viewport=SIZES[request.param])
    opened.set_default_timeout(PATIENCE_MS)
    expect.set_options(timeout=PATIENCE_MS)
    wrong: list[str] = []
    opened.on("console", lambda said: said.type == "error" and wrong.append(said.text))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("response", lambda got: got.status >= 400 and wrong.append(f"{got.status} {got.url}"))
    opened.on("request", lambda asked: _is_foreign(asked.url, server) and wrong.append(f"asked {asked.url}"))
    opened.goto(server.url)
    opened.get_by_role("button", name="Classify", exact=True).wait_for()
    yield opened
    assert opened.evaluate("document.documentElement.scrollWidth") <= SIZES[request.param]["width"], "nothing sticks out"
    opened.mouse.wheel(0, 10_000)  # pictures further down are loaded when they come into sight
    opened.wait_for_timeout(1_000)  # messages fade in
    opened.wait_for_function("[...document.images].every(image => image.complete)")
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"test_|\[.*", "", request.node.name)
    opened.screenshot(path=SCREENSHOTS / f"{name}-{request.param}.png", full_page=True)
    opened.close()
    assert not wrong


def _is_foreign(url: str, server: Server) -> bool:
    return not url.startswith((server.url, "data:", "blob:"))


def _open(page: Page, tab: str) -> None:
    """Go to a tab; those that a phone has no room for are behind a button."""
    button = page.get_by_role("tab", name=tab, exact=True)
    if button.is_visible():
        button.click()
    else:
        page.locator(".overflow-menu > button:visible").first.click()
        page.locator(".overflow-dropdown button", has_text=tab).click()


def _found(page: Page, name: str) -> Locator:
    """The caption of a picture that a search found."""
    return page.locator(".found .caption-label", has_text=re.compile(rf"^\s*{name} +\d")).locator("visible=true")


def test_classify(page: Page) -> None:
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_test_id("label-output-value")).to_have_text("tiger face")
    shown = page.locator(".picture img:visible")
    before = str(shown.get_attribute("src"))
    page.locator("button.gallery-item:visible").nth(4).click()
    expect(shown).not_to_have_attribute("src", before)
    page.get_by_label("Your labels, separated by commas").fill("pear, rocket, green apple, light bulb")
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_test_id("label-output-value")).to_have_text("pear")


def test_what_is_no_picture_is_told(page: Page, tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<!doctype html><script>alert(1)</script>")
    page.get_by_label("Remove Image").locator("visible=true").first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "page.jpg")
    expect(page.locator(".picture img:visible")).to_have_attribute("src", re.compile("page.jpg"))
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_text("This picture cannot be used: unknown format")).to_be_visible()


def test_search(page: Page) -> None:
    _open(page, "Search")
    page.get_by_role("button", name="Search by words").click()
    expect(page.get_by_text("The best 12 of")).to_be_visible()
    expect(page.locator(".found img")).to_have_count(12)
    page.get_by_label("What to look for, in any of ten languages").fill("rotes Herz")
    page.get_by_label("What to look for, in any of ten languages").press("Enter")
    expect(_found(page, "red heart")).to_be_visible()
    page.get_by_role("tab", name="By picture").click()
    page.get_by_role("button", name="Search by picture").click()
    expect(_found(page, "helicopter")).to_have_text(re.compile(r"1\.00"))


def test_search_by_voice(page: Page, tmp_path: Path) -> None:
    _open(page, "Search")
    page.get_by_role("tab", name="By voice").click()
    search = page.get_by_role("button", name="Search by voice")
    search.click()
    expect(_found(page, "grinning cat")).to_be_visible()
    wave, rate = soundfile.read(io.BytesIO(speak("ferris wheel")))
    soundfile.write(tmp_path / "said.wav", wave, rate)
    whole = (tmp_path / "said.wav").read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[: len(whole) // 2])
    for name in ("cut.wav", "said.wav"):
        page.locator(".sound").get_by_label("Clear").click()
        page.locator(".sound").get_by_label("Upload file").click()
        page.locator(".sound input[type=file]").set_input_files(tmp_path / name)
        expect(page.locator(".sound").get_by_label("Clear")).to_be_visible()
        search.click()
        if name == "cut.wav":
            expect(page.get_by_text("This recording cannot be used: truncated")).to_be_visible()
    expect(_found(page, "ferris wheel")).to_be_visible()
    page.locator(".sound").get_by_label("Clear").click()
    page.locator(".sound").get_by_label("Record audio").click()
    page.locator(".sound").get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(RECORDED_MS)
    page.locator(".sound").get_by_role("button", name="Stop", exact=True).click()
    page.locator(".sound").get_by_label("Play", exact=True).wait_for()
    search.click()
    expect(_found(page, "wine glass")).to_be_visible()


def test_caption_and_ask(page: Page) -> None:
    _open(page, "Caption & ask")
    page.get_by_role("button", name="Describe").click()
    expect(page.locator("label", has_text="Caption").locator("textarea")).to_have_value("tiger face")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.get_by_test_id("label-output-value").locator("visible=true")).to_have_text("tiger face")
    page.get_by_role("button", name="Show where").click()
    expect(page.get_by_text("The text fits the picture with")).to_be_visible()
    expect(page.locator(".heat img")).to_have_count(2)


def test_create(page: Page) -> None:
    _open(page, "Create")
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.get_by_text("Prompt: please write something")).to_be_visible()
    page.get_by_label("Prompt").fill("red heart")
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.locator(".painting img")).to_have_count(3)
    page.wait_for_function("[...document.querySelectorAll('.painting img')].every(img => img.naturalWidth == 64)")
    with page.expect_download() as download:
        page.locator(".painting").first.get_by_label("Download").click()
    assert download.value.suggested_filename.endswith(".png")
    before = page.locator(".painting img").first.get_attribute("src")
    page.get_by_role("button", name="Create", exact=True).click()
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    page.wait_for_timeout(5000)  # until the page has taken notice, it ignores the button
    page.get_by_label("Prompt").fill("pear")
    page.get_by_role("button", name="Create", exact=True).click()
    expect(page.locator(".painting img")).to_have_count(3)
    expect(page.locator(".painting img").first).not_to_have_attribute("src", str(before))
    page.wait_for_function("[...document.querySelectorAll('.painting img')].every(img => img.naturalWidth == 64)")


def test_compare(page: Page) -> None:
    _open(page, "Compare")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("nats a picture token")).to_be_visible()
    expect(page.get_by_text("cosine 0.")).to_be_visible()
    expect(page.get_by_text("belong together:")).to_be_visible()
