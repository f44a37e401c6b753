"""The benchmark of servers counts what the clients really got, and in which order; what is not there is a line."""

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from serving import serving, tiny_chat

from pocketlm.bench import serving as bench


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tiny_chat(tmp_path_factory.mktemp("bench"), n_ctx=256), slots=2, ignore_eos=True) as running:
        yield running


def asked(port, number=0, tokens=8):
    client = bench.Client(port, number, tokens)
    bench.receive([client])
    return client.answer()


def test_every_client_gets_all_its_tokens(server):
    answer = asked(server.port, 3, 12)
    assert answer.tokens == 12
    assert 0 < answer.first <= answer.whole
    found = bench.together(server.port, 5, 12)
    assert found.speed > 0
    assert len(found.firsts) == 5
    assert 0 <= found.places < 5
    assert server.idle()


def test_a_client_without_an_answer_ends_the_run(server):
    with pytest.raises(SystemExit, match=r"3 of 3 clients have no answer: 400: .*max_tokens"):
        bench.together(server.port, 3, -2)
    with pytest.raises(SystemExit, match=r"2 of 2 clients have no answer: .*refused"):
        bench.together(bench.free_port(), 2, 1)


@pytest.fixture
def told():
    """A server that answers what it is told to: `body(number)`, once `may(number)` says so; then it waits for the client to
    have read that, and calls `done(number)`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][0]["content"]
            number = int(re.search(r"number (\d+)", question)[1])
            handler.may(number)
            data = "".join(f"data: {json.dumps(event)}\n\n" for event in handler.body(number)).encode() + b"data: [DONE]\n\n"
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            self.connection.recv(1)
            handler.done(number)

        def log_message(self, format, *args):
            pass

    handler = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    handler.daemon_threads = True
    handler.may = handler.done = lambda number: None
    thread = threading.Thread(target=handler.serve_forever, daemon=True)
    thread.start()
    yield handler
    handler.shutdown()
    handler.server_close()


def piece(text):
    return {"choices": [{"delta": {"content": text}}]}


def test_tokens_are_those_of_the_usage_and_else_pieces_of_text(told):
    """A character of several tokens is one piece."""
    told.body = lambda number: [piece("ж"), piece("😀"), {"choices": [], "usage": {"completion_tokens": 7}}]
    assert asked(told.server_port).tokens == 7
    told.body = lambda number: [piece("ж"), piece("😀")]
    assert asked(told.server_port).tokens == 2
    told.body = lambda number: [{"choices": [], "usage": {"completion_tokens": 7}}]
    assert asked(told.server_port) == "no answer", "nobody has read any of them"


@pytest.mark.parametrize(("order", "places"), [([0, 1, 2, 3], 0), ([3, 2, 1, 0], 3), ([1, 0, 3, 2], 1), ([3, 0, 1, 2], 3)])
def test_the_order_of_first_tokens_is_held_against_that_of_the_questions(told, order, places):
    turns = [threading.Event() for _ in order]
    turns[0].set()
    told.may = lambda number: turns[order.index(number)].wait(600)

    def done(number):
        if (after := order.index(number) + 1) < len(order):
            turns[after].set()

    told.done = done
    told.body = lambda number: [piece("a")]
    assert bench.together(told.server_port, len(order), 1).places == places


LISTEN = "import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"


def test_what_is_not_installed_or_does_not_start_is_a_line_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SERVERS", {
        "half": ("json no_such_package nor_this_one", lambda *_: ["-c", ""]),
        "broken": ("json", lambda *_: ["-c", "raise SystemExit('it broke')"]),
        "good": ("json", lambda model, port, slots, threads: ["-c", LISTEN.format(port=port)]),
    })  # fmt: skip
    monkeypatch.setattr(bench, "together", lambda port, clients, *_: bench.Round(10.0 * clients, [0.5] * clients, 0))
    monkeypatch.setattr(sys, "argv", ["serving.py", str(tiny_chat(tmp_path)), "--clients", "1,2", "--rounds", "2"])
    bench.main()
    said, errors = capsys.readouterr()
    assert errors.splitlines() == [
        "half is left out: no_such_package, nor_this_one not installed", "broken is left out: it broke",
    ]  # fmt: skip
    assert said.splitlines()[2:] == ["| good | 1 | 10 | 1.00 | 500 | 500 | 0 |", "| good | 2 | 20 | 2.00 | 500 | 500 | 0 |"]
