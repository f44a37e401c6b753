"""What Windows' friends get, composed here and run under wine: it talks, checks itself, and says what is wrong in one line."""

import importlib
import json
import os
import random
import shutil
import socket
import urllib.request
from pathlib import Path

import pytest
from packing import friend_fixture, model_fixture  # noqa: F401
from tiny_models import write_model
from wine_runner import environment_for, needs_wine, prefix, run_windows

import pocketlm
from pocketlm.runtime import container

pytestmark = needs_wine
PLATFORM = "windows-x86_64"


@pytest.fixture(scope="module")
def home(request):
    return prefix(Path(request.config.cache.mkdir("pocketlm-wine")))


def windows_path(path):
    return "Z:" + str(path).replace("/", "\\")


def test_it_is_an_exe_of_thirteen_megabytes_at_most(friend, model):
    assert friend.suffix == ".exe"
    assert friend.stat().st_size - model.stat().st_size < 13e6


def test_it_checks_itself_on_every_level_of_this_processor(friend, home):
    assert "whole" in run_windows(home, friend, "--check").stdout
    result = run_windows(home, friend, "--selftest")
    assert (result.returncode, result.stderr) == (0, "")
    *lines, verdict = result.stdout.splitlines()
    assert verdict.startswith("right: ")
    for line in lines:
        name, _, said = line.partition(" ")
        assert name in verdict or said.strip().startswith("this CPU cannot run that level")
    assert "amx" not in result.stdout  # Linux's alone
    assert "numpy" in verdict  # by our own library in place of OpenBLAS
    assert "sse4" in verdict


def test_it_writes_what_the_installed_package_writes(friend, model, home):
    result = run_windows(home, friend, "generate", "-p", "the", "-n", "9")
    with pocketlm.load(model) as plain:
        assert result.stdout == "".join(p.text for p in plain.generate("the", max_tokens=9, temperature=0)) + "\n"
    assert run_windows(home, friend, "generate", "-p", "the", "-n", "9", POCKETLM_ISA="sse4").stdout == result.stdout


@pytest.mark.parametrize("name", ["a folder with spaces", "Ёлка и друзья", "ağaç ığdır"])
def test_it_talks_from_any_folder_even_a_read_only_one(friend, home, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    copy = Path(shutil.copy(friend, folder / f"{name} friend.exe"))
    folder.chmod(0o555)
    result = run_windows(home, copy, stdin="hello\n")
    folder.chmod(0o755)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip()
    assert [path.name for path in folder.iterdir()] == [copy.name]


def test_a_conversation_goes_on_another_day_for_a_user_of_any_name(friend, home, tmp_path):
    folder = tmp_path / "Ёлка ağaç"
    (folder / "Temp").mkdir(parents=True)

    def talk(words, stdin):  # wine says itself where its user's folders are
        places = {"LOCALAPPDATA": folder, "TEMP": folder / "Temp", "TMP": folder / "Temp"}
        script = "&& ".join(f"set {name}={windows_path(place)}" for name, place in places.items())
        return run_windows(home, Path("cmd"), "/c", f"{script}&& {windows_path(friend)} {words}", stdin=stdin)

    first, chats = talk("--save", "hello\n"), folder / "pocketlm" / "chats"
    (saved,) = chats.glob("*.json")
    second = talk(f"--save --resume {saved.stem}", "and you?\n")
    assert (first.returncode, first.stderr, second.returncode) == (0, "", 0)
    assert "resumed: 1 " in second.stdout + second.stderr
    assert list(chats.glob("*.json")) == [saved]
    assert list((folder / "Temp").iterdir()) == []  # where the boot loader had unpacked it


def test_a_conversation_at_a_console(friend, home, tmp_path):
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    env = environment_for(home, TERM="xterm", LC_ALL="C.UTF-8")
    child = pexpect.spawn("wine", [str(friend), "--no-save"], env=env, encoding="utf-8", dimensions=(30, 100), timeout=120)
    child.expect(r"\x1b\]\d;Ada Ağaç Ёлка\x07")  # the window's title
    child.expect("Ada Ağaç Ёлка")
    child.expect("To leave: /quit")
    for _ in range(2):  # wine's console sends what has changed on it: the second prompt is where the first one was
        child.send("hello\r")
        child.expect("tokens/s")
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_an_emoji_at_a_console_is_kept(friend, home, tmp_path):
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    env = environment_for(home, TERM="xterm", LC_ALL="C.UTF-8")
    script = f"set LOCALAPPDATA={windows_path(tmp_path)}&& {windows_path(friend)}"
    child = pexpect.spawn("wine", ["cmd", "/c", script], env=env, encoding="utf-8", dimensions=(30, 100), timeout=120)
    child.expect("To leave: /quit")
    child.send("I like 😀 and 👍🏽\r")
    child.expect("tokens/s")
    child.send("/quit\r")
    child.expect(pexpect.EOF)
    child.close()
    (saved,) = (tmp_path / "pocketlm" / "chats").glob("*.json")
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"][0]["content"] == "I like 😀 and 👍🏽"
    assert "+I like 😀 and 👍🏽\n" in (tmp_path / "pocketlm" / "history").read_text(encoding="utf-8")


def test_threads_wait_for_each_other_and_end(friend, home, tmp_path):
    """POCKETLM_THOROUGH=1: five times 10,000 tokens, which takes minutes where the processor is busy."""
    n = "10000" if os.environ.get("POCKETLM_THOROUGH") else "400"
    long = write_model(tmp_path / "long.gguf", format="Q4_0", n_ctx=10_100)
    command = ("generate", "--model", str(long), "--ctx", "10100", "-p", "the", "-n", n, "--temp", "0", "--threads")
    one, *more = (run_windows(home, friend, *command, threads, seconds=3000) for threads in ("1", "2", "3", "2", "4"))
    assert one.returncode == 0
    assert len(one.stdout) > int(n)
    assert [(other.returncode, other.stdout) for other in more] == [(0, one.stdout)] * 4


def test_a_damaged_one_says_so_in_one_line_or_talks_as_before(friend, home, tmp_path):
    """POCKETLM_THOROUGH=1: 15 changed bits and 5 cuts."""
    n_flips, n_cuts = (15, 5) if os.environ.get("POCKETLM_THOROUGH") else (2, 1)
    whole, sections, noise = friend.read_bytes(), container.find(friend).sections, random.Random(3)
    start, header = sections["program"].offset - container.SIZE, sections["header"]
    ranges = ((start, start + container.SIZE), (header.offset, header.end))
    answer, broken = run_windows(home, friend, stdin="hello\n").stdout, tmp_path / "broken.exe"
    damaged = []
    for i in range(n_flips):
        place = noise.randrange(*ranges[i % 2])
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
    damaged += [whole[: noise.randrange(400_000, len(whole))] for _ in range(n_cuts)]
    for data in damaged:
        broken.write_bytes(data)
        result = run_windows(home, broken, stdin="hello\n")
        if result.returncode == 0:
            assert result.stdout == answer
        else:
            assert (result.stdout, result.stderr.count("\n")) == ("", 1)


def test_it_brings_the_licences_of_all_that_is_inside(friend, home):
    text = run_windows(home, friend, "--licenses").stdout
    for word in ("PYTHON SOFTWARE FOUNDATION LICENSE", "\nnumpy\n", "\nregex\n", "libffi", "Visual C++", "\npocketlm\n"):
        assert word in text


def test_it_talks_in_the_browser_and_ctrl_c_leaves_nothing(friend, home):
    """wine's sockets are this system's: page, programs and conversations are asked for from outside."""
    pexpect = pytest.importorskip("pexpect", reason="pexpect drives the pseudo-terminal")
    env = environment_for(home, TERM="xterm")
    # the program that is started runs another one, which a kill would leave; the end of a terminal reaches both
    child = pexpect.spawn(
        "wine", [str(friend), "--web", "--no-browser"], env=env, encoding="utf-8", dimensions=(30, 100), timeout=120
    )
    try:
        child.expect(r"page +(http://[\d.]+:(\d+))/#([\w-]+)[^\w-]")
        url, port, token = child.match.groups()

        def ask(path, body=None):
            headers = {"Content-Type": "application/json", "X-Pocketlm-Token": token}
            request = urllib.request.Request(url + path, None if body is None else json.dumps(body).encode(), headers)
            with urllib.request.urlopen(request, timeout=120) as reply:
                return reply.read()

        assert b"<script>" in ask("/")
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
        answer = json.loads(ask("/v1/chat/completions", {"messages": messages}))["choices"][0]["message"]["content"]
        assert answer + "\n" == run_windows(home, friend, "chat", stdin="hello\n").stdout
        name = json.loads(ask("/page/chats", {"messages": [messages[1], {"role": "assistant", "content": answer}]}))["name"]
        assert json.loads(ask(f"/page/chats/{name}"))["messages"][1]["content"] == answer
        ask(f"/page/chats/{name}/delete", {})  # wine's user has one folder for all tests
        assert name not in str(ask("/page/chats"))
        child.expect("Ctrl-C stops it")
        child.send("\x03")
        child.expect(pexpect.EOF)
        assert "stopped" in child.before
        child.close()
        assert child.exitstatus == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(port)), 120)
    finally:
        child.close(force=True)


@pytest.mark.parametrize("many", [(0.46, 0.42), (0.47, 0.41), (0.45, 0.43)])
def test_too_few_tokens_to_measure_are_one_line(many, monkeypatch):
    """Processor time comes in steps of 10 ms: of few tokens it is none, or less than none."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "windows")
    speed = importlib.import_module("speed")
    one = speed.Seconds(0.46, 0.42)
    with pytest.raises(SystemExit, match=r"^speed\.py: 3 tokens take less time than starts differ by: ask for more with -n$"):
        speed.of_a_token(one, speed.Seconds(*many), 3)
    assert speed.of_a_token(one, speed.Seconds(0.66, 0.52), 10) == pytest.approx((0.02, 0.01))
