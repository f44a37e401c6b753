"""JSON as a grammar: strings, numbers, any value, and exactly this value.

A text is JSON as `json.dumps` writes it, with or without `indent` and `ensure_ascii`: white space stands behind `{`, `[`, `,`
and `:` and in front of `]` and `}`, and is nothing, one space, or a line break with up to INDENT spaces or tabs. A model that
may write white space without end does so. What a string holds may be escaped in every way that JSON has.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pocketlm.constrain.grammar import (
    EMPTY,
    EVERY,
    Chars,
    Choice,
    Either,
    Listed,
    Node,
    Repeat,
    Rule,
    Sequence,
    literal,
    optional,
)  # fmt: skip
from pocketlm.constrain.numbers import NUMBER

INDENT = 32
SPACE = Either((EMPTY, literal(" "), Sequence((literal("\n"), Repeat(Chars(((9, 9), (32, 32))), 0, INDENT)))))
COMMA = Sequence((literal(","), SPACE))
_COLON = Sequence((literal(":"), SPACE))
_QUOTE = literal('"')


def string(inside: Node) -> Node:
    return Sequence((_QUOTE, inside, _QUOTE))


def characters(least: int = 0, most: int | None = None) -> Node:
    return Repeat(Chars(EVERY, quoted=True), least, most)


def string_of(texts: Iterable[str]) -> Node:
    """One of these strings."""
    return string(Choice(tuple(texts), quoted=True))


def member(key: str, value: Node) -> Node:
    return Sequence((string(literal(key, quoted=True)), _COLON, value))


def other_member(keys: Iterable[str], value: Node) -> Node:
    """A member of an object: a key that is none of these, and a value."""
    return Sequence((string(Choice(tuple(keys), quoted=True, others=True)), _COLON, value))


def object_of(members: Iterable[tuple[Node, bool]], others: Node | None = None) -> Node:
    """An object with these members, in their order: those marked True must be there. Then any number of `others`."""
    parts = list(members)
    if others is not None:
        parts.append((some(others), False))
    inside = Listed(tuple(parts), COMMA)
    filled = Sequence((SPACE, inside, SPACE))
    return Sequence((literal("{"), filled, literal("}")))


def some(node: Node, least: int = 1, most: int | None = None) -> Node:
    """At least one, with commas between."""
    return Sequence((node, Repeat(Sequence((COMMA, node)), least - 1, None if most is None else most - 1)))


def array_of(inside: Node) -> Node:
    return Sequence((literal("["), SPACE, inside, SPACE, literal("]")))


def exactly(value: Any) -> Node:
    """This value."""
    if isinstance(value, str):
        return string(literal(value, quoted=True))
    if isinstance(value, dict):
        return object_of([(member(key, exactly(each)), True) for key, each in value.items()])
    if isinstance(value, list):
        items = [exactly(each) for each in value]
        return array_of(Sequence(tuple(part for i, item in enumerate(items) for part in ([COMMA] if i else []) + [item])))
    return literal(json.dumps(value))


ANY_VALUE, ANY_OBJECT, ANY_ARRAY = Rule("value"), Rule("object"), Rule("array")
STRING = string(characters())
BOOLEAN, NULL = Either((literal("true"), literal("false"))), literal("null")
RULES: dict[str, Node] = {
    "object": object_of((), other_member((), ANY_VALUE)),
    "array": array_of(optional(some(ANY_VALUE))),
    "value": Either((ANY_OBJECT, ANY_ARRAY, STRING, NUMBER, BOOLEAN, NULL)),
}
