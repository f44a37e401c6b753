"""`pocketlm check` says which part is damaged, also of executables that do not start any more; packing lets none through."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
from fuzz_packed import check
from packing import fake_stub
from tiny_models import write_model

from pocketlm.build.archive_reader import damaged_entries
from pocketlm.build.check import parts_of
from pocketlm.build.pack import open_stub, pack, set_persona
from pocketlm.build.persona import Persona
from pocketlm.cli import main
from pocketlm.errors import FileError
from pocketlm.runtime import container
from pocketlm.runtime.gguf_reader import open_gguf


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model.gguf", n_layer=1, format="Q4_0")


@pytest.fixture
def friend(model, tmp_path):
    stub = open_stub(fake_stub(tmp_path / "stub", archive=20_000))
    return pack(model, stub, tmp_path / "friend", Persona(title="Ada"), b"reference")


def zeroed(path, place, n=1000):
    """A thousand bytes that were lost on the way."""
    data = bytearray(path.read_bytes())
    data[place : place + n] = bytes(len(data[place : place + n]))
    path.write_bytes(data)


def verdicts(path):
    return {part.name: part.verdict for part in parts_of(path) if not part.is_whole}


def test_every_part_is_listed_and_whole(friend, capsys):
    assert main(["check", str(friend)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].rstrip() for line in lines] == [
        "boot loader", "keys of the model", "model", "record of the GGUF", "reference results", "title and system prompt",
        "archive of the program",
    ]  # fmt: skip
    assert all(line.endswith(" whole") for line in lines)


@pytest.mark.parametrize("part", ["boot", "model", "original", "reference", "persona", "program"])
def test_the_damaged_part_is_named(friend, part, capsys):
    section = container.find(friend).sections[part]
    place, n = section.offset + section.length // 2, min(1000, section.length // 2)
    zeroed(friend, place, n)
    title = container.TITLES[part]
    assert verdicts(friend)[title].startswith("damaged")
    assert len(verdicts(friend)) == 1
    capsys.readouterr()
    assert main(["check", str(friend)]) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert f"damaged (the {title})" in said.err


def test_every_changed_bit_anywhere_is_found(friend):
    """tests/fuzz_packed.py does this to Pocket, 10,000 times."""
    whole, noise = friend.read_bytes(), random.Random(9)
    for place in (noise.randrange(len(whole)) for _ in range(500)):
        friend.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << noise.randrange(8)]) + whole[place + 1 :])
        assert check(friend) == "found", place
    friend.write_bytes(whole)
    assert check(friend) == "NOT FOUND"


def test_of_an_archive_the_damaged_files_are_named(friend):
    start, _ = container.program_place(friend)
    zeroed(friend, start + 3000)
    assert verdicts(friend)[container.TITLES["program"]] == "damaged: library.so"
    start, length = container.program_place(friend)
    zeroed(friend, start + length - 9000, 40)
    assert verdicts(friend)[container.TITLES["program"]] == "damaged: library.so, PYZ.pyz"
    zeroed(friend, start + length - 200, 40)
    assert verdicts(friend)[container.TITLES["program"]] == "damaged: its table"


def test_every_changed_byte_of_what_is_compressed_is_found_in_an_archive(tmp_path):
    stub, noise = fake_stub(tmp_path / "stub", archive=2000), random.Random(5)
    whole, (start, _) = stub.read_bytes(), container.program_place(stub)
    assert damaged_entries(stub) == []
    for _ in range(300):
        place = start + noise.randrange(2000)
        stub.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << noise.randrange(8)]) + whole[place + 1 :])
        assert damaged_entries(stub) == ["library.so"]


def test_a_table_of_nonsense_is_one_line(tmp_path):
    stub, noise = fake_stub(tmp_path / "stub", archive=500), random.Random(6)
    whole = stub.read_bytes()
    table = whole.rindex(b"library.so") - 20
    for _ in range(500):
        changed = bytearray(whole)
        changed[noise.randrange(table, len(whole) - 40)] = noise.randrange(256)
        stub.write_bytes(changed)
        try:
            damaged_entries(stub)
        except FileError as error:
            assert str(error).isprintable()  # noqa: PT017


@pytest.mark.parametrize("lost", [1, 100, 21_000, 64_000])
def test_what_a_cut_has_taken_is_said(friend, lost):
    """A packed program that is cut short cannot even say so itself, unless its boot loader does."""
    whole, sections = friend.read_bytes(), container.find(friend).sections
    friend.write_bytes(whole[:-lost])
    program = sections["program"]
    if program.length < lost:  # the list of the parts is gone, too
        with pytest.raises(FileError, match="holds no list of its parts"):
            parts_of(friend)
    else:
        assert verdicts(friend) == {container.TITLES["program"]: f"cut short: {program.length - lost:,} bytes of it are there"}


@pytest.mark.skipif(os.name == "nt", reason="an executable of Unix")
def test_an_executable_that_is_no_stub_is_called_that(model, tmp_path):
    with pytest.raises(FileError, match="is an executable, but not a stub, or one that was cut short; make one with"):
        open_stub(Path("/bin/ls"))


def test_a_damaged_stub_is_not_packed(model, tmp_path):
    """It would get checksums of its damage, and --check would call it whole."""
    stub = fake_stub(tmp_path / "stub", archive=20_000)
    zeroed(stub, container.program_place(stub)[0] + 3000)
    with pytest.raises(FileError, match=r"stub: is damaged: library\.so in it does not unpack"):
        pack(model, open_stub(stub), tmp_path / "friend", Persona())
    assert not list(tmp_path.glob("*friend*"))


def test_a_damaged_executable_gets_no_new_checksums_with_a_new_persona(friend):
    zeroed(friend, container.program_place(friend)[0] + 3000)
    before = friend.read_bytes()
    with pytest.raises(FileError, match="damaged"):
        set_persona(container.find(friend), lambda persona: persona, friend)
    assert friend.read_bytes() == before


def test_a_signed_boot_loader_is_not_called_damaged(model, tmp_path):
    """Windows keeps the place of a signature in a directory of the header; a Mac checks what it has signed itself."""
    friend = pack(model, open_stub(fake_stub(tmp_path / "stub", kind="windows")), tmp_path / "friend.exe", Persona())
    data = bytearray(friend.read_bytes())
    optional = 64 + 24
    data[optional + 8] ^= 1
    friend.write_bytes(data)
    assert container.find(friend).damaged() == ["boot"]
    data[optional + 144 : optional + 152] = b"\1\0\0\0\1\0\0\0"
    friend.write_bytes(data)
    assert container.find(friend).damaged() == []


def test_a_model_file_is_whole_as_far_as_can_be_told(model, tmp_path, capsys):
    assert main(["check", "small-talk"]) == main(["check", str(model)]) == 0
    *_, keys, tensors = capsys.readouterr().out.splitlines()
    assert keys.startswith("keys of the GGUF")
    assert tensors.split()[1] == "tensors"
    weights = np.full((64, 64), np.nan, np.float32)
    bad = write_model(tmp_path / "bad.gguf", n_layer=1, tensors={"blk.0.attn_q.weight": weights})
    assert "NaN" in verdicts(bad)[next(name for name in verdicts(bad) if name.endswith("tensors"))]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(model.read_bytes()[:-5000])
    assert main(["check", str(cut)]) == 1
    assert main(["check", str(tmp_path / "nowhere")]) == 1
    assert main(["check", __file__]) == 1
    assert capsys.readouterr().err.count("\n") == 3


def test_an_exporters_texts_are_tried_again(tmp_path):
    keys = {"pocketlm.tokenizer.test_texts": ["hello"], "pocketlm.tokenizer.test_ids": ["1 2 3"]}
    wrong = verdicts(write_model(tmp_path / "model.gguf", n_layer=1, metadata=keys))
    assert "does not give the ids" in wrong["keys of the GGUF"]


def test_other_keys_leave_the_weights_as_they_are(model, tmp_path):
    """`pack --name --chat-template`: nothing is quantised again, also of what a packed executable holds."""
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}!")
    stub, friend = fake_stub(tmp_path / "stub"), tmp_path / "friend"
    for source, out in ((model, friend), (friend, tmp_path / "other")):
        words = ["pack", str(source), "--stub", str(stub), "-o", str(out), "--name", "Ada"]
        assert main([*words, "--chat-template", str(tmp_path / "t.jinja")]) == 0
        assert main(["unpack", str(out), "-o", str(tmp_path / "again.gguf")]) == 0
        with open_gguf(model) as before, open_gguf(tmp_path / "again.gguf") as after:
            expected = {**before.metadata, "general.name": "Ada", "tokenizer.chat_template": "{{ messages[0].content }}!"}
            assert list(after.metadata) == list(expected)
            assert all(np.array_equal(after.metadata[key], value) for key, value in expected.items())
            assert [(t.name, t.shape, t.format) for t in after.tensors.values()] == [
                (t.name, t.shape, t.format) for t in before.tensors.values()
            ]
            assert all(np.array_equal(t.data, before.tensors[name].data) for name, t in after.tensors.items())


@pytest.mark.parametrize("options", [[], ["--quant", "q8_0"]])
def test_a_model_without_a_name_is_called_as_its_file(options, tmp_path, capsys):
    path, stub, friend = tmp_path / "Ada.gguf", fake_stub(tmp_path / "stub"), tmp_path / "friend"
    write_model(path, n_layer=1, metadata={"general.name": None})
    assert main(["pack", str(path), "--stub", str(stub), "-o", str(friend), *options]) == 0
    capsys.readouterr()
    assert main(["persona", str(friend)]) == 0
    assert "Ada" in capsys.readouterr().out
