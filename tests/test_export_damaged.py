"""A damaged checkpoint, or one that lies about its sizes, is one line: archives, arrays, safetensors, models."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import zipfile
import zlib
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hostile_checkpoints import SOUND, TENSOR, VALUES, entry, refused, safetensors, torch_zip

from pocketlm.errors import FileError
from pocketlm.export.checkpoint import open_checkpoint
from pocketlm.export.dialects import to_canonical

# ── archives ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_sound_archive_is_read(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(SOUND)
    assert open_checkpoint(tmp_path / "ckpt.pt").tensors["w"].read().tolist() == VALUES.reshape(2, 3).tolist()


def test_every_truncation_is_one_line(tmp_path: Path) -> None:
    for size in range(0, len(SOUND), 7):
        refused(tmp_path / "ckpt.pt", SOUND[:size])


def test_random_damage_is_one_line_or_harmless(tmp_path: Path) -> None:
    chosen = random.Random(7)
    for number in range(600):
        path = tmp_path / f"{number}.pt"  # the last one may be in use: Windows overwrites nothing that is mapped
        content = bytearray(SOUND)
        for _ in range(chosen.choice([1, 1, 2, 8])):
            content[chosen.randrange(len(content))] = chosen.choice([0, 1, 0x7F, 0x80, 0xFF, chosen.randrange(256)])
        path.write_bytes(content)
        try:
            tensors = open_checkpoint(path).tensors
            assert all(tensor.read().size <= 1 << 16 for tensor in tensors.values())
        except FileError:
            continue


def directory_changed(entry: int, offset: int, data: bytes) -> bytes:
    """SOUND with bytes of one row of its central directory replaced."""
    at = [match.start() for match in re.finditer(b"PK\x01\x02", SOUND)][entry] + offset
    return SOUND[:at] + data + SOUND[at + len(data) :]


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    assert "encrypted" in refused(path, directory_changed(2, 8, b"\x01\x00"))
    assert "two headers" in refused(path, directory_changed(2, 46, b"ckpt/data/1"))
    assert "twice" in refused(path, _duplicate())
    assert "not where" in refused(path, directory_changed(2, 42, struct.pack("<I", 3)))
    assert "beyond" in refused(path, directory_changed(2, 20, struct.pack("<II", 1 << 30, 1 << 30)))
    assert "two sizes" in refused(path, directory_changed(2, 24, struct.pack("<I", 1 << 30)))
    assert "lacks a size" in refused(path, directory_changed(2, 24, b"\xff" * 4))
    assert "packed in a way" in refused(path, directory_changed(2, 10, b"\x0e\x00"))
    assert "overlap" in refused(path, _overlapping())
    assert "compressed" in refused(path, torch_zip(TENSOR, {"0": VALUES.tobytes()}, zipfile.ZIP_DEFLATED))
    assert "too short" in refused(path, torch_zip(TENSOR, {"0": VALUES.tobytes()[:-1]}))
    assert "missing" in refused(path, torch_zip(TENSOR, {}))
    assert "no data.pkl" in refused(path, torch_zip(TENSOR).replace(b"data.pkl", b"data.pkx"))


def _duplicate() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("ckpt/data.pkl", TENSOR)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("ckpt/data.pkl", TENSOR)
    return file.getvalue()


def _overlapping() -> bytes:
    """One entry's bytes hold the whole of another entry."""
    inner = struct.pack("<4s5HIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 4, 4, 1, 0) + b"b" + b"data"
    outer = struct.pack("<4s5HIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, len(inner), len(inner), 1, 0) + b"a" + inner
    rows = b"".join(
        struct.pack("<4s6HIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 0, n, n, 1, 0, 0, 0, 0, 0, offset) + name
        for name, n, offset in ((b"a", len(inner), 0), (b"b", 4, 31))
    )
    return outer + rows + struct.pack("<4s4HIIH", b"PK\x05\x06", 0, 0, 2, 2, len(rows), len(outer), 0)


def test_a_flipped_weight_is_noticed_by_the_checksum(tmp_path: Path) -> None:
    at = SOUND.index(VALUES.tobytes())
    path = tmp_path / "ckpt.pt"
    path.write_bytes(SOUND[:at] + b"\x01" + SOUND[at + 1 :])
    tensor = open_checkpoint(path).tensors["w"]
    with pytest.raises(FileError, match="checksum"):
        tensor.read()


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        ((2, 4), (4, 1), 0), ((7,), (1,), 0), ((6,), (1,), 1), ((2,), (6,), 0), ((2, 3), (3,), 0), ((-1,), (1,), 0), ((2,),
        (-1,), 5),
        ((1 << 40, 1 << 40), (0, 0), 0), ((1 << 62,), (1,), 0), ((1,) * 100, (1,) * 100, 0),
    ],
)  # fmt: skip
def test_ranges_outside_the_storage_are_refused(shape: tuple, strides: tuple, offset: int, tmp_path: Path) -> None:
    def tuple_of(values: tuple) -> bytes:
        return b"(" + b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values) + b"t"

    arguments = b"tQ\x8a\x09" + offset.to_bytes(9, "little", signed=True) + tuple_of(shape) + tuple_of(strides) + b"\x89}tRs."
    pickled = TENSOR[: TENSOR.index(b"tQ")] + arguments
    path = tmp_path / "ckpt.pt"
    path.write_bytes(torch_zip(pickled, {"0": VALUES.tobytes()}))
    with pytest.raises(FileError):
        open_checkpoint(path).tensors["w"].read()


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    tar = bytearray(1024)
    tar[257:262] = b"ustar"
    for content, said in (
        (bytes(tar), "a tar archive"),
        (b"\x80" + bytes(tar[1:]), "a tar archive"),
        (b"\x1f\x8b" + bytes(100), "gzip"),
        (b"<html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"hello", "no checkpoint"),
        (pickle.dumps([1, 2], 2), "not a PyTorch checkpoint"),
    ):
        assert said in refused(tmp_path / "x.bin", content)


def test_a_compressed_array_that_unpacks_to_terabytes_is_refused(tmp_path: Path) -> None:
    header = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627775,), }".ljust(117)
        + b"\n"
    )
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packed.compress(header + bytes(1 << 20)) + packed.flush()
    local = struct.pack("<4s5HIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 0, 0, len(body), 0xFFFFFFFF, 5, 0) + b"w.npy" + body
    extra = struct.pack("<HHQ", 1, 8, 4 * 1099511627775 + 128)
    row = struct.pack(
        "<4s6HIIIHHHHHII", b"PK\x01\x02", 45, 45, 0, 8, 0, 0, 0, len(body), 0xFFFFFFFF, 5, len(extra), 0, 0, 0, 0, 0
    )
    directory = row + b"w.npy" + extra
    end = struct.pack("<4s4HIIH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), len(local), 0)
    assert "more than can be packed" in refused(tmp_path / "x.npz", local + directory + end)


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", w=np.array([{"a": 1}], dtype=object))
    assert "holds objects" in refused(tmp_path / "y.npz", (tmp_path / "x.npz").read_bytes())


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [
        safetensors(entry(), length=1 << 60),
        safetensors(entry(), bytes(23)),
        safetensors(entry(offsets=(0, 25))),
        safetensors(entry(offsets=(24, 0))),
        safetensors(entry(offsets=(-24, 0))),
        safetensors(entry(offsets=(0.0, 24.0))),
        safetensors(entry(shape=(2, -3))),
        safetensors(entry(shape=(1 << 40, 1 << 40))),
        safetensors(entry(shape=[[2], 3])),
        safetensors(entry(shape="23")),
        safetensors(entry(dtype="F4")),
        safetensors(entry(dtype=["F32"])),
        safetensors({"w": 3}),
        safetensors({"a": entry()["w"], "b": entry()["w"]}),
        safetensors(b'{"w":' + json.dumps(entry()["w"]).encode() + b',"w":' + json.dumps(entry()["w"]).encode() + b"}"),
        safetensors(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        safetensors(b'{"w":' + b"9" * 100_000 + b"}"),
        safetensors(b'{"\xff": 1}'),
        safetensors({}),
    ],
)
def test_damaged_safetensors_are_one_line(content: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", content)


def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path) -> None:
    for name in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".."):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(FileError, match="outside its folder"):
            open_checkpoint(tmp_path)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["GptOss", "Lfm2", "Phi", "Phi3", "Qwen2", "StableLm"])
def test_tensors_that_are_missing_misnamed_or_misshapen_are_one_line_or_harmless(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, pad_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = open_checkpoint(tmp_path)
    for name, tensor in whole.tensors.items():
        others = {other: value for other, value in whole.tensors.items() if other != name}
        wrong = [{name: replace(tensor, shape=shape, read=partial(np.zeros, shape))} for shape in ((), (3,), (0, 0), (1,) * 4)]
        for tensors in ({}, {name.replace("gate_up", "gate"): tensor}, *wrong):
            with suppress(FileError):
                to_canonical(replace(whole, tensors={**others, **tensors}), tokenizer="none")
