"""Requests that come and go: a client that hangs up frees its slot and nobody else's; the queue has an order and an end."""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Reply, everything, hello, serving, tiny_chat, wait_until

from pocketlm.serve.answering import ENCODING
from pocketlm.serve.command import _begun
from pocketlm.serve.guard import Policy, is_loopback
from pocketlm.serve.server import address_for_others, listen

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("slots"), n_ctx=4096)


def ask(server, body, connection=b"close"):
    """A connection on which a request is under way."""
    client = server.connect()
    data = json.dumps(body).encode()
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                   b"Connection: %s\r\nContent-Length: %d\r\n\r\n" % (connection, len(data)) + data)  # fmt: skip
    return client


class Gate:
    """Holds every pass of the model until it is opened; `waiting` once one is there."""

    def __init__(self, server):
        self.waiting, self._open = threading.Event(), threading.Event()
        server.before = self.hold

    def hold(self):
        self.waiting.set()
        assert self._open.wait(30)

    def open(self):
        self._open.set()


def cancelled(server):
    return [answer for answer in server.answerer.running if answer._handover.cancel.is_set()]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompt", [3000, 3])
def test_who_hangs_up_frees_his_slot_within_one_pass_also_in_the_middle_of_a_prompt(path, stream, prompt):
    with serving(path, slots=1) as server:
        gate = Gate(server)
        client = ask(server, hello("x" * prompt, stream=stream, max_tokens=500, ignore_eos=True))
        assert gate.waiting.wait(30)
        client.close()
        wait_until(lambda: cancelled(server))
        gate.open()
        wait_until(server.idle)
        assert len(server.passes) == 1, "the pass that was under way, and none after it"
        server.before = None
        assert server.post(CHAT, hello()).status == 200


@pytest.mark.parametrize("more", [b"\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_who_hangs_up_is_seen_to_though_he_has_sent_more(path, more):
    with serving(path, slots=1) as server:
        gate = Gate(server)
        client = ask(server, hello(max_tokens=500, ignore_eos=True), b"keep-alive")
        assert gate.waiting.wait(30)
        client.sendall(more)
        time.sleep(0.1)  # apart from the end
        client.close()
        wait_until(lambda: cancelled(server), 20)
        gate.open()
        wait_until(server.idle)


def test_who_hangs_up_before_his_prompt_is_read_costs_nobody_time(path):
    with serving(path) as server:
        encode, begun, go_on = server.answerer.asking.encode, [], threading.Event()

        def slowly(ask):
            begun.append(ask)
            assert go_on.wait(30)
            return encode(ask)

        server.answerer.asking.encode = slowly
        clients = [ask(server, hello()) for _ in range(ENCODING)]
        wait_until(lambda: len(begun) == ENCODING)
        leaving = [ask(server, hello()) for _ in range(3)]
        wait_until(lambda: len(server.server.server_state.tasks) == ENCODING + 3)
        for client in leaving:
            client.close()
        wait_until(lambda: len(server.server.server_state.connections) == ENCODING)
        go_on.set()
        assert [Reply(everything(client)).status for client in clients] == [200] * ENCODING
        wait_until(lambda: not server.server.server_state.tasks)
        assert len(begun) == ENCODING


def test_a_short_prompt_does_not_wait_for_long_ones(path):
    with serving(path) as server:
        encode, go_on = server.answerer.asking.encode, threading.Event()
        server.answerer.asking.encode = lambda ask: (len(ask.messages[0]["content"]) < 99 or go_on.wait(30)) and encode(ask)
        long = [ask(server, hello("x" * 100_000, fit=True)) for _ in range(2)]
        wait_until(lambda: server.answerer._encoding[True].locked())
        assert server.post(CHAT, hello()).status == 200
        assert not go_on.is_set()
        go_on.set()
        assert {Reply(everything(client)).status for client in long} == {400}


def test_who_hangs_up_takes_nobody_along(path):
    with serving(path, slots=2) as server:
        wanted = server.post(CHAT, hello("stays", max_tokens=50)).json["choices"]
        gate = Gate(server)
        leaves, stays = ask(server, hello("leaves", max_tokens=500)), ask(server, hello("stays", max_tokens=50))
        wait_until(lambda: server.answerer.slots.busy == 2)
        queued = ask(server, hello("waits", max_tokens=5))
        wait_until(lambda: server.answerer.slots.waiting == 1)
        queued.close()  # who waits and leaves ends nobody's answer
        wait_until(lambda: server.answerer.slots.waiting == 0)
        assert not cancelled(server)
        leaves.close()
        wait_until(lambda: len(cancelled(server)) == 1)
        gate.open()
        assert Reply(everything(stays)).json["choices"] == wanted
        wait_until(server.idle)


def test_the_queue_keeps_its_order_and_has_an_end(path):
    with serving(path, slots=1, waiting=5) as server:
        gate = Gate(server)
        first = ask(server, hello("first", max_tokens=1))
        wait_until(lambda: server.answerer.slots.busy == 1)
        waiting = []
        for n in range(5):
            waiting.append(ask(server, hello(f"question {n}", max_tokens=1)))
            wait_until(lambda n=n: server.answerer.slots.waiting == n + 1)
        refused = server.post(CHAT, hello())
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.error["type"] == "rate_limit_error"
        order, lock = [], threading.Lock()

        def read(n, client):
            assert Reply(everything(client)).status == 200
            with lock:
                order.append(n)

        readers = [threading.Thread(target=read, args=pair) for pair in enumerate([first, *waiting])]
        for reader in readers:
            reader.start()
        starts = []
        take = server.answerer.slots.give_back

        def watched(slot):
            starts.append(list(slot.session.state.ids))
            take(slot)

        server.answerer.slots.give_back = watched
        gate.open()
        for reader in readers:
            reader.join(30)
        assert sorted(order) == [*range(6)]
        wait_until(lambda: len(starts) == 6)  # a slot is given back after its answer was read
        encode = server.model.template.encode
        wanted = [encode(hello(text)["messages"], server.model.tokenizer) for text in
                  ("first", *(f"question {n}" for n in range(5)))]  # fmt: skip
        assert [ids[: len(prompt)] for ids, prompt in zip(starts, wanted, strict=True)] == wanted, "first come, first served"


def test_many_clients_on_few_slots_lose_nothing_and_starve_nobody(path):
    with serving(path, slots=8, waiting=64) as server:
        texts = [f"question {n}" for n in range(64)]
        alone = [server.post(CHAT, hello(text)).json["choices"] for text in texts]
        with ThreadPoolExecutor(64) as clients:
            together = list(clients.map(lambda text: server.post(CHAT, hello(text)).json["choices"], texts))
        assert together == alone
        assert server.idle()


def test_200_disconnects_at_random_moments_leak_no_slot_and_spoil_no_answer(path):
    disconnects(path, 200)


def disconnects(path, n, seed=0):
    """`n` clients that leave at random moments, among others that stay and whose answers are compared. Also run by hand:
    `python tests/test_serve_slots.py N`."""
    draw = random.Random(seed)
    with serving(path, slots=4, waiting=1000) as server:
        texts = [f"question {i} " + "y" * (i * 37 % 300) for i in range(20)]
        alone = {text: server.post(CHAT, hello(text, max_tokens=12)).json["choices"] for text in texts}
        lock, wrong = threading.Lock(), []

        def one(i):
            with lock:
                moment, text, stream = draw.choice((0, draw.uniform(0, 0.03), draw.uniform(0, 0.3))), draw.choice(texts), i % 2
                stays = draw.random() < 0.2
            if stays:
                reply = server.post(CHAT, hello(text, max_tokens=12)).json
                if reply.get("choices") != alone[text]:
                    wrong.append((text, reply))
                return
            client = ask(server, hello(text, max_tokens=200, ignore_eos=True, stream=bool(stream)))
            time.sleep(moment)
            client.close()

        with ThreadPoolExecutor(12) as clients:
            list(clients.map(one, range(int(n / 0.8))))
        assert not wrong
        wait_until(server.idle)
        assert len(server.answerer.slots._free) == 4
        assert {text: server.post(CHAT, hello(text, max_tokens=12)).json["choices"] for text in texts} == alone


def test_the_time_of_an_answer_and_of_waiting_has_a_limit(path):
    with serving(path, slots=1, seconds=0.3) as server:
        server.before = lambda: time.sleep(0.02)
        late = server.post(CHAT, hello(max_tokens=1000, ignore_eos=True)).json["choices"][0]
        assert late["finish_reason"] == "length"
        gate = Gate(server)
        holder = ask(server, hello())
        assert gate.waiting.wait(30)
        waited = server.post(CHAT, hello())
        assert (waited.status, waited.error["type"]) == (503, "unavailable_error")
        assert "retry-after" in waited.headers
        gate.open()
        holder.close()


def test_a_stop_lets_answers_end_with_a_reason(path):
    with serving(path, slots=1) as server:
        gate = Gate(server)
        streamed = ask(server, hello(max_tokens=1000, ignore_eos=True, stream=True))
        wait_until(lambda: server.answerer.slots.busy == 1)
        queued = ask(server, hello())
        wait_until(lambda: server.answerer.slots.waiting == 1)
        server.server.stop()
        wait_until(lambda: server.answerer.stopping)
        gate.open()
        *_, last, done = [line for line in everything(streamed).decode().split("\n") if line.startswith("data: ")]
        assert done.strip() == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"
        reply = Reply(everything(queued))
        assert (reply.status, reply.error["message"]) == (503, "the server is stopping")


def test_a_long_silence_is_not_taken_for_a_dead_connection(path, monkeypatch):
    monkeypatch.setattr("pocketlm.serve.app.PING_SECONDS", 0.02)
    with serving(path) as server:
        gate = Gate(server)
        client = ask(server, hello(stream=True))
        assert gate.waiting.wait(30)
        got = b""
        while b":\n\n" not in got:
            got += client.recv(4096)
        gate.open()
        assert b"[DONE]" in everything(client)


def test_a_model_that_fails_is_an_error_and_not_the_end(path):
    with serving(path, slots=1) as server:
        broken = server.model.executor.step
        from pocketlm.errors import PocketlmError

        def fail(*work):
            raise PocketlmError("the model computed NaN")

        server.model.executor.step = fail
        reply = server.post(CHAT, hello())
        assert (reply.status, reply.error["message"]) == (500, "the model computed NaN")
        *_, last = server.post(CHAT, hello(stream=True)).body.decode().split("data: ")[1:-1]
        assert json.loads(last)["error"]["type"] == "server_error"
        server.model.executor.step = broken
        assert server.post(CHAT, hello()).status == 200


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals as POSIX has them")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_in_order_at_a_signal(path, number):
    command = [sys.executable, "-m", "pocketlm", "serve", str(path), "--port", "0", "--threads", "1", "--slots", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        said = [process.stderr.readline() for _ in range(3)]
        assert "/#" in said[0]
        assert "/v1" in said[1]
        process.send_signal(number)
        rest = process.stderr.read()
        assert (process.wait(30), rest) == (0, "pocketlm: stopped\n")


def test_the_command_says_where_other_computers_find_the_page(path, monkeypatch, capsys):
    monkeypatch.setattr("pocketlm.serve.server.address_for_others", lambda host: "192.0.2.7")
    for host, shown in {"0.0.0.0": "http://127.0.0.1:1", "::": "http://[::1]:1", "192.0.2.5": ""}.items():
        arguments = argparse.Namespace(host=host, browser=False)
        _begun(arguments, Policy(host, token="t"), None, 1)
        expected = [f"others    http://192.0.2.7:1 in place of {shown}"] * bool(shown)
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("others")] == expected


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_address_for_others_is_one_of_this_computers(host):
    if address := address_for_others(host).strip("[]"):
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET):
            assert not is_loopback(address)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this system has no IPv6")
def test_every_address_is_also_every_address_of_ipv4():
    with listen("::", 0) as listening:
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, listening.getsockname()[1]), 5).close()


def test_the_command_says_where_the_context_is_longer_than_the_model_knows(path):
    command = [sys.executable, "-m", "pocketlm", "serve", str(path), "--port", "0", "--threads", "1", "--ctx", "5000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
        said = process.stderr.readline()
        process.terminate()
        assert "--ctx 5000" in said
        assert "was trained for 4096 tokens" in said


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        disconnects(tiny_chat(Path(folder), n_ctx=4096), int(sys.argv[1]))
    print("no slot leaked, every answer that was not cut is the one computed alone")
