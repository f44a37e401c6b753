"""What a text must look like, as a tree: classes of characters, in order, as alternatives, repeated, and rules by name.

In and out: plain frozen values. Patterns and schemas are turned into these; the automaton is built from them. Knows no bytes.

Equal nodes are one object (hash consing), so that comparing two and looking one up takes no walk through them: where branches
share what they hold, as in an array of arrays, such a walk could visit 2^depth nodes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from pocketlm import locks

Ranges = tuple[tuple[int, int], ...]  # of code points, first and last, in order, apart from each other
SURROGATES = 0xD800, 0xDFFF  # no characters by themselves
EVERY: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))

_Made = TypeVar("_Made")
_made: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()  # (class, its fields) -> the one that there is
_lock = locks.ForkedLock()


class _OneOfEach(type):
    def __call__(cls: type[_Made], *fields: Any, **named: Any) -> _Made:
        made = type.__call__(cls, *fields, **named)
        with _lock.here:
            return _made.setdefault((cls, *vars(made).values()), made)


@dataclass(frozen=True, eq=False)
class Chars(metaclass=_OneOfEach):
    """One character of these. `quoted`: as it is written inside a JSON string, in every way that there is; `plainly`: only
    as `json.dumps` writes it.
    """

    ranges: Ranges
    quoted: bool = False
    plainly: bool = False


@dataclass(frozen=True, eq=False)
class Sequence(metaclass=_OneOfEach):
    """One after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Either(metaclass=_OneOfEach):
    """One of them."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, eq=False)
class Repeat(metaclass=_OneOfEach):
    """`least` to `most` times, without end where that is None."""

    body: Node
    least: int
    most: int | None


@dataclass(frozen=True, eq=False)
class Listed(metaclass=_OneOfEach):
    """Some of the parts in their order, with the separator between each two; those that are marked have to be there."""

    parts: tuple[tuple[Node, bool], ...]
    separator: Node


@dataclass(frozen=True, eq=False)
class Choice(metaclass=_OneOfEach):
    """One of these texts, quoted as in `literal`; `others`: any text but these."""

    texts: tuple[str, ...]
    quoted: bool = False
    others: bool = False


@dataclass(frozen=True, eq=False)
class Rule(metaclass=_OneOfEach):
    """What the grammar has under this name."""

    name: str


Node = Chars | Sequence | Either | Repeat | Listed | Choice | Rule
EMPTY = Sequence(())
NEVER = Either(())


@dataclass(frozen=True)
class Grammar:
    """`top` is the whole text. No rule begins with itself. `of` names it in errors."""

    top: Node
    rules: dict[str, Node]
    of: str


def either(nodes: Iterable[Node]) -> Node:
    """One of these; NEVER where there are none."""
    parts = tuple(dict.fromkeys(nodes))
    return parts[0] if len(parts) == 1 else Either(parts)


def optional(node: Node) -> Node:
    return Repeat(node, 0, 1)


def literal(text: str, quoted: bool = False) -> Node:
    """Exactly this text; quoted: as `json.dumps` writes it inside a string, with or without `ensure_ascii`."""
    return Sequence(tuple(Chars(((ord(c), ord(c)),), quoted, quoted) for c in text))


@lru_cache(4096)
def width(node: Node) -> int | None:
    """How many characters it has, where that is always the same number."""
    if isinstance(node, Chars):
        return 1
    if isinstance(node, Sequence):
        widths = [width(part) for part in node.parts]
        return None if None in widths else sum(w or 0 for w in widths)
    if isinstance(node, Either):
        widths = {width(part) for part in node.parts}
        return widths.pop() if len(widths) == 1 else None
    if isinstance(node, Repeat) and node.least == node.most and (each := width(node.body)) is not None:
        return node.least * each
    return None


# ---- sets of code points


def union(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return tuple(merged)


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """Those of the first that are not among the others."""
    left, at = [], 0
    for low, high in ranges:
        while at and others[at - 1][1] >= low:
            at -= 1
        while at < len(others) and others[at][0] <= high:
            taken, until = others[at]
            if until >= low:
                if low < taken:
                    left.append((low, taken - 1))
                low = until + 1
            at += 1
        if low <= high:
            left.append((low, high))
    return tuple(left)


def common(ranges: Ranges, others: Ranges) -> Ranges:
    return without(ranges, without(ranges, others))
