"""What the tests of packed executables share: a stub without a program in it, and the real one, built once."""

import json
import os
import platform
import random
import signal
import struct
import subprocess
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from one_at_a_time import one_at_a_time
from tiny_models import write_model

from pocketlm.build import pe
from pocketlm.build.pack import open_stub, pack
from pocketlm.build.persona import Persona
from pocketlm.build.selftest import reference
from pocketlm.runtime.gguf_reader import open_gguf

COOKIE = struct.Struct("!8sIIII64s")  # PyInstaller's, written down anew, as is the rest of its archives


def fake_stub(path: Path, *, kind: str = "linux", boot: int = 5000, archive: int = 3000) -> Path:
    """A file with the outside of a stub: an executable's first bytes, and an archive of noise that unpacks.

    It is for another system than this, so that nobody tries whether it runs.
    """
    machine = 62 if platform.machine() == "aarch64" else 183
    head = {
        "linux": b"\x7fELF".ljust(18, b"\0") + struct.pack("<H", machine),
        "windows": pe.shared_library("program", b"\xc3", {"main": 0}),
        "macos": mach_o(boot),
    }[kind]
    noise = random.Random(boot)
    path.write_bytes(head + noise.randbytes(boot - len(head)) + fake_archive(noise.randbytes(archive)))
    return path


def fake_archive(data: bytes) -> bytes:
    """The noise three times: compressed, as it is, and as a module of Python; a table and a cookie behind it."""
    stream = zlib.compress(data)
    modules = b"PYZ\0" + b"\xa7\r\r\n" + struct.pack("!i", 17 + 2 * len(stream)) + bytes(5) + 2 * stream + b"a table"
    files = {"library.so": (stream, len(data), 1, b"b"), "plain.bin": (data, len(data), 0, b"x"),
             "PYZ.pyz": (modules, len(modules), 0, b"z")}  # fmt: skip
    body, table = b"", b""
    for name, (packed, size, compressed, letter) in files.items():
        row = struct.pack("!IIIBc", len(body), len(packed), size, compressed, letter) + name.encode().ljust(14, b"\0")
        table += struct.pack("!I", len(row) + 4) + row
        body += packed
    length = len(body) + len(table) + COOKIE.size
    return body + table + COOKIE.pack(b"MEI\x0c\x0b\x0a\x0b\x0e", length, len(body), len(table), 311, b"libpython")


def mach_o(boot: int) -> bytes:
    """A Mach-O header for Apple's processors: a __LINKEDIT that ends with the boot loader, its strings, a signature."""
    commands = [
        struct.pack("<II16sQQQQIIII", 0x19, 72, b"__TEXT", 0, 4096, 0, 4096, 5, 5, 0, 0),
        struct.pack("<II16sQQQQIIII", 0x19, 72, b"__LINKEDIT", 4096, 16384, 4096, boot - 4096, 1, 1, 0, 0),
        struct.pack("<IIIIII", 0x2, 24, 4096, 2, 4200, 300),
        struct.pack("<IIII", 0x1D, 16, 4500, boot - 4500),
        struct.pack("<IIQQ", 0x80000028, 24, 64, 0),
    ]
    body = b"".join(commands)
    return struct.pack("<8I", 0xFEEDFACF, 0x0100000C, 0, 2, len(commands), len(body), 0x85, 0) + body


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def tiny_chat_model(folder: Path) -> Path:
    """A tiny model with a chat template. Its answers are noise, but always the same noise."""
    return write_model(folder / "model.gguf", format="Q4_0", metadata={"tokenizer.chat_template": TEMPLATE})


def pack_friend(model: Path, stub: Path, folder: Path) -> Path:
    """The model as a program whose title is not ASCII, and that answers alike every time."""
    persona = Persona(title="Ada Ağaç Ёлка", system="Be kind.", flags={"--temp": 0.0, "--max-tokens": 12})
    with open_gguf(model) as file:
        return pack(model, open_stub(stub), folder / "friend", persona, reference(file))


@pytest.fixture(name="model", scope="module")
def model_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(name="friend", scope="module")
def friend_fixture(model: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a real stub: this system's, or of the PLATFORM that the module of the tests names."""
    folder, platform = Path(request.config.cache.mkdir("pocketlm-stub")), getattr(request.module, "PLATFORM", "")
    stub = composed_stub(platform, folder) if platform else real_stub(folder)
    return pack_friend(model, stub, tmp_path_factory.mktemp("friend"))


def real_stub(folder: Path) -> Path:
    """The stub of this source for this system, composed unless `folder` (one that stays between test runs) has it."""
    from pocketlm.build.sources import host_platform

    return composed_stub(host_platform(), folder)


@cache
def composed_stub(platform: str, folder: Path) -> Path:
    """The same for any platform. Skips where the wheels that it is made of are not there and cannot be fetched."""
    from pocketlm.build.compose import kept_stub
    from pocketlm.build.wheels import Unreachable

    before = os.environ.get("POCKETLM_CACHE")
    os.environ["POCKETLM_CACHE"] = str(folder)
    try:
        with one_at_a_time(folder / f"{platform}.lock"):
            return kept_stub(platform)
    except Unreachable as error:
        pytest.skip(f"there is nothing to compose a stub of: {error}")
    finally:
        if before is None:
            del os.environ["POCKETLM_CACHE"]
        else:
            os.environ["POCKETLM_CACHE"] = before


@contextmanager
def web(command: Sequence[str | Path], **environment: str) -> Iterator[tuple[str, str]]:
    """Address and token of a program that serves a page, which ends in order."""
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            if not said and process.wait(30) == 77:
                pytest.skip("this system lets nobody register programs of another processor: its mounts are not allowed")
            assert said.startswith("page "), said + process.stderr.read()
            address, _, token = said.split()[1].partition("/#")
            yield address, token
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        assert process.returncode == 0


def ask(url: str, body: Any = None, token: str = "") -> bytes:
    """What a server answers to a GET, or to a POST of `body`."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "X-Pocketlm-Token": token}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as reply:
        return reply.read()
