"""The server in llama.cpp's words, and what llama.cpp's own tests of its server ask for where its model's words do not matter.

Each test names, after "stands for", the tests of `tools/server/tests/unit` whose promise it keeps, in words of its own. What
is refused instead, and why, stands in serve/README.md.
"""

import http.client
import json
import threading

import pytest
from serving import alone_fixture, hello, serving, tiny_chat, wait_until  # noqa: F401
from tiny_models import SPECIALS, TOKENS, write_model

from pocketlm.serve.guard import Policy

OWN = "/completion"
MARKERS = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant{{ '\n' }}"
)
END = TOKENS.index(SPECIALS[2])


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    metadata = {"tokenizer.chat_template": MARKERS, "tokenizer.ggml.add_bos_token": True, "general.name": "Tiny"}
    return write_model(tmp_path_factory.mktemp("own") / "tiny.gguf", n_ctx=128, metadata=metadata)


@pytest.fixture(scope="module")
def server(path):
    with serving(path, seed=42) as server:
        yield server


def asked(prompt="the inn", **fields):
    return {"prompt": prompt, "n_predict": 8, "temperature": 0, **fields}


def said(server, prompt="the inn", **fields):
    reply = server.post(OWN, asked(prompt, **fields))
    assert reply.status == 200, reply.body
    return reply.json


def events(server, prompt="the inn", **fields):
    """A stream, which ends without a word of its own."""
    body = server.post(OWN, asked(prompt, stream=True, **fields)).body.decode()
    return [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n") if line]


# ---- stands for test_basic.py: server_props, server_slots, models; test_security.py: *_api_key


def test_properties_say_what_there_is(server):
    told = server.get("/props").json
    assert (told["model_path"], told["model_alias"], told["total_slots"]) == ("tiny.gguf", "Tiny", 2)
    assert told["default_generation_settings"]["n_ctx"] == 128
    params = told["default_generation_settings"]["params"]
    assert (params["seed"], params["n_predict"], params["temperature"]) == (42, -1, 0.7)
    assert told["chat_template"] == MARKERS
    assert str(server.model.path.parent) not in json.dumps(told), "where the file lies is nobody's business"


def test_slots_say_who_answers_and_nothing_of_what_is_said(server):
    """Stands for completion_parallel_slots and cancel_request, too: busy while it answers, free when its client has gone."""
    wait_until(server.idle)
    listed = server.get("/slots").json
    assert [(slot["id"], slot["n_ctx"], slot["is_processing"]) for slot in listed] == [(0, 128, False), (1, 128, False)]
    at_work, go_on = threading.Event(), threading.Event()

    def wait():
        at_work.set()
        assert go_on.wait(60)

    server.before = wait
    clients = [http.client.HTTPConnection("127.0.0.1", server.port, timeout=60) for _ in range(2)]
    try:
        for busy, client in enumerate(clients, 1):
            client.request("POST", OWN, json.dumps(asked(n_predict=100)), {"Content-Type": "application/json"})
            wait_until(lambda busy=busy: sum(slot["is_processing"] for slot in server.get("/slots").json) == busy)
        assert at_work.wait(60)
        assert b"inn" not in server.get("/slots").body
    finally:
        server.before = None
        for client in clients:
            client.close()
        go_on.set()
    wait_until(lambda: not any(slot["is_processing"] for slot in server.get("/slots").json))


def test_the_key_guards_them_all(path):
    with serving(path, policy=Policy(key="s3cret")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            for reply in (server.post("/completions", asked(), **headers), server.get("/props", **headers),
                          server.get("/slots", **headers), server.post("/apply-template", hello(), **headers)):  # fmt: skip
                assert (reply.status, reply.error["type"]) == (401, "authentication_error")
        assert server.get("/health").status == 200
        for headers in ({"Authorization": "Bearer s3cret"}, {"X_Api_Key": "s3cret"}):
            assert server.post("/completions", asked(), **headers).json["content"]


# ---- stands for test_completion.py


def test_an_answer_is_the_models_and_is_counted(server, alone):
    """completion, consistent_result_same_seed, completion_response_fields (without a choice)"""
    *pieces, last = alone.generate("the inn", max_tokens=8, temperature=0)
    told = said(server, return_tokens=True)
    assert told["content"] == "".join(piece.text for piece in [*pieces, last])
    assert told["tokens"] == [piece.id for piece in pieces]
    assert (told["tokens_evaluated"], told["tokens_predicted"], told["timings"]["predicted_n"]) == (last.prompt_tokens, 8, 8)
    assert told["timings"]["prompt_n"] + told["timings"]["cache_n"] == last.prompt_tokens
    assert (told["stop"], told["stop_type"], told["truncated"], told["stopping_word"]) == (True, "limit", False, "")
    assert told["has_new_line"] is ("\n" in told["content"])
    assert told["prompt"] == SPECIALS[0] + "the inn", "the token in front is told, too"
    assert {"n_predict": 8, "temperature": 0, "seed": 42, "stream": False}.items() <= told["generation_settings"].items()
    assert said(server)["tokens"] == [], "unless asked for"


@pytest.mark.parametrize("fields", [{}, {"n_predict": 40, "temperature": 1.5, "seed": 3}, {"n_probs": 2}])
def test_a_stream_says_the_same_token_by_token(server, fields):
    """completion_stream, completion_stream_vs_non_stream, n_probs_stream"""
    whole = said(server, return_tokens=True, **fields)
    *parts, last = events(server, **fields)
    assert not any(part["stop"] for part in parts)
    assert "".join(part["content"] for part in [*parts, last]) == whole["content"]
    assert [len(part["tokens"]) for part in parts] == [1] * whole["tokens_predicted"]
    assert [id for part in parts for id in part["tokens"]] == whole["tokens"]
    for name in ("stop", "stop_type", "truncated", "has_new_line", "tokens_predicted", "prompt"):
        assert last[name] == whole[name]
    assert last["generation_settings"] == {**whole["generation_settings"], "stream": True}
    listed = [entry for part in parts for entry in part.get("completion_probabilities", [])]
    assert listed == whole.get("completion_probabilities", [])


def test_seeds(server):
    """different_result_different_seed, consistent_result_same_seed, consistent_result_different_batch_size"""
    options = [{"seed": seed, "cache_prompt": cached} for seed in (1, 2, 1) for cached in (True, False)]
    drawn = [said(server, temperature=1.5, **each)["content"] for each in options]
    assert len({*drawn}) == 2
    assert drawn[:2] == drawn[4:]


def test_a_prompt_that_is_too_long(server):
    """nocache_long_input_prompt, ctx_shift_disabled_long_prompt"""
    for prompt in ("the inn " * 100, list(range(128)), "x" * 100_000):
        reply = server.post(OWN, asked(prompt))
        assert (reply.status, reply.error["type"], reply.error["n_ctx"]) == (400, "exceed_context_size_error", 128)
        assert "exceeds the available context size" in reply.error["message"]


def test_a_prompt_may_be_ids_texts_and_both(server):
    """completion_with_tokens_input, json_prompt_no_mtmd"""
    ids = server.post("/tokenize", {"content": "the inn", "add_special": True}).json["tokens"]
    assert ids[0] == TOKENS.index(SPECIALS[0])
    wanted = said(server)["content"]
    rest = server.post("/detokenize", {"tokens": ids[2:]}).json["content"]
    for prompt in (ids, {"prompt_string": "the inn"}, [*ids[:2], rest]):
        assert said(server, prompt)["content"] == wanted
    several = said(server, [ids, "the inn", {"prompt_string": "the inn"}, "in"])
    assert [answer["content"] for answer in several[:3]] == [wanted] * 3
    assert [answer["index"] for answer in several] == [0, 1, 2, 3]
    assert several[3]["content"] == said(server, "in")["content"]
    assert {part["index"] for part in events(server, [ids, "in"])} == {0, 1}


def test_a_text_in_front_gets_the_token_that_begins_one_but_once(server):
    alike = [said(server, prompt, return_tokens=True) for prompt in ("the inn", SPECIALS[0] + "the inn")]
    assert alike[0]["tokens_evaluated"] == alike[1]["tokens_evaluated"]
    assert alike[0]["tokens"] == alike[1]["tokens"]


def test_probabilities_are_those_of_the_other_protocol(server):
    """n_probs"""
    told = said(server, n_probs=10, n_predict=5)["completion_probabilities"]
    chat = server.post("/v1/completions", {"prompt": "the inn", "max_tokens": 5, "temperature": 0, "logprobs": 10}).json
    assert [entry["logprob"] for entry in told] == chat["choices"][0]["logprobs"]["token_logprobs"]
    for entry in told:
        assert [*entry] == ["id", "token", "bytes", "logprob", "top_logprobs"]
        assert len(entry["top_logprobs"]) == 10
        assert all(top["logprob"] <= 0 and isinstance(top["bytes"], list) for top in entry["top_logprobs"])


@pytest.mark.parametrize("form", [list, dict], ids=["pairs", "an object"])
@pytest.mark.parametrize("as_text", [False, True], ids=["ids", "texts"])
def test_tokens_can_be_forbidden(server, form, as_text):
    """logit_bias; a text stands for all of its tokens"""
    first = said(server, return_tokens=True)["tokens"][0]
    names = [server.model.tokenizer.decode([first])] if as_text else [first]
    bias = form([(str(name) if form is dict else name, -1000) for name in names])
    told = said(server, return_tokens=True, logit_bias=[[*pair] for pair in bias] if form is list else bias)
    assert first not in told["tokens"]
    assert told["generation_settings"]["logit_bias"] == [{"token": first, "bias": -1000.0}]


def test_how_it_ended(server):
    text = said(server, n_predict=30)["content"]
    stop = text[5:7]
    told = said(server, n_predict=30, stop=["never said", stop])
    assert (told["stop_type"], told["stopping_word"], told["content"]) == ("word", stop, text[: text.index(stop)])
    told = said(server, logit_bias=[[END, 1000]])
    assert (told["stop_type"], told["stopping_word"], told["content"], told["tokens_predicted"]) == ("eos", "", "", 0)


# ---- stands for test_ctx_shift.py, test_ignore_eos.py, test_metrics.py: *_rate_excludes_first_token


@pytest.mark.parametrize(("n_predict", "is_cut"), [(64, False), (-1, True)])
def test_the_context_ends_an_answer_and_it_says_so(server, n_predict, is_cut):
    """ctx_shift_disabled_short_prompt, ctx_shift_disabled_stream: the last token is said and not computed"""
    told = said(server, "in", n_predict=n_predict, ignore_eos=True)
    assert told["truncated"] is is_cut
    assert told["tokens_predicted"] == (129 - told["tokens_evaluated"] if is_cut else 64)
    assert events(server, "in", n_predict=n_predict, ignore_eos=True)[-1]["stop_type"] == "limit"


def test_end_tokens_that_are_passed_over_are_told(server):
    """ignore_eos_populates_logit_bias, ignore_eos_false_no_logit_bias"""
    ends = [{"token": id, "bias": None} for id in sorted(server.model.tokenizer.end_ids)]
    assert {"token": END, "bias": None} in ends
    assert said(server, ignore_eos=True)["generation_settings"]["logit_bias"] == ends
    assert said(server, ignore_eos=False)["generation_settings"]["logit_bias"] == []


def test_speeds_are_of_the_passes_that_were_made(server):
    """metrics_generation_rate_excludes_first_token, metrics_timings_are_finite, and of
    chat_completion_with_timings_per_token what is told at the end"""
    one, many = (said(server, n_predict=n)["timings"] for n in (1, 16))
    assert (one["predicted_n"], one["predicted_per_second"], one["predicted_per_token_ms"]) == (1, 0, 0)
    assert many["predicted_per_second"] == pytest.approx(1e3 * 15 / many["predicted_ms"])
    assert many["predicted_per_token_ms"] == pytest.approx(many["predicted_ms"] / 15)
    stream = server.post("/v1/chat/completions", hello(stream=True, stream_options={"include_usage": True})).events
    assert stream[-1]["choices"] == []
    assert stream[-1]["timings"]["predicted_n"] == 8


# ---- stands for test_chat_completion.py: apply_chat_template, chat_template_assistant_prefill, chat_completions_token_count


@pytest.mark.parametrize("begun", ["", "The"])
def test_the_text_of_a_conversation_is_what_chat_answers(server, begun):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    messages += [{"role": "assistant", "content": begun}] if begun else []
    prompt = server.post("/apply-template", {"messages": messages}).json["prompt"]
    assert prompt == (f"{SPECIALS[0]}<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                      f"<|im_start|>assistant\n{begun}")  # fmt: skip
    chat = server.post("/v1/chat/completions", hello(messages=messages, repeat_penalty=1)).json
    told = said(server, prompt)
    assert told["content"] == chat["choices"][0]["message"]["content"]
    assert told["tokens_evaluated"] == chat["usage"]["prompt_tokens"]
    for address in ("/chat/completions/input_tokens", "/v1/chat/completions/input_tokens"):
        assert server.post(address, {"messages": messages}).json == {"input_tokens": told["tokens_evaluated"]}


def test_a_conversation_that_is_none(server):
    """invalid_chat_completion_req"""
    for address in ("/apply-template", "/chat/completions/input_tokens"):
        for messages in (None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 1}], []):
            assert server.post(address, {"messages": messages}).status == 400


def test_a_form_can_be_asked_for(tmp_path):
    """completion_with_json_schema"""
    with serving(tiny_chat(tmp_path)) as server:
        assert said(server, n_predict=20, json_schema={"const": "42"})["content"] == '"42"'


# ---- what there is not


REFUSED = {
    "grammar": 'root ::= "a"', "post_sampling_probs": True, "timings_per_token": True, "return_progress": True, "verbose": True,
    "samplers": ["top_k"], "mirostat": 1, "dry_multiplier": 0.5, "xtc_probability": 0.1, "typical_p": 0.5, "min_keep": 2,
    "t_max_predict_ms": 5, "lora": [{"id": 0, "scale": 1}], "n_probs": 21, "response_fields": ["content"], "n_cmpl": 2,
    "return_tokens": 1, "stream_options": {"include_usage": True}, "logit_bias": [["", 1], 5], "n_predicts": 3,
    "prompt": {"prompt_string": "a", "multimodal_data": ["x"]},
}  # fmt: skip


@pytest.mark.parametrize("field", REFUSED)
def test_what_there_is_not_is_named(server, field):
    """Stands for what llama.cpp refuses as well (completion_with_invalid_grammar, json_prompt_mtm_error_when_not_supported)
    and for what it has and pocketlm has not."""
    before = len(server.passes)
    reply = server.post(OWN, asked(**{"prompt": "a", field: REFUSED[field]}))
    assert reply.status == 400
    assert field in reply.error["message"]
    assert len(server.passes) == before


def test_samplers_that_are_off_and_a_slot_that_is_wished_for_change_nothing(server):
    """chat_completions_multiple_choices sends a slot; front ends send every sampler there is, with the values that say: off"""
    off = {"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "typical_p": 1, "xtc_probability": 0, "xtc_threshold": 0.1,
           "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2, "dry_sequence_breakers": ["\n"], "n_keep": 5,
           "min_keep": 0, "dynatemp_range": 0, "dynatemp_exponent": 1, "id_slot": 1, "grammar": "", "lora": []}  # fmt: skip
    assert said(server, **off)["content"] == said(server)["content"]
    assert server.post("/v1/chat/completions", hello(id_slot=0, n=2, add_generation_prompt=True)).status == 200
