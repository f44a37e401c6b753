"""The server speaks OpenAI's protocol: every field that it takes does what it says, every other is refused by its name."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import alone_fixture, hello, path_fixture, server_fixture, serving, tiny_chat  # noqa: F401

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def test_health_and_models(server):
    assert server.get("/health").json == {"status": "ok"}
    listed = server.get("/v1/models").json
    assert listed["object"] == "list"
    [model] = listed["data"]
    assert (model["id"], model["object"], model["meta"]["n_vocab"], model["meta"]["n_ctx_train"]) == ("Tiny", "model", 263, 512)
    assert server.get("/v1/models/Tiny").json == model
    assert server.get("/v1/models/other").status == 404


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX moves a file that is mapped")
def test_the_model_is_listed_though_its_file_was_moved(tmp_path):
    with serving(tiny_chat(tmp_path)) as server:
        listed = server.get("/v1/models").json
        server.model.path.rename(tmp_path / "elsewhere.gguf")
        assert server.get("/v1/models").json == listed
        assert server.get("/v1/models/Tiny").json == listed["data"][0]


def test_an_answer_is_the_one_that_the_model_gives_alone(server, alone):
    reply = server.post(CHAT, hello()).json
    [choice] = reply["choices"]
    *pieces, last = alone.chat([{"role": "user", "content": "hello"}], max_tokens=8, temperature=0)
    assert choice == {"index": 0, "message": {"role": "assistant", "content": text_of([*pieces, last])}, "logprobs": None,
                      "finish_reason": "length"}  # fmt: skip
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["system_fingerprint"].startswith("b")
    usage = reply["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (last.prompt_tokens, 8)
    assert usage["total_tokens"] == last.prompt_tokens + 8


def test_a_stream_says_the_same_in_parts(server):
    whole = server.post(CHAT, hello(max_tokens=20)).json
    reply = server.post(CHAT, hello(max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert reply.headers["content-type"].startswith("text/event-stream")
    first, *deltas, end, usage = reply.events
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
    said = [delta["choices"][0]["delta"] for delta in deltas]
    assert all(delta.keys() == {"content"} and delta["content"] for delta in said)
    text = "".join(delta["content"] for delta in said)
    assert text == whole["choices"][0]["message"]["content"]
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "length")
    assert end["timings"]["predicted_n"] == 20
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 20
    assert len({(event["id"], event["created"], event["object"]) for event in reply.events}) == 1
    plain = server.post(CHAT, hello(stream=True)).events
    assert all(event["choices"] for event in plain), "usage comes where it was asked for"


def test_completions_of_texts_and_of_ids(server, alone):
    ids = alone.tokenizer.encode("the inn")
    wanted = text_of(alone.generate("the inn", max_tokens=6, temperature=0))
    for prompt in ("the inn", ids, ["the inn"], [ids]):
        reply = server.post(COMPLETION, {"prompt": prompt, "max_tokens": 6, "temperature": 0}).json
        assert (reply["object"], reply["choices"][0]["text"]) == ("text_completion", wanted)
    both = server.post(COMPLETION, {"prompt": ["the inn", "in"], "n": 2, "max_tokens": 6, "temperature": 0}).json
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["choices"][1]["text"] == wanted
    assert both["choices"][2]["text"] == text_of(alone.generate("in", max_tokens=6, temperature=0))
    n = len(ids) + len(alone.tokenizer.encode("in"))
    assert both["usage"]["prompt_tokens"] == n, "a prompt counts once, however many answers it gets"
    streamed = server.post(COMPLETION, {"prompt": "the inn", "max_tokens": 6, "temperature": 0, "stream": True}).events
    assert "".join(event["choices"][0]["text"] for event in streamed) == wanted
    default = server.post(COMPLETION, {"prompt": "a", "ignore_eos": True}).json
    assert default["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("name", "body", "said"), [("encode", {"content": "inn"}, "tokens"), ("decode", {"tokens": [5]}, "content")]
)
def test_nobody_waits_for_a_long_text_of_another(server, monkeypatch, name, body, said):
    work, at_work, go_on = getattr(server.model.tokenizer, name), threading.Event(), threading.Event()

    def slow(*arguments, **options):
        at_work.set()
        assert go_on.wait(30)
        return work(*arguments, **options)

    monkeypatch.setattr(server.model.tokenizer, name, slow)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.post, "/tokenize" if name == "encode" else "/detokenize", body)
        assert at_work.wait(30)
        try:
            assert b"ok" in server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", patience=60)
        finally:
            go_on.set()
        assert said in reply.result().json


def test_a_seed_means_one_text_and_n_means_several(server):
    drawn = [server.post(CHAT, hello(temperature=1.5, seed=7, n=3, max_tokens=12)).json for _ in range(2)]
    texts = [[choice["message"]["content"] for choice in reply["choices"]] for reply in drawn]
    assert texts[0] == texts[1]
    assert len({*texts[0]}) == 3
    alone = server.post(CHAT, hello(temperature=1.5, seed=8, max_tokens=12)).json["choices"][0]["message"]["content"]
    assert alone == texts[0][1], "answer i has the seed plus i"


def test_logprobs_and_the_likeliest(server, alone):
    reply = server.post(CHAT, hello(logprobs=True, top_logprobs=3, max_tokens=5)).json["choices"][0]
    pieces = list(alone.chat([{"role": "user", "content": "hello"}], max_tokens=5, temperature=0))
    content = reply["logprobs"]["content"]
    assert [entry["id"] for entry in content] == [piece.id for piece in pieces[:-1]]
    ids = alone.template.encode([{"role": "user", "content": "hello"}], alone.tokenizer)
    for entry, piece in zip(content, pieces, strict=False):
        logits = alone.logits(ids)[-1].astype(float)  # independently: the plain softmax of the whole vocabulary
        logprobs = logits - math.log(sum(math.exp(x - logits.max()) for x in logits)) - logits.max()
        assert entry["logprob"] == pytest.approx(logprobs[piece.id], abs=1e-4)
        likeliest = sorted(range(len(logits)), key=lambda i: -logits[i])[:3]
        assert [top["id"] for top in entry["top_logprobs"]] == likeliest
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx([logprobs[i] for i in likeliest], abs=1e-4)
        assert bytes(entry["bytes"]) == alone.tokenizer.token_bytes(piece.id)
        ids.append(piece.id)
    streamed = server.post(CHAT, hello(logprobs=True, top_logprobs=3, max_tokens=5, stream=True)).events
    parts = [event["choices"][0]["logprobs"] for event in streamed if event["choices"][0]["logprobs"]]
    assert [entry for part in parts for entry in part["content"]] == content
    legacy = server.post(COMPLETION, {"prompt": "the", "logprobs": 2, "max_tokens": 4, "temperature": 0}).json["choices"][0]
    listed = legacy["logprobs"]
    assert [len(listed[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [4] * 4


def test_stop_strings_bias_and_penalties(server, alone):
    text = server.post(CHAT, hello(max_tokens=30)).json["choices"][0]["message"]["content"]
    stop = text[5:7]
    stopped = server.post(CHAT, hello(max_tokens=30, stop=[stop, "never said"])).json["choices"][0]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == (text[: text.index(stop)], "stop")
    for bias in ({"65": 1000}, [[65, 1000]], [["65", 1000], [66, False]]):
        biased = server.post(CHAT, hello(logit_bias=bias, repeat_penalty=1)).json["choices"][0]["message"]["content"]
        assert biased == alone.tokenizer.token_bytes(65).decode() * 8
    plain = hello(max_tokens=40, repeat_penalty=1)
    with_penalty = server.post(CHAT, {**plain, "frequency_penalty": 2, "presence_penalty": 1}).json
    wanted = text_of(alone.chat(hello()["messages"], max_tokens=40, temperature=0, repeat_penalty=1, frequency_penalty=2,
                                presence_penalty=1))  # fmt: skip
    assert with_penalty["choices"][0]["message"]["content"] == wanted
    assert wanted != server.post(CHAT, plain).json["choices"][0]["message"]["content"]


def test_an_answer_that_is_begun_is_gone_on_with(server, alone):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "the "}]
    reply = server.post(CHAT, hello(messages=messages)).json["choices"][0]["message"]["content"]
    assert reply == text_of(alone.chat(messages, max_tokens=8, temperature=0))


REFUSED = {
    "tools": [{"type": "function"}], "tool_choice": "required", "response_format": {"type": "grammar"}, "functions": [{}],
    "audio": {}, "store": True, "n": 0, "stop": [""], "temperature": "hot", "top_p": 2, "max_tokens": -2, "stream": "yes",
    "logit_bias": {"x": 1}, "seed": 1.5, "frequency_penalty": True, "top_logprobs": 21, "max_token": 5, "top_k": -1,
    "stream_options": {"x": 1}, "messages": [], "min_p": -1, "modalities": ["audio"], "repeat_last_n": 0,
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_supported_is_a_400_that_names_it(server, field):
    before = len(server.passes)
    reply = server.post(CHAT, hello(**{field: REFUSED[field]}))
    assert reply.status == 400
    assert field in reply.error["message"]
    assert reply.error["type"] == "invalid_request_error"
    assert len(server.passes) == before, "nothing was computed for it"


TWICE = {
    "two limits": (CHAT, "max_tokens", 3, "max_completion_tokens", 4),
    "two limits, the other way round": (CHAT, "max_completion_tokens", 4, "max_tokens", 3),
    "a limit in llama.cpp's word": (COMPLETION, "n_predict", 3, "max_tokens", 4),
    "two schemas": (CHAT, "json_schema", {"type": "null"}, "response_format",
                    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}),
    "a limit in llama.cpp's address": ("/completion", "n_predict", 3, "max_tokens", 4),
}  # fmt: skip


@pytest.mark.parametrize(("address", "first", "one", "second", "other"), TWICE.values(), ids=TWICE)
def test_two_names_of_one_thing_do_not_contradict_each_other(server, address, first, one, second, other):
    body = hello() if address == CHAT else {"prompt": "the inn"}
    body = {name: value for name, value in body.items() if name != "max_tokens"}
    reply = server.post(address, {**body, first: one, second: other})
    assert reply.status == 400
    assert first in reply.error["message"]
    assert second in reply.error["message"]


def test_two_names_that_say_the_same_are_no_contradiction(server):
    body = {name: value for name, value in hello().items() if name != "max_tokens"}
    both = server.post(CHAT, {**body, "max_completion_tokens": 4, "max_tokens": 4}).json
    assert both["usage"]["completion_tokens"] == 4
    assert server.post(CHAT, {**body, "max_completion_tokens": 4, "max_tokens": None}).json["choices"] == both["choices"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": 0, "temperature": 1}', "temperature stands twice"),
        ('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "content stands twice"),
        ('{"messages": [' + "[]," * 300_000 + "0]}", "the body has more than 200,000 opening brackets"),
        ('{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature is nan"),
        ('{"prompt": "x"}', "it is a field of /v1/completions"),
    ],
)
def test_what_a_body_says_twice_or_at_the_wrong_address(server, body, named):
    reply = server.post(CHAT, body.encode())
    assert reply.status == 400
    assert named in reply.error["message"]


def test_a_top_p_of_0_is_the_likeliest_token(server):
    greedy = server.post(CHAT, hello()).json["choices"]
    drawn = {name: value for name, value in hello().items() if name != "temperature"}
    for top_p in (0, 0.0):
        reply = server.post(CHAT, {**drawn, "temperature": 2, "top_k": 0, "min_p": 0, "top_p": top_p, "seed": 5}).json
        assert reply["choices"] == greedy
    assert server.post(CHAT, hello(top_p=False)).status == 400


def test_null_and_what_asks_for_nothing_is_no_field(server):
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "stop": None, "logprobs": None, "n": 1,
               "user": "me", "metadata": {"a": "b"}, "store": False, "stream_options": {"include_usage": None},
               "chat_template_kwargs": {"enable_thinking": None}}  # fmt: skip
    expected = server.post(CHAT, hello()).json["choices"]
    assert server.post(CHAT, hello(**nothing)).json["choices"] == expected
    form = {"type": "text", "json_schema": None}
    assert server.post(CHAT, hello(response_format=form)).json["choices"] == expected


def test_a_name_that_all_messages_of_a_role_have_tells_nobody_apart(server):
    def asked(*names):
        return server.post(CHAT, hello(messages=[{"role": "user", "content": "hello", "name": name} for name in names]))

    assert asked("Ada").json["choices"] == server.post(CHAT, hello(messages=hello()["messages"][-1:])).json["choices"]
    assert asked("Ada", "", "Ada").status == asked("Ada", None).status == 200, "as some frameworks send them"
    two = asked("Ada", "Bob")
    assert (two.status, two.error["param"], "two names" in two.error["message"]) == (400, "messages", True)
    assert asked(5).status == 400


MESSAGES = {
    "a role that there is not": [{"role": "tool", "content": "x"}],
    "no role": [{"content": "x"}],
    "no content": [{"role": "user"}],
    "a picture": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    "a call of a tool": [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
    "no object": ["x"],
}


@pytest.mark.parametrize("messages", MESSAGES.values(), ids=MESSAGES)
def test_messages_that_are_none(server, messages):
    reply = server.post(CHAT, hello(messages=messages))
    assert reply.status == 400
    assert "messages[0]" in reply.error["message"]


def test_half_a_character_is_no_text_wherever_it_is(server):
    message = {"role": "user", "content": "\ud800"}
    for field in ({"messages": [message]}, {"\ud800": 1}, {"stop": ["\udfff"]}, {"model": "\udc00"}):
        assert server.post(CHAT, hello(**field)).status == 400
    assert server.post(CHAT, b'{"model": "\xed\xa0\x80"}').status == 400


def test_content_may_come_in_parts(server):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    reply = server.post(CHAT, hello(messages=[{"role": "user", "content": parts}])).json
    assert reply["choices"] == server.post(CHAT, hello()).json["choices"]


def test_a_prompt_that_does_not_fit_says_so(server):
    for text in ("x" * 600, "x" * 100_000):
        reply = server.post(CHAT, hello(text))
        assert reply.status == 400
        assert reply.error["type"] == "exceed_context_size_error"
        assert reply.error["n_ctx"] == 512
        assert reply.error["n_prompt_tokens"] >= 512
    streamed = server.post(CHAT, hello("x" * 600, stream=True))
    assert streamed.status == 400, "the first error of a stream is a plain one"


def test_older_turns_go_where_that_is_asked_for(server):
    turns = [{"role": role, "content": "x" * 60} for _ in range(10) for role in ("user", "assistant")]
    messages = [*turns, {"role": "user", "content": "hello"}]
    assert server.post(CHAT, hello(messages=messages)).status == 400
    assert server.post(CHAT, hello(messages=messages, fit=True)).json["dropped_turns"] > 0


def test_the_context_ends_an_answer(server):
    reply = server.post(CHAT, hello(max_tokens=None, ignore_eos=True)).json
    assert reply["choices"][0]["finish_reason"] == "length"
    assert reply["usage"]["total_tokens"] == 513, "the last token is said and not computed"


def test_tokenize_and_detokenize(server, alone):
    ids = server.post("/tokenize", {"content": "the inn ж"}).json["tokens"]
    assert ids == alone.tokenizer.encode("the inn ж", special=True)
    assert server.post("/detokenize", {"tokens": ids}).json == {"content": "the inn ж"}
    pieces = server.post("/tokenize", {"content": "ж", "with_pieces": True}).json["tokens"]
    assert [piece["piece"] for piece in pieces] == [[0xD0], [0xB6]], "bytes, where they are no text"
    for path, body in (("/tokenize", {"content": 5}), ("/detokenize", {"tokens": [263]}), ("/detokenize", {"tokens": ["a"]})):
        assert server.post(path, body).status == 400


def test_metrics_count(server):
    def counted():
        lines = server.get("/metrics").body.decode().splitlines()
        return {name: float(value) for name, value in (line.split() for line in lines if not line.startswith("#"))}

    before = counted()
    server.post(CHAT, hello())
    after = counted()
    assert after["pocketlm_requests_total"] - before["pocketlm_requests_total"] == 1
    assert after["pocketlm_tokens_predicted_total"] - before["pocketlm_tokens_predicted_total"] == 8
    assert (after["pocketlm_slots"], after["pocketlm_requests_processing"]) == (2, 0)


def test_what_a_slot_remembers_is_not_computed_again(server):
    first = hello("a question that nobody has asked before")
    reply = server.post(CHAT, first).json
    again = [*first["messages"], reply["choices"][0]["message"], {"role": "user", "content": "and?"}]
    cached = server.post(CHAT, hello(messages=again)).json["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= reply["usage"]["prompt_tokens"]
    fresh = server.post(CHAT, hello(messages=again, cache_prompt=False)).json
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_addresses_that_there_are_not(server):
    assert server.get("/nothing").status == 404
    assert server.post("/v1/responses", {}).error["type"] == "invalid_request_error"
    assert server.get(CHAT).status == 405


@pytest.mark.parametrize("name", ["max_tokens", "n_predict"])
def test_minus_one_token_is_as_many_as_there_is_room_for(server, name):
    body = {"prompt": "the inn", "temperature": 0, "ignore_eos": True}
    long = server.post("/v1/completions", {**body, name: -1}).json
    assert long["usage"]["total_tokens"] >= server.answerer.n_ctx
    assert long["choices"][0]["finish_reason"] == "length"
    assert server.post("/v1/completions", {**body, name: 3}).json["usage"]["completion_tokens"] == 3
    assert server.post("/v1/completions", {**body, name: -2}).status == 400
