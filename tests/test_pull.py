"""`pocketlm pull` against a server on this computer that breaks off, lies, redirects and dawdles; nobody else is asked."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import FILE, REPOSITORY, Hub, serving
from tiny_models import write_model

from pocketlm.cli import main
from pocketlm.doctor.models import at_hand
from pocketlm.errors import FileError
from pocketlm.model import find_model
from pocketlm.pull import download, hub
from pocketlm.pull.catalogue import CATALOGUE, Known


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[Hub]:
    model = write_model(tmp_path / "source.gguf")
    with serving(Hub(model.read_bytes())) as hub_:
        monkeypatch.setenv("HF_ENDPOINT", hub_.url)
        monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(download, "PAUSES", (0, 0))
        yield hub_


def pull(capsys, *words: str, status: int = 0) -> tuple[str, str]:
    """Standard output and standard error of `pocketlm pull qwen3-0.6b …`."""
    found = main(["pull", "qwen3-0.6b", *words])
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def failure(capsys, *words: str) -> str:
    """The one line of an error, the last on standard error; nothing is where the model would be."""
    out, err = pull(capsys, *words, status=1)
    lines = err.splitlines()
    assert out == ""
    assert "Traceback" not in err
    assert [line for line in lines if line.startswith("pocketlm: ")] == lines[-1:]
    with pytest.raises(FileError, match=r"get it with: pocketlm pull qwen3-0\.6b"):
        find_model("qwen3-0.6b")
    return lines[-1]


def parts(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("cache/models/*.part"))


# ---- what should happen ------------------------------------------------------------------------------------------------


def test_a_fetched_model_is_found_by_its_name(served, capsys, tmp_path):
    with pytest.raises(FileError, match=r"qwen3-0\.6b: this model is not here; get it with: pocketlm pull qwen3-0\.6b"):
        find_model("qwen3-0.6b")
    out, err = pull(capsys)
    path = find_model("qwen3-0.6b")
    assert out == f"{path}\n"
    assert path.read_bytes() == served.content
    assert "licence apache-2.0" in err
    assert "the server states (pocketlm knows none of its own)" in err
    assert main(["generate", "qwen3-0.6b", "-p", "a", "-n", "1", "--temp", "0"]) == 0
    assert path in at_hand(tmp_path / "empty")
    assert parts(tmp_path) == []
    main(["pull"])
    assert re.search(r"qwen3-0\.6b .*\[here: ", capsys.readouterr().out)


def test_what_came_of_another_quantisation_goes_when_one_is_whole(served, capsys, tmp_path):
    pull(capsys)
    folder = tmp_path / "cache/models"
    names = ("qwen3-0.6b.gguf.0123", "qwen3-1.7b.gguf.0123", "qwen3-0.6b.gguf.4567")
    left, other, held = (folder / f"{name}.part" for name in names)
    for path in (left, other, held):
        path.write_bytes(b"GGUF")
    with open(held, "rb") as file:
        assert download.lock_file(file.fileno(), 0.0)
        pull(capsys, "--quant", "Q8_0")
    assert set(parts(tmp_path)) == {other, held}


def test_a_file_that_is_there_and_right_is_not_fetched_again(served, capsys):
    pull(capsys)
    assert pull(capsys)[0] == f"{find_model('qwen3-0.6b')}\n"
    assert served.starts == [0]
    find_model("qwen3-0.6b").write_bytes(bytes(len(served.content)))  # damaged since
    pull(capsys)
    assert served.starts == [0, 0]
    assert find_model("qwen3-0.6b").read_bytes() == served.content


def test_a_hash_of_ours_is_believed_above_the_servers(served, capsys, monkeypatch):
    def known(sha256: str) -> None:
        monkeypatch.setitem(CATALOGUE, "qwen3-0.6b", Known(REPOSITORY, "0.6 B", "", (("Q4_K_M", sha256),)))

    known("0" * 64)
    assert "its SHA-256 differs" in failure(capsys)
    known(hashlib.sha256(served.content).hexdigest())
    assert "that pocketlm knows it by" in pull(capsys)[1]


def test_every_row_of_the_table_is_a_name_and_a_repository():
    for name, known in CATALOGUE.items():
        assert re.fullmatch(r"[a-z0-9.-]+", name)
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", known.repository)
        assert all(re.fullmatch("[0-9a-f]{64}", sha256) for _, sha256 in known.sha256)


def test_a_file_in_this_folder_goes_before_a_name_of_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("qwen3-0.6b").touch()
    assert find_model("qwen3-0.6b") == Path("qwen3-0.6b")


def test_another_quantisation_and_another_place(served, capsys, tmp_path):
    target = tmp_path / "mine.gguf"
    pull(capsys, "-o", str(target))
    assert target.read_bytes() == served.content
    assert "is there already" in pull(capsys, "-o", str(target), status=1)[1]
    assert f"has no file for IQ1_S; it has {FILE}, Qwen_Qwen3-0.6B-Q8_0.gguf" in failure(capsys, "--quant", "IQ1_S")


# ---- connections that end, servers that lie ----------------------------------------------------------------------------


def breaking_off(n_bytes: int) -> Callable[[Any, bytes, int], object]:
    return lambda handler, body, start: handler.give(body[:n_bytes], start, length=len(body), of=start + len(body))


def test_a_body_that_breaks_off_is_asked_for_from_where_it_ended(served, capsys):
    step = len(served.content) // 5 + 1
    served.serve = breaking_off(step)
    pull(capsys)
    assert find_model("qwen3-0.6b").read_bytes() == served.content
    assert served.starts == [0, step, 2 * step, 3 * step, 4 * step]


def test_what_has_come_outlives_the_command(served, capsys, tmp_path):
    def once(handler: Any, body: bytes, start: int) -> None:
        breaking_off(0 if start else 1000)(handler, body, start)

    served.serve = once
    assert re.search(r"connection is lost at 0\.0 of .* MB \(.*\); the same command goes on from there", failure(capsys))
    assert [part.stat().st_size for part in parts(tmp_path)] == [1000]
    served.serve, served.starts = Hub.serve, []
    pull(capsys)
    assert served.starts == [1000]
    assert find_model("qwen3-0.6b").read_bytes() == served.content


def test_a_server_that_cannot_go_on_begins_again(served, capsys):
    def from_the_start(handler: Any, body: bytes, start: int) -> None:
        whole = handler.server and served.content
        handler.give(whole if start else whole[:700], length=len(whole))

    served.serve = from_the_start
    pull(capsys)
    assert served.starts == [0, 700]
    assert find_model("qwen3-0.6b").read_bytes() == served.content


def test_wrong_bytes_are_not_kept(served, capsys, tmp_path):
    served.serve = lambda handler, body, start: handler.give(body[:-1] + bytes([body[-1] ^ 1]), start)
    assert "what came is not this file (its SHA-256 differs); nothing was kept" in failure(capsys)
    assert parts(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="Windows lets few users make links")
@pytest.mark.parametrize("trap", [os.symlink, os.link])
def test_a_link_in_the_place_of_the_part_leads_to_no_file_that_is_written_to(served, capsys, tmp_path, trap):
    """In a folder of all, others know the part's name."""
    letter, shared = tmp_path / "letter.txt", tmp_path / "shared"
    letter.write_text("dear")
    shared.mkdir()
    part = shared / f"m.gguf.{hashlib.sha256(served.content).hexdigest()[:12]}.part"
    trap(letter, part)
    assert f"{part}: is " in failure(capsys, "-o", str(shared / "m.gguf"))
    assert letter.read_text() == "dear"
    part.unlink()
    pull(capsys, "-o", str(shared / "m.gguf"))
    assert (shared / "m.gguf").read_bytes() == served.content


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such numbers of users")
def test_a_drive_on_which_all_is_of_another_user_is_written_to(served, capsys, tmp_path, monkeypatch):
    """As a stick is that was formatted as FAT, and mounted for all."""
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    monkeypatch.chdir(tmp_path)
    pull(capsys, "-o", "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == served.content


def test_a_part_that_was_changed_on_the_disk_is_not_built_upon(served, capsys, tmp_path):
    part = tmp_path / f"cache/models/qwen3-0.6b.gguf.{hashlib.sha256(served.content).hexdigest()[:12]}.part"
    part.parent.mkdir(mode=0o700, parents=True)
    part.write_bytes(b"\0" * 1000)
    assert "its SHA-256 differs" in failure(capsys)
    pull(capsys)
    part.write_bytes(b"\0" * (len(served.content) + 1))  # longer than the file
    pull(capsys)
    assert find_model("qwen3-0.6b").read_bytes() == served.content


@pytest.mark.parametrize(
    ("serve", "said"),
    [
        (lambda handler, body, start: handler.give(body, length=len(body) + 1), "the server means to send"),
        (lambda handler, body, start: handler.give(body[:-1]), "the server means to send"),
        (lambda handler, body, start: handler.give(body[5:], 5), "another part of the file than it was asked for"),
        (lambda handler, body, start: handler.give(b"", status=404), "has no such model (404)"),
        (lambda handler, body, start: handler.give(b"", status=403), "accept this model's terms first (403)"),
        (lambda handler, body, start: handler.give(b"", status=503), "answers with 503"),
        (lambda handler, body, start: handler.give(b"", status=416), "refuses (416)"),
        (lambda handler, body, start: handler.go("file:///etc/passwd"), "address of another kind (file:)"),
        (lambda handler, body, start: handler.go("ftp://127.0.0.1/x"), "address of another kind (ftp:)"),
        (lambda handler, body, start: handler.go("http://localhost:1/x"), "without TLS (http://localhost)"),
        (lambda handler, body, start: handler.go("https://example.org/x"), "to another host (example.org)"),
        (lambda handler, body, start: handler.go("https://huggingface.co.example.org/x"), "to another host (huggingface.co.ex"),
        (lambda handler, body, start: handler.go("/elsewhere"), "refuses (302)"),  # for ever
        (lambda handler, body, start: handler.wfile.write(b"HELLO\r\n\r\n"), "the connection is lost"),
    ],
    ids=["long", "short", "elsewhere", "404", "403", "503", "416", "file", "ftp", "http", "host", "suffix", "loop", "no-http"],
)
def test_a_server_that_does_something_else_is_one_line(served, capsys, tmp_path, serve, said):
    served.serve = serve
    assert said in failure(capsys)
    assert parts(tmp_path) == []


def test_a_body_without_a_length_may_not_be_longer_than_was_said(served, capsys, tmp_path):
    def endless(handler: Any, body: bytes, start: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(body + b"\0" * 100_000)

    served.serve = endless
    assert f"sends more than the {len(served.content):,} bytes" in failure(capsys)
    assert parts(tmp_path) == []


def test_files_may_lie_on_another_port_of_the_same_host(served, capsys):
    with serving(Hub(served.content)) as files:
        served.serve = lambda handler, body, start: handler.go(f"{files.url}/elsewhere")
        pull(capsys)
        assert files.starts == [0]


def test_a_slow_server_is_waited_for_and_a_silent_one_is_not(served, capsys, monkeypatch):
    monkeypatch.setattr(hub, "SECONDS", 0.5)

    def slow(handler: Any, body: bytes, start: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        for at in range(0, len(body), len(body) // 25 + 1):  # 2.5 seconds in all, and never 2 without a byte
            handler.wfile.write(body[at : at + len(body) // 25 + 1])
            time.sleep(0.1)

    served.serve = lambda handler, body, start: time.sleep(2)
    assert "nothing came for 0.5 seconds" in failure(capsys)
    served.serve = slow
    monkeypatch.setattr(hub, "SECONDS", 2)
    pull(capsys)


@pytest.mark.parametrize(
    "facts",
    [
        [], {}, {"sha": "main"}, {"siblings": None}, {"siblings": [{"rfilename": FILE}]},
        {"siblings": [{"rfilename": FILE, "lfs": {"size": -1, "sha256": "0" * 64}}]},
        {"siblings": [{"rfilename": FILE, "lfs": {"size": 1 << 60, "sha256": "0" * 64}}]},
        {"siblings": [{"rfilename": FILE, "lfs": {"size": 5, "sha256": "../../x"}}]},
        {"siblings": [{"rfilename": FILE, "lfs": [5]}]}, {"siblings": [7]},
        {"siblings": [{"rfilename": f"a/{FILE}"}, {"rfilename": FILE}]},
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_make_no_sense_are_one_line(served, capsys, facts):
    served.facts = {**served.facts, **facts} if isinstance(facts, dict) and facts else facts
    failure(capsys)
    assert served.starts == []


@pytest.mark.parametrize("status", [404, 401, 500])
def test_a_repository_that_is_not_given_is_one_line(served, capsys, status):
    served.status = status
    assert f"{status}" in failure(capsys)


# ---- what is not the server's ------------------------------------------------------------------------------------------


def test_without_a_network_it_says_so_in_one_line(served, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert failure(capsys) == (
        "pocketlm: pull qwen3-0.6b: http://127.0.0.1:1 cannot be reached (Connection refused); is there a network?"
    )
    monkeypatch.setenv("HF_ENDPOINT", "https://name.invalid")
    assert "https://name.invalid cannot be reached" in failure(capsys)


@pytest.mark.parametrize("url", ["http://example.org", "file:///tmp", "ftp://127.0.0.1", "127.0.0.1"])
def test_another_hub_must_have_tls(served, capsys, monkeypatch, url):
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert "must begin with https://" in failure(capsys)


def test_a_proxy_of_the_environment_is_used(served, capsys, monkeypatch):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert "cannot be reached" in failure(capsys)


def test_a_disk_without_room_is_said_before_anything_is_fetched(served, capsys, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    assert "where 0 MB are free; make room" in failure(capsys)
    assert served.starts == []


def test_two_at_once_do_not_write_into_one_another(served, capsys):
    going, ended = threading.Event(), threading.Event()

    def held(handler: Any, body: bytes, start: int) -> None:
        going.set()
        ended.wait(30)
        handler.give(body, start)

    served.serve = held
    first = threading.Thread(target=main, args=(["pull", "qwen3-0.6b"],))
    first.start()
    assert going.wait(30)
    assert "is being fetched by another program" in failure(capsys)
    ended.set()
    first.join()
    assert find_model("qwen3-0.6b").read_bytes() == served.content


def test_a_name_that_is_not_there(capsys):
    assert main(["pull", "qwen3-0.6"]) == 2
    assert capsys.readouterr().err == "pocketlm: pull qwen3-0.6: there is no such name, did you mean qwen3-0.6b?\n"
