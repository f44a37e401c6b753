"""The icon of a packed program for Windows: the user's own, or one that is drawn here.

In: nothing, or the path of an .ico or .png file. Out: images as an .ico file holds them. Knows no executables.
Formats: PNG, and Microsoft's "Icons"; Windows reads PNG in icons since Vista.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, refused

Image = tuple[int, int, bytes]  # side in pixels, bits a pixel, the bytes
SIDES = (16, 32, 48, 256)
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST = 1 << 20  # bytes of a file: no icon is larger
_BUBBLE, _DOTS = (46, 110, 200), (255, 255, 255)
_FINER = 4  # points in a row of a pixel, for smooth edges


def images(path: Path | None) -> list[Image]:
    """The images in an icon file; without a path, pocketlm's own icon. Raises FileError for any other file."""
    if path is None:
        return [(side, 32, _png(side, _drawn(side))) for side in SIDES]
    with refused(path):
        data = path.read_bytes() if path.stat().st_size <= _MOST else b""
    try:
        found = _of_png(data) if data.startswith(_PNG) else _of_ico(data)
    except struct.error:
        found = []
    if not found:
        raise FileError(path, "is no icon that Windows shows", "give an .ico file, or a square .png of at most 256 pixels")
    return found


def _of_png(data: bytes) -> list[Image]:
    width, height = struct.unpack_from(">II", data, 16)
    return [(width, 32, data)] if width == height and 0 < width <= 256 else []


def _of_ico(data: bytes) -> list[Image]:
    zero, kind, count = struct.unpack_from("<HHH", data)
    found = []
    for at in range(6, 6 + 16 * (count if (zero, kind) == (0, 1) else 0), 16):
        side, _, _, _, _, bits, length, offset = struct.unpack_from("<BBBBHHII", data, at)
        if offset + length > len(data) or not length:
            return []
        found.append((side or 256, bits, data[offset : offset + length]))
    return found


def _drawn(side: int) -> np.ndarray:
    """uint8 [side, side, 4], red, green, blue and opacity: a speech bubble with three dots."""
    places = (np.arange(side * _FINER) + 0.5) / (side * _FINER)  # of the unit square, from the top left
    x, y = places[None, :], places[:, None]
    across, down = np.maximum(abs(x - 0.5) - 0.3, 0), np.maximum(abs(y - 0.43) - 0.2, 0)  # a rectangle with round corners
    tail = (y > 0.7) & (y < 0.95) & (x > 0.25) & (x < 1.2 - y)
    bubble = (across**2 + down**2 < 0.16**2) | tail
    dots = np.zeros_like(bubble)
    for centre in (0.29, 0.5, 0.71):
        dots |= (x - centre) ** 2 + (y - 0.43) ** 2 < 0.065**2
    colours = np.where(dots[..., None], _DOTS, _BUBBLE)

    def mean(of: np.ndarray) -> np.ndarray:
        return of.reshape(side, _FINER, side, _FINER, -1).mean((1, 3))

    opacity = mean(bubble)
    colour = mean(colours * bubble[..., None]) / np.maximum(opacity, 1 / _FINER**2)
    return np.rint(np.concatenate([colour, 255 * opacity], -1)).astype(np.uint8)


def _png(side: int, pixels: np.ndarray) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels), 9)
    return _PNG + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
