"""Which program plays a 64-bit Arm processor: qemu-aarch64-static of Debian's qemu-user-static; or qemu-aarch64 of qemu-user,
which from Debian 13 on is the static one.

    python tests/find_qemu.py    # prints one that runs in the root of another system; exit status 1 where there is none
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

NAMES = ("qemu-aarch64-static", "qemu-aarch64")


def find_qemu(anywhere: bool = True) -> str | None:
    """Its path. `anywhere`: one that needs no libraries of this system, which are not in another one's root."""
    found = [path for path in map(shutil.which, NAMES) if path is not None]
    return next((path for path in found if not anywhere or b"/ld-" not in Path(path).read_bytes()[:4096]), None)


def entry(qemu: str) -> str:
    """What registers it with the kernel (binfmt_misc) for programs of that processor."""
    elf = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    mask = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
    return f":pocketlm:M::{elf}:{mask}:{qemu}:F"


if __name__ == "__main__":
    qemu = find_qemu()
    print(qemu or "no qemu-aarch64 that needs no libraries")
    sys.exit(qemu is None)
