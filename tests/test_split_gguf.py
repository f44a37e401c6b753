"""A GGUF that lies in several files, split by the gguf package: the same model as in one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from packing import fake_stub
from tiny_models import write_model, write_out

import pocketlm
from pocketlm import cli
from pocketlm.errors import FileError
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.identity import fingerprint
from pocketlm.runtime.model_file import open_model, parts_of, size_of

IDS = np.array([5, 9, 2, 7])


def split(source: Path, folder: Path, tensors_each: int) -> list[Path]:
    """The file's keys and tensors written by the gguf package, so many tensors in a part."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=tensors_each)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    write_out(writer, folder / "m.gguf")
    return sorted(folder.glob("m-*.gguf"))


@pytest.fixture
def parts(tmp_path: Path):
    write_model(tmp_path / "whole.gguf")
    (tmp_path / "parts").mkdir()
    found = split(tmp_path / "whole.gguf", tmp_path / "parts", 7)
    assert len(found) >= 3
    return found


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_any_part_opens_the_whole_model(parts, tmp_path: Path, backend: str):
    with pocketlm.load(tmp_path / "whole.gguf", backend=backend) as whole:
        expected = whole.logits(IDS)
    for part in parts:
        with pocketlm.load(part, backend=backend) as model:
            np.testing.assert_array_equal(model.logits(IDS), expected)
    assert parts_of(parts[1]) == parts
    assert size_of(parts[0]) == sum(part.stat().st_size for part in parts)


def test_closing_unmaps_every_part_at_once(parts, monkeypatch):
    def searched() -> None:
        pytest.fail("the garbage collector was asked for an array that still looks at a part")

    monkeypatch.setattr("pocketlm.runtime.file_mapping.gc.collect", searched)
    open_model(parts[0]).close()


def test_conversations_with_it_are_found_again_in_the_whole_file(parts, tmp_path: Path):
    with open_model(parts[0]) as several, open_gguf(tmp_path / "whole.gguf") as one:
        assert fingerprint(several.tensors) == fingerprint({name: one.tensors[name] for name in several.tensors})


def test_export_and_pack_put_it_into_one_file(parts, tmp_path: Path):
    out, friend, stub = tmp_path / "one.gguf", tmp_path / "friend", tmp_path / "stub"
    fake_stub(stub)
    assert cli.main(["export", str(parts[0]), "-o", str(out), "--quant", "f32"]) == 0
    assert cli.main(["pack", str(parts[0]), "-o", str(friend), "--stub", str(stub)]) == 0
    with open_gguf(tmp_path / "whole.gguf") as whole:
        for path in (out, friend):
            with open_model(path) as one:
                assert one.tensors.keys() == whole.tensors.keys()
                assert not [key for key in one.metadata if key.startswith("split.")]


def test_missing_and_foreign_parts_are_one_line(parts, tmp_path: Path):
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0  # under wine there is a folder, too
    third = parts[2].read_bytes()
    parts[2].unlink()
    with pytest.raises(FileError, match=r"is one of \d parts, and m-00003-of-\d{5}.gguf is not beside it"):
        open_model(parts[0])
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(FileError, match=r"m-00003-of-\d{5}.gguf: is not part 3"):
        open_model(parts[0])
    (tmp_path / "other").mkdir()
    other = split(tmp_path / "whole.gguf", tmp_path / "other", 6)
    if len(other) == len(parts):
        parts[2].write_bytes(other[2].read_bytes())
        with pytest.raises(FileError, match=r"holds .* as another part does|tensors"):
            open_model(parts[0])
    parts[2].write_bytes(third)
    open_model(parts[0]).close()
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before  # fewer where another test's rubbish goes meanwhile


@pytest.mark.parametrize("part", [0, 1])
def test_a_part_under_another_name_is_called_so(parts, part: int):
    """As a browser names what it fetches again."""
    again = parts[part].rename(parts[part].with_name("m (1).gguf"))
    with pytest.raises(FileError, match=rf"is one of {len(parts)} parts, under another name; .*-00001-of-0000{len(parts)}"):
        open_model(again)


def test_parts_that_were_put_together_again_are_one_file(tmp_path: Path):
    """llama.cpp's gguf-split leaves a count of 0 in what it merges."""
    path = write_model(tmp_path / "m.gguf", metadata={"split.count": 0, "split.no": 0})
    open_model(path).close()
