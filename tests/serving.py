"""A server with a tiny model in a thread of the tests' own process, and a client that sends what it is told to.

Fixtures: `path` of the model, `server`, `alone` (the model without a server), `client` (OpenAI's own, of the server).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_model

import pocketlm

pytest.importorskip("uvicorn", reason="uvicorn serves")
from pocketlm.serve.answering import Answerer
from pocketlm.serve.app import application
from pocketlm.serve.guard import Policy
from pocketlm.serve.page import Page
from pocketlm.serve.server import Server, listen

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Serving:
    """A running server. `passes`: how many ids each pass of the model had, or the first of several in a row; `before`, where a
    test sets it, is called in front of every pass.
    """

    def __init__(self, path: Path, *, slots: int = 2, waiting: int = 32, seconds: float = 60.0, policy: Policy | None = None,
                 persona: dict[str, str] | None = None, prepared: str | None = None, **defaults: Any):  # fmt: skip
        self.model = pocketlm.load(path, threads=1)
        self.policy = policy or Policy()
        self.answerer = Answerer(self.model, [self.model.session() for _ in range(slots)], waiting, seconds)
        texts = {"title": "", "system": "", "greeting": "", **(persona or {})}
        self.page = Page(self.answerer, self.policy, texts, "", defaults)
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        app = application(self.answerer, self.policy, defaults, self.page.routes())
        self.server = Server(app, self._socket, self.answerer.stop)
        self.passes: list[int] = []
        self.before: Callable[[], object] | None = None
        step = self.model.executor.step

        def counted(work: Any, samplers: Any = (), most: int = 1, *wanted: Any) -> Any:
            if self.before is not None:
                self.before()
                most = 1
            self.passes.append(sum(len(ids) for _, ids, _ in work))
            return step(work, samplers, most, *wanted)

        self.model.executor.step = counted  # type: ignore[method-assign]
        ready = threading.Event()

        def begun() -> None:
            if prepared is not None:
                self.answerer.prepare(prepared, forms=True)
            ready.set()

        self._thread = threading.Thread(target=self.server.serve_until_stopped, args=(begun,))
        self._thread.start()
        assert ready.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._socket.close()
        self.model.close()

    def idle(self) -> bool:
        """Whether nobody has a slot, and nobody waits for one."""
        slots = self.answerer.slots
        return slots.busy == 0 and slots.waiting == 0 and not self.answerer.running

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, {"Content-Type": "application/json", **headers}, data)

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, headers)

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"") -> Reply:
        """One request; a header whose value is None is left out."""
        given: dict[str, Any] = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(body)), "Connection": "close"}
        given |= {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{n}: {v}\r\n" for n, v in given.items() if v is not None)
        return Reply(self.raw(head.encode("latin-1") + b"\r\n" + body))

    def raw(self, data: bytes, patience: float = 300.0) -> bytes:
        """What comes until the server closes the connection."""
        with self.connect(patience) as client:
            with suppress(BrokenPipeError, ConnectionResetError):  # it has said all that it wants to
                client.sendall(data)
            return everything(client)

    def connect(self, patience: float = 300.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), patience)


def everything(client: socket.socket) -> bytes:
    got = b""
    while True:
        try:
            part = client.recv(65536)
        except ConnectionResetError:
            return got
        if not part:
            return got
        got += part


class Reply:
    """A response taken apart."""

    def __init__(self, data: bytes):
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(first.split()[1]) if first else 0
        pairs = [line.partition(": ")[::2] for line in lines]
        self.headers = {name.lower(): value for name, value in pairs}
        if self.headers.get("transfer-encoding") == "chunked":
            body = b"".join(_chunks(body))
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        lines = [line.removeprefix("data: ") for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


def _chunks(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        n = int(size, 16)
        yield rest[:n]
        body = rest[n + 2 :]


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@contextmanager
def serving(path: Path, **options: Any) -> Iterator[Serving]:
    server = Serving(path, **options)
    try:
        yield server
    finally:
        server.before = None
        server.stop()


def tiny_chat(folder: Path, n_ctx: int = 512, **options: Any) -> Path:
    metadata = {"tokenizer.chat_template": TEMPLATE, "general.name": "Tiny"}
    return write_model(folder / f"tiny-{n_ctx}.gguf", n_ctx=n_ctx, metadata=metadata, **options)


def hello(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A chat request that is answered alike every time."""
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}


@pytest.fixture(name="path", scope="module")
def path_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat(tmp_path_factory.mktemp("serve"))


@pytest.fixture(name="server", scope="module")
def server_fixture(path: Path) -> Iterator[Serving]:
    with serving(path) as server:
        yield server


@pytest.fixture(name="alone", scope="module")
def alone_fixture(path: Path) -> Iterator[pocketlm.Model]:
    with pocketlm.load(path, threads=1) as model:
        yield model


@pytest.fixture(name="client", scope="module")
def client_fixture(server: Serving) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="the openai package is the client")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
