"""Chromium through a real browser driver, where both are there."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
_QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")
_ARGUMENTS = ["--headless=new", "--no-sandbox", "--no-first-run", *(f"--disable-{each}" for each in _QUIET)]


def find_chromium() -> str | None:
    """The browser that DREAMMIX_CHROMIUM names, or the first of its usual names on PATH."""
    named = os.environ.get("DREAMMIX_CHROMIUM")
    if named:
        return named
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A headless Chromium; the test is skipped where there is none."""
    program = find_chromium()
    if program is None:
        pytest.skip(f"no Chromium found: none of {', '.join(_NAMES)} on PATH; install one or set DREAMMIX_CHROMIUM")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no browser driver found: pip install playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=_ARGUMENTS)
        yield browser
        browser.close()
