"""JSON schemas (draft 2020-12, a part of it) as a grammar.

In: a schema. Out: a `Grammar` whose every text is a valid instance, or a UsageError that names the keyword that is not
supported: none is ignored but those that are notes. Knows no automaton.

Not every valid instance is among the texts: members come in the order of `properties`; members beside them where
`additionalProperties` says so, or no properties are named; a schema without `type` is of the types that its keywords are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any

from pocketlm.constrain import json_texts, patterns
from pocketlm.constrain.combining import (
    COMBINING,
    MOST_SCHEMAS,
    NAME,
    OF_TYPE,
    Schema,
    Schemas,
    asks_nothing,
    bad,
    key_of,
    kind_of,
    types_of,
)
from pocketlm.constrain.grammar import EMPTY, NEVER, Either, Grammar, Node, Repeat, Rule, Sequence, either, optional
from pocketlm.constrain.numbers import Bounds, above, fixed, integers, numbers
from pocketlm.errors import UsageError, quoted

MOST_NESTED = 128

_YEAR = r"(000[1-9]|00[1-9]\d|0[1-9]\d\d|[1-9]\d{3})"
_FOURTH = "(0[48]|[2468][048]|[13579][26])"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    rf"|(\d\d{_FOURTH}|{_FOURTH}00)-02-29)"
)
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d"
_TIME = rf"{_CLOCK}:[0-5]\d(\.\d{{1,6}})?(Z|[+-]{_CLOCK})"
_ATOM = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "email": rf"{_ATOM}(\.{_ATOM}){{0,3}}@{_LABEL}(\.{_LABEL}){{1,3}}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}",
}


def grammar_of(schema: Any) -> Grammar:
    """Raises UsageError."""
    compiler = _Compiler(schema)
    try:
        top = compiler.node(schema, "")
        rules = {**json_texts.RULES, **compiler.rules}
        _check_beginnings(rules)
    except RecursionError:
        raise UsageError(f"{NAME} is nested too deeply") from None
    return Grammar(top, rules, NAME)


def _check_beginnings(rules: Mapping[str, Node]) -> None:
    """UsageError for a rule that begins with itself: it would have to be there before it is."""

    def first(node: Node) -> Iterator[str]:
        if isinstance(node, Rule):
            yield node.name
        elif isinstance(node, Either):
            for part in node.parts:
                yield from first(part)
        elif isinstance(node, Sequence) and node.parts:
            yield from first(node.parts[0])

    after = {name: set(first(node)) for name, node in rules.items()}
    while free := [name for name, others in after.items() if not others & after.keys()]:
        for name in free:
            del after[name]
    if after:
        raise UsageError(f"{NAME}: {quoted(next(iter(after)))} refers to itself without end")


class _Compiler:
    def __init__(self, root: Any):
        self.rules: dict[str, Node] = {}
        self._merging = set[str]()
        self._schemas = Schemas(root)

    # ---- one schema

    def node(self, schema: Any, path: str) -> Node:
        self._schemas.n += 1
        if self._schemas.n > MOST_SCHEMAS or path.count("/") > MOST_NESTED:
            raise bad(path, "the schema is too large, or nested too deeply")
        if isinstance(schema, bool):
            return json_texts.ANY_VALUE if schema else NEVER
        self._schemas.check(schema, path)
        schema = {keyword: value for keyword, value in schema.items() if not asks_nothing(keyword, value)}
        if not schema:
            return json_texts.ANY_VALUE
        if set(schema) == {"$ref"}:
            return self._rule(schema["$ref"], path)
        if "$ref" in schema or "allOf" in schema:
            return self._merged(schema, path)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._either(keyword, schema, path)
        kinds = types_of(schema, path)
        if schema.get("nullable"):
            kinds = [*kinds, "null"]
        if "enum" in schema or "const" in schema:
            return self._values(schema, kinds, path)
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return either([_TYPES[kind](self, schema, path) for kind in dict.fromkeys(kinds)])

    def _whole(self, schema: Schema, keyword: str, path: str, default: int | None) -> int | None:
        value = schema.get(keyword, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if keyword in schema and not (is_number and 0 <= value <= 1 << 31 and value % 1 == 0):
            raise bad(path, f"{keyword} must be a whole number from 0 to {1 << 31}")
        return None if value is None else int(value)

    # ---- references and combinations

    def _rule(self, ref: str, path: str) -> Node:
        target = self._schemas.target(ref, path)
        if ref not in self.rules:
            self.rules[ref] = NEVER  # while it is made
            self.rules[ref] = self.node(target, ref)
        return Rule(ref)

    def _merged(self, schema: Schema, path: str) -> Node:
        """What is merged at each place anew; but where it holds itself it is a rule."""
        name = json.dumps(schema, sort_keys=True)
        self._schemas.n += len(name) // 1000  # for who writes a lot beside each of many
        if name in self._merging or name in self.rules:
            self.rules.setdefault(name, NEVER)  # while it is made
            return Rule(name)
        self._merging.add(name)
        node = self.node(self._schemas.merged(schema, path), path)
        self._merging.remove(name)
        if name in self.rules:
            self.rules[name] = node
            return Rule(name)
        return node

    def _either(self, keyword: str, schema: Schema, path: str) -> Node:
        branches = schema[keyword]
        if not isinstance(branches, list) or not branches:
            raise bad(path, f"{keyword} must be a list of schemas")
        rest = {other: value for other, value in schema.items() if other != keyword and other != "nullable"}
        places = [f"{path}/{keyword}/{i}" for i in range(len(branches))]
        merged = [{"allOf": [rest, one]} if rest else one for one in branches]
        if keyword == "oneOf":
            flat = [self._schemas.flat(*one) for one in zip(merged, places, strict=True)]
            for i, one in enumerate(flat):
                for j in range(i):
                    if not self._schemas.apart(flat[j], one, path, 0):
                        raise bad(path, f"oneOf: schemas {j} and {i} may both hold, which is not supported; use anyOf")
        nodes = [self.node(*one) for one in zip(merged, places, strict=True)]
        return either([*nodes, json_texts.NULL] if schema.get("nullable") else nodes)

    def _values(self, schema: Schema, kinds: list[str], path: str) -> Node:
        if others := [keyword for keyword in schema if keyword not in COMBINING]:
            raise bad(path, f"{others[0]} beside enum or const is not supported")
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise bad(path, "enum must be a list")
        if "enum" in schema and "const" in schema:
            key = key_of(schema["const"])
            values = [value for value in values if key_of(value) == key]
        self._schemas.n += len(values)
        if "type" in schema:
            values = [v for v in values if kind_of(v) in kinds or (kind_of(v) == "integer" and "number" in kinds)]
        strings = [value for value in values if isinstance(value, str)]
        others = [json_texts.exactly(value) for value in values if not isinstance(value, str)]
        return either([*([json_texts.string_of(strings)] if strings else []), *others])

    # ---- types

    def _object(self, schema: Schema, path: str) -> Node:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise bad(path, "properties must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise bad(path, "required must be a list of names")
        others = schema.get("additionalProperties", not properties and not required)
        value_of_others = schema.get("additionalProperties", True)
        wanted, members = set(required), []
        for name in (*properties, *(name for name in dict.fromkeys(required) if name not in properties)):
            value = properties.get(name, value_of_others)
            if value is not False or name in wanted:
                members.append((json_texts.member(name, self.node(value, f"{path}/properties/{name}")), name in wanted))
        least = self._whole(schema, "minProperties", path, 0) or 0
        most = self._whole(schema, "maxProperties", path, None)
        if least > len(wanted) or (most is not None and (others is not False or most < len(members))):
            named = "minProperties" if least > len(wanted) else "maxProperties"
            raise bad(path, f"{named} is not supported")
        if others is False:
            return json_texts.object_of(members)
        value = self.node(others, f"{path}/additionalProperties")
        return json_texts.object_of(members, json_texts.other_member(dict.fromkeys((*properties, *required)), value))

    def _array(self, schema: Schema, path: str) -> Node:
        if schema.get("uniqueItems", False) is not False:
            raise bad(path, "uniqueItems is not supported")
        least = self._whole(schema, "minItems", path, 0) or 0
        most = self._whole(schema, "maxItems", path, None)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise bad(path, "prefixItems must be a list of schemas")
        if isinstance(schema.get("items"), list):
            raise bad(path, "items as a list is not supported: say prefixItems")
        if most is not None and most < least:
            return NEVER
        first = first[:most]
        rest = schema.get("items", True)
        if most == len(first):
            rest = False
        n = len(first)
        inside = EMPTY if least <= n else NEVER  # what follows the first items
        if rest is not False:
            item = self.node(rest, f"{path}/items")
            least_left, most_left = max(least - n, 0), None if most is None else most - n
            if n:
                inside = Repeat(Sequence((json_texts.COMMA, item)), least_left, most_left)
            else:
                inside = json_texts.some(item, max(least_left, 1), most_left)
                inside = inside if least_left else optional(inside)
        for i in reversed(range(n)):
            item = self.node(first[i], f"{path}/prefixItems/{i}")
            inside = Sequence((json_texts.COMMA, item, inside) if i else (item, inside))
            inside = inside if i < least else optional(inside)
        return json_texts.array_of(inside)

    def _string(self, schema: Schema, path: str) -> Node:
        given = [keyword for keyword in ("pattern", "format") if keyword in schema]
        bounded = [keyword for keyword in ("minLength", "maxLength") if keyword in schema]
        if given and len(given + bounded) > 1:
            raise bad(path, f"{given[0]} together with {(given + bounded)[1]} is not supported")
        if "pattern" in schema:
            try:
                inside = patterns.anywhere(schema["pattern"])
            except UsageError as error:
                raise bad(path, str(error)) from None
            return json_texts.string(patterns.inside_string(inside))
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in FORMATS:
                raise bad(path, f"format {quoted(name)} is not supported; these are: {', '.join(FORMATS)}")
            return json_texts.string(patterns.inside_string(patterns.whole(FORMATS[name])))
        least, most = self._whole(schema, "minLength", path, 0), self._whole(schema, "maxLength", path, None)
        if most is not None and most < (least or 0):
            return NEVER
        return json_texts.string(json_texts.characters(least or 0, most))

    def _bounds(self, schema: Schema, path: str, is_whole: bool) -> Bounds:
        bounds: dict[str, int] = {}
        for keyword in OF_TYPE["number"]:
            value = schema.get(keyword)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float) or not -inf < value < inf:
                    raise bad(path, f"{keyword} must be a number")
                try:
                    bounds[keyword] = fixed(value)
                except UsageError as error:
                    raise bad(path, f"{keyword}: {error}") from None
        if "exclusiveMinimum" in bounds:
            least = above(bounds["exclusiveMinimum"], is_whole)
            bounds["minimum"] = max(least, bounds["minimum"]) if "minimum" in bounds else least
        if "exclusiveMaximum" in bounds:
            most = -above(-bounds["exclusiveMaximum"], is_whole)
            bounds["maximum"] = min(most, bounds["maximum"]) if "maximum" in bounds else most
        return Bounds(bounds.get("minimum"), bounds.get("maximum"))


_TYPES: dict[str, Callable[[_Compiler, Schema, str], Node]] = {
    "object": _Compiler._object, "array": _Compiler._array, "string": _Compiler._string,
    "number": lambda compiler, *place: numbers(compiler._bounds(*place, is_whole=False)),
    "integer": lambda compiler, *place: integers(compiler._bounds(*place, is_whole=True)),
    "boolean": lambda *_: json_texts.BOOLEAN, "null": lambda *_: json_texts.NULL,
}  # fmt: skip
