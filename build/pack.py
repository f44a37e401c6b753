"""One executable out of a stub and a model, and the model out of the executable.

In: a stub (or any packed executable, of any system), a GGUF, a persona. Out: an executable, written as a stream beside the
target and renamed; the same inputs give the same bytes. Knows no conversations; runtime/container.py has the container's form.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from pocketlm import __version__
from pocketlm.build import macho, pe
from pocketlm.build.archive_reader import damaged_entries
from pocketlm.build.icon import Image, images
from pocketlm.build.persona import Persona, from_bytes
from pocketlm.build.tiled_gguf import store, unstore
from pocketlm.errors import FileError
from pocketlm.runtime import container
from pocketlm.runtime.atomic import check_room, replacing_file
from pocketlm.runtime.container import PAGE, Packed, Section, copy, digest
from pocketlm.runtime.gguf_reader import open_gguf

LIMIT = 1 << 32  # of Windows' loader, and of the 32-bit sizes in a Mach-O
SLACK = 1 << 24  # bytes that filling rows up and the record may add, for the check of the disk's free space

_MACHINES = {  # ELF's and PE's numbers of processors
    ("linux", 62): "linux-x86_64", ("linux", 183): "linux-aarch64", ("windows", 0x8664): "windows-x86_64",
    ("windows", 0xAA64): "windows-arm64", ("macos", 0x0100000C): "macos-arm64", ("macos", 0x01000007): "macos-x86_64",
}  # fmt: skip


@dataclass(frozen=True)
class Stub:
    """An executable without a model: the parts of a file that make it."""

    path: Path
    platform: str  # as in runtime/native/aot.py
    boot: int  # bytes of the boot loader, from the beginning
    program: tuple[int, int]  # offset and length of PyInstaller's archive


def open_stub(path: Path) -> Stub:
    """A stub, or a packed executable to be used as one. Raises FileError."""
    if not container.is_program(path):
        raise FileError(path, "is not a stub" if path.exists() else "there is no such file", "make one with pocketlm stub")
    try:
        program = container.program_place(path)
    except FileError:
        problem = "is an executable, but not a stub, or one that was cut short"
        raise FileError(path, problem, "make one with pocketlm stub") from None
    packed = container.find(path)
    return Stub(path, platform_of(path), packed.sections["boot"].length if packed else program[0], program)


def platform_of(path: Path) -> str:
    """The system and processor that an executable is for. Raises FileError for an unknown one."""
    with open(path, "rb") as file:
        head = file.read(PAGE)
    try:
        if head.startswith(b"\x7fELF"):
            key = "linux", struct.unpack_from("<H", head, 18)[0]
        elif head.startswith(b"MZ"):
            key = "windows", struct.unpack_from("<H", head, struct.unpack_from("<I", head, 60)[0] + 4)[0]
        else:
            key = "macos", struct.unpack_from("<I", head, 4)[0]
        return _MACHINES[key]
    except (struct.error, KeyError):
        raise FileError(path, "is for a system that pocketlm does not know", "use a stub made by pocketlm stub") from None


def name_for(platform: str, out: Path) -> Path:
    """The path of an executable that is to be called `out`: Windows starts none without .exe."""
    has_none = platform.startswith("windows") and out.suffix.lower() != ".exe"
    return out.with_name(out.name + ".exe") if has_none else out


def pack(
    model: Path, stub: Stub, out: Path, persona: Persona, reference: bytes = b"", trial: Callable[[Path], object] | None = None,
    icons: Sequence[Image] | None = None,
) -> Path:  # fmt: skip
    """Write the executable; returns its path, which ends in .exe for Windows.

    `reference`: the results that --selftest compares with (selftest.py). `trial` is called with the finished executable, under
    another name; if it raises, nothing is left behind. `icons`: for Windows, in place of pocketlm's own. Raises FileError if
    the model cannot be packed, the stub is damaged, the disk is too small, or the system could not run the result.
    """
    out = name_for(stub.platform, out)
    with open_gguf(model) as source, open(model, "rb") as raw, ThreadPoolExecutor(1) as other_core:
        original = other_core.submit(_whole, model)
        n_bytes = model.stat().st_size + stub.boot + stub.program[1] + SLACK
        _check_size(stub, model, n_bytes - SLACK)
        check_room(out, n_bytes)
        if not persona.title:  # so that it is known before the model is open
            name = source.metadata.get("general.name")
            persona = replace(persona, title=name if isinstance(name, str) and name.strip() else model.stem)
        with replacing_file(out, n_bytes) as part:
            with _reporting(model, stub.path), open(part, "x+b") as file, open(stub.path, "rb") as program:
                boot = program.read(stub.boot)
                if stub.platform.startswith("windows"):
                    boot = pe.with_resources(boot, persona.title, __version__, icons or images(None))
                file.write(boot + bytes(-len(boot) % PAGE))
                start = file.tell()
                header, length, parts = store(source, raw, file)
                for offset, n in parts:
                    copy(raw, offset, n, file)
                sections = {
                    "boot": Section(0, len(boot), hashlib.sha256(container.without_checksum(boot)).digest()),
                    "header": _section(file, start, header),
                    "model": _section(file, start, length),
                    "original": _section(file, start + length, sum(n for _, n in parts)),
                    "gguf": original.result(),
                }
                _finish(file, sections, reference, persona, (program, *stub.program))
                _check_size(stub, model, file.tell())
            part.chmod(0o755)
            _verify(part, stub)
            if trial:
                trial(part)
    return out


def _verify(part: Path, stub: Stub) -> None:
    """Read back what was written, compare its checksums, and unpack the program in it. Raises FileError."""
    packed = container.find(part)
    if packed is None or packed.damaged():
        raise FileError(part, "is not what was written", "the disk may be failing")
    if wrong := damaged_entries(part):
        raise FileError(stub.path, f"is damaged: {wrong[0]} in it does not unpack", "get the stub again, or make it again")


def set_persona(packed: Packed, change: Callable[[Persona], Persona], out: Path) -> Persona:
    """Write the executable with another persona; the model is copied unchanged. Raises FileError; UsageError if the persona is
    too long.
    """
    packed.check()  # what is copied gets checksums anew
    persona = change(from_bytes(packed.read("persona"), packed.path))
    reference, sections = packed.read("reference"), packed.sections
    with replacing_file(out, packed.path.stat().st_size) as part:
        with _reporting(packed.path, packed.path), open(packed.path, "rb") as old, open(part, "x+b") as file:
            copy(old, 0, sections["original"].end, file)
            program = sections["program"]
            _finish(file, dict(sections), reference, persona, (old, program.offset, program.length))
        part.chmod(0o755)
    return persona


def unpack(packed: Packed, out: Path) -> int:
    """Write the GGUF that was packed; returns its size. Raises FileError unless it is the same, byte for byte."""
    model, gguf = packed.sections["model"], packed.sections["gguf"]
    packed.read("header")
    with (
        open_gguf(packed.path, offset=model.offset, length=model.length) as stored,
        open(packed.path, "rb") as raw,
        replacing_file(out, gguf.length) as part,
    ):
        with open(part, "xb") as file:
            sha256 = unstore(stored, raw, model.offset, packed.read("original"), file)
        if sha256 != gguf.sha256:
            raise FileError(packed.path, "the model in it was damaged", "get the file again")
    return gguf.length


def _finish(file: BinaryIO, sections: dict[str, Section], reference: bytes, persona: Persona, program: tuple) -> None:
    """Write everything behind the section "original"; `program`: a file, and the archive's offset and length in it."""
    at = file.seek(sections["original"].end)
    for name, data in (("reference", reference), ("persona", persona.to_bytes())):
        file.write(data)
        sections[name] = Section(at, len(data), hashlib.sha256(data).digest())
        at += len(data)
    source, offset, length = program
    sections["program"] = Section(at + container.SIZE, length, digest(source, offset, length))
    file.write(container.locator(sections))
    copy(source, offset, length, file)
    file.truncate()
    file.seek(0)
    start = file.read(len(macho.MAGIC))
    if start.startswith(macho.MAGIC):
        macho.sign(file)
    elif start.startswith(pe.MAGIC):
        pe.write_checksum(file)
    file.seek(0, 2)
    file.flush()


def _whole(path: Path) -> Section:
    with open(path, "rb") as file:
        return _section(file, 0, path.stat().st_size)


def _section(file: BinaryIO, offset: int, length: int) -> Section:
    file.flush()
    at = file.tell()
    section = Section(offset, length, digest(file, offset, length))
    file.seek(at)
    return section


def _check_size(stub: Stub, model: Path, n_bytes: int) -> None:
    system = stub.platform.partition("-")[0]
    if system != "linux" and (macho.signed_bytes(n_bytes) if system == "macos" else n_bytes) >= LIMIT:
        raise FileError(
            model, f"makes an executable of {n_bytes / 1e9:.1f} GB, and {system} runs none over 4 GB",
            "quantise it to fewer bits, or send the stub with the GGUF beside it, to be opened with --model",
        )  # fmt: skip


@contextmanager
def _reporting(path: Path, stub: Path) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise FileError(path, "became shorter while it was read", "try again") from None
    except (macho.UnreadableHeader, pe.UnreadableProgram) as error:
        raise FileError(stub, str(error), "use a stub made by pocketlm stub") from None


def with_texts(persona: Persona, texts: dict[str, str | None], flags: Mapping[str, float | str]) -> Persona:
    """The persona with the given texts and flags; a text that is None stays."""
    given = {name: text for name, text in texts.items() if text is not None}
    return replace(persona, **given, flags={**persona.flags, **flags})
