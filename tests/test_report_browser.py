"""The report in a real browser: headless Chromium, driven by Playwright.

It is the Chromium on PATH (Debian: `apt-get install chromium`), or the one that `python -m playwright install
chromium` fetches. Without either these tests are skipped; test_report_page.py needs none.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from drawn_dataset import drawn_dataset
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running import call, write_jpegs

IMAGES = 15  # a page holds 12


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("browser")
    images = write_jpegs(folder / "in", IMAGES)
    drawn_dataset(images, folder / "out")
    (images / "0004.jpg").unlink()
    result = call("jobs.report", "--input", folder / "out", "--output", folder / "report")
    assert result.returncode == 0, result.stderr
    return (folder / "report/index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: `apt-get install chromium` or `python -m playwright install chromium`")
        # Root, as in containers, has no sandbox; the page is our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, report: str, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """The page, and what its console says; whatever it asks for that is not in it fails there."""
    context = browser.new_context(
        viewport={"width": width, "height": 800},
        color_scheme="dark" if scheme == "dark" else "light",
        offline=True,
    )
    page = context.new_page()
    page.set_default_timeout(20_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report)
    return page, said


def test_it_opens_from_disk_without_a_word_in_the_console(browser: Browser, report: str) -> None:
    page, said = opened(browser, report)
    assert page.locator(".card").count() == 12
    assert page.locator("#gallery path.mask").count() > 50
    loaded = "Promise.all([...document.querySelectorAll('#gallery image')].map(i => i.decode ? i.decode() : 1))"
    page.evaluate(loaded)
    assert page.locator("svg.chart").count() == 5
    assert said == []


def test_a_slider_takes_masks_out_of_the_pictures_and_back(browser: Browser, report: str) -> None:
    page, _ = opened(browser, report)
    masks = page.locator("#gallery path.mask")
    known = masks.count()
    page.locator("#iou").fill("0.93")
    scores = page.evaluate("data.images.flatMap((image) => image.masks.map((mask) => mask[2]))")
    assert 0 < masks.count() < known
    expect(page.locator("#drawn")).to_have_text(f"{masks.count()} of {known} masks on this page are drawn.")
    assert {0.9, 0.95} <= {round(score, 2) for score in scores}
    page.locator("#iou").fill("0")  # below its minimum
    assert masks.count() == known
    page.locator("#stability").fill("0.9")
    assert 0 < masks.count() < known


def test_the_keyboard_turns_pages_opens_and_closes(browser: Browser, report: str) -> None:
    page, said = opened(browser, report)
    expect(page.locator("#page")).to_have_text("Page 1 of 2")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#page")).to_have_text("Page 2 of 2")
    assert page.locator(".card").count() == IMAGES - 12
    page.keyboard.press("ArrowRight")
    expect(page.locator("#page")).to_have_text("Page 2 of 2")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#page")).to_have_text("Page 1 of 2")

    page.locator(".card").nth(11).focus()
    page.keyboard.press("Enter")
    expect(page.locator("#viewer")).to_be_visible()
    first = page.locator("#viewer-title").inner_text()
    page.keyboard.press("ArrowRight")
    assert page.locator("#viewer-title").inner_text() != first
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()
    expect(page.locator("#page")).to_have_text("Page 2 of 2")  # where the picture is that was looked at last
    assert page.evaluate("document.activeElement === document.querySelector('.card')")
    assert said == []


def test_focus_is_seen(browser: Browser, report: str) -> None:
    page, _ = opened(browser, report)
    stops = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        stop, width = page.evaluate(
            """(() => { const at = document.activeElement;
            const shown = at.matches('input[type=radio]') ? at.nextSibling : at;
            return [at.id || at.className || at.tagName, parseFloat(getComputedStyle(shown).outlineWidth)]; })()"""
        )
        assert width >= 3, stop
        stops.add(stop)
    assert {"SUMMARY", "iou", "stability", "card"} <= stops


def test_an_arrow_key_on_a_slider_moves_the_slider(browser: Browser, report: str) -> None:
    page, _ = opened(browser, report)
    page.locator("#iou").focus()
    before = page.locator("#iou").input_value()
    page.keyboard.press("ArrowRight")
    assert page.locator("#iou").input_value() > before
    expect(page.locator("#page")).to_have_text("Page 1 of 2")


def test_a_mask_is_chosen_in_the_picture_and_in_the_list(browser: Browser, report: str) -> None:
    page, _ = opened(browser, report)
    page.locator(".card").first.click()
    rows = page.locator("#viewer-masks button")
    outlines = page.locator("#viewer-picture path.mask")
    assert rows.count() == outlines.count() > 3
    rows.nth(2).focus()
    assert page.locator("#viewer-picture .chosen").get_attribute("d") == outlines.nth(2).get_attribute("d")
    assert "IoU" in rows.nth(2).inner_text()
    outlines.last.dispatch_event("click")  # the smallest lies on top
    assert page.locator("#viewer-picture .chosen").get_attribute("d") == outlines.last.get_attribute("d")
    expect(rows.last).to_be_focused()


def test_an_image_that_is_gone_is_drawn_by_its_masks(browser: Browser, report: str) -> None:
    page, said = opened(browser, report)
    page.keyboard.press("ArrowRight")
    missing = page.locator(".card", has_text="0004.jpg")
    if not missing.count():
        page.keyboard.press("ArrowLeft")
    assert missing.locator("image").count() == 0
    assert missing.locator("path.mask").count() > 3
    assert said == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_in_one_direction_only(scheme: str, browser: Browser, report: str) -> None:
    page, _ = opened(browser, report, 375, scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every(box => box.scrollWidth <= box.clientWidth)"
    )
    for details in page.locator("details > summary").all():
        details.click()
    page.locator(".card").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") == 375
    assert page.evaluate("document.getElementById('viewer').scrollWidth <= 375")
