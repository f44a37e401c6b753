"""The page where somebody does the next thing before the first has ended, and with words that are not English."""

import threading

from browsing import (  # noqa: F401
    alone_fixture,
    answered,
    answers,
    ask,
    begun,
    chromium_fixture,
    files,
    halt,
    server_fixture,
    visit_fixture,
    written,
)
from serving import wait_until

from pocketlm.chat import saved, transcript


def test_while_it_answers_another_conversation_is_opened_or_this_one(server, visit):
    page = visit()
    ask(page, "Hi! How are you?")
    first = page.get_attribute("nav li[aria-current]", "data-name")
    page.click("#new")
    go_on = halt(server)
    ask(page, "Tell me a joke.", wait=False)
    begun(page)
    listed = page.wait_for_selector(f"nav li[aria-current]:not([data-name='{first}'])")  # the list comes a little later
    this = listed.get_attribute("data-name")
    page.click(f"nav li[data-name='{this}'] .open")  # it is open
    assert page.is_visible("#stop")
    page.click(f"nav li[data-name='{first}'] .open")
    page.wait_for_selector("li.user:has-text('Hi!')")
    go_on.set()
    answered(page)
    assert page.get_by_role("button", name="Edit").count() == page.get_by_role("button", name="Retry").count() == 1
    assert page.inner_text("#line") == ""
    page.click(f"nav li[data-name='{this}'] .open")
    page.wait_for_selector("li.user:has-text('a joke')")
    assert "(cut off)" in page.inner_text("#log")
    ask(page, "I like tea.")
    assert "changed elsewhere" not in page.inner_text("#line")
    wait_until(lambda: sorted(len(chat.messages) for chat in files()) == [2, 4])


def test_what_is_deleted_while_it_answers_stays_deleted(server, visit):
    page = visit()
    go_on = halt(server)
    ask(page, "Tell me a joke.", wait=False)
    begun(page)
    page.wait_for_selector("nav li[aria-current]")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("nav .delete")
    go_on.set()
    page.wait_for_selector("nav li", state="detached")
    wait_until(server.idle)
    page.wait_for_timeout(300)
    wait_until(lambda: (files(), answers(page), page.inner_text("#line")) == ([], [], ""))


def test_what_is_left_or_deleted_before_its_first_word(server, visit):
    page = visit()
    ask(page, "Hello")
    first = page.get_attribute("nav li[aria-current]", "data-name")
    go_on = threading.Event()
    server.before = lambda: go_on.wait(60)  # no token comes
    for _ in range(2):
        page.click("#new")
        ask(page, "Tell me a secret.", wait=False)
        page.wait_for_selector("nav li:has-text('secret')")
        page.wait_for_selector("nav li[aria-current]:has-text('secret')")
        page.click(f"nav li[data-name='{first}'] .open")
        page.wait_for_selector("li.user:has-text('Hello')")
        assert page.input_value("#question") == "", "it was not asked here"
        assert len(files()) == 2, "the question is kept"
        page.click("nav .open:has-text('secret')")
        page.wait_for_selector("li.user:has-text('secret')")
        page.once("dialog", lambda dialog: dialog.accept())
        page.click("nav li:has-text('secret') .delete")
        page.wait_for_selector("nav li:has-text('secret')", state="detached")
    page.click("#new")
    ask(page, "Tell me a secret.", wait=False)
    page.wait_for_selector("nav li[aria-current]:has-text('secret')")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("nav li:has-text('secret') .delete")
    page.wait_for_selector("nav li:has-text('secret')", state="detached")
    wait_until(lambda: (page.inner_text("#line"), page.input_value("#question")) == ("", ""))  # a list comes before it is said
    ask(page, "Tell me a secret.", wait=False)
    page.wait_for_selector("nav li[aria-current]:has-text('secret')")
    path = next(path for path in saved.paths() if path.stem != first)
    record = transcript.Record()
    conversation = record.load(path)
    conversation.messages[-1] = {"role": "assistant", "content": "Another window has said it."}
    record.save(conversation)
    page.click("#stop")
    page.wait_for_selector("#question:focus")
    page.wait_for_timeout(300)
    go_on.set()
    assert transcript.load(path).messages[-1]["content"] == "Another window has said it."


def test_an_answer_that_never_begins_leaves_all_as_it_was(server, visit):
    page = visit()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello", wait=False)
    page.wait_for_selector(".line.bad")
    page.wait_for_timeout(300)
    wait_until(lambda: not files() and not page.locator("nav li").count())  # nothing to keep
    assert page.input_value("#question") == "Hello", "the question is given back"
    page.unroute("**/v1/chat/completions")
    ask(page, "Hello")
    page.get_by_role("button", name="Retry").click()
    answered(page)
    page.get_by_role("button", name="Previous version").click()
    ask(page, "I like tea.")
    before = page.locator("li > .text").all_inner_texts()
    assert len(before) == 4
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.get_by_role("button", name="Retry").first.click()
    page.wait_for_selector(".line.bad")
    answered(page)
    assert page.locator("li > .text").all_inner_texts() == before, "the version that was looked at"
    wait_until(lambda: len(files()[0].messages) == 4)


def test_a_long_conversation_in_characters_of_three_bytes_is_saved(server, visit):
    begun = transcript.Conversation(system="", model="other", model_id="other", interactive=True)
    begun.messages = [{"role": role, "content": "天地玄黃" * 6000} for role in ("user", "assistant")]
    transcript.Record().save(begun)
    page = visit()
    page.click("nav .open")
    page.wait_for_selector("li.assistant")
    page.click("#options")
    page.fill("#system", "Be kind.")
    page.keyboard.press("Escape")
    wait_until(lambda: files()[0].system == "Be kind.")
    assert page.inner_text("#line") == ""


def test_arabic_stands_from_right_to_left(server, visit):
    begun = transcript.Conversation(system="", model="other", model_id="other", interactive=True)
    begun.messages = [{"role": "user", "content": "ما اسمك؟"}, {"role": "assistant", "content": "اسمي آدا.\n\nHi!\n\n- نعم"}]
    transcript.Record().save(begun)
    page = visit()
    page.click("nav .open")
    page.wait_for_selector("li.assistant p")
    page.wait_for_selector("nav li[aria-current]")  # the list is written anew
    page.fill("#question", "مرحبا")
    directions = [
        page.locator(where).first.evaluate("at => getComputedStyle(at).direction")
        for where in ("li.user .text", "li.assistant .text", "nav .open span", "#question")
    ]
    assert directions == ["rtl"] * 4
    left, right = (  # distances of a paragraph's words from its two ends
        page.locator("li.assistant p").nth(1).evaluate(
            "at => { const r = document.createRange(); r.selectNodeContents(at);"
            f" return Math.round(Math.abs(r.getBoundingClientRect().{side} - at.getBoundingClientRect().{side})); }}"
        )
        for side in ("left", "right")
    )  # fmt: skip
    assert left == 0 < right, "and English among it from left to right"


def test_what_is_typed_in_an_open_field_stays(server, visit):
    page = visit()
    ask(page, "Hello")
    ask(page, "I like music.")
    page.get_by_role("button", name="Edit").first.click()
    page.fill(".edit textarea", "Good evening")
    for question in ("And you?", "I like tea."):
        page.fill("#question", question)
        page.press("#question", "Enter")
        answered(page)
        assert page.input_value(".edit textarea") == "Good evening"
    this = page.get_attribute("nav li[aria-current]", "data-name")
    page.click("#new")
    page.wait_for_selector("li.user", state="detached")
    page.click(f"nav li[data-name='{this}'] .open")
    assert page.input_value(".edit textarea") == "Good evening"
    page.reload()
    page.wait_for_selector("li.user")
    assert page.input_value(".edit textarea") == "Good evening"
    page.press(".edit textarea", "Enter")
    answered(page)
    assert page.inner_text("li.user > .text") == "Good evening"
    page.get_by_role("button", name="Previous version").first.click()
    assert page.locator("li.user > .text").all_inner_texts() == ["Hello", "I like music.", "And you?", "I like tea."]
    page.reload()
    page.wait_for_selector("li.user")
    assert page.locator(".edit").count() == 0


def test_what_is_typed_in_an_open_field_is_of_its_conversation_alone_and_goes_with_it(server, visit):
    page = visit()
    kept = "sessionStorage.getItem('pocketlm-drafts')"
    page.route("**/page/chats", lambda route: route.fulfill(status=503, json={"error": {"message": "No space left"}}))
    page.on("dialog", lambda dialog: dialog.accept())
    for text in ("never saved", "saved"):
        ask(page, "Hello", wait=False)
        page.wait_for_selector("#send:not([hidden])")
        page.get_by_role("button", name="Edit").click()  # another one's text does not stand there
        page.fill(".edit textarea", text)
        assert "never" not in page.evaluate(kept)
        if text == "never saved":
            page.wait_for_selector(".line.bad:has-text('No space left')")
            page.click("#new")
            page.wait_for_selector("li.user", state="detached")
            page.unroute("**/page/chats")
    page.click("nav .delete")
    page.wait_for_selector("li.user", state="detached")
    assert page.evaluate(kept) == "{}"


def test_a_question_that_fails_comes_back_beside_what_was_typed_since(server, visit):
    page = visit()
    waiting = []
    page.route("**/v1/chat/completions", lambda route: waiting.append(route))
    ask(page, "Hello", wait=False)
    page.fill("#question", "And you?")
    while not waiting:
        page.wait_for_timeout(10)
    waiting[0].abort()
    page.wait_for_selector(".line.bad")
    wait_until(lambda: page.input_value("#question") == "Hello\nAnd you?")


def test_what_is_selected_in_an_answer_stays_while_it_comes(server, visit):
    page = visit()
    page.evaluate("chat.append(chat.append(chat.root, 'user', 'Hi'), 'assistant', 'First.\\n\\nSec'); render()")
    page.evaluate("getSelection().selectAllChildren($('log').querySelector('li.assistant p'))")
    page.evaluate("{ const node = chat.path()[1]; node.content += 'ond.\\n\\nThird'; paint(node); render(); }")
    assert page.locator("li.assistant p").all_inner_texts() == ["First.", "Second.", "Third"]
    assert page.evaluate("getSelection().toString()") == "First."


def test_a_conversation_of_two_thousand_messages(server, visit):
    begun = transcript.Conversation(system="", model="other", model_id="other", interactive=True)
    begun.messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n}\n\n- **a**\n- b"} for n in range(2000)]
    transcript.Record().save(begun)
    page = visit()
    page.click("nav .open")
    page.wait_for_selector("li.assistant")  # a layout of the whole for each message took a minute
    ask(page, "Hello")
    assert page.locator("#log > li").count() == 2002
    assert page.evaluate("atEnd()")


def test_a_conversation_that_cannot_be_saved_is_not_left_without_a_word(server, visit):
    page = visit()
    page.route("**/page/chats", lambda route: route.fulfill(status=503, json={"error": {"message": "No space left"}}))
    ask(page, "Precious", wait=False)
    page.wait_for_selector("#send:not([hidden])")
    page.wait_for_selector(".line.bad:has-text('No space left')")
    asked = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    page.click("#new")
    wait_until(lambda: page.is_visible("li.user") and bool(asked))
    assert "lose" in asked[0]
    page.unroute("**/page/chats")
    page.click("#new")  # there is space again
    page.wait_for_selector("li.user", state="detached")
    wait_until(lambda: [chat.messages[0]["content"] for chat in files()] == ["Precious"])


def test_a_draft_outlives_a_reload(server, visit):
    page = visit()
    page.fill("#question", "one\ntwo")
    page.reload()
    page.wait_for_selector("h1:has-text('Ada')")
    wait_until(lambda: page.input_value("#question") == "one\ntwo")
    page.press("#question", "Enter")
    answered(page)
    page.reload()
    page.wait_for_selector("li.user")
    assert page.input_value("#question") == ""


def test_a_draft_is_there_before_the_program_has_answered(server, visit):
    page = visit()
    page.fill("#question", "one")
    held = []
    page.route("**/page/facts", lambda route: held.append(route))
    page.reload()
    wait_until(lambda: page.wait_for_timeout(10) or bool(held))
    assert page.input_value("#question") == "one"
    page.press("#question", "End")
    page.keyboard.type(" two")
    held[0].continue_()
    page.wait_for_selector("h1:has-text('Ada')")
    assert page.input_value("#question") == "one two"


def test_a_reload_before_the_first_word_keeps_the_question_once(server, visit):
    page = visit()
    go_on = threading.Event()
    server.before = lambda: go_on.wait(60)  # no token comes
    ask(page, "Tell me a joke.", wait=False)
    page.wait_for_selector("nav li[aria-current]")
    page.reload()
    page.wait_for_selector("li.user:has-text('joke')")
    page.wait_for_timeout(300)
    go_on.set()
    assert page.input_value("#question") == ""
    assert [chat.messages[0]["content"] for chat in files()] == ["Tell me a joke."]


def test_what_a_friend_meets_is_said_in_their_language(server, visit):
    page = visit(locale="pl-PL")
    ask(page, "słowo " * 2000, wait=False)
    page.wait_for_selector(".line.bad:has-text('Skróć')")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json={"error": {"message": "busy"}}))
    ask(page, "Hello", wait=False)
    page.wait_for_selector(".line.bad:has-text('Spróbuj za chwilę')")
    page.unroute("**/v1/chat/completions")
    page.evaluate("""{
        const real = fetch, broken = () => new ReadableStream({ start: (of) => of.error(new TypeError("network error")) });
        window.fetch = async (path, ...more) => path.startsWith("/v1/") ? new Response(broken()) : real(path, ...more);
    } null""")
    ask(page, "Hello", wait=False)
    page.wait_for_selector(".line.bad:has-text('Program nie odpowiada')")
    assert page.input_value("#question") == "Hello"
    written(page)  # a page that is left before that keeps the file that it had begun
    page.reload()
    page.wait_for_selector("h1:has-text('Ada')")
    ask(page, "Hello")
    stopping = 'data: {"error": {"code": 503, "message": "the server is stopping", "type": "unavailable_error"}}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stopping, content_type="text/event-stream"))
    ask(page, "And you?", wait=False)
    page.wait_for_selector(".line.bad:has-text('Program nie odpowiada')")
    written(page)
    page.click("#new")
    page.wait_for_selector("nav li:not([aria-current])")
    saved.delete(saved.paths()[0])
    page.click("nav .open")
    page.wait_for_selector(".line.bad:has-text('Tej rozmowy już nie ma')")
    page.wait_for_selector("nav li", state="detached")


def test_a_conversation_that_cannot_be_read_is_not_called_gone_and_one_that_is_gone_leaves_the_list(server, visit):
    page = visit()
    ask(page, "Hello")
    page.click("#new")
    page.wait_for_selector("nav li:not([aria-current])")
    [path] = saved.paths()
    text = path.read_text()
    path.write_text("{")
    page.click("nav .open")
    page.wait_for_selector(f".line.bad:has-text('{path.stem}')")
    path.write_text(text)
    page.click("#new")
    page.wait_for_selector("nav li")
    path.unlink()
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("nav .delete")
    page.wait_for_selector(".line.bad:has-text('This conversation is gone')")
    page.wait_for_selector("nav li", state="detached")
