"""The small files by which a system tells about itself, under /proc and /sys: the text or the number in one."""

from __future__ import annotations

from pathlib import Path


def text(path: Path) -> str:
    """What is in a small file, without the NUL that ends texts of a device tree; "" where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):
        return ""


def number(path: Path, base: int = 10) -> int | None:
    """The number in a small file; None where there is none."""
    return whole(text(path), base)


def whole(written: str, base: int = 10) -> int | None:
    """The number that is written there; None for "max" and for whatever else is not one."""
    try:
        return int(written, base)
    except ValueError:
        return None
