"""The container: a model goes in, runs from there, and comes out again byte for byte; damage is noticed."""

import json
import math
import os
import pickle
import random
import re
import struct
from itertools import pairwise

import numpy as np
import pytest
from gguf_bytes import file_fields, join, key
from packing import fake_stub
from signatures import check_signature
from tiny_models import write_model

import pocketlm
from pocketlm import tokenizer
from pocketlm.build import selftest
from pocketlm.build.pack import open_stub, pack, set_persona, unpack, with_texts
from pocketlm.build.persona import MAX_BYTES, Persona, from_bytes
from pocketlm.cli import main
from pocketlm.errors import FileError, UsageError
from pocketlm.runtime import container
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.model_file import open_packed

IDS = [1, 50, 200, 3, 3]
SHAPES = {
    "Q4_0, rows that fill no group": {"format": "Q4_0", "n_ff": 96, "n_head": 4, "n_kv_head": 1, "head_dim": 24},
    "Q8_0, learned positions": {"format": "Q8_0", "arch": "gpt2"},
    "Q5_1, ALiBi": {"format": "Q5_1", "arch": "refact"},
    "F16, head of its own": {"format": "F16", "tied": False},
    "F32": {"format": "F32"},
    "Q4_1": {"format": "Q4_1"},
}


@pytest.fixture(params=SHAPES, ids=str)
def model(request, tmp_path):
    return write_model(tmp_path / "model.gguf", n_layer=1, **SHAPES[request.param])


@pytest.fixture
def small(tmp_path):
    return write_model(tmp_path / "model.gguf", n_layer=1, format="Q4_0")


def packed(model, folder, **options):
    stub = open_stub(fake_stub(folder / "stub", **options))
    return pack(model, stub, folder / "friend", Persona(title="Ada", flags={"--temp": 0.5}), b"reference")


@pytest.mark.parametrize("kind", ["linux", "windows", "macos"])
def test_a_packed_program_is_a_tokenizer_as_its_model_is(small, tmp_path, kind):
    friend = packed(small, tmp_path, kind=kind)
    assert tokenizer.load(friend).encode("then") == tokenizer.load(small).encode("then")


def test_unpacking_gives_the_original_byte_for_byte(model, tmp_path):
    friend = packed(model, tmp_path)
    unpack(container.find(friend), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()


def test_bytes_between_and_behind_the_tensors_are_kept(small, tmp_path):
    with open_gguf(small) as file:
        ends = sorted((t.offset + t.data.nbytes, t.offset) for t in file.tensors.values())
    data = bytearray(small.read_bytes())
    gaps = [(end, start) for (end, _), (_, start) in pairwise(ends) if start > end]
    for end, start in gaps:
        data[end:start] = b"x" * (start - end)
    small.write_bytes(bytes(data) + b"something behind the model")
    unpack(container.find(packed(small, tmp_path)), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == small.read_bytes()


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_packed_model_computes_the_same(model, tmp_path, backend):
    friend = packed(model, tmp_path)
    with pocketlm.load(model, backend) as plain, pocketlm.load(friend, backend) as inside:
        assert np.array_equal(plain.logits(IDS), inside.logits(IDS))


def test_the_weights_are_used_where_they_are(small, tmp_path):
    friend = packed(small, tmp_path)
    with pocketlm.load(friend, "native") as inside:
        matrices = inside.executor._storage.matrices
        assert matrices
        for name, matrix in matrices.items():
            assert matrix.data is inside.tensors[name].data
            assert matrix.data.ctypes.data % 64 == 0


def test_a_matrix_of_a_stored_model_is_read_row_after_row(small, tmp_path):
    section = container.find(packed(small, tmp_path)).sections["model"]
    with open_gguf(small) as plain, open_gguf(tmp_path / "friend", offset=section.offset, length=section.length) as stored:
        for name, tensor in plain.tensors.items():
            assert stored.tensors[name].tiled == (len(tensor.shape) == 2)
            assert np.array_equal(stored.tensors[name].to_float32(), tensor.to_float32())


def test_the_same_inputs_give_the_same_bytes(small, tmp_path):
    first = packed(small, tmp_path).read_bytes()
    os.utime(small, (1, 1))
    assert packed(small, tmp_path).read_bytes() == first


@pytest.mark.parametrize("alignment", [8, 32, 256])
def test_other_alignments_and_formats_come_back_too(tmp_path, alignment, monkeypatch):
    tensors = [("k", "Q4_K", (256, 33), 144), ("v", "F32", (7,), 4), ("s", "Q6_K", (512, 5), 210), ("h", "Q5_0", (32, 16), 22)]
    blocks = {"Q4_K": 256, "Q6_K": 256, "Q5_0": 32, "F32": 1}
    noise = random.Random(alignment)
    rows = [(name, kind, dims, noise.randbytes(math.prod(dims) // blocks[kind] * size)) for name, kind, dims, size in tensors]
    model = tmp_path / "model.gguf"
    keys = [key("general.alignment", "u32", alignment), key("general.name", "string", "x")]
    model.write_bytes(join(file_fields(keys, rows, alignment)))
    monkeypatch.setattr("pocketlm.build.tiled_gguf.check_finite", lambda tensor: None)  # random bytes are not all finite
    unpack(container.find(packed(model, tmp_path)), tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == model.read_bytes()


def test_only_the_persona_changes_when_it_is_replaced(small, tmp_path):
    friend = packed(small, tmp_path)
    before, old = friend.read_bytes(), container.find(friend)
    set_persona(old, lambda persona: with_texts(persona, {"system": "Sei kurz. " * 50, "title": None}, {"--top-k": 5}), friend)
    new = container.find(friend)
    persona = from_bytes(new.read("persona"), friend)
    assert persona == Persona(title="Ada", system="Sei kurz. " * 50, flags={"--temp": 0.5, "--top-k": 5})
    end = new.sections["reference"].end
    assert friend.read_bytes()[:end] == before[:end]
    new.check()
    unpack(new, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == small.read_bytes()
    with pytest.raises(UsageError, match=str(MAX_BYTES)):
        set_persona(new, lambda persona: Persona(system="x" * MAX_BYTES), friend)


def test_a_packed_executable_is_a_stub_too(small, tmp_path):
    other = write_model(tmp_path / "other.gguf", n_layer=2)
    again = pack(other, open_stub(packed(small, tmp_path)), tmp_path / "again", Persona())
    assert again.read_bytes() == pack(other, open_stub(tmp_path / "stub"), tmp_path / "new", Persona()).read_bytes()


@pytest.mark.parametrize(("kind", "name"), [("linux", "friend"), ("windows", "friend.exe"), ("macos", "friend")])
def test_any_system_packs_for_any_system(small, tmp_path, kind, name):
    friend = packed(small, tmp_path, kind=kind)
    assert friend.name == name
    stub = (tmp_path / "stub").read_bytes()
    assert kind != "linux" or friend.read_bytes().startswith(stub[:5000])
    assert stub[5000:] in friend.read_bytes()
    assert open_stub(friend).platform.startswith(kind)


def test_a_mac_finds_the_whole_file_in_its_last_segment(small, tmp_path):
    data = packed(small, tmp_path, kind="macos").read_bytes()
    assert check_signature(data) == []
    wrong = fake_stub(tmp_path / "wrong", kind="macos")
    wrong.write_bytes(wrong.read_bytes()[:20] + b"\xff" * 60 + wrong.read_bytes()[80:])
    with pytest.raises(FileError, match=r"makes? no sense"):
        pack(small, open_stub(wrong), tmp_path / "friend", Persona())


def test_windows_gets_no_executable_over_four_gigabytes(small, tmp_path, monkeypatch):
    monkeypatch.setattr("pocketlm.build.pack.LIMIT", 10_000)
    with pytest.raises(FileError, match=r"windows runs none over 4 GB.*--model"):
        packed(small, tmp_path, kind="windows")
    assert not list(tmp_path.glob("*friend*"))
    packed(small, tmp_path, kind="linux")


def test_what_cannot_be_packed_is_said(small, tmp_path):
    for name, content in {"no program": b"GGUF", "no archive": b"\x7fELF".ljust(9000, b"\0")}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError):
            open_stub(tmp_path / name)
    with pytest.raises(FileError, match="there is no such file"):
        open_stub(tmp_path / "nowhere")
    weights = np.full((64, 64), np.nan, np.float32)
    bad = write_model(tmp_path / "bad.gguf", n_layer=1, tensors={"blk.0.attn_q.weight": weights})
    with pytest.raises(FileError, match="NaN"):
        packed(bad, tmp_path)
    section = container.find(packed(small, tmp_path)).sections["model"]
    stored = (tmp_path / "friend").read_bytes()[section.offset : section.end]
    (tmp_path / "stored.gguf").write_bytes(stored)
    with pytest.raises(FileError, match="tiled already"):
        packed(tmp_path / "stored.gguf", tmp_path)


def refused(path):
    with pytest.raises(FileError, match=rf"^{re.escape(str(path))}: [^\n]+$"):
        pocketlm.load(path, "numpy")


def test_a_changed_byte_in_locator_or_header_is_noticed(small, tmp_path):
    friend = packed(small, tmp_path)
    whole, sections = friend.read_bytes(), container.find(friend).sections
    start, end = sections["program"].offset - container.SIZE, sections["program"].offset
    header = sections["header"]
    noise = random.Random(7)
    broken = tmp_path / "broken"
    ranges = [(start, end), (header.offset, header.end)] * 100
    for place in (noise.randrange(*ends) for ends in ranges):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << noise.randrange(8)]) + whole[place + 1 :])
        refused(broken)


def test_a_cut_file_is_noticed(small, tmp_path):
    whole = packed(small, tmp_path).read_bytes()
    broken, noise = tmp_path / "broken", random.Random(8)
    for length in [noise.randrange(4, len(whole)) for _ in range(50)]:
        broken.write_bytes(whole[:length])
        refused(broken)


def test_a_changed_byte_anywhere_is_found_by_the_full_check(small, tmp_path):
    friend = packed(small, tmp_path)
    whole, found = friend.read_bytes(), container.find(friend)
    found.check()
    for name, title in container.TITLES.items():
        place = found.sections[name].offset + found.sections[name].length // 2
        friend.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(FileError, match=f"damaged .*the {'model' if name == 'header' else title}"):
            found.check()
    place = found.sections["boot"].end + 5  # the zeros in front of the model
    friend.write_bytes(whole[:place] + b"x" + whole[place + 1 :])
    with pytest.raises(FileError, match="boot loader"):
        found.check()
    place = found.sections["model"].end - 5000
    friend.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
    with pytest.raises(FileError, match="damaged"):
        unpack(found, tmp_path / "again.gguf")
    assert not (tmp_path / "again.gguf").exists()


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 100_000, b'{"title": 1, "system": "", "greeting": "", "flags": {}}'])
def test_a_persona_that_is_none_is_one_line(data):
    with pytest.raises(FileError, match="damaged"):
        from_bytes(data, "friend")


def test_a_locator_that_does_not_fit_is_refused(small, tmp_path):
    friend = packed(small, tmp_path)
    whole, sections = friend.read_bytes(), container.find(friend).sections
    start = sections["program"].offset - container.SIZE
    for name in ("model", "persona", "program", "header"):
        moved = container.Section(sections[name].offset + 64, sections[name].length, sections[name].sha256)
        friend.write_bytes(whole[:start] + container.locator({**sections, name: moved}) + whole[start + container.SIZE :])
        if name != "program":  # where the archive begins is known without the locator
            with pytest.raises(FileError, match="damaged"):
                container.find(friend)
    later = struct.pack("<8sI", b"pocketlm", container._VERSION + 1)
    friend.write_bytes(whole[:start] + later + whole[start + len(later) :])
    with pytest.raises(FileError, match="another version"):
        container.find(friend)


def test_the_commands_pack_unpack_and_persona(small, tmp_path, capsys):
    stub, friend = fake_stub(tmp_path / "stub"), tmp_path / "friend"
    assert main(["pack", str(small), "--stub", str(stub), "-o", str(friend), "--title", "Ада", "--temp", "0.3"]) == 0
    assert os.access(friend, os.X_OK)
    assert main(["persona", str(friend), "--greeting", "Merhaba", "--max-tokens", "50"]) == 0
    assert main(["persona", str(friend)]) == 0
    shown = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[-1] for line in shown if line[0] != "s"] == ["Ада", "Merhaba", "--temp=0.3", "--max-tokens=50"]
    assert main(["unpack", str(friend), "-o", str(tmp_path / "again.gguf")]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == small.read_bytes()
    whole = friend.read_bytes()
    assert main(["unpack", str(friend), "-o", str(friend)]) == 2
    assert friend.read_bytes() == whole
    assert main(["generate", str(friend), "-p", "the", "-n", "2", "--temp", "0"]) == 0
    for wrong, status in ((["unpack", str(small), "-o", "x"], 1), (["unpack", str(tmp_path / "no"), "-o", "x"], 1),
                          (["pack", str(small), "--stub", str(stub), "-o", str(friend), "--temp", "-1"], 2),
                          (["pack", str(small), "--stub", str(stub), "-o", str(tmp_path / "no" / "x")], 1)):  # fmt: skip
        capsys.readouterr()
        assert main(wrong) == status
        assert capsys.readouterr().err.count("\n") == 1


def test_a_program_for_windows_does_not_replace_the_one_it_is_made_of(small, tmp_path, capsys):
    """-o names neither with its .exe; nor is the stub replaced."""
    stub = fake_stub(tmp_path / "stub.exe", kind="windows")
    old = pack(small, open_stub(stub), tmp_path / "friend", Persona())
    before = old.read_bytes(), stub.read_bytes()
    for out in ("friend", "stub"):
        assert main(["pack", str(old), "--stub", str(stub), "-o", str(tmp_path / out)]) == 2
        assert f"{out}.exe is where the input is; name another output" in capsys.readouterr().err
    assert (old.read_bytes(), stub.read_bytes()) == before


def test_an_output_that_is_a_folder_is_refused_before_a_stub_is_made(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("pocketlm.build.command._stub_for", lambda name, arguments: pytest.fail("it was made"))
    (tmp_path / "folder").mkdir()
    assert main(["pack", str(small), "--for", "linux-x86_64", "-o", str(tmp_path / "folder")]) == 1
    assert "folder: is there already and is not a file" in capsys.readouterr().err


def test_other_models_are_converted_on_the_way(small, tmp_path):
    stub, friend = fake_stub(tmp_path / "stub"), tmp_path / "friend"
    assert main(["export", str(small), "-o", str(tmp_path / "bin")]) == 0
    assert main(["pack", str(tmp_path / "bin"), "--stub", str(stub), "-o", str(friend), "--quant", "q8_0"]) == 0
    with pocketlm.load(friend) as model, pocketlm.load(small) as original:
        assert model.tensors["blk.0.attn_q.weight"].format.name == "Q8_0"
        assert np.corrcoef(model.logits(IDS).ravel(), original.logits(IDS).ravel())[0, 1] > 0.99
    assert not list(tmp_path.glob(".pocketlm-*"))


def test_a_checkpoint_is_converted_on_the_way(tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes the checkpoint")
    width, weights = 64, {"transformer.ln_f.weight": torch.ones(64)}
    shapes = {"wte": (256, width), "wpe": (128, width), "h.0.attn.c_attn": (3 * width, width),
              "h.0.attn.c_proj": (width, width), "h.0.mlp.c_fc": (4 * width, width),
              "h.0.mlp.c_proj": (width, 4 * width)}  # fmt: skip
    torch.manual_seed(0)
    for name, shape in shapes.items():
        weights[f"transformer.{name}.weight"] = 0.1 * torch.randn(shape)
    weights |= {f"transformer.h.0.{norm}.weight": torch.ones(width) for norm in ("ln_1", "ln_2")}
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": width, "block_size": 128, "bias": False, "vocab_size": 256, "dropout": 0.0}
    checkpoint = {"model": {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}, "model_args": sizes}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    characters = {chr(i): i for i in range(256)}
    tables = {"vocab_size": 256, "stoi": characters, "itos": {i: c for c, i in characters.items()}}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(tables))
    stub, friend = fake_stub(tmp_path / "stub"), tmp_path / "friend"
    assert main(["pack", str(tmp_path / "ckpt.pt"), "--quant", "q4_0", "--stub", str(stub), "-o", str(friend)]) == 0
    assert from_bytes(container.find(friend).read("persona"), friend).title == tmp_path.name
    with pocketlm.load(friend, "numpy") as model:
        assert model.tensors["blk.0.ffn_up.weight"].format.name == "Q4_0"
        stored = model.tensors["blk.0.ffn_up.weight"].to_float32()
        assert np.corrcoef(stored.ravel(), weights["transformer.h.0.mlp.c_fc.weight"].numpy().ravel())[0, 1] > 0.99


def test_levels_that_cannot_run_say_so_in_words_for_a_friend(model, tmp_path, monkeypatch):
    with open_gguf(model) as file:
        results = json.loads(selftest.reference(file))
    monkeypatch.setattr("pocketlm.runtime.native.levels.cpu_flags", lambda machine: frozenset())
    monkeypatch.setattr(selftest.sys, "platform", "win32")
    monkeypatch.setattr("pocketlm.runtime.native.levels.host_machine", lambda: "x86_64")
    found = dict(selftest.backends(results, open_packed(container.find(packed(model, tmp_path)))))
    assert [*found] == ["avx512-vnni", "avx-vnni", "avx2", "sse4", "numpy"]  # amx is for Linux
    for name in [*found][:-1]:
        assert found[name].startswith("this CPU cannot run that level, it lacks ")


def test_the_reference_is_computed_in_little_memory_and_fits_every_executor(model, tmp_path):
    with open_gguf(model) as file:
        results = json.loads(selftest.reference(file))
    friend = packed(model, tmp_path)
    found = dict(selftest.backends(results, open_packed(container.find(friend))))
    off = {name: selftest.distance(results, logits) for name, logits in found.items() if not isinstance(logits, str)}
    assert "numpy" in off
    assert len(off) > 1
    assert max(off.values()) <= selftest.TOLERANCE / 2
