"""A real browser for tests of pages: Chromium, drawing WebGL on the CPU."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = [
    "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist", "--no-sandbox",
]  # fmt: skip
PATIENCE_S = 120.0


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A playwright browser. Skips the test where none is installed; with STUDIO_BROWSER=required that is a failure."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        missing = f"no browser is installed: none of {', '.join(NAMES)}"
        if os.environ.get("STUDIO_BROWSER") == "required":
            pytest.fail(missing)
        pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE_S) -> Any:
    """What ``condition`` gives, once that is true. The page's policy forbids playwright's own waiting for functions."""
    deadline = time.monotonic() + patience
    while not (result := condition()):
        assert time.monotonic() < deadline, f"{what}: did not happen within {patience:.0f} s"
        time.sleep(0.02)
    return result
