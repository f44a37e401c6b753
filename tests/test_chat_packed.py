"""The chat of a packed program: its conversations are its own; it answers once, in pipes and by name, as the command does."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packing import real_stub, web
from tiny_models import write_model

from pocketlm import cli
from pocketlm.build.pack import open_stub, pack
from pocketlm.build.persona import Persona

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these tests drive a POSIX system")


@pytest.fixture(scope="module")
def programs(request, tmp_path_factory):
    """Three programs of one model, two under titles, and a fourth of another model under the first title. All are kind."""
    stub, folder = real_stub(Path(request.config.cache.mkdir("pocketlm-stub"))), tmp_path_factory.mktemp("programs")
    made = {}
    for name, title, seed in (("ada", "Ada", 0), ("bob", "Bob", 0), ("nameless", "", 0), ("other", "Ada", 1)):
        model = write_model(folder / f"{name}.gguf", format="Q4_0", seed=seed)
        persona = Persona(title=title, system="Be kind.", flags={"--temp": 0.0, "--max-tokens": 4})
        made[name] = pack(model, open_stub(stub), folder / name, persona)
    return made


def run(program, *arguments, home, stdin=""):
    return subprocess.run(
        [str(program), *arguments], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120,
        env={**os.environ, "XDG_DATA_HOME": str(home)},
    )  # fmt: skip


def test_a_program_resumes_its_own_conversations_only(programs, terminal, tmp_path):
    first = terminal(command=(str(programs["ada"]),))
    first.prompt(1)
    first.type("Hello Ada\r", "tokens/s")
    assert first.leave("/quit\r") == 0
    for name in ("bob", "other"):
        result = run(programs[name], "--resume", home=tmp_path)
        assert "there is no saved conversation with this model yet" in result.stderr
    again = terminal("--resume", command=(str(programs["ada"]),))
    again.wait("resumed: 1 turn with Ada, ")
    again.wait("> Hello Ada")
    assert again.leave("/quit\r") == 0
    (conversation,) = first.conversations()
    name = next((tmp_path / "pocketlm" / "chats").glob("[!.]*")).stem
    result = run(programs["bob"], "--resume", name, "And you?", home=tmp_path)
    assert result.stderr == f"resumed: 1 turn with Ada (another model), {name}\n"
    assert first.conversations() == [conversation]


def test_what_it_is_told_is_for_new_conversations(programs, tmp_path):
    def told(*arguments, stdin):
        result = run(programs["ada"], "--save", "--lines", *arguments, home=tmp_path, stdin=stdin)
        return [line.partition(": ")[2] for line in result.stderr.splitlines() if line.startswith("system: ")]

    assert told(stdin="/system\n/system You are a pirate.\nHello\n") == ["Be kind.", "You are a pirate."]
    name = next((tmp_path / "pocketlm" / "chats").glob("[!.]*")).stem
    assert told("--resume", name, stdin="/system\n") == ["You are a pirate."]
    assert told("--resume", name, "--system", "Be brief.", stdin="/system\n") == ["Be brief."]


def test_it_answers_once_and_keeps_nothing(programs, tmp_path):
    whole = run(programs["ada"], home=tmp_path, stdin="Hello\nthere\n")
    once = run(programs["ada"], "Hello\nthere", home=tmp_path)
    both = run(programs["ada"], "Hello", home=tmp_path, stdin="there\n")
    assert whole.stdout == once.stdout == both.stdout != ""
    assert (whole.stderr, once.returncode) == ("", 0)
    assert run(programs["ada"], "--lines", home=tmp_path, stdin="Hello\nthere\n").stdout != whole.stdout
    assert list(tmp_path.iterdir()) == []
    run(programs["ada"], "--save", home=tmp_path, stdin="Hello\n/quit\n")
    assert len(list((tmp_path / "pocketlm" / "chats").glob("[!.]*"))) == 1


def test_it_talks_to_another_model_and_without_a_title(programs, tmp_path):
    other = run(programs["other"], "Hello", home=tmp_path)
    named = run(programs["ada"], "--model", str(programs["other"].with_suffix(".gguf")), "Hello", "--temp", "0",
                "--max-tokens", "4", "--system", "Be kind.", home=tmp_path)  # fmt: skip
    ada, nameless = (run(programs[name], "Hello", home=tmp_path) for name in ("ada", "nameless"))
    assert (named.stderr, named.returncode, named.stdout) == ("", 0, other.stdout)
    assert (nameless.stderr, nameless.returncode, nameless.stdout) == ("", 0, ada.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the boot loader says so where libraries are on Linux alone")
def test_the_browser_gets_no_libraries_of_its(programs, tmp_path):
    told, browser = tmp_path / "told", tmp_path / "browser"
    os.mkfifo(told)
    browser.write_text(f'#!/bin/sh\necho "$LD_LIBRARY_PATH" "$(env | grep -c _PYI)" >{told}\n')
    browser.chmod(0o755)
    given = {"BROWSER": str(browser), "LD_LIBRARY_PATH": "/theirs", "XDG_DATA_HOME": str(tmp_path)}
    with web([programs["ada"], "--web"], **{**os.environ, **given}):
        assert told.read_text() == "/theirs 0\n"


def test_it_is_no_service_of_systemds(programs, tmp_path):
    result = run(programs["ada"], "--web", "--install-service", home=tmp_path)
    refused = "ada: --install-service is for pocketlm serve, not for a packed program\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", refused)


def test_its_help_names_what_it_takes_and_nothing_else(programs, tmp_path):
    text = run(programs["ada"], "--help", home=tmp_path).stdout
    for word in ("--resume [NAME]", "--save", "--lines", '"QUESTION"', "-f, --file FILE", "--ctx N", "--think on|off|hide"):
        assert word in text
    assert "--model-id" not in text
    both, chat, generate = text.strip().split("\n\n")[-3:]
    assert ("--json-object" in both, "--system" in chat, "--input" in generate) == (True, True, True)
    for command, texts in (("chat", both + chat), ("generate", both + generate)):
        listed = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", texts, re.MULTILINE))
        taken = {flag for flag, option in cli.options(command).items() if option.help != argparse.SUPPRESS}
        assert listed == taken - {"--help", "--dask"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model"], "--model: expected a file, as in --model FILE.gguf"),
        (["--check", "x"], "--check stands alone"),
        (["--modle-id", "x"], "chat --modle-id: there is no such flag; --help lists them"),
        (["--temp", "nan"], "temperature is nan; it must be a number from 0 up (0: always the likeliest token)"),
        (["--seed", "-1"], "seed is -1; it must be a whole number from 0 up, or None"),
        (["--max-tokens", "0"], "--max-tokens 0: expected 1 to 1000000"),
    ],
)
def test_wrong_usage_is_said_at_once(programs, tmp_path, words, said):
    result = run(programs["ada"], *words, home=tmp_path, stdin="Hello\n")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"ada: {said}\n")
