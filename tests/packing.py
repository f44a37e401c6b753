"""What the tests of packed executables share: a stub without a program in it, and the real one, built once."""

import importlib.util
import os
import random
import struct
from functools import cache
from pathlib import Path

import pytest

COOKIE = struct.Struct("!8sIIII64s")  # PyInstaller's, written down anew


def fake_stub(path: Path, *, kind: str = "linux", boot: int = 5000, archive: int = 3000) -> Path:
    """A file with the outside of a stub: an executable's first bytes, and an archive that ends with PyInstaller's cookie."""
    head = {
        "linux": b"\x7fELF".ljust(18, b"\0") + struct.pack("<H", 62),
        "windows": b"MZ".ljust(60, b"\0") + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", 0x8664),
        "macos": b"\xcf\xfa\xed\xfe" + struct.pack("<I", 0x0100000C),
    }[kind]
    noise = random.Random(boot)
    program = noise.randbytes(archive) + COOKIE.pack(b"MEI\x0c\x0b\x0a\x0b\x0e", archive + COOKIE.size, 0, 0, 311, b"libpython")
    path.write_bytes(head + noise.randbytes(boot - len(head)) + program)
    return path


@cache
def real_stub(folder: Path) -> Path:
    """The stub of this source, built unless `folder` (one that stays between test runs) has it."""
    if importlib.util.find_spec("PyInstaller") is None:
        pytest.skip("PyInstaller builds the stub: pip install 'pocketlm[build]'")
    from pocketlm.build.stub import host_platform, kept_stub

    before = os.environ.get("POCKETLM_CACHE")
    os.environ["POCKETLM_CACHE"] = str(folder)
    try:
        return kept_stub(host_platform())
    finally:
        if before is None:
            del os.environ["POCKETLM_CACHE"]
        else:
            os.environ["POCKETLM_CACHE"] = before
