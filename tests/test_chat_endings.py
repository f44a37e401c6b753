"""A chat that is ended from outside keeps what Ctrl-C keeps: the question, and the answer so far, marked as cut."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from chat_fake import FakeModel

from pocketlm.chat import console, dialogue, saved, transcript
from pocketlm.chat.endings import CLOSE_EVENTS, Endings
from pocketlm.chat.opening import Opening

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has neither these signals nor pseudo-terminals")
ENTER, CTRL_D = "\r", "\x04"
OPENING = f"""
import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from chat_fake import FakeModel
from pocketlm.chat.opening import Opening
from pocketlm.chat.repl import run
def load():
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)
    model = FakeModel()
    model.close = lambda: None
    return model
with Opening(load, "Ada") as model:
    sys.exit(run(model, sampling={{}}, title="Ada", model_id="ada"))
"""

LEAVING = f"""
import asyncio, os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from chat_fake import FakeModel
from pocketlm.chat.repl import run
close = asyncio.BaseEventLoop.shutdown_asyncgens
def interrupted(loop):
    closing = close(loop)
    os.kill(os.getpid(), signal.SIGTERM)  # between the making of what the loop is to do, and its doing
    return closing
asyncio.BaseEventLoop.shutdown_asyncgens = interrupted
sys.exit(run(FakeModel(), sampling={{}}))
"""
pytestmark = pytest.mark.usefixtures("home")


def assert_cut(conversations, question="slow", answered="You said: slow word0 word1 word2"):
    (conversation,) = conversations
    asked, answer = conversation["messages"][-2:]
    assert asked == {"role": "user", "content": question}
    assert answer["content"].startswith(answered)
    assert answer["cut"] is True


@posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_in_an_answer_keeps_both(number, terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("slow" + ENTER, "word3")
    shown.child.kill(getattr(signal, number))
    assert shown.ended() == 128 + getattr(signal, number)
    assert "Traceback" not in shown.text()
    assert_cut(shown.conversations())
    again = terminal("--resume")
    again.wait("resumed: 1 turn with Fake 1M")
    again.wait("(cut off: /more continues)")


@posix
@pytest.mark.parametrize("place", ["answer", "prompt", "prompt under nohup"])
def test_a_closed_window_keeps_both(place, terminal, tmp_path):
    before = "trap '' HUP; " if "nohup" in place else ""
    program = f"PYTHONUNBUFFERED= {sys.executable} {Path(__file__).with_name('chat_fake.py')}"  # with a buffer, as users have
    shown = terminal(command=("sh", "-c", f"{before}{program} 2>{tmp_path}/errors"))
    shown.prompt(1)
    shown.type("slow" + ENTER, "word3")
    if "prompt" in place:
        shown.type("\x03")
        shown.prompt(2)
    shown.child.ptyproc.fileobj.close()  # the terminal is gone
    shown.child.ptyproc.closed = shown.child.closed = True
    end = time.monotonic() + 30
    # the shell may be gone before the program that it started has saved
    while shown.child.ptyproc.isalive() or not shown.conversations()[0]["messages"][-1]["content"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert_cut(shown.conversations())
    assert (tmp_path / "errors").read_text() == ""


@posix
@pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP"])
def test_a_signal_at_the_prompt_ends_at_once_and_leaves_the_terminal_in_order(number, terminal):
    shown = terminal(command=("sh", "-c", f"{sys.executable} {Path(__file__).with_name('chat_fake.py')}; stty -a; sleep 60"))
    shown.prompt(1)
    shown.type("Hello" + ENTER, "tokens/s")
    shown.prompt(2)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(shown.child.pid)], capture_output=True, text=True).stdout
    os.kill(int(children.split()[0]), getattr(signal, number))
    shown.wait(" icanon")
    assert " echo " in shown.text()
    assert "Traceback" not in shown.text()
    (conversation,) = shown.conversations()
    assert "cut" not in conversation["messages"][-1]


@pytest.fixture
def opening(terminal, tmp_path):
    """A chat at its first prompt, whose model will never have been opened."""
    driver = tmp_path / "driver.py"
    driver.write_text(OPENING, encoding="utf-8")
    shown = terminal(command=(sys.executable, str(driver), str(tmp_path / "never there")))
    shown.prompt(1)
    return shown


@posix
def test_a_signal_while_the_model_opens_keeps_the_question_and_waits_for_no_model(opening):
    opening.type("Are you awake?" + ENTER)
    while not opening.conversations():
        opening.read()
    opening.child.kill(signal.SIGTERM)
    assert opening.ended() == 128 + signal.SIGTERM
    assert_cut(opening.conversations(), "Are you awake?", "")


@posix
def test_who_leaves_waits_for_no_model(opening):
    assert opening.leave() == 0


def test_a_model_that_opens_too_late_is_closed():
    may_open, closed = threading.Event(), threading.Event()
    model = FakeModel()
    model.close = closed.set
    opening = Opening(lambda: may_open.wait(30) and model, "Ada")
    opening.start([], lambda error: None)
    opening.close()
    assert opening.is_busy
    assert not closed.is_set()
    may_open.set()
    assert closed.wait(30)
    assert not opening.is_busy


def test_a_packed_program_that_is_left_while_its_model_opens_ends_there():
    """Python's own end would free what the thread that opens it is still using."""
    script = """
import atexit, threading, pocketlm
from pocketlm.build import stub_entry
def run(arguments):
    with stub_entry._open_later("Ada", "no model") as opening:
        opening.start([], print)
    return 143
pocketlm.load = lambda *_: threading.Event().wait()
stub_entry._run = run
atexit.register(print, "Python's own end")
stub_entry.main()
"""
    ended = subprocess.run([sys.executable, "-c", script, "--lines"], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (143, "", "")


@pytest.mark.parametrize("where", ["the first imports", "later ones"])
def test_ctrl_c_at_the_start_of_a_packed_program_says_nothing(where):
    script = """
import importlib.abc, sys
from pocketlm.build.sources import ENTRY
class Interrupted(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == sys.argv[1]:
            raise KeyboardInterrupt
for name in [name for name in sys.modules if name.startswith("pocketlm") or name.startswith("numpy")]:
    del sys.modules[name]
sys.meta_path.insert(0, Interrupted())
exec(ENTRY)
"""
    name = "pocketlm.build.stub_entry" if where == "the first imports" else "numpy"
    ended = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@posix
def test_before_there_are_modules_ctrl_c_ends_it_as_a_program_without_python():
    script = "from pocketlm.build.sources import QUIET; import os, signal; exec(QUIET); os.kill(os.getpid(), signal.SIGINT)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
    ignored = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); {script}"
    subprocess.run([sys.executable, "-c", ignored], check=True, timeout=120)


@posix
def test_the_first_process_of_a_container_ends_at_a_signal():
    script = "import os, signal; from pocketlm import cli; own = os.getpid(); os.getpid = lambda: 1\n"
    script += "cli.main(['chat'], lambda *_, **__: os.kill(own, signal.SIGTERM))"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, "")


@posix
@pytest.mark.parametrize("typed", ["Hello" + ENTER, CTRL_D])
def test_a_signal_while_the_line_editor_ends_loses_no_line(typed, terminal, tmp_path):
    (tmp_path / "driver.py").write_text(LEAVING, encoding="utf-8")
    shown = terminal(command=("sh", "-c", f"{sys.executable} {tmp_path}/driver.py 2>{tmp_path}/errors"))
    shown.prompt(1)
    assert shown.leave(typed) == 128 + signal.SIGTERM
    assert (tmp_path / "errors").read_text() == ""
    if typed != CTRL_D:
        assert_cut(shown.conversations(), "Hello", "")


@posix
def test_a_kill_that_cannot_be_caught_keeps_the_question(terminal):
    shown = terminal()
    shown.prompt(1)
    shown.type("slow" + ENTER, "word3")
    shown.child.kill(signal.SIGKILL)
    shown.ended()
    assert_cut(shown.conversations(), answered="")


@posix
def test_what_nohup_ignores_stays_ignored(home):
    command = ["nohup", sys.executable, str(Path(__file__).with_name("chat_fake.py")), "--lines"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(b"Hello\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"You said: Hello\n"
        child.send_signal(signal.SIGHUP)
        child.stdin.write(b"Bye\n")
        child.stdin.close()
        assert child.stdout.readline() == b"You said: Bye\n"
    assert child.returncode == 0


def test_a_signal_during_a_save_waits_until_it_is_done(monkeypatch):
    if os.name == "nt":
        pytest.skip("Windows has no signal to send to oneself")
    done = []

    def save(self, conversation):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # where Python would look for signals
            time.sleep(0)
        done.append(len(conversation.messages))
        return True

    monkeypatch.setattr(transcript.Record, "save", save)
    from pocketlm.chat.repl import run

    before = signal.getsignal(signal.SIGTERM)
    given = {"sampling": {}, "save": True, "stdin": io.StringIO("Hello"), "stdout": io.StringIO(), "stderr": io.StringIO()}
    assert run(FakeModel(), **given) == 128 + signal.SIGTERM
    assert done == [2]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("event", range(8))
def test_a_console_that_closes_is_kept_in_the_event_itself(event):
    """Windows ends the process when the handler returns: the main thread, in the middle of an answer, does nothing more."""
    reached, go_on = threading.Event(), threading.Event()

    class Waiting(FakeModel):
        def chat(self, messages, **options):
            for n, piece in enumerate(super().chat(messages, **options)):
                if n == 3:
                    reached.set()
                    assert go_on.wait(30)
                yield piece

    shown = console.Console(io.StringIO(), io.StringIO(), io.StringIO())
    chat = dialogue.Chat(Waiting(), shown, {}, save=True)
    asking = threading.Thread(target=chat.ask, args=("one two three",))
    asking.start()
    assert reached.wait(30)
    handled = []
    system = threading.Thread(target=lambda: handled.append(chat.endings.console_event(event)))
    system.start()
    system.join(30)
    assert handled == [event in CLOSE_EVENTS]
    (path,) = saved.paths()
    answer = transcript.load(path).messages[-1]
    assert answer == {"role": "assistant", "content": "You said: one" if event in CLOSE_EVENTS else "", "cut": True}
    go_on.set()
    asking.join(30)
    assert transcript.load(path).messages[-1] == {"role": "assistant", "content": "You said: one two three"}


def test_the_event_of_a_console_never_waits_for_the_model():
    may_open = threading.Event()
    opening = Opening(lambda: may_open.wait(30) and FakeModel(), "Ada")
    chat = dialogue.Chat(opening, console.Console(io.StringIO(), io.StringIO(), io.StringIO()), {}, save=True)
    asking = threading.Thread(target=chat.ask, args=("Are you awake?",))
    asking.start()
    end = time.monotonic() + 30
    while not saved.paths():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert chat.endings.console_event(2)
    may_open.set()
    asking.join(30)


def test_endings_that_nobody_sends_change_nothing():
    with Endings(lambda: pytest.fail("kept"), lambda error: False) as endings, endings.held():
        assert endings.ended is None
    assert not endings.console_event(0)
