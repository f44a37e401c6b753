"""Many prompts from a file: every line is answered once, with the answer that it would have alone, whatever happens."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import nullcontext

import pytest
from serving import hello, serving, tiny_chat

from pocketlm import cli
from pocketlm.batch.files import Answers, Prompts
from pocketlm.batch.lines import Written
from pocketlm.errors import FileError

WORDS = ["hello", "the inn", "in the inn", "hello hello", "the", "no", "then one"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_chat(tmp_path_factory.mktemp("batch"), n_ctx=256)


def prompts(path, n, seed=0):
    """A file of `n` lines of many kinds."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for i in range(n):
            text = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            body = {"prompt": text} if i % 3 else hello(text, temperature=draw.choice([0, 1.0]))
            file.write(json.dumps({"id": f"q{i}", **body, "max_tokens": draw.randint(1, 24)}) + "\n")
    return path


def batch(model, given, out, *options):
    return cli.main(["generate", str(model), "--input", str(given), "--output", str(out), "--threads", "1", *options])


def answered(model, tmp_path, *bodies, options=()):
    """What is written of lines, as objects; a text or bytes stand for themselves."""
    given, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    lines = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    given.write_bytes(b"\n".join(lines))
    out.unlink(missing_ok=True)
    assert batch(model, given, out, *options) == 0
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def text(answer):
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def program(model, given, out, *options):
    command = [sys.executable, "-m", "pocketlm", "generate", str(model), "--input", str(given), "--output", str(out)]
    return [*command, "--threads", "1", *options]


def parts(out):
    return sorted(out.parent.glob(f"{out.name}.*.part"))


def test_a_line_is_answered_as_the_server_answers_the_same_request(model, tmp_path):
    chat = hello("the inn", seed=3, temperature=1.0, n=2, logprobs=True, top_logprobs=2, stop=["zz"])
    plain = {"prompt": ["in the", "inn"], "max_tokens": 5, "seed": 4, "logprobs": 1}
    found = answered(model, tmp_path, {"id": 7, **chat}, plain)
    with serving(model) as server:
        for answer, path, body in zip(found, ("/v1/chat/completions", "/v1/completions"), (chat, plain), strict=True):
            said = server.post(path, body).json
            assert answer["choices"] == said["choices"]
            assert answer["usage"].items() <= said["usage"].items()
    assert [(answer["line"], answer.get("id")) for answer in found] == [(1, 7), (2, None)]


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_the_file_is_the_same_for_any_number_of_slots(model, tmp_path, backend):
    given, seen = prompts(tmp_path / "given.jsonl", 40), set()
    for slots in (1, 3, 8):
        out = tmp_path / f"{slots}.jsonl"
        assert batch(model, given, out, "--slots", str(slots), "--backend", backend) == 0
        seen.add(out.read_bytes())
    assert len(seen) == 1
    assert [json.loads(line)["line"] for line in seen.pop().splitlines()] == list(range(1, 41))


def test_an_answer_depends_on_its_line_alone(model, tmp_path):
    lines = [json.loads(line) for line in prompts(tmp_path / "p", 30).read_text().splitlines()]
    straight = answered(model, tmp_path, *lines)
    turned = answered(model, tmp_path, *lines[::-1])
    assert [(a["id"], text(a)) for a in straight] == [(a["id"], text(a)) for a in turned[::-1]]


def test_seeds_are_the_lines_own_unless_they_say_one(model, tmp_path):
    line = {"prompt": "the inn", "max_tokens": 24, "temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0}
    lines = [{"id": i, **line} for i in range(3)]
    lines += [{"seed": 5, **line}, {"id": 3, "seed": 5, **line}, {"seed": -1, **line}]
    found = [text(answer) for answer in answered(model, tmp_path, *lines)]
    again = [text(answer) for answer in answered(model, tmp_path, *lines)]
    other = [text(answer) for answer in answered(model, tmp_path, *lines, options=("--seed", "1"))]
    assert found == again
    assert len({*found[:3], found[5]}) == 4
    assert found[3] == found[4] == other[3]
    assert found[0] != other[0]


def test_what_is_wrong_with_a_line_is_written_in_its_place(model, tmp_path):
    good = {"prompt": "the inn", "max_tokens": 3, "seed": 1}
    bad = [
        (b'{"prompt": "x"', "no JSON"), (b"[1]", "no JSON obj"), (b'{"prompt": "\xff"}', "no JSON"), (b"[" * 9999, "no JSON"),
        ({"id": "b"}, "messages or prompt is missing"),
        ({"id": "c", **good, "tools": [{}]}, "tools is not supported"),
        ({**good, "temprature": 1}, "temperature"), ({**good, "temperature": -1}, "temperature is -1"),
        ({**good, "stream": True}, "stream is not supported"), ({**good, "id": {}}, "id must be"),
        ({"prompt": "the inn " * 300}, "context size of 256"), ({"prompt": [10**6]}, "no token"),
        ({**hello(), "prompt": "x"}, "prompt is not supported"), (b'{"prompt": "' + b"x" * (5 << 20) + b'"}', "4194304 bytes"),
        ({"custom_id": "b", "method": "POST", "body": good}, "what OpenAI's batches have as body is a line here"),
    ]  # fmt: skip
    lines = [line for each, _ in bad for line in (each, good)]
    found = answered(model, tmp_path, *lines)
    assert [answer["line"] for answer in found] == list(range(1, len(lines) + 1))
    for answer, (_, message) in zip(found[::2], bad, strict=True):
        assert message in answer["error"]["message"], answer
        assert answer["error"]["code"] in (400, 413, "context_length_exceeded")
    assert {text(answer) for answer in found[1::2]} == {text(answered(model, tmp_path, good)[0])}
    assert [found[8]["id"], found[10]["id"]] == ["b", "c"]


@pytest.mark.parametrize(("lines", "status"), [
    (["{}", "x"], 1), (["{}", '{"prompt": "in", "max_tokens": 1}'], 0), ([""], 0),
])  # fmt: skip
def test_a_file_of_errors_alone_ends_with_1_also_when_gone_on_with(model, tmp_path, capsys, monkeypatch, lines, status):
    given, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(lines))
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "finish", lambda self: self.no_such_thing)
        with pytest.raises(AttributeError):  # it was ended in the last moment
            batch(model, given, out)
    assert batch(model, given, out) == status
    assert ("could be answered" in capsys.readouterr().err) == bool(status)
    assert ["error" in json.loads(line) for line in out.read_text().splitlines()] == ["prompt" not in x for x in lines if x]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_in_the_place_of_the_answers_so_far_is_not_followed(model, tmp_path, monkeypatch, capsys):
    given, out, other = prompts(tmp_path / "given.jsonl", 2), tmp_path / "out.jsonl", tmp_path / "of the user"
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "finish", lambda self: self.no_such_thing)
        with pytest.raises(AttributeError):
            batch(model, given, out)
    [part] = parts(out)
    part.unlink()
    other.write_text("mine")
    part.symlink_to(other)
    assert batch(model, given, out) == 1
    assert f"{part}: cannot be written" in capsys.readouterr().err
    assert other.read_text() == "mine"


def test_lines_of_any_system_and_blank_ones_are_read(model, tmp_path):
    data = b'\xef\xbb\xbf{"prompt": "the", "seed": 1}\r\n\r\n  \n{"prompt": "the", "seed": 1, "id": "\xe2\x80\xa8"}'
    found = answered(model, tmp_path, data)
    assert [answer["line"] for answer in found] == [1, 4]
    assert text(found[0]) == text(found[1])
    assert found[1]["id"] == "\u2028", "no end of a line for str.splitlines either"
    assert answered(model, tmp_path, b"") == []


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
def test_a_run_that_is_killed_ten_times_writes_the_same_file_and_no_line_twice(model, tmp_path):
    given, whole, out = prompts(tmp_path / "given.jsonl", 1500), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch(model, given, whole) == 0
    draw, n_before, kills = random.Random(5), 0, 0
    while kills < 10:
        run = subprocess.Popen(program(model, given, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < until and _n_kept(out) < n_before + draw.randint(20, 60):
            time.sleep(0.001)
        assert run.poll() is None, "it was through before it was killed ten times"
        run.kill()
        run.wait()
        kills += 1
        kept = parts(out)[0].read_bytes().splitlines(keepends=True)
        numbers = [json.loads(line)["line"] for line in kept if line.endswith(b"\n")]
        assert len({*numbers}) == len(numbers) > n_before
        n_before = len(numbers)
    assert subprocess.run(program(model, given, out), check=False).returncode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert parts(out) == []


def _n_kept(out):
    return parts(out)[0].read_bytes().count(b"\n") if parts(out) else 0


@pytest.mark.parametrize(
    "rest", [b'{"line": 3, "choi', b'{"line": 3, "id": "q2"}', b"\0" * 5000, b"\n", b'{"line": 9, "a": 1}\n']
)
def test_what_a_power_cut_leaves_behind_the_last_answer_is_done_again(model, tmp_path, rest, monkeypatch):
    given, whole, out = prompts(tmp_path / "given.jsonl", 6), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch(model, given, whole) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert batch(model, given, out) == 130
    lines = parts(out)[0].read_bytes().splitlines(keepends=True)
    parts(out)[0].write_bytes(b"".join(lines[:3]) + rest)
    added, add = [], Answers.add
    monkeypatch.setattr(Answers, "add", lambda self, written: (added.append(written.number), add(self, written)))
    assert batch(model, given, out) == 0
    assert sorted(added) == sorted(json.loads(line)["line"] for line in lines[3:])
    assert out.read_bytes() == whole.read_bytes()


def test_answers_made_otherwise_are_not_mixed_in(model, tmp_path, monkeypatch):
    given, out = prompts(tmp_path / "given.jsonl", 6), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        for options in (), ("--temp", "2"), ("--seed", "2"), ("--ctx", "128"), ("--backend", "numpy"):
            assert batch(model, given, out, *options) == 130
        prompts(given, 6, seed=1)
        assert batch(model, given, out) == 130
    assert len(parts(out)) == 6


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_ctrl_c_keeps_what_is_answered(model, tmp_path):
    given, out = prompts(tmp_path / "given.jsonl", 5000), tmp_path / "out.jsonl"
    run = subprocess.Popen(program(model, given, out), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not _n_kept(out) and time.monotonic() < until:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert (run.returncode, said.strip()) == (130, "")
    assert not out.exists()
    assert parts(out)[0].read_bytes().endswith(b"\n")


def test_ctrl_c_between_the_first_write_and_its_note_keeps_what_is_written(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    out = tmp_path / "out.jsonl"
    written = Written(2, b'{"line": 2, "choices": []}\n')
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "_note", interrupted)
        with pytest.raises(KeyboardInterrupt), Answers(out, "key", 3) as answers:
            answers.add(written)
    with Answers(out, "key", 3) as answers:
        assert 2 in answers


def test_an_output_that_is_there_and_one_that_another_run_writes_are_left_alone(model, tmp_path, capsys):
    given, out = prompts(tmp_path / "given.jsonl", 3), tmp_path / "out.jsonl"
    with Answers(out, "key", 3), pytest.raises(FileError, match="another run"):
        Answers(out, "key", 3)
    out.write_text("mine")
    assert batch(model, given, out) == 1
    assert "is there already; take it away" in capsys.readouterr().err
    assert (out.read_text(), parts(out)) == ("mine", [])
    out.unlink()
    written = Written(2, b'{"line": 2, "choices": []}\n')
    with Answers(out, "key", 3) as answers:
        answers.add(written)
        out.write_text("mine")  # while it runs
        with pytest.raises(FileError, match="is there already"):
            answers.finish()
    assert (out.read_text(), len(parts(out))) == ("mine", 1)
    out.unlink()
    with Answers(out, "key", 3) as answers:
        assert 2 in answers
        answers.finish()
    assert (out.read_bytes(), parts(out)) == (written.data, [])


@pytest.mark.skipif(os.name == "nt", reason="a limit on the size of files is POSIX's")
def test_a_full_disk_is_one_line_and_keeps_what_is_there(model, tmp_path):
    given, whole, out = prompts(tmp_path / "given.jsonl", 60), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert batch(model, given, whole) == 0
    limited = "import resource,sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); import signal;" \
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from pocketlm.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limited, *program(model, given, out)[3:]]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "cannot be written (File too large); mend that and give the same command again" in run.stderr
    assert run.stderr.count("\n") == 1
    assert batch(model, given, out) == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="only POSIX has names for open files")
def test_a_pipe_is_refused_since_it_can_be_read_only_once(model, tmp_path, capsys):
    read, write = os.pipe()
    os.write(write, b'{"prompt": "the inn"}\n')
    os.close(write)
    given, out = f"/dev/fd/{read}", tmp_path / "out.jsonl"
    assert batch(model, given, out) == 1
    advice = "is a pipe, and prompts are read more than once; write them to a file, and name that"
    assert capsys.readouterr().err == f"pocketlm: {given}: {advice}\n"
    assert not out.exists()
    os.close(read)


def test_prompts_may_grow_while_they_are_answered_but_not_change(tmp_path):
    text = (given := prompts(tmp_path / "given.jsonl", 300)).read_bytes()
    for begun, then in [(text, text + b"{}\n"), (text, b"{}\n" + text), (text, text[:9000]), (text[:-1], text)]:
        given.write_bytes(begun)
        next(lines := iter(Prompts(given)))
        given.write_bytes(then)
        with nullcontext() if then == text + b"{}\n" else pytest.raises(FileError, match="was changed while"):
            assert [line.number for line in lines] == [*range(2, 301)]


def test_lines_are_counted_with_and_without_the_blank_ones(tmp_path, monkeypatch):
    monkeypatch.setattr("pocketlm.batch.files.BLOCK", 4)  # so that a line comes in pieces
    given = tmp_path / "given.jsonl"
    for data, n_lines, n_blank in (
        (b"", 0, 0), (b"\n", 1, 1), (b"a", 1, 0), (b"a\n", 1, 0), (b"a\n\n  \r\nb", 4, 2), (b"       \nb\n ", 3, 2),
        (b"       a\na       \n\n", 3, 1), (b"abc\nabcd\n    \n    ", 4, 2),
    ):  # fmt: skip
        given.write_bytes(data)
        prompts = Prompts(given)
        assert (prompts.n_lines, prompts.n_blank) == (n_lines, n_blank), data
        assert len([*prompts]) == n_lines - n_blank


def test_the_longest_line_that_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("pocketlm.batch.files.MAX_BODY", 10)
    monkeypatch.setattr("pocketlm.batch.files.BLOCK", 4)
    given = tmp_path / "given.jsonl"
    longest, more = b"a" * 10, b"a" * 11
    for ending in (b"", b"\n"):
        given.write_bytes(b"\n".join([longest, more, longest + b"a" * 50, b"b", more, longest]) + ending)
        assert [line.data for line in Prompts(given)] == [longest, None, None, b"b", None, longest]
        given.write_bytes(longest + b"\n" + more + ending)
        assert [line.data for line in Prompts(given)] == [longest, None]


def test_a_file_of_a_million_lines_takes_eight_bytes_for_each(tmp_path):
    n = 50_000
    given, out = tmp_path / "given.jsonl", tmp_path / "out.jsonl"
    given.write_text('{"prompt": "the inn"}\n' * n)
    tracemalloc.start()
    try:
        lines = Prompts(given)
        with Answers(out, "key", lines.n_lines) as answers:
            for line in lines:
                answers.add(Written(line.number, b'{"line": %d, "choices": []}\n' % line.number))
            answers.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert out.read_bytes().count(b"\n") == n
    assert peak < 8 * n + (4 << 20)


def test_a_cluster_without_dask_is_one_line(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pocketlm.batch.over_dask", None)
    assert batch(model, prompts(tmp_path / "given.jsonl", 3), tmp_path / "out.jsonl", "--dask", "tcp://127.0.0.1:1") == 2
    assert "--dask needs Dask" in capsys.readouterr().err


def test_progress_says_how_much_is_left(model, tmp_path, monkeypatch, capsys):
    from pocketlm.batch import command

    monkeypatch.setattr(command, "EVERY", (0.0, 0.0))
    given, out = prompts(tmp_path / "given.jsonl", 20), tmp_path / "out.jsonl"
    given.write_text(given.read_text() + "{}\n")
    assert batch(model, given, out) == 0
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 22
    assert said[9].startswith("10/21 lines  48%  ")
    assert said[9].endswith(" left")
    assert said[-1].startswith(f"{out}: 21 answers, 1 of them errors; ")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--input", "x"], "belong together"), (["--output", "x"], "belong together"), (["--dask", "tcp://x"], "belong together"),
     (["--input", "x", "--output", "y", "-p", "a"], "a single prompt"), (["--input", "x", "--output", "y", "--json"], "single"),
     (["--input", "x", "--output", "y", "--slots", "0"], "--slots 0"), (["--input", "/none", "--output", "y"], "be read")],
)  # fmt: skip
def test_what_makes_no_sense_is_told_before_the_model_is_opened(options, message, capsys):
    assert cli.main(["generate", "no-such-model.gguf", *options]) in (1, 2)
    assert message in capsys.readouterr().err


def test_a_line_may_ask_for_a_form(model, tmp_path):
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    schema = {"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    lines = [hello(f"the inn {i}", max_tokens=120, temperature=1.0, response_format=wanted) for i in range(6)]
    for answer in answered(model, tmp_path, *lines):
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert set(json.loads(text(answer))) == {"n"}
