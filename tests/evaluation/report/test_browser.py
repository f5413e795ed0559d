"""The page in a real browser: sizes and schemes, the table of prompts, enlarged pictures; nothing is requested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
from playwright.sync_api import Browser, Page

from tests.evaluation.report.made import CATEGORIES, HOSTILE, MODELS, Made

pytestmark = pytest.mark.browser

POOR_CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channels = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (colour) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = channels(colour).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    const colour = getComputedStyle(element).backgroundColor;
    return channels(colour)[3] === 255 || !element.parentElement ? colour : behind(element.parentElement);
  };
  const poor = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!text || !element.checkVisibility() || ["SCRIPT", "OPTION"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const pair = [light(element instanceof SVGElement ? style.fill : style.color), light(behind(element))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) poor.push(`${element.tagName}.${element.className}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(poor)];
}"""
"""The visible elements whose text has less than the 4.5 : 1 of WCAG 2.2, success criterion 1.4.3."""


@pytest.fixture
def page(browser: Browser, made: Made) -> Iterator[Page]:
    """The page at 1400 pixels; ends with a check that nothing but it was asked for."""
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    opened, asked, errors = context.new_page(), [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text))
    opened.goto(made.path.as_uri())
    yield opened
    context.close()
    assert [url for url in asked if not url.startswith("data:")] == [made.path.as_uri()]
    assert errors == []


def numbers(page: Page) -> list[int]:
    """The numbers of the prompts in the table."""
    return [int(text) for text in page.locator("#table tbody .text .soft").all_inner_texts()]


def gains(made: Made, model: str = "smpo", against: str = "base", reward: str = "pickscore") -> np.ndarray:
    return (made.scores[reward][model] - made.scores[reward][against]).mean(axis=1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_wide_and_narrow(page: Page, scheme: Literal["light", "dark"]) -> None:
    page.emulate_media(color_scheme=scheme)
    for width in (1400, 400):
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(POOR_CONTRAST) == []
        first = page.locator("#table .picture").first
        first.click()
        assert page.evaluate("document.querySelector('#viewer').scrollWidth") <= width
        assert page.evaluate(POOR_CONTRAST) == []
        page.keyboard.press("Escape")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 21, 23)"
    assert dark == (scheme == "dark")


def test_what_a_prompt_says_is_text(page: Page) -> None:
    page.fill("#find", "bold")
    assert page.locator("#table .prompt").all_inner_texts() == [HOSTILE]
    assert page.locator("#table tbody b", has_text="bold").count() == 0


def test_the_table_is_sorted(page: Page, made: Made) -> None:
    assert numbers(page) == list(range(20))
    page.click("[data-sort=difference]")
    assert numbers(page) == np.argsort(-gains(made), kind="stable")[:20].tolist()
    page.click("[data-sort=difference]")
    worst = np.argsort(gains(made), kind="stable")
    assert numbers(page) == worst[:20].tolist()
    assert page.get_attribute("th:has([data-sort=difference])", "aria-sort") == "ascending"
    for shown in (40, 45):
        page.click("#more")
        assert numbers(page) == worst[:shown].tolist()
    assert page.is_hidden("#more")
    page.click(f"[data-sort='{MODELS.index('dpo')}']")
    assert numbers(page) == np.argsort(-made.scores["pickscore"]["dpo"].mean(axis=1), kind="stable")[:20].tolist()
    page.click("[data-sort=difference]")
    page.select_option("#reward", label="hpsv2")
    page.select_option("#model", label="base")
    page.select_option("#against", label="worse-one")
    expected = gains(made, "base", "worse-one", "hpsv2")
    assert numbers(page) == np.argsort(-expected, kind="stable")[:20].tolist()
    assert float(page.locator(".difference").first.inner_text()) == pytest.approx(expected.max(), rel=0.01)


def test_the_table_is_filtered(page: Page, made: Made) -> None:
    texts, wanted = made.results.settings.prompts, gains(made)
    page.fill("#find", "  A DOG ")
    dogs = [number for number, text in enumerate(texts) if "a dog" in text]
    assert numbers(page) == dogs
    assert page.inner_text("#count") == f"{len(dogs)} of 45 prompts"
    page.fill("#find", "")
    page.select_option("#category", CATEGORIES[1])
    assert numbers(page) == list(range(1, 45, 3))
    page.select_option("#outcome", label="losses")
    losses = [number for number in range(1, 45, 3) if wanted[number] < 0]
    assert 0 < len(losses) < 15
    assert numbers(page) == losses
    page.select_option("#outcome", label="gains")
    page.fill("#least", "1")
    large = [number for number in range(1, 45, 3) if wanted[number] >= 1]
    assert 0 < len(large) < 15 - len(losses)
    assert numbers(page) == large


def test_pictures_are_enlarged_and_left_by_keys(page: Page, made: Made) -> None:
    start = page.locator("#table .picture").nth(1)
    start.focus()
    page.keyboard.press("Enter")
    assert (page.inner_text("#large-model"), page.inner_text("#large-prompt")) == ("smpo", "prompt 0 of a dog")
    assert page.get_attribute("#large", "src") == start.locator("img").get_attribute("src")
    assert page.evaluate("document.querySelector('#large').naturalWidth") == 40
    own = made.scores["pickscore"]["smpo"][0, 0]
    assert f"pickscore {own:.4g}" in page.inner_text("#large-scores")
    assert page.get_attribute("#original", "href") == "images/smpo/00000-00.png"
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
        seen.append((page.inner_text("#large-model"), page.inner_text("#large-prompt")))
    assert seen == [
        ("dpo", "prompt 0 of a dog"),
        ("worse-one", "prompt 0 of a dog"),
        ("base", HOSTILE),
        ("worse-one", "prompt 0 of a dog"),
    ]
    page.keyboard.press("Escape")
    assert page.is_hidden("#viewer")
    assert page.evaluate("document.activeElement.dataset.model") == "worse-one"


def test_the_ends_of_a_gallery(page: Page) -> None:
    gallery = page.locator(".gallery").first
    gallery.locator(".picture").first.click()
    assert page.is_disabled("#previous")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#large-model") == "base"
    count = gallery.locator(".picture").count()
    for _ in range(count):
        page.keyboard.press("ArrowRight")
    assert page.is_disabled("#next")
    assert page.inner_text("#large-model") == "smpo"
    page.click("#close")
    assert page.is_hidden("#viewer")


def test_files_to_take_away(page: Page, made: Made) -> None:
    for name in ("win_rates.png", "win_rates.csv", "prompts.csv"):
        with page.expect_download() as download:
            page.click(f"a[download='{name}']")
        assert download.value.suggested_filename == name
        assert download.value.path().read_bytes() == (made.path.parent / name).read_bytes()


def test_training_settings_of_the_models_that_have_them(page: Page) -> None:
    rows = [row.locator("th, td").all_inner_texts() for row in page.locator(".settings tr").all()]
    assert [text.strip() for text in rows[0]] == ["", "smpo", "dpo", "worse-one"]
    assert ["beta", "2000", "5000", "5000"] in rows


def test_the_matrix_says_who_is_better(page: Page) -> None:
    row = page.locator("#matrix ~ .scroll").first.locator("tbody tr").nth(1)
    assert row.locator("th").inner_text().split() == ["smpo", "trained", "on"]
    assert [cell.inner_text().split()[-1] for cell in row.locator("td").all()] == ["better", "-", "better", "better"]
    held_out = page.locator("#matrix ~ .scroll").nth(1).locator("tbody th").all_inner_texts()
    assert ["held out" in text for text in held_out] == [False, True, True, True]
