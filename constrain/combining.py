"""Several schemas as one: references, `allOf`, and what stands beside `anyOf`; and whether two of them exclude each other.

In: JSON schemas of one document. Out: a schema without `$ref` and `allOf` at its top. Raises UsageError, naming the place, for
what is not supported. Knows no grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from pocketlm.errors import UsageError, quoted

Schema = Mapping[str, Any]
NAME = "json_schema"
MOST_SCHEMAS = 20_000
MOST_COMPARED = 100_000  # schemas, and their values, that have to be apart
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


def asks_nothing(keyword: str, value: Any) -> bool:
    """Whether a keyword changes no answer. So does one that begins with x-, and one of zod's dictionaries: names are texts."""
    of_names = keyword == "propertyNames" and (value is True or value in ({}, {"type": "string"}))
    return keyword in NOTES or str(keyword).startswith("x-") or of_names


def bad(path: str, problem: str) -> UsageError:
    return UsageError(f"{NAME}{quoted(path)}: {problem}")


def _refs_below_ids(root: Any) -> set[int]:
    """The schemas, by `id()`, whose `$ref` stands below an inner `$id`, which begins a document that `$ref` then means."""
    found, work = set[int](), [(root, False)]
    while work:
        here, is_below = work.pop()
        if isinstance(here, Mapping):
            own = here.get("$id")
            is_below = is_below or (here is not root and isinstance(own, str) and not own.startswith("#"))
            if is_below and "$ref" in here:
                found.add(id(here))
        inside = here.values() if isinstance(here, Mapping) else here
        work += [(each, is_below) for each in inside if isinstance(each, Mapping | list)]
    return found


def types_of(schema: Schema, path: str) -> list[str]:
    given = schema.get("type")
    if given is None:
        found = [kind for kind, keywords in OF_TYPE.items() if any(keyword in schema for keyword in keywords)]
        return found or list(OF_TYPE)
    kinds = [given] if isinstance(given, str) else given
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in OF_TYPE for kind in kinds):
        raise bad(path, f"type is {quoted(given)}; it must be of {', '.join(OF_TYPE)}, or a list of these")
    return kinds


class Schemas:
    """The schemas of one document. `n` counts what was looked at so far, so that an absurd document ends with an error."""

    def __init__(self, root: Any):
        self._root = root
        self._elsewhere = _refs_below_ids(root) if isinstance(root, Mapping) else set[int]()
        self.n = self._n_compared = 0
        self._keys: dict[int, tuple[Schema, frozenset[str] | None]] = {}  # by id, which is its own as long as it is kept here

    def check(self, schema: Any, path: str) -> None:
        if not isinstance(schema, Mapping):
            raise bad(path, f"a schema is {quoted(json.dumps(schema, default=str))}; it must be an object, true or false")
        for keyword, value in schema.items():
            if keyword not in KNOWN and not asks_nothing(keyword, value):
                raise bad(path, f"{quoted(keyword)} is not supported")
        if id(schema) in self._elsewhere:
            raise bad(path, "$ref below an $id other than the whole schema's is not supported")

    def target(self, ref: Any, path: str) -> Any:
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise bad(path, f"$ref {quoted(ref)} is not supported: it must be # or begin with #/")
        here = self._root
        for step in ref.split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(here, Mapping) and step in here:
                here = here[step]
            elif isinstance(here, list) and step.isdecimal() and len(step) < 9 and int(step) < len(here):
                here = here[int(step)]
            else:
                raise bad(path, f"$ref {quoted(ref)} leads nowhere")
        return here

    def merged(self, schema: Schema, path: str) -> Any:
        """One schema in place of `allOf` and of a `$ref` with other keywords beside it."""
        own = {keyword: value for keyword, value in schema.items() if keyword not in ("$ref", "allOf")}
        parts: list[Any] = [own] if own else []
        if "$ref" in schema:
            parts.append(self.target(schema["$ref"], path))
        branches = schema.get("allOf", [])
        if not isinstance(branches, list) or ("allOf" in schema and not branches):
            raise bad(path, "allOf must be a list of schemas")
        parts += branches
        merged: Any = True
        for i, part in enumerate(parts):
            merged = self.both(merged, part, f"{path}/allOf/{i}" if i else path)
        return merged

    def flat(self, schema: Any, path: str) -> Any:
        """An equivalent schema without `$ref` and `allOf` at its top."""
        while not isinstance(schema, bool):
            self.check(schema, path)
            if "$ref" not in schema and "allOf" not in schema:
                break
            self._one_more(path)
            schema = self.merged(schema, path)
        return schema

    def _one_more(self, path: str) -> None:
        self.n += 1
        if self.n > MOST_SCHEMAS:
            raise bad(path, "the schema is too large, or refers to itself without end")

    def both(self, a: Any, b: Any, path: str) -> Any:
        """A schema for what both ask for."""
        self._one_more(path)
        if a is True or b is True or _is_same(a, b):
            return b if a is True else a
        if a is False or b is False:
            return False
        a, b = self.flat(a, path), self.flat(b, path)
        if isinstance(a, bool) or isinstance(b, bool):
            return self.both(a, b, path)
        a, b = ({keyword: value for keyword, value in one.items() if not asks_nothing(keyword, value)} for one in (a, b))
        n_first = max(len(first) if isinstance(first := one.get("prefixItems"), list) else 0 for one in (a, b))
        a, b = _with_first(a, n_first), _with_first(b, n_first)
        merged = dict(a)
        for closed, other in ((a, b), (b, a)):
            if closed.get("additionalProperties", True) is not True and _properties(other).keys() - _properties(closed).keys():
                raise bad(path, "additionalProperties in one of several schemas that are combined is not supported")
        for keyword, value in b.items():
            if keyword in merged and not _is_same(merged[keyword], value):
                if keyword not in _MERGE:
                    raise bad(path, f"{keyword} in several schemas that are combined is not supported")
                self.n += sum(len(one) for one in (merged[keyword], value) if isinstance(one, list | dict))
                try:
                    value = _MERGE[keyword](merged[keyword], value)
                except (TypeError, AttributeError, ValueError):
                    raise bad(path, f"{keyword} holds what it cannot hold") from None
            merged[keyword] = value
        return merged

    def apart(self, a: Any, b: Any, path: str, depth: int) -> bool:
        """Whether it is plain that no value is valid under both."""
        self._n_compared += 1
        if self._n_compared > MOST_COMPARED:
            raise bad(path, "the schema is too large: too much has to be compared for oneOf")
        if depth > 4:
            return False
        a, b = self.flat(a, path), self.flat(b, path)
        if a is False or b is False:
            return True
        if isinstance(a, bool) or isinstance(b, bool):
            return False
        keys = self._keys_of(a), self._keys_of(b)
        if keys[0] is not None and keys[1] is not None:
            return keys[0].isdisjoint(keys[1])
        kinds = [self._kinds(one, path) for one in (a, b)]
        if not kinds[0] & kinds[1]:
            return True
        if kinds[0] & kinds[1] != {"object"}:
            return False
        required = _required(a) & _required(b)
        members = _properties(a), _properties(b)
        named = required & members[0].keys() & members[1].keys()
        return any(self.apart(members[0][name], members[1][name], path, depth + 1) for name in sorted(named))

    def _keys_of(self, schema: Schema) -> frozenset[str] | None:
        """Keys of the only values that may be valid, None where these are not listed. Kept: a schema is compared with many."""
        if id(schema) not in self._keys:
            values = _listed(schema)
            self._n_compared += len(values or ())
            self._keys[id(schema)] = schema, None if values is None else frozenset(map(key_of, values))
        return self._keys[id(schema)][1]

    def _kinds(self, schema: Schema, path: str) -> set[str]:
        if (values := _listed(schema)) is not None:
            kinds = {kind_of(value) for value in values}
        elif "type" not in schema:
            return set(OF_TYPE) - {"integer"}  # whatever its keywords are for, other types are valid, too
        else:
            kinds = set(types_of(schema, path))
        return {"number" if kind == "integer" else kind for kind in kinds} | ({"null"} if schema.get("nullable") else set())


def key_of(value: Any) -> str:
    """A text that is equal for values that JSON schemas call equal: for 1 and 1.0, but not for true."""
    return json.dumps(_with_whole(value), sort_keys=True)


def _with_whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_whole(each) for each in value]
    if isinstance(value, dict):
        return {name: _with_whole(each) for name, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_same(a: Any, b: Any) -> bool:
    """For Python, true is 1 as well."""
    return a is b or (a == b and key_of(a) == key_of(b))


def _listed(schema: Schema) -> list[Any] | None:
    """The only values that may be valid, where the schema lists them."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and not schema.get("nullable") else None


def _properties(schema: Schema) -> Mapping[str, Any]:
    return given if isinstance(given := schema.get("properties"), Mapping) else {}


def _required(schema: Schema) -> set[str]:
    return {name for name in given if isinstance(name, str)} if isinstance(given := schema.get("required"), list) else set()


def kind_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float) and value.is_integer():
        return "integer"
    kinds = ((str, "string"), (int, "integer"), (float, "number"), (list, "array"), (dict, "object"))
    return next((kind for of, kind in kinds if isinstance(value, of)), "null")


def _common_types(a: Any, b: Any) -> list[str]:
    a, b = ([one] if isinstance(one, str) else list(one) for one in (a, b))
    both = [kind for kind in a if kind in b]
    return both + [
        "integer" for one, other in ((a, b), (b, a)) if "integer" in one and "number" in other and "integer" not in both
    ]


def _common_values(a: list[Any], b: list[Any]) -> list[Any]:
    keys = set(map(key_of, b))
    return [value for value in a if key_of(value) in keys]


def _with_first(schema: Schema, n: int) -> Schema:
    """The schema with `n` prefixItems, filled up by its `items`, which hold where another schema has prefixItems, too."""
    first = schema.get("prefixItems", [])
    if not isinstance(first, list) or len(first) == n:
        return schema
    return {**schema, "prefixItems": first + [schema.get("items", True)] * (n - len(first))}


def _all_of(a: Any, b: Any) -> Any:
    if a is True or b is True:
        return b if a is True else a
    return {"allOf": [a, b]}


# Keywords that may stand in several schemas that all have to hold
_MERGE: dict[str, Callable[[Any, Any], Any]] = {
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
    "type": _common_types,
    "properties": lambda a, b: {**a, **b, **{name: _all_of(a[name], b[name]) for name in a if name in b}},
    "required": lambda a, b: list(dict.fromkeys([*a, *b])),
    "enum": _common_values,
    "prefixItems": lambda a, b: list(map(_all_of, a, b)),
    "items": _all_of,
    "additionalProperties": _all_of,
    "nullable": lambda a, b: bool(a and b),
    "uniqueItems": lambda a, b: a or b,
}
