"""The files that are written for other systems are what those systems, and independent readers, take them for."""

import ast
import ctypes
import errno
import marshal
import mmap
import os
import shutil
import struct
import subprocess
import sys
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest
from packing import mach_o
from signatures import check_signature

from pocketlm.build import archive_writer, bytecode, compose, elf, icon, licences, macho, modules, pe
from pocketlm.build.contents import EXCLUDED
from pocketlm.errors import FileError, PocketlmError

CODE = bytes.fromhex("8d0411c3")  # lea eax, [rcx + rdx]; ret, in Windows' convention


# ---- Windows ----


def a_program(path: Path) -> bytes:
    """An .exe: a DLL is one but for a flag."""
    data = bytearray(pe.shared_library("program.exe", CODE, {"add": 0}))
    path.write_bytes(data)
    return bytes(data)


def warnings_of(read) -> list[str]:
    """But for what is as it should be: a library need have no entry point, and code of four bytes leaves much empty."""
    return [text for text in read.get_warnings() if "AddressOfEntryPoint" not in text and "Byte 0x00" not in text]


def checksum(data: bytes, place: int) -> int:
    """Microsoft's ImageHlp, as the books tell it: word by word, the carry added at once."""
    total = 0
    data = data[:place] + bytes(4) + data[place + 4 :]
    for (word,) in struct.iter_unpack("<H", data + bytes(len(data) % 2)):
        total += word
        total = (total & 0xFFFF) + (total >> 16)
    return total + len(data)


def test_a_library_offers_its_functions_to_an_independent_reader(tmp_path):
    pefile = pytest.importorskip("pefile", reason="pefile reads Windows' files")
    data = pe.shared_library("sums.dll", CODE + bytes(60) + CODE, {"zeta": 64, "add": 0, "Beta": 0})
    read = pefile.PE(data=data)
    assert {(s.name.decode(), s.address) for s in read.DIRECTORY_ENTRY_EXPORT.symbols} == {
        ("add", 0x1000), ("Beta", 0x1000), ("zeta", 0x1040),
    }  # fmt: skip
    assert [s.name for s in read.DIRECTORY_ENTRY_EXPORT.symbols] == [b"Beta", b"add", b"zeta"]  # searched by halves
    assert read.DIRECTORY_ENTRY_EXPORT.name == b"sums.dll"
    assert read.get_data(0x1040, 4) == CODE
    assert read.verify_checksum()
    assert read.is_dll()
    assert warnings_of(read) == []
    assert pe.imports(data) == {}


@pytest.mark.skipif(sys.platform != "win32", reason="only Windows loads a DLL (tests/test_pack_windows.py does so under wine)")
def test_windows_loads_a_library(tmp_path):
    (tmp_path / "sums.dll").write_bytes(pe.shared_library("sums.dll", CODE, {"add": 0}))
    assert ctypes.CDLL(str(tmp_path / "sums.dll")).add(2, 3) == 5


def test_resources_say_who_a_program_is(tmp_path):
    pefile = pytest.importorskip("pefile", reason="pefile reads Windows' files")
    boot = a_program(tmp_path / "boot")
    for title in ("Ada", "Ёлка"):  # the second takes the first one's place
        boot = pe.with_resources(boot, title, "1.20.3", icon.images(None))
        read = pefile.PE(data=boot)
        assert [section.Name.rstrip(b"\0") for section in read.sections] == [b".text", b".edata", b".rsrc"]
        assert warnings_of(read) == []
        texts = {key.decode(): value.decode() for key, value in read.FileInfo[0][0].StringTable[0].entries.items()}
        assert (texts["FileDescription"], texts["ProductName"], texts["FileVersion"]) == (title, title, "1.20.3")
        assert (read.VS_FIXEDFILEINFO[0].FileVersionMS, read.VS_FIXEDFILEINFO[0].FileVersionLS) == (1 << 16 | 20, 3 << 16)
        kinds = {kind.id: kind for kind in read.DIRECTORY_ENTRY_RESOURCE.entries}
        assert sorted(kinds) == [3, 14, 16, 24]
        (manifest,) = (number.directory.entries[0].data.struct for number in kinds[24].directory.entries)
        text = read.get_data(manifest.OffsetToData, manifest.Size).decode()
        assert text == pe.MANIFEST
        for word in ("<activeCodePage", "UTF-8", "<longPathAware", "supportedOS", "asInvoker"):
            assert word in text
        sides = []
        for number in kinds[3].directory.entries:
            place = number.directory.entries[0].data.struct
            sides.append(struct.unpack(">I", read.get_data(place.OffsetToData, place.Size)[16:20])[0])
        assert sides == list(icon.SIDES)


@pytest.mark.parametrize("length", [0, 1, 2, 77, 70_000])
def test_the_checksum_is_the_one_that_the_books_tell(tmp_path, length):
    path = tmp_path / "program"
    path.write_bytes(a_program(path) + b"\xff\xfe\x01" * length)
    with open(path, "r+b") as file:
        pe.write_checksum(file)
    data = path.read_bytes()
    place = struct.unpack_from("<I", data, 60)[0] + 24 + 64
    assert struct.unpack_from("<I", data, place)[0] == checksum(data, place)


@pytest.mark.parametrize("cut", [0, 2, 63, 70, 200, 400])
def test_what_is_no_program_is_told_so(tmp_path, cut):
    with pytest.raises(pe.UnreadableProgram):
        pe.with_resources(a_program(tmp_path / "boot")[:cut], "Ada", "1", icon.images(None))


def test_icons_of_one_s_own(tmp_path):
    (_, _, png), own = icon.images(None)[2], tmp_path / "own"
    own.write_bytes(png)
    assert icon.images(own) == [(48, 32, png)]
    bitmap = struct.pack("<IiiHHIIiiII", 40, 16, 32, 1, 32, 0, 0, 0, 0, 0, 0) + bytes(16 * 16 * 4 + 64)
    rows = [(16, bitmap), (0, png)]
    at, head, body = 6 + 16 * len(rows), struct.pack("<HHH", 0, 1, len(rows)), b""
    for side, image in rows:
        head += struct.pack("<BBBBHHII", side, side, 0, 0, 1, 32, len(image), at + len(body))
        body += image
    own.write_bytes(head + body)
    assert icon.images(own) == [(16, 32, bitmap), (256, 32, png)]
    for broken in (b"", b"text", (head + body)[:-1], head[:20], png[:20]):
        own.write_bytes(broken)
        with pytest.raises(FileError, match="is no icon that Windows shows"):
            icon.images(own)
    with pytest.raises(FileError, match="cannot be read"):
        icon.images(tmp_path / "nowhere")


# ---- macOS ----


def wrong_in(path: Path) -> list[str]:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return check_signature(data)


@pytest.mark.parametrize("length", [5000, 4096 * 3, 100_001, *([4_200_000_001] if os.environ.get("POCKETLM_THOROUGH") else [])])
def test_a_signature_covers_all_that_is_before_it(tmp_path, length):
    """POCKETLM_THOROUGH=1: of a program as long as macOS runs, too."""
    path = tmp_path / "program"
    with open(path, "w+b") as file:
        file.write(mach_o(5000).ljust(5000, b"\xa5"))
        file.truncate(length)
        macho.sign(file)
    assert wrong_in(path) == []
    assert path.stat().st_size == macho.signed_bytes(length)
    with open(path, "r+b") as file:  # and again, over what is there
        macho.sign(file)
    assert wrong_in(path) == []


def test_a_changed_byte_is_what_a_signature_tells(tmp_path):
    path = tmp_path / "program"
    path.write_bytes(mach_o(5000).ljust(9000, b"\xa5"))
    with open(path, "r+b") as file:
        macho.sign(file)
    data = bytearray(path.read_bytes())
    for place in (1000, 4999, 8999):
        data[place] ^= 1
        assert check_signature(bytes(data))
        data[place] ^= 1


def test_a_file_for_two_processors_gives_one_s_part():
    numbers = {"x86_64": 0x01000007, "aarch64": 0x0100000C}
    thin = {machine: struct.pack("<II", 0xFEEDFACF, number) + machine.encode() for machine, number in numbers.items()}
    head, body = struct.pack(">II", 0xCAFEBABE, 2), b""
    for number, part in zip(numbers.values(), thin.values(), strict=True):
        head += struct.pack(">5I", number, 0, 48 + len(body), len(part), 0)
        body += part
    for machine, part in thin.items():
        assert macho.part_for(head + body, machine) == part
        assert macho.part_for(part, machine) == part
    with pytest.raises(macho.UnreadableHeader, match="nothing for x86_64"):
        macho.part_for(thin["aarch64"], "x86_64")


# ---- Linux ----


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux loads its libraries")
def test_a_library_without_sections_still_loads(tmp_path):
    import numpy.linalg._umath_linalg as plain

    whole = Path(plain.__file__).read_bytes()
    assert "libc.so.6" in elf.needed(whole)
    smaller = elf.without_sections(whole)
    assert len(smaller) < len(whole)
    copy = tmp_path / Path(plain.__file__).name
    copy.write_bytes(smaller)
    script = (
        "import importlib.machinery as m, importlib.util as u, sys, numpy\n"
        "loader = m.ExtensionFileLoader('numpy.linalg._umath_linalg', sys.argv[1])\n"
        "module = u.module_from_spec(u.spec_from_loader(loader.name, loader)); loader.exec_module(module)\n"
        "print(module.det(numpy.eye(3)))"
    )
    library = f"{Path(plain.__file__).parents[2] / 'numpy.libs'}"  # which it looks for beside itself
    command, environment = [sys.executable, "-c", script, copy], {"LD_LIBRARY_PATH": library}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("1.0\n", "")
    if shutil.which("readelf"):
        assert subprocess.run(["readelf", "-lW", copy], capture_output=True).returncode == 0


# ---- modules and archives ----


def test_imports_are_followed_as_the_system_would_take_them(tmp_path):
    files = {
        "start.py": "import sys, os\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n import never\n"
        "if sys.platform == 'win32':\n from one import a\nelif sys.platform.startswith('linux'):\n import two\n"
        "else:\n import three\n"
        "def f():\n try:\n  import far.away\n except ImportError:\n  import near\n"
        "if os.name != 'nt':\n import posix_only\n"
        "if sys.version_info >= (3, 99):\n import never\nelse:\n import always\n"
        "if sys.version_info < (3, 9):\n import never\n",
        "one/__init__.py": "from . import b as c\nfrom .deep import *",
        "one/deep/__init__.py": "from ..last import x",
        "two/__init__.py": "import left.out, left.inside, _two",
        "far/away.cp311.so": "\0far.hidden\0far.text, not a name\0other.thing\0",
        "_two.so": "\0two._layout\0",  # as _ctypes imports ctypes._layout
    }
    empty = ("one/a", "one/b", "one/last", "left/__init__", "left/out", "left/inside", "three", "far/__init__", "far/hidden",
             "near", "never", "always", "posix_only", "other/thing", "two/_layout")  # fmt: skip
    files |= {f"{name}.py": "" for name in empty}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    always = {"start", "far", "far.hidden", "near", "always"}
    expected = {
        "windows-x86_64": {"one", "one.a", "one.b", "one.deep", "one.last"},
        "linux-x86_64": {"two", "two._layout", "left", "left.inside", "posix_only"},
        "macos-arm64": {"three", "posix_only"},
    }  # fmt: skip
    for platform, more in expected.items():
        found = modules.find(["start"], [tmp_path], platform, ["left.out"])
        assert set(found.python) == always | more
        assert set(found.compiled) == {"far.away"} | ({"_two"} & {f"_{name}" for name in more})


@pytest.mark.parametrize("name", ["bz2", "lzma", "compression.zstd"])  # which shutil imports for archives that nobody packs
def test_no_compression_comes_with_a_library_of_its_own(tmp_path, name):
    folder, last = tmp_path.joinpath(*name.split(".")[:-1]), name.rpartition(".")[2]
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    (folder / f"{last}.py").write_text(f"import _{last}")
    (tmp_path / f"_{last}.so").touch()
    (tmp_path / "shutil.py").write_text(f"try:\n import {name}, _{last}\nexcept ImportError:\n pass")
    assert modules.find(["shutil"], [tmp_path], "macos-arm64", EXCLUDED).compiled == {}


def test_bytecode_is_the_same_whoever_compiles_it(tmp_path):
    text = 'def f(x):\n    """Doc."""\n    assert x\n    return x in {"b", "a", "c", "d", "e"}, "a", ("a", "zz"), 1 << 70\n'
    files = {}
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.py").write_text(text)
        files[name] = {"package.m": tmp_path / name / "m.py"}
    (one, magic), two = bytecode.compile_all(files["here"]), bytecode.compile_all(files["there"])
    assert (one, magic) == two
    assert magic == MAGIC_NUMBER
    code = marshal.loads(one["package.m"])
    assert code.co_filename == "package/m.py"
    space = {}
    exec(code, space)
    assert space["f"](None) == (False, "a", ("a", "zz"), 1 << 70)
    assert space["f"].__doc__ is None
    (tmp_path / "here" / "m.py").write_text("def")
    with pytest.raises(PocketlmError, match="could not be compiled") as caught:
        bytecode.compile_all(files["here"])
    assert "\n" not in str(caught.value)


def test_bytecode_does_not_tell_what_the_compiler_had_loaded(tmp_path):
    """A Python whose own modules lie there compiled begins with other texts interned than one that compiles them first."""
    (tmp_path / "m.py").write_text("x = ['*', '+', 'é', '']", "utf-8")
    compiled = set()
    for before in ("", "import sys; [sys.intern(text) for text in ('*', '+', 'é', '')]\n"):
        command = [sys.executable, "-S", "-c", before + bytecode._COMPILER]
        done = subprocess.run(command, input=f"{tmp_path / 'm.py'}\0m".encode(), check=True, capture_output=True)
        compiled.add(done.stdout)
    assert len(compiled) == 1


def test_pyinstaller_reads_the_archive(tmp_path):
    readers = pytest.importorskip("PyInstaller.archive.readers", reason="PyInstaller reads its archives")
    code = marshal.dumps(compile("x = 1", "m.py", "exec"))
    codes = {name: archive_writer.Code(name == "p", code) for name in ("m", "p", "p.q")}
    entries = [
        archive_writer.Entry(archive_writer.SCRIPT, "start", code),
        archive_writer.Entry(archive_writer.BINARY, "a/b.so", b"library" * 99),
        archive_writer.Entry(archive_writer.MODULES, "PYZ.pyz", archive_writer.modules(codes, MAGIC_NUMBER)),
        archive_writer.Entry(archive_writer.OPTION, "X utf8=1"),
    ]  # fmt: skip
    path = tmp_path / "program"
    path.write_bytes(b"boot" * 1000 + archive_writer.program(entries, sys.version_info[:2], "libpython.so"))
    read = readers.CArchiveReader(str(path))
    assert read.extract("a/b.so") == b"library" * 99
    assert read.options == ["X utf8=1"]
    inner = read.open_embedded_archive("PYZ.pyz")
    assert {name: row[0] for name, row in inner.toc.items()} == {"m": 0, "p": 1, "p.q": 0}
    assert inner.extract("p.q") == marshal.loads(code)


def test_python_starts_from_its_own_archive(tmp_path):
    code = archive_writer.Code(False, marshal.dumps(compile("answer = 42", "m.py", "exec")))
    path = tmp_path / "base.zip"
    path.write_bytes(archive_writer.library({"m": code, "p": code._replace(is_package=True), "p.q": code}, MAGIC_NUMBER))
    command = [sys.executable, "-c", "import m, p.q; print(m.answer + p.answer + p.q.answer)"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True)
    assert done.stdout.split() == [b"126"], done.stderr.decode()


def test_a_part_without_a_licence_is_an_error(tmp_path):
    import zipfile

    path, library = tmp_path / "free-1-py3-none-any.whl", Path(ast.__file__).parent
    for name in ("free-1.dist-info/licenses/docs/LICENSE.md", "free-1.dist-info/COPYING.txt"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(name, "Do as you like.")
        text = licences.collect({"free": path}, {"libpython3": "its own"}, library, ["zlib1.dll", "python311.dll"])
        for words in ("Do as you like.", "Jean-loup Gailly", "MIT License", "its own"):
            assert words in text
    with pytest.raises(PocketlmError, match=r"no licence is known of libsecret\.so"):
        licences.collect({}, {"libpython3": ""}, library, ["libsecret.so"])
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("free.py", "")
    with pytest.raises(PocketlmError, match="has no licence in it"):
        licences.collect({"free": path}, {"libpython3": ""}, library, [])


def test_a_title_of_any_length_has_a_version_resource():
    assert len(pe._version("x" * 40_000, "1")) == len(pe._version("x" * 256, "1"))


def test_what_lies_in_the_folder_is_not_imported_by_the_compiler(tmp_path):
    for name in ("json", "ast", "marshal", "io", "codecs"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('somebody put this here')")
    (tmp_path / "m.txt").write_text("x = 1")
    command = [sys.executable, "-S", "-c", bytecode._COMPILER]
    assert subprocess.run(command, cwd=tmp_path, input=b"m.txt\0m", check=True, capture_output=True).stdout.startswith(
        MAGIC_NUMBER
    )


def test_a_new_program_does_not_speak_of_the_signature_of_the_old_one(tmp_path):
    data = bytearray(a_program(tmp_path / "boot"))
    place = pe._File(data).directory(4)  # of the certificates
    struct.pack_into("<II", data, place, len(data), 512)
    assert struct.unpack_from("<II", pe.with_resources(data, "Ada", "1", icon.images(None)), place) == (0, 0)
    (tmp_path / "boot").write_bytes(data)
    with open(tmp_path / "boot", "r+b") as file:
        pe.write_checksum(file)
    assert struct.unpack_from("<II", (tmp_path / "boot").read_bytes(), place) == (0, 0)


def test_what_is_compiled_for_a_python_without_the_lock_is_not_taken(tmp_path):
    for file in ("select.cp313t-win_amd64.pyd", "select.pyd", "zlib.cpython-313t-x86_64-linux-gnu.so"):
        (tmp_path / file).write_bytes(b"")
    found = modules.find(["select", "zlib"], [tmp_path], "windows-x86_64", ())
    assert found.compiled == {"select": tmp_path / "select.pyd"}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux' programs can hold this Python")
def test_a_large_python_of_this_system_is_left_for_debians_where_that_runs(tmp_path, monkeypatch):
    path, glibc = tmp_path / "libpython.so", ["glibc 2.36"]
    monkeypatch.setattr(compose.sysconfig, "get_config_var", {"LIBDIR": str(tmp_path)}.get)
    monkeypatch.setattr(compose.os, "confstr", lambda name: glibc[0])
    assert compose._own_library(path.name) is None
    for megabytes, version, is_own in ((7, "2.36", True), (9, "2.36", False), (9, "2.41", False), (9, "2.35", True)):
        library = elf.shared_object(path.name, "x86_64", bytes(megabytes * 1_000_000), {"f": 0})
        path.write_bytes(library + bytes(2_000_000))  # what debuggers read does not count
        glibc[0] = f"glibc {version}"
        assert compose._own_library(path.name) == (path if is_own else None)


def test_a_full_folder_for_temporary_files_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")  # as what writes into an open file raises it, without a name

    monkeypatch.setattr(compose.wheels, "fetch", lambda *_: {})
    monkeypatch.setattr(compose, "_unpack", full)
    monkeypatch.setattr(compose.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compose, "_own_library", lambda _: None)
    with pytest.raises(FileError) as error:
        compose.compose("windows-x86_64", tmp_path / "stub")
    advice = "make room there, or name another folder in TMPDIR"
    assert str(error.value) == f"{tmp_path}: cannot be filled (No space left on device); {advice}"
    assert list(tmp_path.iterdir()) == []
