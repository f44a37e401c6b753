"""JSON schemas (draft 2020-12, a part of it) as a grammar.

In: a schema. Out: a `Grammar` whose every text is a valid instance, or a UsageError that names the keyword that is not
supported: none is ignored but those that are notes. Knows no automaton.

Not every valid instance is among the texts: members come in the order of `properties`; members beside them where
`additionalProperties` says so, or no properties are named; a schema without `type` is of the types that its keywords are for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from pocketlm.constrain import json_texts, patterns
from pocketlm.constrain.grammar import EMPTY, EVERY, NEVER, Chars, Either, Grammar, Node, Repeat, Rule, Sequence, optional
from pocketlm.constrain.numbers import Bounds, fixed, integers, numbers
from pocketlm.errors import UsageError, quoted

Schema = Mapping[str, Any]
NAME = "json_schema"
MOST_SCHEMAS = 20_000
MOST_NESTED = 128
NOTES = {
    "$schema", "$id", "$anchor", "$comment", "$defs", "definitions", "title", "description", "default", "examples", "example",
    "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "discriminator",
}  # fmt: skip
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "integer": (), "boolean": (), "null": (),
}  # fmt: skip
COMBINING = ("$ref", "allOf", "anyOf", "oneOf", "enum", "const", "type", "nullable")
KNOWN = {*COMBINING, *(keyword for keywords in OF_TYPE.values() for keyword in keywords)}

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
        self._root = root
        self._n = 0

    # ---- one schema

    def node(self, schema: Any, path: str) -> Node:
        self._n += 1
        if self._n > MOST_SCHEMAS or path.count("/") > MOST_NESTED:
            raise self._bad(path, "the schema is too large, or nested too deeply")
        if isinstance(schema, bool):
            return json_texts.ANY_VALUE if schema else NEVER
        self._check(schema, path)
        schema = {keyword: value for keyword, value in schema.items() if keyword not in NOTES}
        if not schema:
            return json_texts.ANY_VALUE
        if set(schema) == {"$ref"}:
            return self._rule(schema["$ref"], path)
        if "$ref" in schema or "allOf" in schema:
            return self.node(self._merged(schema, path), path)
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                return self._either(keyword, schema, path)
        kinds = self._types(schema, path)
        if schema.get("nullable"):
            kinds = [*kinds, "null"]
        if "enum" in schema or "const" in schema:
            return self._values(schema, kinds, path)
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return _either([_TYPES[kind](self, schema, path) for kind in dict.fromkeys(kinds)])

    def _bad(self, path: str, problem: str) -> UsageError:
        return UsageError(f"{NAME}{quoted(path)}: {problem}")

    def _check(self, schema: Any, path: str) -> None:
        if not isinstance(schema, Mapping):
            raise self._bad(path, f"a schema is {quoted(json.dumps(schema, default=str))}; it must be an object, true or false")
        for keyword in schema:
            if keyword not in KNOWN and keyword not in NOTES:
                raise self._bad(path, f"{quoted(keyword)} is not supported")

    def _types(self, schema: Schema, path: str) -> list[str]:
        given = schema.get("type")
        if given is None:
            found = [kind for kind, keywords in OF_TYPE.items() if any(keyword in schema for keyword in keywords)]
            return found or list(OF_TYPE)
        kinds = [given] if isinstance(given, str) else given
        if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in OF_TYPE for kind in kinds):
            raise self._bad(path, f"type is {quoted(given)}; it must be of {', '.join(OF_TYPE)}, or a list of these")
        return kinds

    def _whole(self, schema: Schema, keyword: str, path: str, default: int | None) -> int | None:
        value = schema.get(keyword, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if keyword in schema and not (is_number and 0 <= value <= 1 << 31 and value % 1 == 0):
            raise self._bad(path, f"{keyword} must be a whole number from 0 to {1 << 31}")
        return None if value is None else int(value)

    # ---- references and combinations

    def _target(self, ref: Any, path: str) -> Any:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise self._bad(path, f"$ref {quoted(ref)} is not supported: it must be # or begin with #/")
        here = self._root
        for step in ref.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(here, Mapping) and step in here:
                here = here[step]
            elif isinstance(here, list) and step.isdecimal() and len(step) < 9 and int(step) < len(here):
                here = here[int(step)]
            else:
                raise self._bad(path, f"$ref {quoted(ref)} leads nowhere")
        return here

    def _rule(self, ref: str, path: str) -> Node:
        target = self._target(ref, path)
        if ref not in self.rules:
            self.rules[ref] = NEVER  # while it is made
            self.rules[ref] = self.node(target, ref)
        return Rule(ref)

    def _merged(self, schema: Schema, path: str) -> Any:
        """One schema in place of `allOf` and of a `$ref` with other keywords beside it."""
        own = {keyword: value for keyword, value in schema.items() if keyword not in ("$ref", "allOf")}
        parts: list[Any] = [own] if own else []
        if "$ref" in schema:
            parts.append(self._target(schema["$ref"], path))
        branches = schema.get("allOf", [])
        if not isinstance(branches, list) or ("allOf" in schema and not branches):
            raise self._bad(path, "allOf must be a list of schemas")
        parts += branches
        merged: Any = True
        for i, part in enumerate(parts):
            merged = self._both(merged, part, f"{path}/allOf/{i}" if i else path)
        return merged

    def _flat(self, schema: Any, path: str) -> Any:
        """The same without `$ref` and `allOf` at its top."""
        while not isinstance(schema, bool) and ("$ref" in schema or "allOf" in schema):
            self._n += 1
            if self._n > MOST_SCHEMAS:
                raise self._bad(path, "the schema is too large, or refers to itself without end")
            schema = self._merged(schema, path)
            if not isinstance(schema, bool):
                self._check(schema, path)
        return schema

    def _both(self, a: Any, b: Any, path: str) -> Any:
        """A schema for what both ask for."""
        self._n += 1
        if self._n > MOST_SCHEMAS:
            raise self._bad(path, "the schema is too large, or refers to itself without end")
        if a is True or b is True or a == b:
            return b if a is True else a
        if a is False or b is False:
            return False
        for one in (a, b):
            self._check(one, path)
        a, b = self._flat(a, path), self._flat(b, path)
        if isinstance(a, bool) or isinstance(b, bool):
            return self._both(a, b, path)
        a, b = ({keyword: value for keyword, value in one.items() if keyword not in NOTES} for one in (a, b))
        merged = dict(a)
        for closed, other in ((a, b), (b, a)):
            if closed.get("additionalProperties", True) is not True and {*_names(other)} - {*_names(closed)}:
                raise self._bad(path, "additionalProperties in one of several schemas that are combined is not supported")
        for keyword, value in b.items():
            if keyword in merged and merged[keyword] != value:
                if keyword not in _MERGE:
                    raise self._bad(path, f"{keyword} in several schemas that are combined is not supported")
                try:
                    value = _MERGE[keyword](merged[keyword], value)
                except (TypeError, AttributeError, ValueError):
                    raise self._bad(path, f"{keyword} holds what it cannot hold") from None
            merged[keyword] = value
        return merged

    def _either(self, keyword: str, schema: Schema, path: str) -> Node:
        branches = schema[keyword]
        if not isinstance(branches, list) or not branches:
            raise self._bad(path, f"{keyword} must be a list of schemas")
        rest = {other: value for other, value in schema.items() if other != keyword and other != "nullable"}
        merged = [self._both(rest, branch, f"{path}/{keyword}/{i}") if rest else branch for i, branch in enumerate(branches)]
        if keyword == "oneOf":
            for i, one in enumerate(merged):
                for j in range(i):
                    if not self._apart(merged[j], one, path, 0):
                        raise self._bad(path, f"oneOf: schemas {j} and {i} may both hold, which is not supported; use anyOf")
        nodes = [self.node(branch, f"{path}/{keyword}/{i}") for i, branch in enumerate(merged)]
        return _either([*nodes, json_texts.NULL] if schema.get("nullable") else nodes)

    def _apart(self, a: Any, b: Any, path: str, depth: int) -> bool:
        """Whether it is plain that no value is valid under both."""
        self._n += 1
        if depth > 4 or self._n > MOST_SCHEMAS:
            return False
        if a is False or b is False:
            return True
        if isinstance(a, bool) or isinstance(b, bool):
            return False
        self._check(a, path)
        self._check(b, path)
        flat = self._flat(a, path), self._flat(b, path)
        if flat[0] is not a or flat[1] is not b:
            return self._apart(*flat, path, depth + 1)
        values = [_listed(one) for one in (a, b)]
        if None not in values:
            return not {_key(value) for value in values[0] or ()} & {_key(value) for value in values[1] or ()}
        kinds = [self._kinds(one, path) for one in (a, b)]
        if not kinds[0] & kinds[1]:
            return True
        if kinds[0] & kinds[1] != {"object"}:
            return False
        required = {*_names({"required": a.get("required")})} & {*_names({"required": b.get("required")})}
        members = [one.get("properties") if isinstance(one.get("properties"), Mapping) else {} for one in (a, b)]
        named = required & members[0].keys() & members[1].keys()
        return any(self._apart(members[0][name], members[1][name], path, depth + 1) for name in sorted(named))

    def _kinds(self, schema: Schema, path: str) -> set[str]:
        if (values := _listed(schema)) is not None:
            kinds = {_kind(value) for value in values}
        elif "type" not in schema:
            return set(OF_TYPE) - {"integer"}  # whatever its keywords are for, other types are valid, too
        else:
            kinds = set(self._types(schema, path))
        return {"number" if kind == "integer" else kind for kind in kinds} | ({"null"} if schema.get("nullable") else set())

    def _values(self, schema: Schema, kinds: list[str], path: str) -> Node:
        for keyword in (keyword for keywords in OF_TYPE.values() for keyword in keywords):
            if keyword in schema:
                raise self._bad(path, f"{keyword} beside enum or const is not supported")
        values = schema.get("enum", [schema.get("const")])
        if not isinstance(values, list):
            raise self._bad(path, "enum must be a list")
        if "enum" in schema and "const" in schema:
            values = [value for value in values if _key(value) == _key(schema["const"])]
        self._n += len(values)
        if "type" in schema:
            values = [v for v in values if _kind(v) in kinds or (_kind(v) == "integer" and "number" in kinds)]
        strings = [value for value in values if isinstance(value, str)]
        others = [json_texts.exactly(value) for value in values if not isinstance(value, str)]
        return _either([*([json_texts.string_of(strings)] if strings else []), *others])

    # ---- types

    def _object(self, schema: Schema, path: str) -> Node:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise self._bad(path, "properties must be an object")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._bad(path, "required must be a list of names")
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
            raise self._bad(path, f"{named} is not supported")
        if others is False:
            return json_texts.object_of(members)
        value = self.node(others, f"{path}/additionalProperties")
        return json_texts.object_of(members, json_texts.other_member(dict.fromkeys((*properties, *required)), value))

    def _array(self, schema: Schema, path: str) -> Node:
        if schema.get("uniqueItems", False) is not False:
            raise self._bad(path, "uniqueItems is not supported")
        least = self._whole(schema, "minItems", path, 0) or 0
        most = self._whole(schema, "maxItems", path, None)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise self._bad(path, "prefixItems must be a list of schemas")
        if isinstance(schema.get("items"), list):
            raise self._bad(path, "items as a list is not supported: say prefixItems")
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
            raise self._bad(path, f"{given[0]} together with {(given + bounded)[1]} is not supported")
        if "pattern" in schema:
            try:
                inside = patterns.anywhere(schema["pattern"])
            except UsageError as error:
                raise self._bad(path, str(error)) from None
            return json_texts.string(patterns.inside_string(inside))
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in FORMATS:
                raise self._bad(path, f"format {quoted(name)} is not supported; these are: {', '.join(FORMATS)}")
            return json_texts.string(patterns.inside_string(patterns.whole(FORMATS[name])))
        least, most = self._whole(schema, "minLength", path, 0), self._whole(schema, "maxLength", path, None)
        if most is not None and most < (least or 0):
            return NEVER
        return json_texts.string(Repeat(Chars(EVERY, quoted=True), least or 0, most))

    def _number(self, schema: Schema, path: str) -> Node:
        return self._between(numbers, schema, path)

    def _integer(self, schema: Schema, path: str) -> Node:
        return self._between(integers, schema, path)

    def _between(self, make: Callable[[Bounds], Node], schema: Schema, path: str) -> Node:
        bounds: dict[str, int] = {}
        for keyword in OF_TYPE["number"]:
            value = schema.get(keyword)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
                    raise self._bad(path, f"{keyword} must be a number")
                try:
                    bounds[keyword] = fixed(value)
                except UsageError as error:
                    raise self._bad(path, f"{keyword}: {error}") from None
        low, low_open = bounds.get("minimum"), bounds.get("exclusiveMinimum")
        high, high_open = bounds.get("maximum"), bounds.get("exclusiveMaximum")
        is_low_open = low_open is not None and (low is None or low_open >= low)
        is_high_open = high_open is not None and (high is None or high_open <= high)
        low, high = low_open if is_low_open else low, high_open if is_high_open else high
        return make(Bounds(low, high, is_low_open, is_high_open))


_TYPES: dict[str, Callable[[_Compiler, Schema, str], Node]] = {
    "object": _Compiler._object, "array": _Compiler._array, "string": _Compiler._string, "number": _Compiler._number,
    "integer": _Compiler._integer, "boolean": lambda *_: json_texts.BOOLEAN, "null": lambda *_: json_texts.NULL,
}  # fmt: skip


def _either(nodes: list[Node]) -> Node:
    nodes = list(dict.fromkeys(nodes))
    return nodes[0] if len(nodes) == 1 else Either(tuple(nodes))


def _key(value: Any) -> str:
    """The same for values that JSON schemas call equal."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _listed(schema: Schema) -> list[Any] | None:
    """The only values that may be valid, where the schema lists them."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and not schema.get("nullable") else None


def _names(schema: Schema) -> list[str]:
    given = [schema.get(keyword) for keyword in ("properties", "required")]
    return [name for names in given if isinstance(names, list | dict) for name in names if isinstance(name, str)]


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = ((str, "string"), (int, "integer"), (float, "number"), (list, "array"), (dict, "object"))
    return next((kind for of, kind in kinds if isinstance(value, of)), "null")


def _common_types(a: Any, b: Any) -> list[str]:
    a, b = ([one] if isinstance(one, str) else list(one) for one in (a, b))
    both = [kind for kind in a if kind in b]
    return both + [
        "integer" for one, other in ((a, b), (b, a)) if "integer" in one and "number" in other and "integer" not in both
    ]


def _all_properties(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"allOf": [a[name], b[name]]} if name in a and name in b else {**a, **b}[name] for name in {**a, **b}}


# Keywords that may stand in several schemas that all have to hold
_MERGE: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
    "type": _common_types,
    "properties": _all_properties,
    "required": lambda a, b: list(dict.fromkeys([*a, *b])),
    "enum": lambda a, b: [value for value in a if _key(value) in {_key(other) for other in b}],
    "items": lambda a, b: {"allOf": [a, b]},
    "additionalProperties": lambda a, b: {"allOf": [a, b]},
    "nullable": lambda a, b: bool(a and b),
    "uniqueItems": lambda a, b: a or b,
}
