"""A real browser for the tests of pages, where one is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Error, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def open_browser() -> Iterator[Browser]:
    """Yield Chromium without a window: the system's, else Playwright's own.

    Without one the tests are skipped; `make test-browser` sets SMPO_BROWSER=required and fails instead.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            why = f"NO BROWSER, the pages were NOT tested in one: {str(error).splitlines()[0]}; install chromium"
            if os.environ.get("SMPO_BROWSER") == "required":
                pytest.fail(why)
            pytest.skip(why)
        yield browser
        browser.close()
