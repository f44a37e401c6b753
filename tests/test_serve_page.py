"""The page in a real browser: conversations and their files, settings, hostile texts, a server that is gone."""

import json

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
    slow,
    text_of,
    visit_fixture,
)
from serving import wait_until

from pocketlm.chat import saved, states, transcript


def test_a_conversation_and_the_file_that_the_terminal_goes_on_with(server, visit, alone):
    page = visit()
    assert page.inner_text(".greeting") == "Good morning!"
    ask(page, "Hi! How are you?")
    ask(page, "I like music.")
    messages = [{"role": "user", "content": "Hi! How are you?"}]
    messages.append({"role": "assistant", "content": text_of(alone.chat(messages, temperature=0))})
    messages.append({"role": "user", "content": "I like music."})
    messages.append({"role": "assistant", "content": text_of(alone.chat(messages, temperature=0))})
    assert answers(page) == [message["content"] for message in messages if message["role"] == "assistant"]
    assert "tokens/s" in page.inner_text("#log")
    assert "context" in page.inner_text("#log")
    wait_until(lambda: files()[0].messages == messages)
    [conversation] = files()
    assert saved.latest(alone.fingerprint) == saved.paths()[0], "what `pocketlm chat --resume` takes"
    assert (conversation.model, conversation.interactive) == (alone.name, True)


def test_one_that_was_begun_in_the_terminal_goes_on_in_the_page(server, visit, alone):
    begun = transcript.Conversation(system="", model=alone.name, model_id=alone.fingerprint, interactive=True)
    begun.messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! How", "cut": True}]
    record = transcript.Record()
    record.save(begun)
    state = states.path_of(saved.paths()[0])
    assert state is not None
    state.parent.mkdir()
    state.write_bytes(b"what the terminal kept of it")
    page = visit()
    page.click("nav .open:has-text('Hello')")
    page.wait_for_selector("li.assistant")
    assert answers(page) == ["Hi! How"]
    page.click("text=Go on")
    answered(page)
    whole = "Hi! How" + text_of(alone.chat(begun.messages, temperature=0))
    wait_until(lambda: files()[0].messages[-1] == {"role": "assistant", "content": whole})
    assert len(files()) == 1
    assert not state.exists(), "it may hold words that are gone"
    state.write_bytes(b"what the terminal kept of it")
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("nav .delete")
    page.wait_for_selector("nav li", state="detached")
    assert files() == []
    assert not state.exists()


def test_a_list_that_comes_late_shows_nothing_that_is_gone(visit, alone):
    begun = transcript.Conversation(system="", model=alone.name, model_id=alone.fingerprint, interactive=True)
    begun.messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]
    transcript.Record().save(begun)
    page, late = visit(), []
    page.wait_for_selector("nav li")
    page.route("**/page/chats", lambda route: late.append((route, route.fetch())) if not late else route.continue_())
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")  # asks for the list
    while not late:
        page.wait_for_timeout(10)
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("nav .delete")
    page.wait_for_selector("nav li", state="detached")
    (route, response), *_ = late
    route.fulfill(response=response)
    page.wait_for_timeout(300)
    assert page.locator("nav li").count() == 0


def test_stop(server, visit):
    page = visit()
    go_on = halt(server)
    ask(page, "Tell me a joke.", wait=False)
    begun(page)
    page.click("#stop")
    go_on.set()
    answered(page)
    wait_until(server.idle)
    said = answers(page)[0]
    assert "(cut off)" in page.inner_text("#log")
    wait_until(lambda: [m.get("cut") for m in files()[0].messages] == [None, True])
    assert files()[0].messages[1]["content"] == said


def test_a_reload_in_the_middle_keeps_the_question_and_the_answer_so_far(server, visit):
    page = visit()
    go_on = halt(server)
    ask(page, "Tell me a joke.", wait=False)
    begun(page)
    page.wait_for_selector("nav li[aria-current]")
    page.reload()
    go_on.set()
    page.wait_for_selector("li.user")
    wait_until(server.idle)
    assert page.inner_text("li.user > .text") == "Tell me a joke."
    wait_until(lambda: files()[0].messages[1].get("cut") is True)
    server.before = None
    page.click("text=Go on")
    answered(page)
    assert len(answers(page)[0]) > 5


def test_the_address_of_a_new_start_in_the_tab_of_an_old_one(server, visit):
    page = visit(enter=False)
    page.wait_for_selector("#status:has-text('address')")
    page.goto(f"{server.url}/#{server.policy.token}")  # only what is behind the # differs: the browser does not load it again
    page.wait_for_selector("h1:has-text('Ada')")


def test_an_old_tab_goes_on_when_a_new_start_has_opened_another(server, visit):
    page = visit()
    ask(page, "Hello")
    server.policy.token = "of-a-new-start"
    other = visit(page.context)
    other.close()
    ask(page, "I like music.")
    wait_until(lambda: len(files()[0].messages) == 4)
    assert page.inner_text("#line") == ""


def test_an_answer_is_copied_where_the_browser_gives_pages_no_clipboard(server, visit):
    """As it gives none to those that come from another computer without TLS."""
    page = visit(enter=False)
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.goto(f"{server.url}/#{server.policy.token}")
    page.wait_for_selector("h1:has-text('Ada')")
    ask(page, "Hi! How are you?")
    page.click("li.assistant .tools button:has-text('Copy')")
    page.wait_for_selector("text=Copied")
    page.focus("#question")
    page.keyboard.press("Control+V")
    assert page.input_value("#question") == answers(page)[0] != ""


def test_two_tabs(server, visit):
    first = visit()
    second = visit(context=first.context, enter=False)  # the token is the browser's, not the tab's
    second.wait_for_selector("h1:has-text('Ada')")
    slow(server)
    ask(first, "Hello", wait=False)
    ask(second, "What is your name?", wait=False)
    answered(first)
    answered(second)
    wait_until(lambda: sorted(c.messages[0]["content"] for c in files()) == ["Hello", "What is your name?"])
    server.before = None
    second.click("nav .open:has-text('Hello')")  # now both have the same one
    second.wait_for_selector("li.user:has-text('Hello')")
    ask(first, "And you?")
    ask(second, "I like music.")
    wait_until(lambda: len(files()) == 3)
    second.wait_for_selector("#line:has-text('changed elsewhere')")
    questions = {tuple(m["content"] for m in c.messages if m["role"] == "user") for c in files()}
    assert questions == {("Hello", "And you?"), ("Hello", "I like music."), ("What is your name?",)}, "nobody's words are lost"


def test_edit_retry_and_branches_survive_a_reload_and_the_terminal(server, visit):
    page = visit()
    ask(page, "Hello")
    ask(page, "I like music.")
    for text in ("I like cats.", "I like tea."):
        page.locator("li.user").nth(1).get_by_role("button", name="Edit").click()
        page.fill(".edit textarea", text)
        page.keyboard.press("Enter")
        answered(page)
    page.get_by_role("button", name="Retry").last.click()
    answered(page)
    assert "2/2" in page.locator("li.assistant").last.inner_text()
    wait_until(lambda: len(files()[0].branches) == 3)
    [conversation] = files()
    assert [m["content"] for m in conversation.messages][::2] == ["Hello", "I like tea."]
    record = transcript.Record()  # the terminal reads it and writes it
    path = saved.paths()[0]
    record.save(record.load(path))
    page.reload()
    page.wait_for_selector("text=I like tea.")
    for text in ("I like music.", "I like cats."):
        page.locator("li.user").nth(1).get_by_role("button", name="Next version").click()
        page.wait_for_selector(f"text={text}")
    wait_until(lambda: files()[0].messages[2]["content"] == "I like cats.")
    assert len(files()[0].branches) == 2, "the two answers that are the same word for word have become one"


def test_settings_reach_the_model(server, visit, alone):
    page = visit()
    page.click("#options")
    page.fill("#system", "You are a pirate.")
    page.fill("input[name=max_tokens]", "3")
    page.click("dialog .main")
    ask(page, "Hello")
    messages = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Hello"}]
    assert answers(page) == [text_of(alone.chat(messages, temperature=0, max_tokens=3)).strip()]
    wait_until(lambda: files()[0].messages[-1]["content"])
    assert files()[0].system == "You are a pirate."
    assert files()[0].messages[-1]["cut"] is True, "three tokens are no whole answer"


def test_a_thought_is_folded_and_kept_as_the_terminal_keeps_it(server, visit):
    deltas = [{"reasoning_content": "It "}, {"reasoning_content": "greets"}, {"content": "Hello "}, {"content": "there"}]
    chunks = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
    timings = dict.fromkeys(("cache_n", "prompt_n", "predicted_n", "predicted_ms", "predicted_per_second"), 1)
    chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}], "timings": timings})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    page = visit()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "Hi")
    thought = page.locator("li.assistant details.thought")
    assert thought.get_attribute("open") is None
    assert page.locator("li.assistant .text > p").inner_text() == "Hello there"
    thought.locator("summary").click()
    assert thought.inner_text().split() == ["Thinking", "It", "greets"]
    wait_until(lambda: files()[0].messages[1].get("cut") is None)
    assert files()[0].messages[1]["content"] == "<think>\nIt greets\n</think>\n\nHello there"


def test_an_answer_that_fills_the_context_is_not_more_than_all_of_it(server, visit):
    page = visit()
    n_ctx = page.evaluate("facts.context")
    timings = {"cache_n": 0, "prompt_n": 6, "predicted_n": n_ctx - 5, "predicted_ms": 1, "predicted_per_second": 1}
    chunk = {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "length"}], "timings": timings}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "Hi")
    assert page.locator("li.assistant").inner_text().endswith(f"context {n_ctx}/{n_ctx} (100%)")


def test_without_the_address_of_the_start_nothing_is_shown(server, visit):
    page = visit(enter=False)
    page.wait_for_selector("text=This page opens by the address")
    assert page.locator("nav li").count() == 0
    with page.expect_event("load"):  # another address in the same tab: the page loads itself again
        page.goto(f"{server.url}/#{'x' * 32}")
    page.wait_for_selector("text=This page opens by the address")


def test_a_server_that_is_gone_is_said_and_the_question_stays(server, visit):
    page = visit()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello", wait=False)
    page.wait_for_selector("text=The program does not answer")
    assert page.input_value("#question") == "Hello"
