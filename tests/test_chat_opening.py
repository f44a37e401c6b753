"""A model that opens while the user types: the prompt does not wait for it, the answer does, and a failure is told."""

import io
import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from chat_fake import FakeModel

from pocketlm.chat import repl
from pocketlm.chat.opening import Opening, OpeningFailed
from pocketlm.errors import FileError

OPTIONS = {"sampling": {}, "resume": False, "save": False}
AT_A_TERMINAL = """
import sys, time
from pocketlm.chat import repl
from pocketlm.chat.opening import Opening
from pocketlm.errors import FileError, PocketlmError
def load():
    time.sleep(float(sys.argv[1]))
    raise FileError("friend", "needs 900 MB", "close other programs")
try:
    repl.run(Opening(load, "Ada"), sampling={}, system=None, resume=False, save=False, title="Ada")
except PocketlmError as error:
    print("ended with", error)
"""


class Closable(FakeModel):
    closed = False

    def close(self):
        self.closed = True


def chat(opening, text, system=None):
    shown = io.StringIO()
    status = repl.run(opening, system=system, stdin=io.StringIO(text), stdout=shown, stderr=shown, **OPTIONS)
    return status, shown.getvalue()


def test_the_answer_waits_and_the_prompt_does_not():
    model, may_open = Closable(), threading.Event()

    class Typing(io.StringIO):
        def readline(self, *arguments):
            may_open.set()  # whoever waited for the model before asking would wait for ever
            return super().readline(*arguments)

    def load():
        assert may_open.wait(30)
        return model

    with Opening(load, "Ada") as opening:
        shown = io.StringIO()
        assert repl.run(opening, system="Be kind.", stdin=Typing("Hello\n"), stdout=shown, stderr=shown, **OPTIONS) == 0
    assert shown.getvalue() == "You said: Hello\n"
    system = {"role": "system", "content": "Be kind."}
    assert model.asked[0] == [system, {"role": "user", "content": "."}]
    assert model.asked[-1] == [system, {"role": "user", "content": "Hello"}]
    assert model.closed


def test_a_model_that_cannot_be_opened_is_told_once():
    def load():
        raise FileError("friend", "needs 900 MB", "close other programs")

    with pytest.raises(FileError, match="900 MB"):
        chat(Opening(load, "Ada"), "Hello\nAgain\n")


def test_a_first_line_that_is_too_long_is_told_when_it_is_asked():
    class Strict(Closable):
        def chat(self, messages, **sampling):
            yield from super().chat([{"role": "user", "content": "fail"}], **sampling)

    status, shown = chat(Opening(Strict, "Ada"), "Hello\n")
    assert status == 1
    assert shown.count("the prompt has 101 tokens") == 1


def test_leaving_does_not_need_a_model():
    opened = []
    opening = Opening(lambda: opened.append("nobody asked for it"), "Ada")
    opening.close()
    assert not opened
    opening = Opening(Closable, "Ada")
    assert opening.wait() is opening.wait()
    assert isinstance(OpeningFailed(ValueError("x")).error, ValueError)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal to send to oneself")
def test_ctrl_c_while_waiting_leaves_the_model_opening():
    model, may_open = Closable(), threading.Event()

    def load():
        assert may_open.wait(30)
        return model

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        opening = Opening(load, "Ada")
        for _ in range(2):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                opening.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    may_open.set()
    assert opening.wait() is model
    opening.close()
    assert model.closed


@pytest.mark.skipif(os.name == "nt", reason="this test drives a POSIX terminal")
@pytest.mark.parametrize("seconds", ["0", "0.7"])
def test_a_failure_ends_the_prompt_that_is_on_the_screen(seconds, tmp_path):
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "HOME": str(tmp_path)}
    driver = Path(tmp_path, "driver.py")
    driver.write_text(AT_A_TERMINAL, encoding="utf-8")
    child = pexpect.spawn(sys.executable, [str(driver), seconds], env=env, encoding="utf-8", timeout=60)
    child.expect("Ada")
    child.expect("ended with friend: needs 900 MB")
    child.expect(pexpect.EOF)
