"""A model without weights for the tests of the chat; run as a program, a chat with it: chat_fake.py
[--no-save | --save] [--lines] [--hot] [--resume[=NAME]] [--model=NAME] [--turns=N] [QUESTION]."""

import argparse
import io
import math
import os
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

from pocketlm.chat.repl import run
from pocketlm.constrain import OPTIONS
from pocketlm.conversation import _check_names
from pocketlm.errors import PocketlmError, UsageError, one_of
from pocketlm.runtime.generator import Piece
from pocketlm.runtime.sampling import chat_defaults
from pocketlm.runtime.sampling_options import SamplingOptions

ENOUGH = Path(os.environ.get("XDG_DATA_HOME", ""), "enough")  # slow answers end where there is such a file


class FakeModel:
    """Answers "You said: …" word by word. Certain questions make it slow, long, broken or silent."""

    name, backend, n_threads, n_ctx = "Fake 1M", "numpy", 2, 100
    n_parameters, file_bytes, context_used = 1_000_000, 2_000_000, 0
    n_turns = 1000  # that the context holds
    fingerprint = "f" * 32
    chat_defaults: ClassVar[dict] = chat_defaults(n_vocab=32_000)

    def __init__(self):
        self.template = SimpleNamespace(
            note="", name="chatml", tags=("<think>", "</think>"), thought_opening="", thinking=None, has_switch=True
        )
        self.tokenizer = SimpleNamespace(encodable=lambda text: text)
        self.asked: list[list[dict[str, str]]] = []
        self.sampling: dict = {}

    state_bytes = 1000

    def save_state(self, path):
        path.write_text("state")

    def load_state(self, path):
        self.loaded = path.read_text()

    def set_threads(self, n):
        if not 1 <= n <= 64:
            raise UsageError(f"--threads {n}: expected 1 to 64")
        self.n_threads = n

    def set_backend(self, name):
        self.backend = one_of("backend", name, ("auto", "numpy"))

    def chat(self, messages, *, cancel=None, **sampling):
        others = ("max_tokens", "stop", "draft", *OPTIONS)
        options = {name: value for name, value in sampling.items() if name not in others}
        _check_names(options, others)
        SamplingOptions(**options)
        self.asked.append([dict(message) for message in messages])
        self.sampling = sampling
        *_, question = (message["content"] for message in messages if message["role"] == "user")
        if question == "fail":
            raise PocketlmError("the prompt has 101 tokens but the context holds 100")
        if question == "template":
            self.template.note = "the model's chat template cannot be used (x): chatml takes its place"
        if question == "escape":
            question = "\x1b]0;title\x07\x1b[2Jred\x9b31m\x00\r\ttab\nline"
        words = f"You said: {question}".split(" ")
        opening = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        if question == "slow":
            words += [f"word{n}" for n in range(10_000)]
        if question == "silent":
            words = []
        words = [word if n == 0 else f" {word}" for n, word in enumerate(words)]
        if question == "think":
            words = ["<thi", "nk>\nIt", " greets\n", "</th", "ink>\n\nHello", " there"]
            words[:2] = ["It"] if self.template.thought_opening else words[:2]
            opening = opening.removeprefix(self.template.thought_opening)
        while opening:  # the beginning of the answer, which is continued
            opening = opening.removeprefix(words.pop(0))
        dropped = max(0, sum(message["role"] == "user" for message in messages) - self.n_turns)
        if dropped:
            yield piece("", dropped_turns=dropped)
        n = 0
        for word in words[: sampling.get("max_tokens")]:
            if cancel is not None and cancel.is_set():
                break
            if question == "slow":
                time.sleep(0.02)
                if ENOUGH.exists():
                    break
            n += 1
            yield piece(word)
        self.context_used = 10 * len(messages)
        reason = "cancelled" if cancel is not None and cancel.is_set() else "length" if n < len(words) else "stop"
        counts = {"prompt_tokens": 12, "cached_tokens": 8, "generated_tokens": n, "drafted_tokens": 8, "accepted_tokens": 6}
        yield piece("", -1, reason, dropped_turns=dropped, **counts, prompt_seconds=0.1, generation_seconds=0.5)


def piece(text, id=1, finish_reason=None, note="", dropped_turns=0, **counts):
    return Piece(text, id, math.nan, finish_reason, note=note, dropped_turns=dropped_turns, **counts)


def chat(*lines: str, model=None, **options):
    """(answers, notes, status, model) of a chat in which each of these lines is a message or a command."""
    model = model or FakeModel()
    stdout, stderr = io.StringIO(), io.StringIO()
    given = {"sampling": {}, "save": False, "lines": True, **options}
    status = run(model, **given, stdin=io.StringIO("".join(line + "\n" for line in lines)), stdout=stdout, stderr=stderr)
    return stdout.getvalue(), stderr.getvalue(), status, model


if __name__ == "__main__":
    assert threading.current_thread() is threading.main_thread()
    flags = argparse.ArgumentParser()
    flags.add_argument("question", nargs="?")
    flags.add_argument("--resume", nargs="?", const=True, default=False)
    flags.add_argument("--save", action="store_true", default=None)
    flags.add_argument("--no-save", dest="save", action="store_false")
    flags.add_argument("--lines", action="store_true")
    flags.add_argument("--model")
    flags.add_argument("--hot", action="store_true")
    flags.add_argument("--turns", type=int, default=1000)
    options = vars(flags.parse_args())
    model = FakeModel()
    model.n_turns = options.pop("turns")
    if name := options.pop("model"):
        model.name, model.fingerprint = name, name * 8
    if options.pop("hot"):
        options["watch"] = lambda: "the processor is slowed down"
    try:
        sys.exit(run(model, sampling={}, **options))
    except PocketlmError as error:
        sys.exit(f"pocketlm: {error}")
