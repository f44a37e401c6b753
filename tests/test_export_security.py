"""A checkpoint from a stranger cannot run code, nor exhaust the machine: payloads, bombs, damaged archives."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pocketlm.errors import FileError
from pocketlm.export.checkpoint import open_checkpoint, plain
from pocketlm.pickle_reader import read_pickle

# what published attacks on pickles call: module, name
CALLS = """
os system|posix system|nt system|os popen|os execv|os spawnlp|os posix_spawn|os remove|os.path join|subprocess Popen
subprocess call|subprocess check_output|subprocess run|subprocess getoutput|builtins eval|builtins exec|builtins compile
builtins getattr|builtins setattr|builtins __import__|builtins open|builtins globals|builtins map|builtins apply
builtins print|__builtin__ eval|__builtin__ exec|__builtin__ file|__builtin__ getattr|__builtin__ apply|commands getoutput
runpy _run_code|runpy run_path|runpy run_module|numpy.f2py.crackfortran getlincoef|numpy.f2py.crackfortran _eval_length
numpy.testing._private.utils runstring|numpy.testing._private.utils execfile|numpy load|torch load|torch.hub load
torch.jit load|torch.serialization load|torch.storage _load_from_bytes|torch.utils.collect_env run
torch._dynamo.guards GuardBuilder.get|torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression
torch.utils._config_module ConfigModule.load_config|torch.utils.bottleneck.__main__ run_cprofile
torch.distributed.rpc rpc_sync|pty spawn|webbrowser open|timeit timeit|timeit main|timeit Timer|pickle loads|pickle load
pickle Unpickler|_pickle loads|marshal loads|shelve open|cloudpickle.cloudpickle loads|cloudpickle loads|dill loads
dill._dill _load_type|joblib load|pandas read_pickle|copyreg add_extension|copyreg __newobj__|functools partial
functools reduce|operator attrgetter|operator methodcaller|operator itemgetter|_io open|_io FileIO|io open|io open_code
shutil rmtree|shutil move|socket socket|socket create_connection|ctypes CDLL|ctypes.util find_library|_ctypes dlopen
sys modules.__getitem__|sys setprofile|sys _getframe|cProfile run|cProfile runctx|profile Profile.run|pdb run|bdb Bdb.run
trace Trace.run|code InteractiveInterpreter.runcode|code interact|codeop compile_command
asyncio.unix_events _UnixSubprocessTransport._start|idlelib.pyshell ModifiedInterpreter.runcode
idlelib.run Executive.runcode|idlelib.autocomplete AutoComplete.get_entity|lib2to3.pgen2.grammar Grammar.loads
lib2to3.pgen2.pgen ParserGenerator.make_label|logging.config valid_ident|doctest debug_script|importlib import_module
importlib.machinery SourceFileLoader|imp load_source|pkgutil resolve_name|pip main|pip._internal main|venv create
ensurepip _run_pip|distutils.file_util write_file|multiprocessing.util spawnv_passfds|signal signal|threading Thread
http.server HTTPServer|urllib.request urlopen|requests get|ssl get_server_certificate|ftplib FTP|smtplib SMTP
xmlrpc.client ServerProxy|types CodeType|types FunctionType|_thread start_new_thread|gc get_objects|site execsitecustomize
zipimport zipimporter|uuid _get_command_stdout|aiohttp.client ClientSession|tensorflow.io read_file|keras.models load_model
jinja2 Template
""".replace("\n", "|")
NAMES = [tuple(row.split(" ")) for row in CALLS.split("|") if row]


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def short(value: str) -> bytes:
    return b"\x8c" + bytes([len(value.encode())]) + value.encode()


ARGUMENT = "touch /tmp/pocketlm-was-here"
# how a pickle can come to call something: a function module, name → the pickle
WAYS: dict[str, Callable[[str, str], bytes]] = {
    "GLOBAL and REDUCE": lambda m, n: b"\x80\x02c" + f"{m}\n{n}\n".encode() + text(ARGUMENT) + b"\x85R.",
    "protocol 0": lambda m, n: f"c{m}\n{n}\n(S'{ARGUMENT}'\ntR.".encode(),
    "STACK_GLOBAL": lambda m, n: b"\x80\x04" + short(m) + short(n) + b"\x93" + short(ARGUMENT) + b"\x85R.",
    "STACK_GLOBAL from the memo": lambda m, n: b"\x80\x04" + short(n) + b"\x940" + short(m) + b"\x940h\x01h\x00\x93)R.",
    "memo overwritten": lambda m, n: b"\x80\x04" + text("torch") + b"q\x05" + text(m) + b"q\x050h\x05" + text(n) + b"\x93)R.",
    "INST": lambda m, n: b"(" + text(ARGUMENT) + f"i{m}\n{n}\n.".encode(),
    "OBJ": lambda m, n: b"(c" + f"{m}\n{n}\n".encode() + text(ARGUMENT) + b"o.",
    "NEWOBJ, then REDUCE": lambda m, n: b"\x80\x02c" + f"{m}\n{n}\n".encode() + b")\x81" + text(ARGUMENT) + b"\x85R.",
    "NEWOBJ, then __setstate__": lambda m, n: b"\x80\x02c" + f"{m}\n{n}\n".encode() + b")\x81" + text(ARGUMENT) + b"b.",
    "behind harmless data": lambda m, n: pickle.dumps({"a": [1] * 50}, 2)[:-1] + b"0c" + f"{m}\n{n}\n".encode() + b")R0}.",
    "in a tensor's arguments": lambda m, n: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(c" + f"{m}\n{n}\n".encode() + text(ARGUMENT) + b"\x85RK\x00))N}tR."
    ),
    "as a tensor's function": lambda m, n: (
        b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(c" + f"{m}\n{n}\n".encode() + b"N" + text(ARGUMENT) + b"\x85}tR."
    ),
}


class Events(list[str]):
    """The audit events of a stretch of code. A hook cannot be taken away again, so one is kept and switched."""

    _active: Events | None = None
    _hooked = False

    def __enter__(self) -> Events:
        if not Events._hooked:
            sys.addaudithook(lambda name, args: Events._active.append(name) if Events._active is not None else None)
            Events._hooked = True
        Events._active = self
        return self

    def __exit__(self, *_: object) -> None:
        Events._active = None


def torch_zip(pickled: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch.save lays one out."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("ckpt/data.pkl", pickled)
        archive.writestr("ckpt/byteorder", "little")
        for key, data in (storages or {}).items():
            archive.writestr(f"ckpt/data/{key}", data)
        archive.writestr("ckpt/version", "3\n")
    return file.getvalue()


def refused(path: Path, content: bytes) -> str:
    """The one line that reading `content` ends with."""
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        open_checkpoint(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    return str(error.value)


# ── code ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", WAYS)
def test_every_published_call_is_refused_by_its_name(way: str, tmp_path: Path) -> None:
    for module, name in NAMES:
        shown = f"{module}.{name}".replace("__builtin__", "builtins")
        assert f"call {shown}" in refused(tmp_path / "ckpt.pt", torch_zip(WAYS[way](module, name))), (module, name)


def test_reading_a_hostile_pickle_causes_no_event_at_all() -> None:
    payloads = [make(module, name) for make in WAYS.values() for module, name in NAMES]
    with Events() as events:
        for payload in payloads:
            try:
                read_pickle(payload, "x.pt", {})
            except FileError:
                continue
            raise AssertionError("not refused")
    assert events == []


def test_opening_a_checkpoint_opens_nothing_but_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(torch_zip(WAYS["STACK_GLOBAL"]("os", "system")))
    with Events() as events, pytest.raises(FileError):
        open_checkpoint(path)
    assert set(events) <= {"open", "mmap.__new__"}
    assert events.count("open") == 1


def test_the_same_payloads_in_the_old_format_are_refused(tmp_path: Path) -> None:
    for module, name in NAMES:
        payload = WAYS["GLOBAL and REDUCE"](module, name)
        old = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + payload
        assert "wants to call" in refused(tmp_path / "old.pt", old)


@pytest.mark.parametrize("way", ["GLOBAL and REDUCE", "protocol 0", "INST", "OBJ"])
def test_a_bare_pickle_is_refused_by_the_name_too(way: str, tmp_path: Path) -> None:
    payload = WAYS[way]("os", "system")
    if way == "INST":
        payload = b"(ios\nsystem\n."
    assert "call os.system" in refused(tmp_path / "ckpt.pt", payload)


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"\x80\x02\x82\x01.", "extension 1"),
        (b"\x80\x02\x83\x01\x02.", "extension 513"),
        (b"\x80\x02cos\nsystem\n}b.", "os.system.__setstate__"),
        (b"\x80\x04cmain\nThing\n)}" + short("x") + b"K\x01s\x92.", "keyword arguments"),
        (b"\x80\x02X\x05\x00\x00\x00hello)R.", "call str"),
        (b"\x80\x02}(R.", "damaged"),
        (b"\x80\x05\x97.", "damaged"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\nq\x00](h\x00Nh\x00}eR.", "damaged"),
    ],
)
def test_rarer_opcodes(payload: bytes, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path / "ckpt.pt", torch_zip(payload))


def test_a_name_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    message = refused(tmp_path / "ckpt.pt", torch_zip(WAYS["STACK_GLOBAL"]("os\x1b[2J\r\n", "system\u202e")))
    assert message.isascii()
    assert message.isprintable()


def test_objects_of_unknown_classes_are_plain_data() -> None:
    pickled = (
        b"\x80\x02csome.where\nConfig\n)\x81}("
        + text("n_head")
        + b"K\x04"
        + text("inner")
        + b"cother\nKind\n)\x81}"
        + text("x")
    )
    tree, _ = read_pickle(pickled + b"K\x01sbub.", "x.pt", {})
    assert plain(tree) == {"n_head": 4, "inner": {"x": 1}}


# ── bombs ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SHARED_TUPLES = b"\x80\x02)" + b"2\x86" * 60_000 + b"."  # each the pair of the one before: 2^60000 leaves
BOMBS = {
    "tuples of themselves": SHARED_TUPLES,
    "as weights": b"\x80\x02}" + text("model") + b"}" + text("w") + SHARED_TUPLES[2:-1] + b"ss.",
    "as a key": b"\x80\x02}" + SHARED_TUPLES[2:-1] + b"K\x01s.",
    "as a device": b"\x80\x02ctorch\ndevice\n" + SHARED_TUPLES[2:-1] + b"\x85R.",
    "as a size": b"\x80\x02ctorch\nSize\n" + SHARED_TUPLES[2:-1] + b"\x85R.",
    "dicts of themselves": b"\x80\x02}q\x00" + text("a") + b"h\x00s" + text("b") + b"h\x00s.",
    "lists of themselves": b"\x80\x02](q\x00" + b"h\x00" * 200 + b"e.",
    "deep lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 200_000 + b".",
    "a long number": b"\x80\x02\x8b\xff\xff\xff\x7f" + bytes(1000) + b".",
    "a negative length": b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a long decimal": b"I" + b"9" * 100_000 + b"\n.",
    "a text longer than the file": b"\x80\x04\x8d" + b"\xff" * 8 + b"x.",
    "bytes longer than the file": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "marks": b"(" * 300_000,
    "a set copied again and again": (
        b"\x80\x02](" + b"".join(b"M" + struct.pack("<H",
        i) for i in range(60_000)) + b"eq\x00" + b"cbuiltins\nset\nh\x00\x85R0" * 20_000 + b"N."
    ),
    "nothing": b"",
    "an empty stack": b"\x80\x02.",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_soon_with_one_line(bomb: str, tmp_path: Path) -> None:
    refused(tmp_path / "ckpt.pt", torch_zip(BOMBS[bomb]))  # if it were not stopped: for ever, or all of the memory


def test_a_pickle_of_too_many_instructions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pocketlm.pickle_reader.MAX_OPCODES", 1000)
    assert "more than 1000 instructions" in refused(tmp_path / "ckpt.pt", torch_zip(b"N0" * 1000 + b"."))


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


# ── damaged archives ─────────────────────────────────────────────────────────────────────────────────────────────────

TENSOR = (
    b"\x80\x02}" + text("w") + b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
    + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x06tQK\x00K\x02K\x03\x86K\x03K\x01\x86\x89}tRs."
)  # fmt: skip
VALUES = np.arange(6, dtype="<f4")
SOUND = torch_zip(TENSOR, {"0": VALUES.tobytes()})


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


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────────


def safetensors(header: object, data: bytes = bytes(24), length: int | None = None) -> bytes:
    packed = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(packed) if length is None else length) + packed + data


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


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
