"""`response_format`, by OpenAI's own client; and what a stranger's schema may do to a server: nothing."""

import json

import pytest
from serving import client_fixture, hello, path_fixture, server_fixture, serving  # noqa: F401
from tiny_models import write_model

from pocketlm.constrain import states

openai = pytest.importorskip("openai", reason="the openai package is the client")
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 50}, "yes": {"type": "boolean"}},
    "required": ["n", "yes"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}


NO_SPACES = {"10": -100, "32": -100}  # the tiny model likes them
ASK = {**hello(), "model": "Tiny", "max_tokens": 120, "temperature": 1.0, "logit_bias": NO_SPACES}


def check(text):
    found = json.loads(text)
    assert list(found) == ["n", "yes"]
    assert 1 <= found["n"] <= 50
    assert isinstance(found["yes"], bool)


def test_a_schema_waiting_and_streamed(client):
    whole = client.chat.completions.create(**ASK, response_format=FORMAT, seed=3, n=3)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)
    parts = list(client.chat.completions.create(**ASK, response_format=FORMAT, seed=3, stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content


def test_the_clients_own_classes(client):
    from pydantic import BaseModel

    class Answer(BaseModel):
        n: int
        words: list[str] | None

    parsed = client.chat.completions.parse(**{**ASK, "max_tokens": 200}, response_format=Answer, seed=1).choices[0]
    assert parsed.message.parsed is None or isinstance(parsed.message.parsed, Answer)


def test_other_ways_to_ask(client):
    reply = client.chat.completions.create(**ASK, response_format={"type": "json_object"}, seed=1)
    assert reply.choices[0].message.content.startswith("{")
    for body in ({"json_schema": SCHEMA}, {"response_format": {"type": "json_object", "schema": SCHEMA}}):
        check(client.chat.completions.create(**ASK, extra_body=body).choices[0].message.content)
        check(
            client.completions.create(model="Tiny", prompt="the", max_tokens=100, logit_bias=NO_SPACES, extra_body=body)
            .choices[0]
            .text
        )
    plain = client.chat.completions.create(**{**ASK, "max_tokens": 4}, response_format={"type": "text"})
    assert plain.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": "json"}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "schema is missing"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not is not supported"),
        ({"json_schema": {"type": "string", "pattern": "(a"}}, "missing"),
        ({"json_schema": {"$ref": "#"}}, "refers to itself"),
        ({"json_schema": False}, "no text can be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": False}}}, "no text can be"),
        ({"json_schema": SCHEMA, "response_format": {"type": "json_object"}}, "one form"),
        ({"json_schema": SCHEMA, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_is_not_supported_is_a_400_that_names_it(client, server, body, named):
    with pytest.raises(openai.BadRequestError, match=named):
        client.chat.completions.create(**ASK, extra_body=body)
    assert client.chat.completions.create(**{**ASK, "max_tokens": 1}).choices


def test_a_form_that_leads_too_far_ends_its_own_answer_alone(client, server, monkeypatch):
    """It is found out while the answer is written: the client is told, and the slot is free again."""
    bad = {"json_schema": {"type": "string", "pattern": "^a{50}((a+b?){1,99}c?){1,99}e$"}}
    monkeypatch.setattr(states, "MOST_STEPS", 1000)
    ask = {**ASK, "max_tokens": 300, "logit_bias": {"97": 100}}
    for _ in range(3):
        with pytest.raises(openai.BadRequestError, match="too many ways"):
            client.chat.completions.create(**ask, extra_body=bad)
    parts = list[str]()
    with pytest.raises(openai.APIError, match="too many ways"):
        parts.extend(
            part.choices[0].delta.content or "" for part in client.chat.completions.create(**ask, extra_body=bad, stream=True)
        )
    assert "".join(parts).startswith('"' + "a" * 40)
    assert server.idle()
    check(client.chat.completions.create(**ASK, response_format=FORMAT).choices[0].message.content)


def test_a_model_that_thinks_first_does_not_where_the_answer_has_a_form(tmp_path):
    """Its template opens a thought, which a form has no place for: all that is written is the answer."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:<think>\n"
    path = write_model(tmp_path / "thinks.gguf", n_ctx=512, metadata={"tokenizer.chat_template": template})
    with serving(path) as server:
        fields = {"max_tokens": 200, "temperature": 1.0, "logit_bias": NO_SPACES}
        message = server.post("/v1/chat/completions", hello(**fields)).json["choices"][0]["message"]
        assert message["reasoning_content"]
        message = server.post("/v1/chat/completions", hello(**fields, response_format=FORMAT)).json["choices"][0]["message"]
        check(message["content"])
        assert not message.get("reasoning_content")
