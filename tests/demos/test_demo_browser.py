"""Every tab used in a real browser as a person would, on a desktop and on a phone; screenshots are kept.

Needs Chromium (``MM_CHROMIUM``, default ``/usr/bin/chromium``); where it is missing the tests fail and say so.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_server import Server
from playwright.sync_api import Browser, Page, expect, sync_playwright

pytestmark = pytest.mark.browser

CHROMIUM = os.environ.get("MM_CHROMIUM", "/usr/bin/chromium")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
SIZES = {"desktop": {"width": 1280, "height": 800}, "phone": {"width": 390, "height": 844}}
PATIENCE_MS = 240_000
"""For machines that others use, too."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).is_file():
        pytest.fail(f"{CHROMIUM} is missing: apt-get install -y chromium, or set MM_CHROMIUM")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[*OPTIONS, "--disable-sync", "--no-first-run"])
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


def test_classify(page: Page, tmp_path: Path) -> None:
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_test_id("label-output-value")).to_have_text("tiger face")
    shown = page.locator(".picture img:visible")
    before = str(shown.get_attribute("src"))
    page.locator("button.gallery-item:visible").nth(4).click()
    expect(shown).not_to_have_attribute("src", before)
    page.get_by_label("Your labels, separated by commas").fill("pear, rocket")
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_test_id("label-output-value")).to_have_text("pear")
    (tmp_path / "page.jpg").write_text("<!doctype html><script>alert(1)</script>")
    page.get_by_label("Remove Image").locator("visible=true").first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "page.jpg")
    expect(shown).to_have_attribute("src", re.compile("page.jpg"))
    page.get_by_role("button", name="Classify", exact=True).click()
    expect(page.get_by_text("This picture cannot be used: unknown format")).to_be_visible()


def test_search(page: Page) -> None:
    _open(page, "Search")
    page.get_by_role("button", name="Search by words").click()
    expect(page.get_by_text("The best 12 of")).to_be_visible()
    expect(page.locator(".found img")).to_have_count(12)
    page.get_by_label("What to look for, in any of ten languages").fill("rotes Herz")
    page.get_by_label("What to look for, in any of ten languages").press("Enter")
    expect(page.get_by_text("red heart 0", exact=False).first).to_be_visible()
    page.get_by_role("tab", name="By a picture").click()
    page.get_by_role("button", name="Search by a picture").click()
    expect(page.get_by_text("helicopter 1.00").first).to_be_visible()


def test_caption_and_ask(page: Page) -> None:
    _open(page, "Caption & ask")
    page.get_by_role("button", name="Describe").click()
    expect(page.get_by_label("Caption", exact=True)).to_have_value("tiger face")
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
