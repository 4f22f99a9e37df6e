"""Headless Chromium for the tests: the system's, or the one that Playwright fetched (make browser)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@contextmanager
def launched(*options: str) -> Iterator[Any]:
    """A browser with further options of its command line. The test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright here: make browser")
    with playwright.sync_playwright() as driver:
        path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
        if path is None and not Path(driver.chromium.executable_path).is_file():
            pytest.skip("no Chromium here: make browser")
        # In a container neither the sandbox nor /dev/shm is what Chromium expects.
        given = ["--no-sandbox", "--disable-dev-shm-usage", *options]
        try:
            opened = driver.chromium.launch(executable_path=path, args=given)
        except playwright.Error as error:  # one that was fetched without the libraries that it needs
            pytest.skip(f"Chromium does not start here: {str(error).splitlines()[0]}")
        yield opened
        opened.close()
