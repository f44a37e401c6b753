"""A real browser for the tests of the page: Debian's Chromium, driven by Playwright. Skips where one of the two is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def chromium() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    path = chromium()
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=[*arguments, "--disable-gpu"])
        yield opened
        opened.close()


def screenshots(folder: str) -> None:
    """The pictures of the README files: `python tests/browsing.py serve`."""
    import tempfile
    from pathlib import Path

    from serving import serving

    from pocketlm.model import find_model

    os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp()
    questions = ["Hi! How are you?", "Tell me a joke.", "I like music."]
    views = {"page": (900, 560, "light"), "page-phone": (360, 640, "dark")}
    with serving(find_model("small-talk"), persona={"title": "Pocket"}, temperature=0.0) as server, browser() as opened:
        for name, (width, height, scheme) in views.items():
            context = opened.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, locale="en-GB")
            page = context.new_page()
            page.goto(f"{server.url}/#{server.policy.token}")
            page.wait_for_selector("h1:has-text('Pocket')")
            for n, question in enumerate(questions, 1):
                page.fill("#question", question)
                page.keyboard.press("Enter")
                page.wait_for_selector(f"li.assistant:nth-of-type({2 * n}) .tools")
            page.locator("#question").blur()
            page.screenshot(path=str(Path(folder, f"{name}.png")))
            context.close()


if __name__ == "__main__":
    import sys

    screenshots(sys.argv[1])
