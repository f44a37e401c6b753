"""A closed file is not mapped any more, so that Windows can overwrite and delete it: shown by Linux' own list of maps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from canonical_models import make_hyper, make_model
from hostile_checkpoints import SOUND, WAYS, entry, safetensors, torch_zip
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.errors import FileError, PocketlmError
from pocketlm.export import export as export_module
from pocketlm.export.checkpoint import open_checkpoint
from pocketlm.runtime import atomic
from pocketlm.runtime.model_file import open_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what a process has mapped")


def mapped(path: Path | str) -> bool:
    """Whether this process has mapped the file, or one in the folder."""
    return os.path.realpath(path) in Path("/proc/self/maps").read_text()


@pytest.fixture
def gguf(tmp_path) -> Path:
    return write_model(tmp_path / "tiny.gguf", format="Q8_0", n_ff=64, metadata={"general.name": "Tiny", "general.url": "a.b"})


@pytest.fixture(params=["gguf", "fp16 bin"])
def path(request, gguf, tmp_path) -> Path:
    if request.param == "gguf":
        return gguf
    assert main(["export", str(gguf), "-o", str(tmp_path / "bin")]) == 0
    return tmp_path / "bin"


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_closed_model_has_let_go_of_its_file_though_all_it_gave_is_alive(path, backend):
    model = pocketlm.load(path, backend=backend, threads=2)
    assert mapped(path)
    executor, tensors, metadata, hyper = model.executor, model.tensors, model.metadata, model.hyper
    logits = model.logits([5, 6, 7])
    pieces = model.generate([5], max_tokens=3)
    next(pieces)
    expected = logits.copy()
    name, count = model.name, model.n_parameters
    model.close()
    assert not mapped(path)
    np.testing.assert_array_equal(logits, expected)
    assert (model.name, model.n_parameters, model.hyper) == (name, count, hyper)
    assert not tensors
    assert model.metadata == {}
    with pytest.raises(PocketlmError):
        executor.forward(np.array([5]))
    if path.suffix:
        with pytest.raises(PocketlmError, match="closed"):
            metadata["general.url"]


def test_a_packed_model_is_let_go_of_though_its_weights_were_used_where_they_lie(gguf, tmp_path):
    from packing import fake_stub

    from pocketlm.build.pack import open_stub, pack
    from pocketlm.build.persona import Persona

    friend = pack(gguf, open_stub(fake_stub(tmp_path / "stub")), tmp_path / "friend", Persona())
    assert not mapped(gguf)
    model = pocketlm.load(friend, backend="native", threads=1)
    model.logits([5, 6, 7])
    assert mapped(friend)
    model.close()
    assert not mapped(friend)


@pytest.mark.parametrize("key", ["general.architecture", "llama.block_count", "tokenizer.ggml.model"])
def test_a_model_that_cannot_be_loaded_is_let_go_of(gguf, key):
    write_model(gguf, metadata={key: "nothing" if "." in key and "count" not in key else 77})
    with pytest.raises(FileError) as error:
        pocketlm.load(gguf)
    assert error.value.__traceback__ is not None  # what the caller holds
    assert not mapped(gguf)


def test_weights_that_are_refused_half_way_are_let_go_of(gguf):
    for backend in ("numpy", "native"):
        weights = np.full((64, 64), np.nan, np.float32)
        write_model(gguf, tensors={"blk.1.attn_output.weight": weights})
        with pytest.raises(FileError, match="NaN") as error:
            pocketlm.load(gguf, backend=backend)
        assert not mapped(gguf)
        del error


def test_a_file_that_the_process_may_not_map_is_not_said_to_be_out_of_reach(gguf, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", refuse)
    with pytest.raises(FileError, match=r"does not fit into the memory .*; allow it more \(ulimit -v\)"):
        open_model(gguf)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
@pytest.mark.parametrize("words", [["inspect"], ["export", "-o", "x.gguf"], ["eval", "--text", "x"], ["generate", "-p", "x"]])
def test_a_pipe_that_nobody_writes_is_refused_and_not_waited_for(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text("some text")
    os.mkfifo(tmp_path / "p")
    command = [sys.executable, "-m", "pocketlm", words[0], "p", *words[1:]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "p: is a pipe or a device, not a file" in ended.stderr


def test_a_damaged_file_is_let_go_of(gguf):
    data = gguf.read_bytes()
    gguf.write_bytes(data[: len(data) - 40])
    with pytest.raises(FileError) as error:
        open_model(gguf)
    assert error.value.path == gguf
    assert not mapped(gguf)


REFUSED = {
    "a pickle that calls": torch_zip(WAYS["STACK_GLOBAL"]("os", "system")), "cut short": SOUND[:-30], "a web page": b"<html>",
    "no weights": torch_zip(b"\x80\x02}."), "an old pickle": WAYS["GLOBAL and REDUCE"]("os", "system"),
    "safetensors": safetensors(entry(shape=(2, -3))),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_checkpoint_is_let_go_of(kind, tmp_path):
    path = tmp_path / "checkpoint"
    path.write_bytes(REFUSED[kind])
    with pytest.raises(FileError) as error:
        open_checkpoint(path)
    assert not mapped(path)
    del error


def test_a_refused_index_lets_go_of_all_its_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(safetensors(entry()))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "a", "v": "b"}}))
    with pytest.raises(FileError, match="two of the files") as error:
        open_checkpoint(index)
    assert not mapped(tmp_path)
    del error


def test_an_array_that_is_still_used_stays_valid(path):
    with open_model(path) as opened:
        data = opened.tensors["blk.0.attn_norm.weight"].data
        before = data.tobytes()
    assert data.tobytes() == before
    assert mapped(path)
    del data
    assert not mapped(path)


@pytest.mark.parametrize("out", ["out.gguf", "bin"])
def test_a_failed_export_has_let_go_of_its_part_before_it_takes_it_away(tmp_path, monkeypatch, out):
    removed = []
    real = atomic._remove

    def remove(part: Path) -> None:
        if part.exists():
            removed.append(mapped(part))
        real(part)

    monkeypatch.setattr(atomic, "_remove", remove)
    monkeypatch.setattr(export_module, "zlib", SimpleNamespace(crc32=lambda data: -1))
    with pytest.raises(FileError, match="not what was written") as error:
        export_module.export(make_model(make_hyper()), "checkpoint", tmp_path / out)
    assert removed == [False]
    assert list(tmp_path.iterdir()) == []
    del error


@pytest.mark.parametrize("words", [["inspect"], ["tokenize"]], ids=str)
def test_a_command_has_let_go_of_its_file_when_it_is_done(gguf, words, capsys):
    assert main([*words, str(gguf), *["then"] * (words == ["tokenize"])]) == 0
    assert not mapped(gguf)
    assert capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="packs for this system")
def test_pack_unpack_and_persona_have_let_go_of_what_they_open(gguf, tmp_path, capsys):
    from packing import fake_stub

    stub, friend, back = fake_stub(tmp_path / "stub"), tmp_path / "friend", tmp_path / "back.gguf"

    assert main(["pack", str(gguf), "-o", str(friend), "--stub", str(stub)]) == 0
    assert main(["persona", str(friend), "--title", "Pip"]) == 0
    assert main(["unpack", str(friend), "-o", str(back)]) == 0
    assert back.read_bytes() == gguf.read_bytes()
    assert not any(map(mapped, (gguf, stub, friend, back)))
