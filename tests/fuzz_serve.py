"""Malformed requests, made of whole ones: whatever comes, the server answers 4xx (or 200 where the request is still one),
never 5xx, and goes on. `python tests/fuzz_serve.py N [SEED]` runs more than the suite does."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import socket
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from serving import Serving, everything, hello, serving, tiny_chat

SCHEMA = {
    "type": "object", "properties": {"a": {"maxLength": 5}, "b": {"$ref": "#/$defs/n"}, "c": {"pattern": "a"}},
    "required": ["a"], "$defs": {"n": {"anyOf": [{"type": ["integer", "null"], "minimum": 1}, {"enum": ["x", 1.5]}]}},
}  # fmt: skip
BODIES: dict[str, Any] = {
    "/v1/chat/completions": {
        **hello(), "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}, "n": 2, "logprobs": True,
        "top_logprobs": 2, "stop": ["a", "b"], "seed": 1, "logit_bias": {"5": -1.0}, "top_p": 0.9, "top_k": 5, "min_p": 0.1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "tools": [], "fit": True,
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    },
    "/v1/completions": {"prompt": ["the", "in"], "max_tokens": 2, "logprobs": 1, "echo": False, "temperature": 0.5,
                        "json_schema": SCHEMA},
    "/completion": {"prompt": [[1, "the", 2], {"prompt_string": "in"}], "n_predict": 2, "n_probs": 2, "stream": True,
                    "response_fields": [], "logit_bias": [["the", -1], [5, False]], "stop": ["a"],
                    "return_tokens": True, "id_slot": 0, "samplers": None, "n_keep": 1, "mirostat": 0, "ignore_eos": False},
    "/apply-template": hello(),
    "/chat/completions/input_tokens": hello(),
    "/tokenize": {"content": "the inn", "add_special": True, "parse_special": False, "with_pieces": True},
    "/detokenize": {"tokens": [1, 2, 3]},
    "/page/enter": {"code": "x"},
    "/page/chats": {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "branches": []},
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "a", "\0",
    "\ud800", "x" * 5000, "٣", "‮", [], {}, [[]], [None], [1, "a"], {"": {}},
    {"type": "text"}, {"type": "json_object"}, [{"role": "user"}],
    [[0]], [2**40], [-1], {"a": {"b": {"c": []}}}, [["a", 1]], {"-1": 5}, {"99999": 5},
]  # fmt: skip
HEADS = [
    b"Content-Type: text/plain", b"Content-Length: 5", b"Content-Length: -5", b"Transfer-Encoding: chunked", b"Host: evil",
    b"Host:", b"Origin: null", b"Expect: 100-continue", b"Upgrade: websocket\r\nConnection: upgrade", b"Connection: close",
    b"Authorization: \xff\xfe", b"X-Pocketlm-Token: \xc3\xa9", b": x", b"a b: c", b"Content-Encoding: gzip", b"Cookie: a=b; c",
    b"Sec-Fetch-Site: cross-site", b"Content-Type: application/json; charset=utf-16", b"Range: bytes=0-", b"X: " + b"y" * 9000,
]  # fmt: skip
METHODS = ["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "CONNECT", "TRACE", "x", "PO ST"]
CLIENTS = 32
PATHS = ["/", "//", "/v1/models/%00", "/page/chats/..%2f", "*", "http://evil/", "/%ff", "x"]


def _nodes(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) inside of a value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        found.append((value, key))
        _nodes(inner, found)
    return found


def _body(draw: random.Random, body: Any) -> bytes:
    body = copy.deepcopy(body)
    for _ in range(draw.randint(1, 3)):
        container, key = draw.choice(_nodes(body, []) or [({"": 0}, "")])
        what = draw.randrange(5)
        if what == 0:
            del container[key]
        elif what == 1 and isinstance(container, dict):
            name = draw.choice(["x", "tool", "max_token", "", "\ud800", "a" * 300, *BODIES["/v1/completions"]])
            container[name] = copy.deepcopy(draw.choice(VALUES))
        elif what == 2:
            container[key] = [copy.deepcopy(container[key])] * draw.randint(0, 40)
        else:
            container[key] = copy.deepcopy(draw.choice(VALUES))
    data = bytearray(json.dumps(body, ensure_ascii=draw.random() < 0.8).encode("utf-8", "surrogatepass"))
    if draw.random() < 0.2:
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    if draw.random() < 0.1:
        del data[draw.randrange(len(data)) :]
    return bytes(data)


def request(draw: random.Random, server: Serving) -> bytes:
    """One request that has something wrong with it, or nearly so."""
    path = draw.choice([*BODIES])
    data = _body(draw, BODIES[path]) if draw.random() < 0.9 else json.dumps(BODIES[path]).encode()
    method = "POST" if draw.random() < 0.93 else draw.choice(METHODS)
    if draw.random() < 0.1:
        path = draw.choice([*PATHS, path + "?a=b", path + "/"])
    length = len(data) if draw.random() < 0.95 else draw.randrange(len(data) + 1)
    lines = [f"{method} {path} HTTP/1.1".encode(), b"Host: localhost", b"Content-Type: application/json",
             b"Content-Length: %d" % length, b"X-Pocketlm-Token: " + server.policy.token.encode(),
             b"Connection: close"]  # fmt: skip
    if draw.random() < 0.15:
        lines.insert(draw.randint(1, len(lines)), draw.choice(HEADS))
    if draw.random() < 0.05:
        del lines[draw.randrange(1, len(lines))]
    raw = bytearray(b"\r\n".join(lines) + b"\r\n\r\n")
    if draw.random() < 0.05:
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw) + data


def _whole(data: bytes) -> bool:
    """Whether a server has all that this request announces."""
    head, end, body = data.partition(b"\r\n\r\n")
    lengths = re.findall(rb"content-length: *(\d+)", head.lower())
    return bool(end) and b"chunked" not in head and all(len(body) >= int(length) for length in lengths)


def fuzz(server: Serving, n: int, seed: int) -> Counter[int]:
    """How often each status came; 0: the connection was closed without a word. AssertionError: a 5xx, with the request."""
    draw, seen = random.Random(seed), Counter[int]()
    for i in range(n):
        data = request(draw, server)
        with server.connect() as client:
            got = b""
            with suppress(ConnectionError):
                client.sendall(data)
                client.settimeout(30 if _whole(data) else 0.1)  # a server that is busy answers late
                try:
                    got = client.recv(65536)
                except TimeoutError:  # it waits for the rest, and is told that none comes
                    client.shutdown(socket.SHUT_WR)
                client.settimeout(30)
                got += everything(client)
        assert not got or re.match(rb"HTTP/1\.1 \d{3} ", got), (seed, i, data, got[:500])
        status = int(got[9:12] or 0)
        seen[status] += 1
        assert status < 500, (seed, i, data, got[:500])
    return seen


def main(n: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_DATA_HOME"] = folder  # conversations are saved, too
        _run(Path(folder), n, seed)


def many_clients(server: Serving, n: int, seed: int) -> Counter[int]:
    """`fuzz` by several clients: most of the time goes by in waiting for what never comes."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        parts = clients.map(lambda i: fuzz(server, n // CLIENTS, seed * CLIENTS + i), range(CLIENTS))
        return sum(parts, Counter[int]())


def _run(folder: Path, n: int, seed: int) -> None:
    import resource

    with serving(tiny_chat(folder, n_ctx=64), slots=2) as server:
        many_clients(server, 2000, seed)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen = many_clients(server, n, seed + 1)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        assert server.idle()
        print(f"{sum(seen.values())} requests: {dict(sorted(seen.items()))}; peak memory grew by {grown} kB; no 5xx")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
