"""The arrays of strings in a GGUF file: where each string is, and the strings themselves, as fast as NumPy can.

A string is its length in bytes (64 bits, little-endian) and then its bytes. Opening a model waits for the 100,000 of a
vocabulary and its merges. Nothing is trusted: whatever is returned lies inside the buffer.
"""
import struct
from mmap import mmap

import numpy as np

Buffer = mmap | memoryview | bytes
_AT_ONCE = 4096  # strings: what is looked at stays in the processor's cache, and one odd string slows only its neighbours
_LENGTH = struct.Struct("<Q")


def find_bounds(buffer: Buffer, start: int, count: int) -> np.ndarray | None:
    """Where each of `count` strings begins, and at last where they end: int64, (count + 1,). None if they do not fit."""
    bounds = np.empty(count + 1, np.int64)
    bounds[0] = start
    for first in range(0, count, _AT_ONCE):
        part = bounds[first : first + _AT_ONCE + 1]
        if not _fill_at_once(buffer, part) and not _fill_one_by_one(buffer, part):
            return None
    return bounds


def _fill_at_once(buffer: Buffer, bounds: np.ndarray) -> bool:
    """Fill `bounds` from its first entry on, for strings of 1 to 255 bytes without NUL; False where others are among them.

    There, seven zeros in a row are the end of a length; that each string ends where the next begins proves the guess.
    """
    count, at = len(bounds) - 1, int(bounds[0])
    for n_bytes in (count * 24, count * 64):
        part = np.frombuffer(buffer, np.uint8, min(n_bytes, len(buffer) - at), at)
        zeros = part[1:] == 0
        for more in (1, 2, 3):  # 2, 4, at last 7 in a row
            zeros = zeros[:-more] & zeros[more:]
        starts = np.flatnonzero(zeros)[:count]
        if len(starts) == count:
            ends = starts + part[starts] + 8
            if starts[0] or ends[-1] > len(part) or not np.array_equal(starts[1:], ends[:-1]):
                return False
            bounds[1:] = ends + at
            return True
    return False


def _fill_one_by_one(buffer: Buffer, bounds: np.ndarray) -> bool:
    """Fill `bounds` from its first entry on; False where a string goes on beyond the end of the buffer."""
    at = int(bounds[0])
    for i in range(1, len(bounds)):
        if len(buffer) - at < 8 or (length := _LENGTH.unpack_from(buffer, at)[0]) > len(buffer) - at - 8:
            return False
        at += 8 + length
        bounds[i] = at
    return True


def decode(buffer: Buffer, bounds: np.ndarray) -> list[str] | None:
    """The strings; None where one of them holds a NUL or is not UTF-8, and they have to be looked at one by one.

    Every length becomes one NUL, so that one `decode` and one `split` make all strings: a third of the time of a loop.
    """
    packed = np.frombuffer(buffer, np.uint8, int(bounds[-1] - bounds[0]), int(bounds[0])).copy()
    lengths = bounds[:-1] - bounds[0]
    packed[lengths] = 0
    keep = np.ones(len(packed), bool)
    for i in range(1, 8):
        keep[lengths + i] = False
    try:
        strings = packed[keep].tobytes().decode().split("\0")[1:]
    except UnicodeDecodeError:
        return None
    return strings if len(strings) == len(lengths) else None
