"""The `pocketlm` command: every subcommand's result, and its place among pipes, disks and terminals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import TOKENS, load_weights, write_model

from pocketlm import cli
from pocketlm.cli import main

COMMAND = [sys.executable, "-m", "pocketlm"]


def run(*words: str, stdin: str | bytes = "", **options: Any) -> subprocess.CompletedProcess[bytes]:
    data = stdin if isinstance(stdin, bytes) else stdin.encode()
    done = subprocess.run([*COMMAND, *words], input=data, capture_output=True, timeout=120, **options)
    done.stdout, done.stderr = (stream.replace(os.linesep.encode(), b"\n") for stream in (done.stdout, done.stderr))
    return done




# ── generate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_generate_prints_the_text_and_says_how_fast(tiny, capsys):
    assert main(["generate", tiny, "-p", "Once", "-n", "5", "--ignore-eos"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "5 tokens" in err
    assert "tokens/s" in err
    assert "length" in err


def test_generate_says_one_token_of_one(tiny, capsys):
    assert main(["generate", str(tiny), "-p", "he", "-n", "1", "--temp", "0", "--ignore-eos"]) == 0
    assert capsys.readouterr().err.startswith("[1 token, ")


def test_generate_takes_its_prompt_from_three_places(tiny, capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("Once upon", encoding="utf-8-sig")  # the mark of Windows' editors is no text
    words = ["generate", tiny, "--seed", "3", "-n", "8", "--ignore-eos"]
    texts = []
    for place in (["-p", "Once upon"], ["-f", str(tmp_path / "prompt.txt")]):
        assert main([*words, *place]) == 0
        texts.append(capsys.readouterr().out)
    piped = run(*words, "-p", "-", stdin="Once upon")
    assert [piped.stdout.decode()] * 2 == texts


def test_generate_json_holds_what_a_script_needs(tiny, capsys):
    assert (
        main(["generate", tiny, "-p", "Once", "-n", "6", "--json", "--ignore-eos", "--threads", "1", "--backend", "numpy"]) == 0
    )
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert out.count("\n") == 1
    assert len(result["ids"]) == result["generated_tokens"] == 6
    assert (result["finish_reason"], result["backend"], result["model"], result["threads"]) == ("length", "numpy", "Tiny", 1)
    assert result["prompt_tokens"] == 4
    assert min(result["prompt_seconds"], result["generation_seconds"], result["tokens_per_second"]) > 0
    assert isinstance(result["text"], str)


def test_a_seed_gives_the_same_text_and_another_seed_another(tiny, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            main(["generate", tiny, "-p", "Once", "-n", "20", "--temp", "1", "--top-k", "0", "--seed", seed, "--ignore-eos"])
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_both_backends_say_the_same_when_greedy(tiny, capsys):
    texts = []
    for backend in ("numpy", "native"):
        assert main(["generate", tiny, "-p", "Once", "-n", "20", "--temp", "0", "--backend", backend]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_stop_text_ends_the_answer_and_is_not_shown(tiny, capsys):
    words = ["generate", tiny, "-p", "Once", "-n", "30", "--temp", "0", "--json", "--ignore-eos"]
    assert main(words) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert main([*words, "--stop", text[4:7]]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(text[4:7])]


# ── tokenize, inspect, eval, chat ────────────────────────────────────────────────────────────────────────────────────


def test_tokenize_prints_ids_and_goes_back(tiny, capsys):
    assert main(["tokenize", tiny, "then"]) == 0
    ids = capsys.readouterr().out.split()
    assert [TOKENS[int(i)] for i in ids] == ["th", "e", "n"]
    assert main(["tokenize", tiny, "--decode", " ".join(ids)]) == 0
    assert capsys.readouterr().out == "then\n"
    assert main(["tokenize", tiny, "--special", "--bos", "<|im_end|>"]) == 0
    assert capsys.readouterr().out.split() == [str(TOKENS.index("<|endoftext|>")), str(TOKENS.index("<|im_end|>"))]


def test_tokenize_reads_standard_input(tiny):
    text = "žluťoučký kůň 🐎\n"
    ids = run("tokenize", tiny, stdin=text).stdout.decode()
    assert run("tokenize", tiny, "--decode", stdin=ids).stdout.decode() == text + "\n"


@pytest.mark.parametrize("name", ["gguf-gpt-2", "gguf-llama", "ggml-vocab-gpt-2", "ggml-vocab-phi-3"])
def test_tokenize_needs_a_vocabulary_only(name, vocabulary_file, capsys):
    file = str(vocabulary_file(name))
    assert main(["tokenize", file, "Hello world"]) == 0
    ids = capsys.readouterr().out
    assert main(["tokenize", file, "--decode", ids]) == 0
    assert capsys.readouterr().out.strip() == "Hello world"


def test_inspect_shows_what_is_in_a_file(tiny, capsys):
    assert main(["inspect", tiny]) == 0
    text = capsys.readouterr().out
    assert "GGUF v3" in text
    assert "llama.block_count" in text
    assert "blk.0.attn_q.weight" not in text
    assert main(["inspect", tiny, "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "blk.0.attn_q.weight" in text
    assert "64x64" in text


def test_inspect_json_agrees_with_the_gguf_package(tiny, capsys):
    assert main(["inspect", tiny, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    weights = load_weights(tiny)
    assert {t["name"]: tuple(t["shape"]) for t in facts["tensors"]} == {name: array.shape for name, array in weights.items()}
    assert facts["parameters"] == sum(array.size for array in weights.values())
    assert facts["bytes"] == Path(tiny).stat().st_size
    assert facts["metadata"]["general.name"] == "Tiny"
    assert facts["metadata"]["tokenizer.ggml.tokens"] == f"[{len(TOKENS)} strings]"
    assert facts["bits_per_weight"] == 32


def test_inspect_writes_nothing_that_a_terminal_obeys(tmp_path, capsys):
    hostile = {"general.name": "\x1b[2J\x07evil\n\u009b31m", "general.\x1b[2Jkey": 1, "general.number": float("nan")}
    path = write_model(tmp_path / "model.gguf", metadata=hostile, tensors={"\x1b[2Jname": np.ones(4, np.float32)})
    for words in (["--tensors"], ["--json"]):
        assert main(["inspect", str(path), *words]) == 0
        out = capsys.readouterr().out
        assert all(c.isprintable() for c in out.replace("\n", ""))
    json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_inspect_of_a_vocabulary_says_that_there_are_no_tensors(tmp_path, capsys):
    path = write_model(tmp_path / "model.gguf", tensors=dict.fromkeys(load_weights(write_model(tmp_path / "whole.gguf"))))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "no tensors" in out
    assert "None" not in out


def test_eval_gives_perplexity(tiny, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("then in the thing " * 20)
    assert main(["eval", tiny, "--text", str(tmp_path / "text.txt")]) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
    assert main(["eval", tiny, "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["perplexity"] > 1
    assert facts["window"] == 128
    assert run("eval", tiny, "--text", "-", stdin="then in the thing").returncode == 0


def test_a_piped_chat_answers_and_ends_by_itself(tiny, tmp_path):
    environment = {**os.environ, "XDG_DATA_HOME": str(tmp_path)}
    done = run("chat", tiny, "--no-save", "--temp", "0", stdin="/max_tokens 5\nHello\n/quit\n", env=environment)
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout
    assert done.stdout.strip()
    assert not any(tmp_path.iterdir())


# ── the world around ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_options_are_checked_without_numpy():
    """A packed program shows its first line before the model and NumPy are there, whatever it was packed with."""
    code = (
        "import sys; from pocketlm import cli, cli_options;"
        "parser = cli.Parser(); cli.COMMANDS['chat'].arguments(parser);"
        "given = parser.parse_args(['--temp', '0.3', '--max-tokens', '5']);"
        "assert cli_options.answer_keywords(given)['max_tokens'] == 5;"
        "sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_imports_nothing_heavy():
    heavy = ["numpy", "jinja2", "regex", "prompt_toolkit", "llvmlite", "pocketlm.model", "pocketlm.runtime"]
    program = (
        "import sys\nfrom pocketlm.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    for command in ("chat", "generate", "tokenize", "inspect", "eval"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["chat", "generate", "tokenize", "inspect", "eval"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: pocketlm" in capsys.readouterr().out


def test_numbers_may_have_a_comma_where_others_have_a_point():
    given = cli._parse(["chat", "--temp", "0,5", "--top-p=,9", "--min-p", "0,125", "--repeat-penalty", "1.2"], "pocketlm")
    assert (given.temp, given.top_p, given.min_p, given.repeat_penalty) == (0.5, 0.9, 0.125, 1.2)


@pytest.mark.parametrize("text", ["10,000", "1,000.5", "0,5,5", ","])
def test_a_comma_that_may_be_of_thousands_is_refused(text):
    with pytest.raises(cli.UsageError, match=f"--timeout: invalid float value: '{text}'"):
        cli._parse(["serve", "--timeout", text], "pocketlm")


def test_tokenizing_needs_no_compiler_and_no_templates(tiny):
    program = f"import sys\nfrom pocketlm.cli import main\nmain(['tokenize', {tiny!r}, 'hi'])\n"
    program += "sys.exit(bool({'llvmlite', 'jinja2', 'prompt_toolkit'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("needless", ["asyncio", "pocketlm.constrain.guides"])
def test_completing_and_answering_once_need_neither_an_event_loop_nor_forms(tiny, needless):
    for words in (["generate", tiny, "-p", "hi", "-n", "1"], ["chat", tiny, "hi", "--max-tokens", "1", "--no-save"]):
        talk = f"import sys\nfrom pocketlm.cli import main\nassert main({words!r}) == 0"
        program = f"{talk}\nsys.exit({needless!r} in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes and signals of POSIX")
def test_a_reader_that_has_seen_enough_is_no_error(tiny, tmp_path):
    for words in (f"inspect {tiny} --tensors", f"generate {tiny} -p hi -n 100 --ignore-eos"):
        script = f"set -o pipefail; {' '.join(COMMAND)} {words} | head -c 1 >/dev/null"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr
        assert done.returncode == 0


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
def test_a_closed_output_is_no_error(tiny):
    script = f"{' '.join(COMMAND)} inspect {tiny} >&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")
def test_a_full_disk_is_one_line(tiny):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "inspect", tiny], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr == "pocketlm: the output: No space left on device\n"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_without_a_traceback(tiny):
    with subprocess.Popen([*COMMAND, "generate", tiny, "-p", "hi", "--ctx", "60000", "-n", "59000", "--ignore-eos"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_while_the_command_is_imported_ends_without_a_traceback():
    script = """if True:
        import os, signal, sys
        class Interrupting:
            def find_spec(self, name, *_):
                if name == "pocketlm.cli":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Interrupting())
        from pocketlm.__main__ import main
        main()"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_terminal_of_another_encoding_gets_replacements(tmp_path):
    path = write_model(tmp_path / "model.gguf", metadata={"general.name": "žluťoučký"})
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    assert run("inspect", str(path), env=environment).returncode == 0
    done = run("tokenize", str(path), "--decode", "195 188", env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["", "train", "export", "generate", "pack", "bench"])
def test_every_help_text_can_be_shown_in_any_encoding(command):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run(*command.split(), "--help", env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(("system", "expected"), [("nt", "ť🐎".encode()), ("posix", b"??")])
def test_a_pipe_on_windows_gets_utf_8_and_every_other_output_what_the_system_says(system, expected, monkeypatch):
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="cp1252")
    cli._settle_encoding(stream, system)
    stream.write("ť🐎")
    stream.flush()
    assert written.getvalue() == expected
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    other = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    cli._settle_encoding(other, system)
    assert (other.encoding, other.errors) == ("cp1252", "replace"), "asked for"
