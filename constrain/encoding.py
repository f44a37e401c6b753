"""How classes of characters are written in bytes: UTF-8, and inside JSON strings.

In: `Chars`. Out: sequences of byte ranges, each a way to write some of the characters. They are prefix-free: no sequence is the
beginning of another, so that it is always known where a character ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from pocketlm.constrain.grammar import EVERY, Chars, Ranges, common, without

Span = tuple[int, int]  # first and last byte
Spans = tuple[Span, ...]
Bytes = tuple[Spans, ...]  # what each byte may be, one after the other
UTF8 = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF))  # characters of one, two, three and four bytes
ESCAPED: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C))  # what JSON strings cannot hold as it is
SHORT = {0x22: '"', 0x5C: "\\", 0x2F: "/", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
BMP: Ranges = ((0, 0xFFFF),)
ASTRAL: Ranges = ((0x10000, 0x10FFFF),)


@lru_cache(1024)
def sequences(chars: Chars) -> tuple[Bytes, ...]:
    """Every way to write one of these characters."""
    ranges = common(chars.ranges, EVERY)
    if not chars.quoted:
        return tuple(_utf8(ranges))
    escaped = ranges
    if chars.plainly:  # not \u0061 for an a, and no escape for a slash
        escaped = without(ranges, without(((0x20, 0x7E),), ESCAPED))
    return (*_utf8(without(ranges, ESCAPED)), *_escapes(escaped))


def _utf8(ranges: Ranges) -> Iterator[Bytes]:
    for limits in UTF8:
        for low, high in common(ranges, (limits,)):
            for spans in between(tuple(chr(low).encode()), tuple(chr(high).encode()), 0x80, 0xBF):
                yield tuple((span,) for span in spans)


def between(low: tuple[int, ...], high: tuple[int, ...], least: int, most: int) -> Iterator[Spans]:
    """The numbers from low to high, each a tuple of digits, as products of one range for each digit; digits behind the first go
    from `least` to `most`.
    """
    if len(low) == 1:
        yield ((low[0], high[0]),)
        return
    whole = ((least, most),) * (len(low) - 1)
    first, last = low[0], high[0]
    if first == last:
        for rest in between(low[1:], high[1:], least, most):
            yield ((first, first), *rest)
        return
    if any(digit != least for digit in low[1:]):
        for rest in between(low[1:], (most,) * len(whole), least, most):
            yield ((first, first), *rest)
        first += 1
    split = any(digit != most for digit in high[1:])
    if first <= last - split:
        yield ((first, last - split), *whole)
    if split:
        for rest in between((least,) * len(whole), high[1:], least, most):
            yield ((last, last), *rest)


def _escapes(ranges: Ranges) -> Iterator[Bytes]:
    for code, letter in SHORT.items():
        if common(ranges, ((code, code),)):
            yield _exactly("\\" + letter)
    for low, high in common(ranges, BMP):
        for units in _hexadecimal(low, high):
            yield (*_exactly("\\u"), *units)
    for low, high in common(ranges, ASTRAL):
        low, high = low - 0x10000, high - 0x10000
        for pair in between((low >> 10, low & 0x3FF), (high >> 10, high & 0x3FF), 0, 0x3FF):
            (a, b), (c, d) = pair
            for first in _hexadecimal(0xD800 + a, 0xD800 + b):
                for second in _hexadecimal(0xDC00 + c, 0xDC00 + d):
                    yield (*_exactly("\\u"), *first, *_exactly("\\u"), *second)


def _exactly(text: str) -> Bytes:
    return tuple(((byte, byte),) for byte in text.encode())


def _hexadecimal(low: int, high: int) -> Iterator[Bytes]:
    """The numbers from low to high in four digits, small letters or capitals."""

    def digits(number: int) -> tuple[int, ...]:
        return tuple(number >> shift & 15 for shift in (12, 8, 4, 0))

    for ranges in between(digits(low), digits(high), 0, 15):
        yield tuple(_letters(*span) for span in ranges)


def _letters(low: int, high: int) -> Spans:
    """Hexadecimal digits."""
    spans = [(low + 48, min(high, 9) + 48)] if low <= 9 else []
    if high >= 10:
        spans += [(max(low, 10) - 10 + ord(first), high - 10 + ord(first)) for first in "aA"]
    return tuple(spans)
