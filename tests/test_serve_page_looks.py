"""The page in a real browser: phone, keyboard, screen reader, dark and light, languages."""

import os

import pytest
from browsing import answered, ask, begun, chromium_fixture, server_fixture, slow, visit_fixture  # noqa: F401

from pocketlm.chat import saved, transcript


def test_a_phone(server, visit):
    page = visit(width=320)
    ask(page, "Hello")
    width = "document.scrollingElement.scrollWidth"
    assert page.evaluate(width) <= 320
    assert page.is_hidden("nav")
    page.click("#menu")
    page.click("nav .open:has-text('Hello')")
    page.wait_for_selector("nav", state="hidden")
    page.click("#options")
    assert page.evaluate(width) <= 320
    assert page.locator("dialog").bounding_box()["width"] <= 320


def test_the_keyboard_is_enough(server, visit):
    page = visit()
    page.keyboard.type("Hello")  # the question has the focus
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("friend")
    page.keyboard.press("Enter")
    answered(page)
    assert page.inner_text("li.user > .text") == "Hello\nfriend"
    page.keyboard.press("ArrowUp")
    assert page.evaluate("document.activeElement.closest('.edit') !== null")
    page.keyboard.press("Escape")
    page.keyboard.press("Alt+n")
    page.wait_for_selector("li.user", state="detached")
    reached = set()
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"new", "options", "open", "delete", "scroll", "question", "send"} <= reached
    slow(server)
    page.focus("#question")
    page.keyboard.type("Tell me a joke.")
    page.keyboard.press("Enter")
    begun(page)
    page.keyboard.press("Escape")
    answered(page)
    assert "(cut off)" in page.inner_text("#log")
    server.before = None
    page.focus("#options")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")


def test_the_question_is_seen_as_a_whole(server, visit):
    page = visit()
    for text, rows in (("word", 1), ("one\ntwo", 2), ("word " * 60, 4), ("word " * 400, 10), ("word " * 2000, 10), ("", 1)):
        page.fill("#question", text)
        found = page.evaluate("document.getElementById('question').rows")
        assert found == rows or (rows == 4 and 2 < found < 7), (len(text), found)  # wrapped lines depend on the font


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1000, 320])
def test_axe_finds_nothing_serious(server, visit, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python brings axe-core").Axe()
    page = visit(width=width, color_scheme=scheme)
    ask(page, "Hello")
    ask(page, "I like music.")
    page.get_by_role("button", name="Retry").last.click()
    answered(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    views = [lambda: None, lambda: page.click("#options")]
    if width == 320:
        views.insert(1, lambda: page.click("#menu"))
    for view in views:
        view()
        found = axe.run(page).response["violations"]
        assert [f"{v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")] == []


def test_appearance_and_language_can_be_chosen(server, visit):
    page = visit(color_scheme="light")
    page.click("#options")
    page.select_option("#theme", "dark")
    page.select_option("#language", "pl")
    assert page.inner_text("#settings-title") == "Ustawienia"
    page.reload()
    page.wait_for_selector("text=Wyślij")
    assert page.evaluate("document.documentElement.lang") == "pl"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


LANGUAGES = {"tr-TR": "Gönder", "pl-PL": "Wyślij", "ru-RU": "Отправить", "en-US": "Send", "de-DE": "Send"}


@pytest.mark.parametrize(("locale", "word"), LANGUAGES.items())
def test_the_browser_chooses_the_words(server, visit, locale, word):
    assert visit(locale=locale).inner_text("#send") == word


FIGURES = {
    "en": ["1 token/s · 1 token · context 1/512 (0%)", "2.5 tokens/s · 5 tokens · context 128/512 (25%)"],
    "tr": ["1 token/sn · 1 token · bağlam 1/512 (%0)", "2,5 token/sn · 5 token · bağlam 128/512 (%25)"],
    "pl": ["1 token/s · 1 token · kontekst 1/512 (0%)", "2,5 tokena/s · 5 tokenów · kontekst 128/512 (25%)"],
    "ru": ["1 токен/с · 1 токен · контекст 1/512 (0 %)", "2,5 токена/с · 5 токенов · контекст 128/512 (25 %)"],
}


@pytest.mark.parametrize(("locale", "figures"), FIGURES.items())
def test_figures_are_said_as_the_language_says_them(server, visit, locale, figures):
    page = visit(locale=locale)
    figure = "([speed, n, used]) => figure({ cache_n: 0, prompt_n: used - n, predicted_n: n, predicted_per_second: speed })"
    found = [page.evaluate(figure, numbers).replace("\xa0", " ") for numbers in ([1, 1, 1], [2.5, 5, 128])]
    assert found == figures


def test_what_is_copied_or_printed_is_the_conversation(server, visit):
    page = visit()
    ask(page, "Hello")
    page.evaluate("getSelection().selectAllChildren(document.body)")
    assert page.evaluate("getSelection().toString()").split("\n")[:3] == ["You:", "Hello", "Ada:"]
    assert "Edit" not in page.evaluate("getSelection().toString()")
    page.evaluate("chat.path()[1].content = 'line\\n\\n'.repeat(100); render()")
    page.emulate_media(media="print")
    assert page.evaluate("$('scroll').scrollHeight <= $('scroll').clientHeight"), "the whole of it"
    assert page.is_hidden("nav")
    assert page.is_hidden("form.ask")


def test_a_setting_out_of_its_range_is_not_taken(server, visit):
    page = visit()
    page.click("#options")
    page.fill("input[name=temperature]", "1")
    page.fill("input[name=temperature]", "-1")
    page.keyboard.press("Escape")
    ask(page, "Hello")
    assert page.inner_text("#line") == ""
    page.click("#options")
    assert page.input_value("input[name=temperature]") == "1"
    for name, within in (("temperature", "0.33"), ("repeat_penalty", "1.18"), ("top_p", "0,5"), ("top_k", "7")):
        page.fill(f"input[name={name}]", "")
        page.type(f"input[name={name}]", within)
        assert page.evaluate(f"settings.{name}") == within.replace(",", ".")
    wrong = ("temperature", "a"), ("top_k", "1.5"), ("top_p", "1,5"), ("seed", "-1"), ("max_tokens", "1,000"), ("top_k", "0x7")
    for name, given in wrong:
        page.fill(f"input[name={name}]", given)
        assert page.evaluate(f"settings.{name}") != given.replace(",", ".")
        assert page.evaluate(f"document.querySelector('[name={name}]').validity.valid") is False


def test_dates_are_those_of_the_place_and_the_time_zone(server, visit):
    conversation = transcript.Conversation(system="", model="other", model_id="other", interactive=True)
    conversation.messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    transcript.Record().save(conversation)
    os.utime(saved.paths()[0], (1_801_958_400,) * 2)  # 2027-02-07 00:00 UTC
    for locale, zone, date in [
        ("en-GB", "Asia/Tokyo", "07/02/2027, 09:00"), ("en-US", "America/New_York", "2/6/27, 7:00 PM"),
        ("pl-PL", "Europe/Warsaw", "7.02.2027, 01:00"), ("de-DE", "UTC", "2/7/27, 12:00 AM"),
    ]:  # fmt: skip
        page = visit(locale=locale, timezone_id=zone)
        page.wait_for_selector("nav small")
        assert page.inner_text("nav small").replace("\u202f", " ").startswith(date)
