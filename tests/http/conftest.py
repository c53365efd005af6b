"""Fixtures of the tests of the page: a browser, and tabs in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.chromium import ARGUMENTS, CHROMIUM


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


# Before, what a test drops or types is lost. Other files of the host have no #main.
BUILT = """() => {
    const is = (id) => document.getElementById(id);
    return !is("main") || is("fields").children.length || !is("unlock").hidden;
}"""


@pytest.fixture
def tabs(browser: Browser) -> Iterator[Any]:
    """Opens tabs, each of a user of its own; no script of the page may fail in any of them."""
    faults: list[str] = []
    contexts = []

    def open_tab(url: str, **options: Any) -> Page:
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda m: faults.append(m.text) if "Content Security" in m.text else None)
        page.goto(url)
        page.wait_for_function(BUILT)
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert not faults
