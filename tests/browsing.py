"""A real browser for the tests of the page: Debian's Chromium, driven by Playwright, a server to visit, and what its page says.

Skips where one of the two is missing.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import serving, wait_until

import pocketlm
from pocketlm.chat import saved, transcript
from pocketlm.model import find_model


def program() -> str:
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return path


@contextmanager
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    path = program()
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=[*arguments, "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture(name="chromium", scope="module")
def chromium_fixture():
    with browser() as opened:
        yield opened


@pytest.fixture(name="alone", scope="module")
def alone_fixture():
    with pocketlm.load("small-talk", threads=1) as model:
        yield model


@pytest.fixture(name="server")
def server_fixture(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "data"))
    persona = {"title": "Ada", "greeting": "Good morning!"}
    with serving(find_model("small-talk"), slots=2, persona=persona, temperature=0.0) as server:
        yield server


@pytest.fixture(name="visit")
def visit_fixture(chromium, server):
    """Opens the page; every error in it, and every request that leaves the computer, fails the test."""
    contexts, wrong = [], []

    def visit(context=None, width=1000, locale="en-GB", enter=True, **options):
        if context is None:
            context = chromium.new_context(viewport={"width": width, "height": 700}, locale=locale, **options)
            contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith((server.url, "data:")) or wrong.append(request.url))
        page.goto(server.url + (f"/#{server.policy.token}" if enter else "/"))
        if enter:
            page.wait_for_selector("h1:has-text('Ada')")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not wrong


def ask(page, text, wait=True):
    page.fill("#question", text)
    page.keyboard.press("Enter")
    if wait:
        answered(page)


def answered(page):
    page.wait_for_selector("#send:not([hidden])")
    written(page)
    page.wait_for_selector("nav li[aria-current]", state="attached")


def written(page):
    """What was asked has ended, and its file is as the page wants it: nothing more will be written."""
    page.evaluate("answered.then(() => saving).then(() => null)")


def begun(page):
    """Some of the answer is there. (`wait_for_function` would want the page's policy to allow eval.)"""
    wait_until(lambda: len((answers(page) or [""])[-1]) > 5)


def answers(page):
    return page.locator("li.assistant > .text").all_inner_texts()


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def files():
    return [transcript.load(path) for path in saved.paths()]


def slow(server):
    server.before = lambda: time.sleep(0.05)


def halt(server):
    """Answers get some tokens, and go on when what is returned is set: as long as a test takes to do something meanwhile."""
    go_on, some = threading.Event(), len(server.passes) + 8
    server.before = lambda: len(server.passes) < some or go_on.wait(60)
    return go_on


def screenshots(folder: str) -> None:
    """The pictures of the README files: `python tests/browsing.py serve`."""
    import tempfile
    from pathlib import Path

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
