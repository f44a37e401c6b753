"""Which board or computer this is, and its processor's cores.

In: files under /proc and /sys, or what the system says. Out: a `Board`. Knows no models. Every function that reads files takes
the root of the file system, so that a copy of another machine's can be read.
"""

from __future__ import annotations

import platform
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from pocketlm.runtime.small_files import text

# Arm's part numbers (MIDR_EL1) of implementer 0x41, as far as they are in boards and phones: the Linux kernel's cputype.h
_ARM_CORES = {
    0xB76: "ARM1176", 0xC07: "Cortex-A7", 0xC08: "Cortex-A8", 0xC09: "Cortex-A9", 0xC0F: "Cortex-A15", 0xD03: "Cortex-A53",
    0xD04: "Cortex-A35", 0xD05: "Cortex-A55", 0xD07: "Cortex-A57", 0xD08: "Cortex-A72", 0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75", 0xD0B: "Cortex-A76", 0xD0C: "Neoverse-N1", 0xD0D: "Cortex-A77", 0xD40: "Neoverse-V1",
    0xD41: "Cortex-A78", 0xD44: "Cortex-X1", 0xD46: "Cortex-A510", 0xD47: "Cortex-A710", 0xD49: "Neoverse-N2",
}  # fmt: skip


@dataclass(frozen=True)
class Board:
    """`model`: what the maker calls it, "" where nothing says so. `cores`: kind → logical processors of it."""

    model: str
    cores: dict[str, int]
    machine: str  # of the kernel: aarch64, armv7l, x86_64, …
    bits: int  # of this Python
    features: frozenset[str]  # that every core has

    @property
    def is_raspberry_pi(self) -> bool:
        return self.model.startswith("Raspberry Pi")


def board(root: Path = Path("/"), machine: str | None = None, bits: int | None = None) -> Board:
    """The machine whose files are below `root`. `machine` and `bits` are this Python's where they are not given."""
    cpuinfo = text(root / "proc/cpuinfo")
    fields = [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in cpuinfo.splitlines())]
    named = dict(fields)
    model = next(filter(None, (
        text(root / "proc/device-tree/model"), text(root / "sys/firmware/devicetree/base/model"), named.get("Model", ""),
        " ".join(_dmi(root, name) for name in ("sys_vendor", "product_name")).strip(),
    )), "")  # fmt: skip
    sets = [frozenset(value.split()) for name, value in fields if name in ("Features", "flags")]
    return Board(
        model, _cores(fields) or {platform.processor() or platform.machine() or "unknown": 0}, machine or platform.machine(),
        bits or 8 * struct.calcsize("P"), frozenset.intersection(*sets) if sets else frozenset(),
    )  # fmt: skip


def _cores(fields: list[tuple[str, str]]) -> dict[str, int]:
    """Kind of core → how many, from the lines of /proc/cpuinfo. A processor's lines follow its "processor: n"."""
    found: Counter[str] = Counter()
    current: dict[str, str] = {}
    for name, value in [*fields, ("processor", "end")]:
        if name == "processor":
            if current:
                found[_core(current)] += 1
            current = {"processor": value} if value.isdecimal() else {}
        elif current:
            current.setdefault(name, value)
    return dict(found)


def _core(processor: dict[str, str]) -> str:
    part, maker = (processor.get(f"CPU {name}", "") for name in ("part", "implementer"))
    try:
        if int(maker, 16) == 0x41:
            return _ARM_CORES.get(int(part, 16), f"Arm core {part}")
    except ValueError:
        pass
    return processor.get("model name") or (f"core {part} of maker {maker}" if part else "processor")


def _dmi(root: Path, name: str) -> str:
    found = text(root / "sys/class/dmi/id" / name)
    return "" if found.lower() in ("default string", "to be filled by o.e.m.", "system manufacturer") else found
