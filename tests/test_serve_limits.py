"""Sizes and times: whatever a client does with its connections, or leaves undone, the others go on."""

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from serving import Reply, everything, hello, path_fixture, server_fixture, serving, wait_until  # noqa: F401
from uvicorn.server import ServerState

from pocketlm.serve import app
from pocketlm.serve import server as http_server

CHAT = "/v1/chat/completions"


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with server.connect() as client:
        client.sendall(head + b"Content-Length: 1000000000\r\n\r\n")
        assert Reply(everything(client)).status == 413, "before the first byte of it came"
    with server.connect() as client:
        client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        sent = 0
        try:
            for _ in range(64):
                client.sendall(chunk)
                sent += 1
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 64, "a body without an end"
    for length in ("-1", "1e9", "99999999999999999999", "0x10", "5, 6"):
        assert server.ask("POST", CHAT, {"Content-Type": "application/json", "Content-Length": length}).status in (400, 413)
    assert server.post(CHAT, hello()).status == 200


def test_a_flood_of_headers_is_refused(server):
    for flood in (b"".join(b"X-%d: y\r\n" % n for n in range(20_000)), b"X: " + b"y" * 1_000_000 + b"\r\n"):
        reply = server.raw(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n")
        assert not reply or Reply(reply).status == 400
    assert server.raw(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n")[:12] in (b"HTTP/1.1 400", b"")
    assert server.post(CHAT, hello()).status == 200


def test_json_that_is_deep_or_large_is_a_400(server):
    deep = b"[" * 100_000, b"1" * 100_000, b'{"a":' * 50_000
    for body in (*deep, b"\xff\xfe", b"", b"nul", b'{"messages": NaN}', b'"x"', b"[]"):
        assert server.post(CHAT, body).status == 400


def test_who_is_slow_with_his_head_loses_the_connection_and_nobody_else_waits(server, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 2)
    slow = [server.connect() for _ in range(50)]
    for client in slow:
        client.sendall(b"GET / HTTP/1.1\r\nHost: loc")
    assert server.post(CHAT, hello()).status == 200
    deadline = time.monotonic() + 20
    for client in slow:
        client.settimeout(max(0.1, deadline - time.monotonic()))
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
        client.close()


def test_where_there_are_too_many_connections_those_go_that_ask_for_nothing(path):
    with serving(path) as server:
        server.server.config.limit_concurrency = 20
        body = json.dumps(hello()).encode()
        head = (b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\n")  # fmt: skip
        slow = server.connect()
        slow.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body[:5])
        wait_until(lambda: bool(server.server.server_state.tasks))
        idle = [server.connect() for _ in range(60)]
        assert server.post(CHAT, hello()).status == 200
        for client in idle[:30]:
            with suppress(ConnectionResetError):
                assert client.recv(1) == b"", "the oldest are closed"
        slow.sendall(body[5:])
        assert Reply(everything(slow)).status == 200, "this one was asking"
        bodies = [server.connect() for _ in range(60)]
        for client in bodies:
            with suppress(ConnectionError):
                client.sendall(head + b"Content-Length: 9\r\n\r\n{")
        assert server.post(CHAT, hello()).status == 200, "they never ask, either"
        for client in (*idle, *bodies):
            client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit, for few file handles, and how Linux accepts connections")
def test_more_connections_than_file_handles_keep_nobody_out(path):
    command = [sys.executable, "-m", "pocketlm", "serve", str(path), "--port", "0", "--threads", "1", "--slots", "1"]
    limited = ["bash", "-c", 'ulimit -n 256; exec "$@"', "bash", *command]
    with subprocess.Popen(limited, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        [port] = re.findall(r":(\d+)/#", process.stderr.readline())
        idle = [socket.create_connection(("127.0.0.1", int(port))) for _ in range(400)]
        asking = http.client.HTTPConnection("127.0.0.1", int(port))
        asking.request("GET", "/v1/models")
        assert asking.getresponse().status == 200
        for client in idle:
            client.close()
        process.terminate()
        *_, last = said = process.stderr.read().splitlines()
    assert (len(said), last) == (3, "pocketlm: stopped")


def test_a_request_that_came_early_has_as_long_as_any_other(server, monkeypatch):
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.3)
    body = json.dumps(hello(max_tokens=20)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = b"Content-Length: %d\r\n\r\n" % len(body) + body
    server.before = lambda: time.sleep(0.05)  # 20 passes
    assert server.raw(head + length + head + b"Connection: close\r\n" + length).count(b"HTTP/1.1 200 OK") == 2
    server.before = None


@pytest.mark.parametrize("n", [2000, 10_000])  # the first does not fill the buffer of asyncio
@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_who_reads_slowly_gets_all_of_it(server, monkeypatch, connection, n):
    monkeypatch.setattr(http_server, "HEAD_SECONDS", 0.2)
    server._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    before = server.server.server_state.total_requests
    body = json.dumps({"content": "x" * n, "with_pieces": True}).encode()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", server.port))
        client.sendall(f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       f"Connection: {connection}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
        wait_until(lambda: server.server.server_state.total_requests > before)
        time.sleep(1)
        assert len(Reply(everything(client)).json["tokens"]) == n


def test_who_is_slow_with_his_body_gets_a_408(server, monkeypatch):
    monkeypatch.setattr("pocketlm.serve.app.READ_SECONDS", 0.2)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert Reply(server.raw(head + b"Content-Length: 9\r\n\r\n{")).status == 408


def test_large_bodies_that_come_at_the_same_time_have_a_bound_together(server, monkeypatch):
    monkeypatch.setattr("pocketlm.serve.app.LARGE_BODIES", 200_000)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = json.dumps(hello()).encode().ljust(150_000)
    begun = head + b"Content-Length: 150000\r\n\r\n" + body[:-1]
    with server.connect() as first:
        first.sendall(begun)
        wait_until(lambda: [*app._coming.values()] == [149_999])
        refused = Reply(server.raw(begun))
        assert (refused.status, refused.headers["retry-after"], refused.headers["connection"]) == (429, "1", "close")
        assert server.post(CHAT, hello()).status == 200
        first.sendall(body[-1:])
        assert b"200 OK" in first.recv(100)
    assert not app._coming


@pytest.mark.skipif(sys.platform != "linux", reason="counts on how large Linux lets the buffers of a socket become")
def test_who_reads_nothing_holds_no_slot_and_in_the_end_loses_the_connection(path, monkeypatch):
    monkeypatch.setattr(http_server, "STALL_SECONDS", 0.5)
    with serving(path, slots=1) as server:
        body = json.dumps(hello(max_tokens=400, n=16, stream=True, logprobs=True, top_logprobs=20, ignore_eos=True)).encode()
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", server.port))
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
            wait_until(lambda: server.answerer.slots.busy == 1)
            assert server.post(CHAT, hello()).status == 200, "the only slot is free before anything is read"
            wait_until(lambda: not server.server.server_state.connections)


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])  # the second is answered before its body has come
@pytest.mark.parametrize("rest", [b"zz\r\n", b"5\r\nabcdefgh\r\n"])
def test_a_body_that_turns_out_malformed_is_no_defect_of_the_server(server, caplog, kind, rest):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert Reply(server.raw(head.encode() + b"3\r\n{\"a\r\n" + rest)).status == 400
    with server.connect() as client:
        client.sendall(head.encode() + b"3\r\n{\"a\r\n")
        time.sleep(0.2)
        client.sendall(rest)
        assert Reply(everything(client)).status == (400 if kind == "application/json" else 415)
    assert server.post("/v1/completions", {"prompt": "the", "max_tokens": 1}).status == 200
    wait_until(server.idle)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


class Wire(asyncio.Transport):
    """A connection to nobody."""

    def __init__(self):
        super().__init__()
        self.sent, self.closed = b"", False

    def write(self, data):
        self.sent += data

    def close(self):
        self.closed = True

    def is_closing(self):
        return self.closed

    def set_write_buffer_limits(self, high=None, low=None):
        pass


def test_what_arrives_after_a_connection_was_ended_is_not_read(server):
    """asyncio's loop for Windows still hands it over."""
    loop, wire = asyncio.new_event_loop(), Wire()
    connection = http_server.Protocol(server.server.config, ServerState(), {}, loop)
    connection.connection_made(wire)
    for _ in range(2):
        connection.data_received(b"no HTTP\r\n\r\n")
    assert wire.closed
    assert wire.sent.count(b"HTTP/1.1 400") == 1
    connection.connection_lost(None)
    loop.close()


def test_a_reader_is_waited_for_as_long_as_he_takes_anything(server, monkeypatch):
    monkeypatch.setattr(http_server, "STALL_SECONDS", 0.01)
    loop, wire, sizes, ended = asyncio.new_event_loop(), Wire(), [100, 60, 30, 30], asyncio.Event()
    wire.get_write_buffer_size, wire.abort = lambda: sizes.pop(0), ended.set
    connection = http_server.Protocol(server.server.config, ServerState(), {}, loop)
    connection.connection_made(wire)
    connection.pause_writing()
    loop.run_until_complete(asyncio.wait_for(ended.wait(), 30))
    assert not sizes, "in the last time he took nothing"
    connection.connection_lost(None)
    loop.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts on how large Linux lets the buffers of a socket become")
def test_who_does_not_go_on_holds_up_no_stop_and_is_no_defect(path, monkeypatch, caplog):
    monkeypatch.setattr(http_server, "STOP_SECONDS", 0.5)
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    body = json.dumps({"content": "x" * 400_000, "with_pieces": True}).encode()
    with serving(path) as server:
        reads_nothing, writes_no_more = server.connect(), server.connect()
        reads_nothing.sendall(head % len(body) + body)
        wait_until(lambda: server.server.server_state.total_requests == 1)
        writes_no_more.sendall(head % 9 + b"{")
        wait_until(lambda: bool(server.server.server_state.tasks))
    reads_nothing.close()
    writes_no_more.close()
    assert not [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
