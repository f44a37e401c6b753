"""A server in Hugging Face's place, on this computer: one repository with one file, which it gives as a test wants it."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

REVISION = "0123456789abcdef0123456789abcdef01234567"
FILE = "Qwen_Qwen3-0.6B-Q4_K_M.gguf"
REPOSITORY = "bartowski/Qwen_Qwen3-0.6B-GGUF"


@dataclass
class Hub:
    """What the server does. `serve` gets the handler, the file's bytes from the asked-for byte on, and where that is."""

    content: bytes
    port: int = 0
    serve: Callable[[Any, bytes, int], object] = lambda handler, body, start: handler.give(body, start)
    facts: dict[str, Any] = field(default_factory=dict)
    status: int = 200
    starts: list[int] = field(default_factory=list)  # of the requests for the file

    def __post_init__(self) -> None:
        lfs = {"size": len(self.content), "sha256": hashlib.sha256(self.content).hexdigest(), "pointerSize": 134}
        self.facts = {
            "id": REPOSITORY, "sha": REVISION, "tags": ["gguf", "license:apache-2.0"],
            "siblings": [{"rfilename": "README.md", "size": 9}, {"rfilename": "Qwen_Qwen3-0.6B-Q8_0.gguf", "lfs": lfs},
                         {"rfilename": FILE, "size": lfs["size"], "lfs": lfs}],
        }  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def handler_for(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def give(self, body: bytes, start: int = 0, status: int = 0, length: int | None = None, of: int | None = None) -> None:
            """Send `body`, as the bytes from `start` on of a file of `of`, announced as `length`."""
            self.send_response(status or (206 if start else 200))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{of or start + len(body)}")
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def go(self, location: str) -> None:
            self.send_response(302)
            self.send_header("Location", location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if path == f"/api/models/{REPOSITORY}":
                return self.give(json.dumps(hub.facts).encode(), status=hub.status)
            assert path in (f"/{REPOSITORY}/resolve/{REVISION}/{FILE}", "/elsewhere")
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))
            assert asked
            hub.starts.append(int(asked[1]))
            hub.serve(self, hub.content[int(asked[1]) :], int(asked[1]))

        def log_message(self, *_: object) -> None:
            pass

    return Handler


class serving:
    def __init__(self, hub_: Hub):
        self.hub = hub_
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_for(hub_))
        self.server.handle_error = lambda *_: None  # a client that hangs up is what some tests want
        hub_.port = self.server.server_address[1]

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self.hub

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
