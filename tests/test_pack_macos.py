"""What Macs get, composed here: its structure, by independent readers. Only a Mac can run it, and none has."""

import shutil
import struct
from pathlib import Path

import pytest
from packing import composed_stub
from signatures import check_signature
from test_pack_aarch64 import entries
from tiny_models import write_model

from pocketlm.build.pack import open_stub, pack, set_persona, with_texts
from pocketlm.build.persona import Persona
from pocketlm.runtime import container

PROCESSORS = {"macos-arm64": 0x0100000C, "macos-x86_64": 0x01000007}


@pytest.fixture(scope="module", params=PROCESSORS)
def packed(request, tmp_path_factory):
    """(platform, the executable, the model's bytes)"""
    folder = tmp_path_factory.mktemp("friend")
    model = write_model(folder / "model.gguf", format="Q4_0")
    stub = composed_stub(request.param, Path(request.config.cache.mkdir("pocketlm-stub")))
    assert check_signature(stub.read_bytes()) == []
    return request.param, pack(model, open_stub(stub), folder / "friend", Persona(title="Ada")), model.stat().st_size


def test_the_signature_is_right_and_covers_the_model(packed):
    platform, friend, n_model = packed
    data = friend.read_bytes()
    assert struct.unpack_from("<I", data, 4)[0] == PROCESSORS[platform]
    assert check_signature(data) == []
    assert len(data) - n_model < 13e6
    found = container.find(friend)
    assert found is not None
    found.check()


def test_another_persona_is_signed_anew(packed, tmp_path):
    _, friend, _ = packed
    other = Path(shutil.copy(friend, tmp_path / "other"))
    found = container.find(other)
    assert found is not None
    set_persona(found, lambda old: with_texts(old, {"title": "Bert " * 20}, {}), other)
    assert check_signature(other.read_bytes()) == []
    assert other.read_bytes() != friend.read_bytes()


def test_every_library_is_for_the_processor_and_wants_only_what_a_mac_has(packed):
    platform, friend, _ = packed
    lief = pytest.importorskip("lief", reason="lief reads Macs' files")
    libraries = [(name, content) for kind, name, content in entries(friend) if kind == b"b"]
    names = {name.rpartition("/")[2] for name, _ in libraries}
    assert {"libpython3.11.dylib"[:9]} <= {name[:9] for name in names}
    for name, data in libraries:
        parts = lief.MachO.parse(list(data))
        assert len(parts) == 1, name
        (part,) = parts
        assert int(part.header.cpu_type.value) == PROCESSORS[platform], name
        for wanted in part.libraries:
            if wanted.command.name != "ID_DYLIB":
                assert wanted.name.startswith(("/usr/lib/", "/System/Library/")), name
        if platform == "macos-arm64":
            assert part.has_code_signature, name
    whole = lief.MachO.parse(str(friend)).at(0)
    assert lief.MachO.check_layout(whole) == (True, "")


def test_macholib_and_pyinstaller_read_it_too(packed):
    _, friend, _ = packed
    macho = pytest.importorskip("macholib.MachO", reason="macholib reads Macs' files")
    (header,) = macho.MachO(str(friend)).headers
    assert header.commands[-1][0].get_cmd_name() == "LC_CODE_SIGNATURE"
    readers = pytest.importorskip("PyInstaller.archive.readers", reason="PyInstaller reads its archives")
    assert "PYZ.pyz" in readers.CArchiveReader(str(friend)).toc
