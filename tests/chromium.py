"""Headless Chromium for the tests of the page."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
from playwright.sync_api import Page

CHROMIUM = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)")
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def fill(page: Page, **values: Any) -> None:
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))


def no_sideways_scroll(page: Page) -> bool:
    return bool(page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"))


def luminance(page: Page, of: str) -> float:
    colour = page.evaluate("(of) => getComputedStyle(document.body)[of]", of)
    r, g, b = (int(n) for n in re.findall(r"\d+", colour)[:3])
    return (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255
