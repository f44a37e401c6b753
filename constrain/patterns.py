r"""Regular expressions, in the syntax that Python and JavaScript have in common, as a grammar.

In: a pattern. Out: a `Node`, or a UsageError that names what is not supported and where. Knows no automaton.

`\d`, `\w` and `\s` are those of ASCII, `.` is anything but a line break, as `re.ASCII` has them; but `\S` and `[^\s]` are no
white space of Unicode's either, for elsewhere that is `\s`. `^` and `$` stand for the beginning and the end of the whole text.
What looks around, behind or back, flags and Unicode's properties are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from pocketlm.constrain.grammar import (
    EMPTY,
    EVERY,
    SURROGATES,
    Chars,
    Either,
    Node,
    Ranges,
    Repeat,
    Sequence,
    either,
    union,
    without,
)  # fmt: skip
from pocketlm.errors import UsageError, quoted

MOST_TIMES = 100_000
MOST_CHARACTERS = 10_000
MOST_NESTED = 100
_DIGIT: Ranges = ((48, 57),)
_WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Ranges = ((9, 13), (32, 32))
_CLASSES = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_ANY_SPACE: Ranges = (  # Python's and JavaScript's together
    (9, 13), (28, 32), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
    (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF),
)  # fmt: skip
_CLASSES |= {"D": without(EVERY, _DIGIT), "W": without(EVERY, _WORD), "S": without(EVERY, _ANY_SPACE)}
_NEGATED = {**_CLASSES, "s": _ANY_SPACE, "S": without(EVERY, _SPACE)}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_HEX = {"x": 2, "u": 4}
_ANY: Ranges = without(EVERY, ((10, 10),))
ANYTHING = Repeat(Chars(EVERY), 0, None)
_REFUSED = {
    "(?=": "looking ahead", "(?!": "looking ahead", "(?<=": "looking behind", "(?<!": "looking behind",
    "(?>": "an atomic group", "(?P=": "a reference to a group", "(?(": "a condition",
}  # fmt: skip


def whole(pattern: str) -> Node:
    """What the pattern matches from the beginning to the end of a text."""
    return _Parser(pattern).parse(anywhere=False)


def anywhere(pattern: str) -> Node:
    """Texts in which the pattern matches somewhere, as JSON schemas mean it."""
    return _Parser(pattern).parse(anywhere=True)


@dataclass
class _Anchored:
    """A sequence, and whether it says that the text begins or ends there."""

    parts: list[Node]
    begins: bool = False
    ends: bool = False


class _Parser:
    def __init__(self, pattern: str):
        if not isinstance(pattern, str):
            raise UsageError(f"a pattern is {type(pattern).__name__}; it must be a text")
        if len(pattern) > MOST_CHARACTERS:
            raise UsageError(f"a pattern has {len(pattern)} characters; {MOST_CHARACTERS} are possible")
        self._text, self._at, self._depth = pattern, 0, 0

    def parse(self, anywhere: bool) -> Node:
        rows = self._rows()
        if self._at < len(self._text):
            raise self._bad("a ) too many")
        around = [ANYTHING] if anywhere else []
        return either([_sequence([*([] if row.begins else around), *row.parts, *([] if row.ends else around)]) for row in rows])

    def _bad(self, problem: str, at: int | None = None) -> UsageError:
        at = self._at if at is None else at
        text = quoted(self._text).replace(r"\\", "\\")  # its own backslashes as they were written
        return UsageError(f"pattern '{text}', character {at + 1}: {problem}")

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self._at)

    def _take(self, text: str) -> bool:
        if self._peek(text):
            self._at += len(text)
            return True
        return False

    def _next(self, problem: str) -> str:
        if self._at >= len(self._text):
            raise self._bad(problem)
        self._at += 1
        return self._text[self._at - 1]

    # ---- alternatives, sequences, what is repeated

    def _rows(self) -> list[_Anchored]:
        rows = [self._row()]
        while self._take("|"):
            rows.append(self._row())
        return rows

    def _row(self) -> _Anchored:
        row, first = _Anchored([]), self._at
        while self._at < len(self._text) and not self._peek("|") and not self._peek(")"):
            at = self._at
            if self._take("^"):
                if at != first:
                    raise self._bad("^ is supported at the beginning only", at)
                row.begins = True
                first = self._at
            elif self._take("$"):
                row.ends = True
                if self._at < len(self._text) and self._text[self._at] not in "|)":
                    raise self._bad("$ is supported at the end only", at)
            else:
                row.parts.append(self._repeated(self._atom()))
        return row

    def _repeated(self, node: Node) -> Node:
        at = self._at
        if self._take("*"):
            bounds = 0, None
        elif self._take("+"):
            bounds = 1, None
        elif self._take("?"):
            bounds = 0, 1
        elif (bounds := self._braces()) is None:
            return node
        if self._take("+"):
            raise self._bad("a possessive quantifier is not supported", at)
        self._take("?")  # lazy: the same texts
        if self._at < len(self._text) and (self._text[self._at] in "*+?" or self._is_braces()):
            raise self._bad("two quantifiers; put the first in a group")
        return _times(node, *bounds)

    def _is_braces(self) -> bool:
        end = self._text.find("}", self._at)
        inside = self._text[self._at + 1 : end] if self._peek("{") and end > 0 else ""
        numbers = inside.split(",")
        return any(numbers) and len(numbers) <= 2 and all(not n or (n.isascii() and n.isdigit()) for n in numbers)

    def _braces(self) -> tuple[int, int | None] | None:
        if not self._is_braces():
            return None
        at, end = self._at, self._text.index("}", self._at)
        low, comma, high = self._text[at + 1 : end].partition(",")
        if max(len(low), len(high)) > 9 or max(int(low or 0), int(high or 0)) > MOST_TIMES:
            raise self._bad(f"repeated more than {MOST_TIMES} times", at)
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if most is not None and most < least:
            raise self._bad(f"from {least} to {most} times", at)
        self._at = end + 1
        return least, most

    # ---- one character, a class, a group

    def _atom(self) -> Node:
        at, c = self._at, self._text[self._at]
        if c == "(":
            return self._group()
        self._at += 1
        if c == "[":
            return Chars(self._class(at))
        if c == ".":
            return Chars(_ANY)
        if c in "*+?":
            raise self._bad("nothing to repeat", at)
        if c == "\\":
            return Chars(self._escape(in_class=False))
        self._at -= 1
        if self._is_braces():
            raise self._bad("nothing to repeat", at)
        self._at += 1
        return Chars(self._one(ord(c), at))

    def _one(self, code: int, at: int) -> Ranges:
        if SURROGATES[0] <= code <= SURROGATES[1] or code > 0x10FFFF:
            raise self._bad("not a character of Unicode", at)
        return ((code, code),)

    def _group(self) -> Node:
        at = self._at
        for beginning, name in _REFUSED.items():
            if self._peek(beginning):
                raise self._bad(f"{name} is not supported", at)
        self._at += 1
        if self._take("?") and not self._take(":"):
            self._take("P")
            end = self._text.find(">", self._at)
            if not self._take("<") or not self._text[self._at : max(end, 0)].isidentifier():
                raise self._bad("flags are not supported; write (?:…) for a plain group", at)
            self._at = end + 1
        self._depth += 1
        if self._depth > MOST_NESTED:
            raise self._bad(f"more than {MOST_NESTED} groups in each other")
        rows = self._rows()
        self._depth -= 1
        if not self._take(")"):
            raise self._bad("a ) is missing", at)
        if any(row.begins or row.ends for row in rows):
            raise self._bad("^ and $ are supported outside of groups only", at)
        return either([_sequence(row.parts) for row in rows])

    def _escape(self, in_class: bool, negated: bool = False) -> Ranges:
        at = self._at - 1
        c = self._next("a lone \\ at the end")
        if c in _CLASSES:
            return (_NEGATED if negated else _CLASSES)[c]
        if c in _CONTROLS and not (c == "0" and self._text[self._at : self._at + 1].isdigit()):
            return self._one(_CONTROLS[c], at)
        if c == "b" and in_class:
            return self._one(8, at)
        if c in _HEX:
            return self._one(self._hexadecimal(_HEX[c], at), at)
        if c.isascii() and c.isalnum():
            raise self._bad(f"\\{c} is not supported", at)
        return self._one(ord(c), at)

    def _hexadecimal(self, n: int, at: int) -> int:
        if n == 4 and self._take("{"):
            end = self._text.find("}", self._at)
            n, closed = end - self._at, 1
        else:
            closed = 0
        digits = self._text[self._at : self._at + n]
        if not 0 < n <= 8 or len(digits) < n or any(d not in "0123456789abcdefABCDEF" for d in digits):
            raise self._bad("not a hexadecimal number", at)
        self._at += n + closed
        return int(digits, 16)

    def _class(self, at: int) -> Ranges:
        negated, ranges, kinds = self._take("^"), list[tuple[int, int]](), set[Ranges]()
        if self._peek("]"):
            raise self._bad("write \\] for a ] that begins a class")
        while not self._take("]"):
            here = self._at
            low = self._in_class(at, negated)
            dash = self._peek("-") and self._at + 1 < len(self._text) and self._text[self._at + 1] != "]"
            if not dash:
                ranges += low
                kinds.add(low)
                continue
            self._at += 1
            high = self._in_class(at, negated)
            if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
                raise self._bad("a range from or to a class", here)
            if high[0][0] < low[0][0]:
                raise self._bad("a range that goes backwards", here)
            ranges.append((low[0][0], high[0][0]))
        if not negated and {_CLASSES["s"], _CLASSES["S"]} <= kinds:  # everything, whatever is white space
            ranges += EVERY
        found = without(union(ranges), (SURROGATES,))
        return without(EVERY, found) if negated else found

    def _in_class(self, at: int, negated: bool) -> Ranges:
        here = self._at
        if self._at >= len(self._text):
            raise self._bad("a ] is missing", at)
        c = self._next("")
        return self._escape(in_class=True, negated=negated) if c == "\\" else self._one(ord(c), here)


def _times(node: Node, least: int, most: int | None) -> Node:
    """What is repeated in what is repeated is repeated once where that is the same: there is one way less to read a text."""
    if isinstance(node, Repeat) and node.least <= 1 and most != 0 and node.most != 0:
        most = None if most is None or node.most is None else most * node.most
        return Repeat(node.body, least * node.least, most)
    return Repeat(node, least, most)


def _sequence(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Sequence(tuple(parts)) if parts else EMPTY


def inside_string(node: Node) -> Node:
    """The same texts, as a JSON string has them between its quotes."""
    if isinstance(node, Chars):
        return Chars(node.ranges, quoted=True)
    if isinstance(node, Sequence):
        return Sequence(tuple(map(inside_string, node.parts)))
    if isinstance(node, Either):
        return Either(tuple(map(inside_string, node.parts)))
    assert isinstance(node, Repeat), node
    return Repeat(inside_string(node.body), node.least, node.most)
