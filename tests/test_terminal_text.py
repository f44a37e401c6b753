"""Nothing that a stranger wrote reaches a terminal as an escape sequence: names, answers, errors; at a real pseudo-terminal."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import BYTE_LETTERS, SPECIALS, TOKENS, write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.terminal_text import print as shown
from pocketlm.terminal_text import without_controls

EVIL = "\x1b]0;taken\x07\x1b[2J\x9b31m\x1b[8;1;1t"
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # a terminal itself writes \r before \n
ROOT = Path(__file__).parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Path:
    """A model with a name full of escape sequences that answers nothing else."""
    words = [f"{EVIL}{n}" for n in range(20)]
    letters = TOKENS[: -len(SPECIALS)]
    tokens = [*letters, *("".join(BYTE_LETTERS[b] for b in word.encode()) for word in words), *SPECIALS]
    table = np.random.default_rng(0).standard_normal((len(tokens), 64)).astype(np.float32)
    table[: len(letters)] *= 0.01  # letters and markers are never the likeliest
    table[-len(SPECIALS) :] *= 0.01
    return write_model(
        tmp_path_factory.mktemp("evil") / "evil.gguf", tokens=tokens, n_ctx=64, tensors={"token_embd.weight": table},
        metadata={"general.name": f"Evil{EVIL}", "tokenizer.chat_template": 5},
    )  # fmt: skip


# ── the filter ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_of_the_control_characters_only_newline_and_tab_stay():
    assert without_controls("".join(map(chr, range(256)))) == "\t\n" + "".join(map(chr, [*range(32, 127), *range(160, 256)]))
    assert without_controls("Günaydın 世界 👩‍👩‍👧 עברית") == "Günaydın 世界 👩‍👩‍👧 עברית"


def test_a_terminal_gets_no_controls_and_a_program_gets_every_byte():
    for stream, expected in ((Terminal(), without_controls(EVIL)), (io.StringIO(), EVIL)):
        shown(EVIL, 5, sep="\r", end="\x1b\n", file=stream)
        assert stream.getvalue() == f"{expected}\r5\x1b\n"  # sep and end are the program's own


def test_a_message_never_has_them(capsys):
    shown(EVIL, file=sys.stderr)
    assert capsys.readouterr().err == without_controls(EVIL) + "\n"


def test_standard_output_may_be_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    shown(EVIL)


def test_every_command_prints_through_the_filter():
    """`print` in these is the one of terminal_text, and nobody writes to the standard streams himself."""
    folders = ("runtime", "export", "build", "chat", "serve", "batch", "pull", "doctor", "train", "constrain")
    files = [ROOT / "cli.py", *(file for folder in folders for file in (ROOT / folder).rglob("*.py"))]
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {
            name.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "pocketlm.terminal_text"
            for name in node.names
        }  # fmt: skip
        calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        writes = [
            node.lineno for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write")
        ]  # fmt: skip
        assert "print" not in calls or "print" in imported, file
        assert not writes, (file, writes)


# ── the commands, where a program reads ──────────────────────────────────────────────────────────────────────────────


def test_a_pipe_gets_what_the_model_wrote(evil, capsys):
    assert main(["generate", str(evil), "-p", "then", "-n", "3", "--temp", "0", "--backend", "numpy"]) == 0
    out, error = capsys.readouterr()
    assert out.count(EVIL) == 3
    assert not CONTROLS.search(error)
    assert main(["generate", str(evil), "-p", "then", "-n", "3", "--temp", "0", "--backend", "numpy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].count(EVIL) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="names of files with control characters are POSIX'")
def test_names_in_messages_are_filtered_whoever_reads(evil, tmp_path, capsys):
    assert main(["generate", str(evil), "-p", "t", "-n", "1", "--ctx", "100", "--backend", "numpy"]) == 0
    error = capsys.readouterr().err
    assert f"Evil{without_controls(EVIL)} was trained for 64 tokens" in error
    assert not CONTROLS.search(error)
    for command, *words in (["generate", "-p", "t"], ["inspect"], ["tokenize", "t"]):
        assert main([command, f"no{EVIL}.gguf", *words]) == 1
        assert not CONTROLS.search(capsys.readouterr().err)
    damaged = tmp_path / f"{EVIL.replace('/', '')}.gguf"
    damaged.write_bytes(b"GGUF" + bytes(40))
    assert main(["inspect", str(damaged)]) == 1
    assert not CONTROLS.search(capsys.readouterr().err)


# ── the commands, at a terminal ──────────────────────────────────────────────────────────────────────────────────────


def at_terminal(*words: str) -> Any:
    """A command that runs at a pseudo-terminal."""
    pexpect = pytest.importorskip("pexpect", reason="runs a command at a terminal")
    environment = {**os.environ, "TERM": "dumb", "HOME": "/nonexistent", "XDG_DATA_HOME": "/nonexistent"}
    return pexpect.spawn(sys.executable, ["-m", "pocketlm", *words], env=environment, timeout=60, dimensions=(40, 120))


def title_after(data: bytes) -> str:
    """The window's title when a terminal has got this."""
    pyte = pytest.importorskip("pyte", reason="is the terminal")
    screen = pyte.Screen(120, 40)
    pyte.ByteStream(screen).feed(data)
    return screen.title


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_the_terminal_of_these_tests_can_be_taken_over():
    assert title_after(EVIL.encode()) == "taken"


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
@pytest.mark.parametrize("words", [
    ["generate", "-p", "then", "-n", "4", "--temp", "0", "--ctx", "100"],
    ["generate", "-p", "then", "-n", "4", "--temp", "0", "--json"],
    ["inspect"], ["inspect", "--json"], ["tokenize", "--decode", "260 261 262"], ["generate", "-p", "then", "--backend", EVIL],
], ids=lambda words: " ".join(words).replace(EVIL, "EVIL"))  # fmt: skip
def test_a_terminal_is_not_taken_over(evil, words):
    backend = ["--backend", "numpy"] if words[0] == "generate" and "--backend" not in words else []
    child = at_terminal(words[0], str(evil), *words[1:], *backend)
    child.expect(pytest.importorskip("pexpect").EOF)
    data = child.before
    assert not CONTROLS.search(data.decode())
    assert title_after(data) == ""
    if words[0] != "generate" or "--temp" in words:
        assert "taken" in data.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_a_chat_does_not_take_a_terminal_over(evil):
    child = at_terminal("chat", str(evil), "--backend", "numpy", "--no-save", "--max-tokens", "4")
    seen = b""
    for line in ("then", None):
        child.expect("> ")
        seen += child.before
        if line:
            child.sendline(line)
    child.sendeof()
    child.expect(pytest.importorskip("pexpect").EOF)
    seen += child.before
    text = seen.decode()
    assert "Evil]0;taken" in text  # the name, in the banner
    assert text.count("]0;taken") > 2  # the answer
    assert "chat template is no text: chatml takes its place" in text
    assert not CONTROLS.search(text)


# ── a chat template that is no text ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("value", [5, 1.5, True, ["a", "b"], [1, 2], "  \n"], ids=repr)
def test_a_chat_template_that_is_no_text_is_none_with_a_note(tmp_path, value):
    plain = write_model(tmp_path / "plain.gguf")
    odd = write_model(tmp_path / "odd.gguf", metadata={"tokenizer.chat_template": value})
    talk = [{"role": "user", "content": "then"}]
    with pocketlm.load(plain, backend="numpy") as a, pocketlm.load(odd, backend="numpy") as b:
        texts = ["".join(p.text for p in m.chat(talk, max_tokens=5, temperature=0, ignore_eos=True)) for m in (a, b)]
        assert texts[0] == texts[1]
        assert a.template.note == ""
        assert b.template.note == "the model's chat template is no text: chatml takes its place"


@pytest.mark.parametrize("words", ["chat --no-save", "inspect", "export -o {out} --to ollama"])
def test_commands_go_on_with_a_chat_template_that_is_no_text(tmp_path, words):
    path = write_model(tmp_path / "odd.gguf", metadata={"tokenizer.chat_template": 5})
    command, *rest = words.format(out=tmp_path / "out").split()
    run = subprocess.run(
        [sys.executable, "-m", "pocketlm", command, str(path), *rest], input="then\n", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert (command == "chat") == ("no text" in run.stderr)
