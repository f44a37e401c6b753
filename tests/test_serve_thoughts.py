"""The thoughts of a model behind the server: told apart from the answer, forbidden, gone on with, dropped by the template."""

import pytest
from serving import hello, serving
from tiny_models import write_model

CHAT = "/v1/chat/completions"
THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1].lstrip('\\n') }}\n{% endfor %}assistant:"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    metadata = {"tokenizer.chat_template": THINKING, "general.name": "Thinker"}
    with serving(write_model(tmp_path_factory.mktemp("thinker") / "m.gguf", n_ctx=512, metadata=metadata)) as server:
        yield server


def told(reply):
    """(thought, answer) of a whole answer."""
    message = reply.json["choices"][0]["message"]
    return message.get("reasoning_content"), message["content"]


def streamed(reply):
    """The same of a stream."""
    deltas = [event["choices"][0]["delta"] for event in reply.events]
    return tuple("".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content"))


def test_a_thought_is_told_apart_as_llama_cpp_does(thinker):
    raw = told(thinker.post(CHAT, hello(reasoning_format="none")))[1]
    assert raw
    assert told(thinker.post(CHAT, hello())) == (raw.strip("\n"), "")
    assert streamed(thinker.post(CHAT, hello(stream=True))) == (raw.strip("\n"), "")
    listed = thinker.post(CHAT, hello(stream=True, logprobs=True)).events
    assert sum(len(event["choices"][0]["logprobs"]["content"]) for event in listed if event["choices"][0]["logprobs"]) == 8


def test_thinking_can_be_forbidden(thinker):
    thought, answer = told(thinker.post(CHAT, hello(chat_template_kwargs={"enable_thinking": False})))
    assert (thought, bool(answer)) == (None, True)


def test_an_answer_that_was_begun_goes_on_in_its_part(thinker):
    def gone_on_with(text):
        messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
        return told(thinker.post(CHAT, hello(messages=messages)))

    thought, answer = gone_on_with("<think>\nIt gre")
    assert thought
    assert answer == ""
    thought, answer = gone_on_with("<think>\nIt greets\n</think>\n\nHel")
    assert thought is None
    assert answer


def test_a_thought_that_comes_back_is_the_templates_to_drop(thinker):
    def answered(**thought):
        answer = {"role": "assistant", "content": "b", **thought}
        messages = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "c"}]
        reply = thinker.post(CHAT, hello(messages=messages)).json
        return told_text(reply), reply["usage"]["prompt_tokens"]

    with_it, without = answered(reasoning_content="x" * 40), answered()
    assert with_it == without
    assert thinker.post(CHAT, hello(messages=[{"role": "user", "content": "a", "reasoning_content": "x"}])).status == 400


def told_text(reply):
    return reply["choices"][0]["message"]["reasoning_content"]


@pytest.mark.parametrize(
    ("field", "value"), [("chat_template_kwargs", {"tools": 1}), ("chat_template_kwargs", {"enable_thinking": "yes"}),
                         ("chat_template_kwargs", 5), ("reasoning_format", "deepseek-legacy"), ("reasoning_format", 1)]
)  # fmt: skip
def test_what_is_wished_of_thoughts_is_checked(thinker, field, value):
    error = thinker.post(CHAT, hello(**{field: value}))
    assert (error.status, error.error["message"].startswith(field)) == (400, True)
