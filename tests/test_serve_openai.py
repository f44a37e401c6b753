"""OpenAI's own client, waiting and asynchronous, against a real server; and what Open WebUI asks before it trusts one."""

import asyncio

import pytest
from serving import client_fixture, hello, path_fixture, server_fixture, serving, tiny_chat  # noqa: F401

openai = pytest.importorskip("openai", reason="the openai package is the client")


ASK = {**hello(), "model": "Tiny"}


def test_models(client):
    assert [model.id for model in client.models.list()] == ["Tiny"]
    assert client.models.retrieve("Tiny").id == "Tiny"


def test_a_chat_waiting_and_streamed(client):
    whole = client.chat.completions.create(**ASK)
    parts = list(client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert parts[-1].usage == whole.usage.model_copy(update={"prompt_tokens_details": parts[-1].usage.prompt_tokens_details})
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == whole.choices[0].finish_reason == "length"


def test_every_option(client):
    options = {"n": 2, "seed": 5, "temperature": 1.0, "top_p": 0.9, "stop": ["zzz"], "logit_bias": {"65": -100},
               "presence_penalty": 0.5, "frequency_penalty": 0.5, "logprobs": True, "top_logprobs": 2}  # fmt: skip
    replies = [client.chat.completions.create(**{**ASK, **options}) for _ in range(2)]
    assert replies[0].choices == replies[1].choices
    for choice in replies[0].choices:
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert "a" not in choice.message.content
    own = client.chat.completions.create(**ASK, extra_body={"top_k": 1, "min_p": 0.1})
    assert own.choices[0].message.content == client.chat.completions.create(**ASK).choices[0].message.content


def test_completions(client):
    whole = client.completions.create(model="Tiny", prompt=["the", "in"], max_tokens=4, temperature=0, logprobs=1)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert len(whole.choices[0].logprobs.tokens) == 4
    parts = client.completions.create(model="Tiny", prompt="the", max_tokens=4, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text


def test_errors_are_the_clients_own(client):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    for asked in (tools, {"tool_choice": "required", **tools}):  # the second: a form, as frameworks ask for it
        with pytest.raises(openai.BadRequestError, match=r"no tools here.*response_format"):
            client.chat.completions.create(**ASK, **asked)
    with pytest.raises(openai.BadRequestError, match="context") as long:
        client.chat.completions.create(**{**ASK, "messages": [{"role": "user", "content": "x" * 999}]})
    assert long.value.code == "context_length_exceeded", "LangChain and others shorten the conversation by that"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_what_there_is_not_says_what_there_is(client):
    """The clients' own defaults, among them /v1/responses; and an address that was given with its end."""
    doubled = client.with_options(base_url=f"{client.base_url}chat/completions")
    asked = {
        "/v1/responses": lambda: client.responses.create(model="Tiny", input="hello"),
        "/v1/embeddings": lambda: client.embeddings.create(model="Tiny", input="hello"),
        "/v1/chat/completions/chat/completions": lambda: doubled.chat.completions.create(**ASK),
    }
    for path, ask in asked.items():
        with pytest.raises(openai.NotFoundError, match=f"nothing at {path}; .*/v1/chat/completions"):
            ask()


def test_the_key(tmp_path):
    from pocketlm.serve.guard import Policy

    with serving(tiny_chat(tmp_path), policy=Policy(key="s3cret")) as server:
        for key, kind in (("wrong", openai.AuthenticationError), ("s3cret", None)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                if kind:
                    with pytest.raises(kind):
                        client.chat.completions.create(**ASK)
                else:
                    assert client.chat.completions.create(**ASK).choices


def test_many_asynchronous_streams_at_once_say_what_each_says_alone(server, client):
    texts = [f"question {n}" for n in range(12)]
    alone = [client.chat.completions.create(**{**ASK, **hello(text)}).choices[0].message.content for text in texts]

    async def ask(client, text):
        parts = []
        async for part in await client.chat.completions.create(**{**ASK, **hello(text)}, stream=True):
            parts.append(part.choices[0].delta.content or "")
        return "".join(parts)

    async def all_at_once():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, text) for text in texts))

    assert asyncio.run(all_at_once()) == alone


def test_a_full_queue_is_tried_again_by_the_client(tmp_path):
    """429 and Retry-After: the client waits and asks again, and loses nothing."""
    with serving(tiny_chat(tmp_path), slots=1, waiting=1) as server:
        async def all_at_once():
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=20) as client:
                return await asyncio.gather(*(client.chat.completions.create(**ASK) for _ in range(6)))

        replies = asyncio.run(all_at_once())
        assert len({reply.choices[0].message.content for reply in replies}) == 1
        assert server.answerer.counters.refused > 0


def test_open_webuis_check_of_a_connection(server):
    """GET {base}/models with any key, then a stream: what it does when an address is entered and a model is asked."""
    models = server.get("/v1/models", Authorization="Bearer none", Content_Type="application/json").json
    reply = server.post("/v1/chat/completions", {**hello(), "model": models["data"][0]["id"], "stream": True},
                        Authorization="Bearer none")  # fmt: skip
    assert reply.status == 200
    assert reply.events[-1]["choices"][0]["finish_reason"]
