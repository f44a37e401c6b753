"""What real machines say about themselves: from public reports of their owners, serial numbers left out.

Of processors that are alike the first one's lines are here, and how many there are.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

V8 = "fp asimd evtstrm crc32 cpuid"
V8_CRYPTO = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
V82 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
V7 = "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae evtstrm crc32"


class Processors(NamedTuple):
    count: int
    part: str
    variant: str
    revision: str
    features: str
    bogomips: str
    name: str = ""  # "model name", which 32-bit and older kernels give
    architecture: str = "8"


class Recorded(NamedTuple):
    """A machine's processors, the lines at the end of /proc/cpuinfo, the device tree's name, and what is to be found."""

    processors: tuple[Processors, ...]
    tail: str
    tree: str
    machine: str
    bits: int
    expected: tuple[str, dict[str, int]]  # model, cores
    level: str  # of the compiled code that it can run; "" none


def pi(rev: str, name: str) -> str:
    return f"\nHardware\t: BCM2835\nRevision\t: {rev}\nModel\t\t: {name}\n"


A53, A55, A72, A76 = "Cortex-A53", "Cortex-A55", "Cortex-A72", "Cortex-A76"
BOARDS = {
    "Pi 5": Recorded(
        (Processors(4, "0xd0b", "0x4", "1", V82, "108.00"),), pi("d04170", "Raspberry Pi 5 Model B Rev 1.0"), "",
        "aarch64", 64, ("Raspberry Pi 5 Model B Rev 1.0", {A76: 4}), "dotprod"),
    "Pi 4, 64 bits": Recorded(
        (Processors(4, "0xd08", "0x0", "3", V8, "108.00"),),
        "\nRevision\t: d03115\nModel\t\t: Raspberry Pi 4 Model B Rev 1.5\n",
        "Raspberry Pi 4 Model B Rev 1.5\0", "aarch64", 64, ("Raspberry Pi 4 Model B Rev 1.5", {A72: 4}), "neon"),
    "Pi 4, 32 bits": Recorded(
        (Processors(4, "0xd08", "0x0", "3", V7, "108.00", "ARMv7 Processor rev 3 (v7l)", "7"),),
        pi("c03112", "Raspberry Pi 4 Model B Rev 1.2"), "", "armv7l", 32, ("Raspberry Pi 4 Model B Rev 1.2", {A72: 4}), ""),
    "Pi 4, 32-bit Python on a 64-bit kernel": Recorded(
        (Processors(4, "0xd08", "0x0", "3", V8, "108.00"),), pi("c03114", "Raspberry Pi 4 Model B Rev 1.4"), "",
        "aarch64", 32, ("Raspberry Pi 4 Model B Rev 1.4", {A72: 4}), ""),
    "Pi 3 B": Recorded(
        (Processors(4, "0xd03", "0x0", "4", V8, "38.40", "ARMv8 Processor rev 4 (v8l)"),),
        pi("a02082", "Raspberry Pi 3 Model B Rev 1.2"), "", "aarch64", 64,
        ("Raspberry Pi 3 Model B Rev 1.2", {A53: 4}), "neon"),
    "Pi 3 B+": Recorded(
        (Processors(4, "0xd03", "0x0", "4", V8, "38.40"),), pi("a020d3", "Raspberry Pi 3 Model B Plus Rev 1.3"), "",
        "aarch64", 64, ("Raspberry Pi 3 Model B Plus Rev 1.3", {A53: 4}), "neon"),
    "Zero 2 W, 32 bits": Recorded(
        (Processors(4, "0xd03", "0x0", "4", V7, "38.40", "ARMv7 Processor rev 4 (v7l)", "7"),),
        pi("902120", "Raspberry Pi Zero 2 W Rev 1.0"), "", "armv7l", 32, ("Raspberry Pi Zero 2 W Rev 1.0", {A53: 4}), ""),
    "Zero 2 W, 64 bits": Recorded(
        (Processors(4, "0xd03", "0x0", "4", V8, "38.40"),), pi("902120", "Raspberry Pi Zero 2 W Rev 1.0"),
        "Raspberry Pi Zero 2 W Rev 1.0\0", "aarch64", 64, ("Raspberry Pi Zero 2 W Rev 1.0", {A53: 4}), "neon"),
    "Pi 2": Recorded(
        (Processors(4, "0xc07", "0x0", "5", V7.removesuffix(" crc32"), "38.40", "ARMv7 Processor rev 5 (v7l)", "7"),),
        "\nHardware\t: BCM2709\nRevision\t: a01041\n", "", "armv7l", 32, ("", {"Cortex-A7": 4}), ""),
    "Zero W": Recorded(
        (Processors(1, "0xb76", "0x0", "7", "half thumb fastmult vfp edsp java tls", "697.95",
                    "ARMv6-compatible processor rev 7 (v6l)", "7"),),
        "\nHardware\t: BCM2835\nRevision\t: 9000c1\n", "", "armv6l", 32, ("", {"ARM1176": 1}), ""),
    "Rock 5B (RK3588)": Recorded(
        (Processors(4, "0xd05", "0x2", "0", V82, "48.00"), Processors(4, "0xd0b", "0x4", "0", V82, "48.00")), "",
        "Radxa ROCK 5B\0", "aarch64", 64, ("Radxa ROCK 5B", {A55: 4, A76: 4}), "dotprod"),
    "NanoPi R5S (RK3568)": Recorded(
        (Processors(4, "0xd05", "0x2", "0", V82, "48.00"),), "", "FriendlyElec NanoPi R5S\0", "aarch64", 64,
        ("FriendlyElec NanoPi R5S", {A55: 4}), "dotprod"),
    "Luckfox Omni3576 (RK3576)": Recorded(
        (Processors(4, "0xd03", "0x0", "4", V8_CRYPTO, "48.00"), Processors(4, "0xd08", "0x1", "0", V8_CRYPTO, "48.00")),
        "", "", "aarch64", 64, ("", {A53: 4, A72: 4}), "neon"),
    "NanoPi NEO 2 (H5)": Recorded(
        (Processors(4, "0xd03", "0x0", "4", V8_CRYPTO, "48.00"),),
        "\nHardware\t: Allwinnersun50iw2Family\nRevision\t: 0000\n", "", "aarch64", 64, ("", {A53: 4}), "neon"),
}  # fmt: skip


def write(board: Recorded, root: Path) -> Path:
    """The machine's files below `root`."""
    blocks, number = [], 0
    for kind in board.processors:
        for _ in range(kind.count):
            name = f"model name\t: {kind.name}\n" if kind.name else ""
            blocks.append(
                f"processor\t: {number}\n{name}BogoMIPS\t: {kind.bogomips}\nFeatures\t: {kind.features}\n"
                f"CPU implementer\t: 0x41\nCPU architecture: {kind.architecture}\nCPU variant\t: {kind.variant}\n"
                f"CPU part\t: {kind.part}\nCPU revision\t: {kind.revision}\n"
            )
            number += 1
    (root / "proc").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text("\n".join(blocks) + board.tail)
    if board.tree:
        (root / "proc/device-tree").mkdir()
        (root / "proc/device-tree/model").write_text(board.tree)
    return root
