"""What a server of a small model saves: events that are filled in are those that the encoder of JSON makes of a whole object,
and no thread keeps the interpreter for long.
"""

import json
import sys
import threading

import pytest
from serving import tiny_chat

from pocketlm.cli import main

pytest.importorskip("uvicorn", reason="uvicorn serves")
from pocketlm.runtime.generator import Piece
from pocketlm.serve.app import _Events
from pocketlm.serve.asking import Prompts, pieces
from pocketlm.serve.command import TURN
from pocketlm.serve.fields import Ask
from pocketlm.serve.server import Server
from pocketlm.serve.shapes import Shape

TEXTS = ("a", '"', "\\", "\n\r\t\0", "\0", "ж😀", "\u2028</script>", "\x85\u2029", '"content":"\0"')
NAME = 'a "model" of \0\\'


class Thinking:
    """A splitter that takes every text for a thought."""

    def push(self, text):
        yield True, text


@pytest.mark.parametrize(("is_chat", "is_thought"), [(True, False), (True, True), (False, False)])
def test_every_text_is_told_as_it_is(is_chat, is_thought):
    shape = Shape(Ask(is_chat), NAME, lambda id: b"x")
    events = _Events(Ask(is_chat), Prompts([[1]], parts=Thinking if is_thought else None), shape)
    for number in (0, 1):
        for text in TEXTS:
            piece = Piece(text, 5, -0.5)
            event = [*events.of(number, piece)][-1]
            assert event.startswith(b"data: ")
            assert event.endswith(b"\n\n")
            assert event.count(b"\n") == len(event.decode().splitlines()) == 2, "clients end lines at more than line feeds"
            told = json.loads(event[6:])
            assert told == shape.delta(number, text, [piece], is_thought)
            assert told["model"] == NAME


@pytest.mark.parametrize("logprobs", [False, True])
def test_log_probabilities_are_computed_for_who_asks_for_them(logprobs):
    class Session:
        def borrow(self, others, ids):
            pass

        def generate(self, ids, **options):
            yield options["logprobs"]

    assert [*pieces(Ask(True, logprobs=logprobs), Prompts([[1]]), Session(), threading.Event())] == [(0, logprobs)]


def test_threads_take_short_turns_while_it_serves_and_as_before_afterwards(tmp_path, monkeypatch):
    turns, before = [], sys.getswitchinterval()
    monkeypatch.setattr(Server, "serve_until_stopped", lambda server, ready: turns.append(sys.getswitchinterval()))
    assert main(["serve", str(tiny_chat(tmp_path)), "--port", "0"]) == 0
    assert turns == [pytest.approx(TURN, abs=1e-6)]
    assert sys.getswitchinterval() == before
