"""JSON and JSON schemas as masks, against Python's `json` and the `jsonschema` package."""

import json
import random
import string

import pytest
from constraining import TOKENS, check_exactly, dumped, masks_of, reads, walk, write

from pocketlm.constrain.combining import KNOWN
from pocketlm.constrain.grammar import Grammar
from pocketlm.constrain.json_texts import ANY_OBJECT, RULES
from pocketlm.constrain.schema import FORMATS, grammar_of
from pocketlm.errors import UsageError

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema says what is valid")
LETTERS = string.ascii_letters + 'é日🙂ığ"\\/\n\t \x01\x7f'
KEYS = ("name", "age", "a", "ab", 'q"k', "ağaç", "🙂", "", "x\n")


def judge(schema):
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def text_of(rng, least=0, most=8):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(least, most + 1)))


def value_of(rng, depth=2):
    """Any JSON value."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 5:
        return [value_of(rng, depth - 1) for _ in range(rng.randrange(3))]
    if kind == 6:
        return {rng.choice(KEYS): value_of(rng, depth - 1) for _ in range(rng.randrange(3))}
    return (text_of(rng), rng.randrange(-(10**6), 10**6), rng.choice((1.5, -0.25, 1e-7, 0.0)), rng.random() < 0.5, None)[kind]


def random_schema(rng, depth=3):
    """(a schema, what makes an instance whose members are in the schema's order)."""
    kind = rng.randrange(11 if depth else 7)
    if kind == 0:
        least = rng.choice((0, 0, 2, 30))
        most = rng.choice((None, least, least + 5, 4000))
        bounds = {"minLength": least} | ({} if most is None else {"maxLength": most})
        return {"type": "string", **bounds}, lambda: text_of(rng, least, min(99 if most is None else most, least + 6))
    if kind == 1:
        low = rng.randrange(-200, 200)
        high = low + rng.randrange(300)
        keyword, shift = rng.choice((("minimum", 0), ("exclusiveMinimum", -1)))
        return {"type": "integer", keyword: low + shift, "maximum": high}, lambda: rng.randrange(low, high + 1)
    if kind == 2:
        low = rng.randrange(-2000, 2000) / 100
        return {"type": "number", "minimum": low}, lambda: round(low + rng.randrange(3000) / 100, 2)
    if kind == 3:
        values = [value_of(rng, 1) for _ in range(rng.randrange(1, 5))]
        return rng.choice(({"enum": values}, {"const": values[0]})), lambda: values[0]
    if kind == 4:
        kinds = rng.sample(("string", "integer", "number", "boolean", "null"), rng.randrange(1, 3))
        made = {"string": "aé", "integer": -7, "number": 2.5, "boolean": True, "null": None}
        return {"type": kinds if len(kinds) > 1 else kinds[0]}, lambda: made[rng.choice(kinds)]
    if kind == 5:
        pattern, makes = rng.choice(PATTERNS)
        return {"type": "string", "pattern": pattern}, lambda: makes(rng)
    if kind == 6:
        return {"description": "anything"}, lambda: value_of(rng)
    if kind <= 8:
        return random_object(rng, depth)
    if kind == 9:
        first = [random_schema(rng, depth - 1) for _ in range(rng.randrange(3))]
        item, make = random_schema(rng, depth - 1)
        least = rng.randrange(4)
        most = rng.choice((None, least + rng.randrange(3)))
        bounds = {"minItems": least} | ({} if most is None else {"maxItems": most})
        prefix = {"prefixItems": [schema for schema, _ in first]} if first else {}

        def items():
            n = rng.randrange(least, (least + 3 if most is None else most) + 1)
            return [first[i][1]() if i < len(first) else make() for i in range(n)]

        return {"type": "array", **prefix, "items": item, **bounds}, items
    branches = [random_schema(rng, depth - 1) for _ in range(rng.randrange(1, 4))]
    if rng.random() < 0.3:
        return {"allOf": [branches[0][0]], "title": "t"}, branches[0][1]
    return {"anyOf": [schema for schema, _ in branches]}, lambda: rng.choice(branches)[1]()


PATTERNS = (
    ("^[a-z]{2,30}$", lambda rng: "".join(rng.choice("abc") for _ in range(rng.randrange(2, 31)))),
    (r"^\d{3}-\d{4}$", lambda rng: f"{rng.randrange(1000):03}-{rng.randrange(10000):04}"),
    ("é+", lambda rng: f"{text_of(rng)}éé{text_of(rng)}"),
    ('^("|\\\\|a)*$', lambda rng: "".join(rng.choice('"\\a') for _ in range(5))),
)


def random_object(rng, depth):
    names = rng.sample(KEYS, rng.randrange(5))
    members = {name: random_schema(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.5]
    extra, make_extra = random_schema(rng, depth - 1)
    kind = rng.randrange(3)
    additional = ({}, {"additionalProperties": False}, {"additionalProperties": extra})[kind]
    schema = {"type": "object", "properties": {name: each for name, (each, _) in members.items()}, **additional}
    if required:
        schema["required"] = required

    def make():
        made = {name: members[name][1]() for name in names if name in required or rng.random() < 0.5}
        if kind == 2:
            made |= {name: make_extra() for name in ("zz", "nam", "name2", "b") if rng.random() < 0.3}
        return made

    return schema, make


@pytest.mark.parametrize("seed", range(12))
def test_schemas(seed):
    """What is drawn under a mask is valid; and what is valid, as `json.dumps` writes it, can be drawn in any tokens."""
    rng, ended = random.Random(seed), 0
    for _ in range(20):
        schema, make = random_schema(rng)
        validator, masks = judge(schema), masks_of(grammar_of(schema))
        for _ in range(3):
            instance = make()
            assert validator.is_valid(instance), (schema, instance)
            assert not write(masks, dumped(instance, rng), rng), schema
        for steps in (3, 25):
            text = walk(masks, rng, steps)
            if text is not None:
                ended += 1
                validator.validate(json.loads(text))
    assert ended > 20


@pytest.mark.parametrize("seed", range(4))
def test_any_object(seed):
    rng, masks = random.Random(seed), masks_of(Grammar(ANY_OBJECT, RULES, "json_object"))
    for _ in range(25):
        assert not write(masks, dumped({text_of(rng): value_of(rng, 4)}, rng), rng)
        text = walk(masks, rng, 30)
        assert text is None or isinstance(json.loads(text), dict)
    assert [
        reads(masks, text) for text in ("[]", "{} ", '{"a":01}', '{"a":}', '{"a":1,}', '{"\\ud800":1}', "{'a':1}", '{"a":+1}')
    ] == [False] * 8
    assert reads(masks, '{"a":' + "[" * 300 + "]" * 300 + "}")
    check_exactly(masks, rng)


RECURSIVE = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "required": ["v"],
        }
    },
    "$ref": "#/$defs/tree",
}


def test_a_schema_may_hold_itself():
    masks, rng = masks_of(grammar_of(RECURSIVE)), random.Random(2)
    tree = {"v": 1, "kids": [{"v": 2}, {"v": 3, "kids": [{"v": 4, "kids": []}]}]}
    assert not write(masks, json.dumps(tree), rng)
    for _ in range(20):
        text = walk(masks, rng, 30)
        assert text is not None
        judge(RECURSIVE).validate(json.loads(text))
    check_exactly(masks, rng)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    masks, rng = masks_of(grammar_of({"type": "string", "format": name})), random.Random(3)
    examples = {
        "date": ("2024-02-29 2000-02-29 1999-12-31 2023-04-30", "2023-02-29 1900-02-29 2024-04-31 0000-01-01 2024-13-01"),
        "time": ("12:00:00Z 23:59:59.123+02:00", "24:00:00Z 12:00:00 12:60:00Z"),
        "email": ("a@b.example x.y+z@sub.b.example", "a@ @b a a@b .a@b.c"),
        "date-time": ("2024-02-29T12:00:00Z", "2024-02-29 12:00:00Z 2023-02-29T12:00:00Z"),
        "ipv4": ("127.0.0.1 255.0.19.7", "256.0.0.1 1.2.3 01.2.3.4"),
        "uuid": (
            "123e4567-e89b-12d3-a456-426614174000",
            "123e4567e89b12d3a456426614174000 123e4567-e89b-12d3-a456-42661417400g",
        ),
    }
    good, bad = examples[name]
    assert all(reads(masks, json.dumps(text)) for text in good.split())
    assert not any(reads(masks, json.dumps(text)) for text in bad.split())
    for _ in range(20):
        text = walk(masks, rng, 30)
        assert text is None or judge({"format": name}).is_valid(json.loads(text)), text


CASES = [
    (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["b"],
            "additionalProperties": {"type": "null"},
        },
        [{"a": 1, "b": None}, {"b": None, "c": None}],
        [{"a": 1}, {"b": 1}],
    ),
    ({"properties": {"a": {"type": "string", "nullable": True}}}, [{"a": None}, {"a": "x"}, {}], [{"a": 1}, {"b": 1}, 3]),
    ({"type": "object", "properties": {"a": False, "b": {}}}, [{"b": [1]}, {}], [{"a": 1}]),
    ({"oneOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]}, [1, "a", None], [True, 1.5]),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": k}, k: {"type": "integer"}}, "required": ["k", k]}
                for k in "ab"
            ]
        },
        [{"k": "a", "a": 1}, {"k": "b", "b": 1}],
        [{"k": "a", "b": 1}, {"k": "c"}],
    ),
    (
        {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 2}],
        [{}],
    ),
    (
        {"allOf": [{"type": "number", "minimum": 3}, {"type": "integer", "maximum": 5}, {"minimum": 4}]},
        [4, 5],
        [3, 6, 4.5, "x"],
    ),
    ({"$ref": "#/$defs/n", "maximum": 2, "$defs": {"n": {"type": "integer", "minimum": 1}}}, [1, 2], [0, 3]),
    ({"$ref": "#/$defs/Ki%C5%9Fi~1a%25", "$defs": {"Kişi/a%": {"type": "boolean"}}}, [True], [1, "a"]),
    (
        {
            "allOf": [
                {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"a": {"maximum": 1}, "b": {"const": 0}}},
            ]
        },
        [{"a": 1}, {"a": 1, "b": 0}],
        [{}, {"a": 2}, {"a": 1, "b": 1}],
    ),
    ({"type": ["string", "null"], "enum": ["a", None, 1]}, ["a", None], [1, "b"]),
    ({"const": {"a": [1, {"b": "é\n"}]}}, [{"a": [1, {"b": "é\n"}]}], [{"a": [1]}]),
    (
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False, "minItems": 1},
        [[1], [1, "a"]],
        [[], ["a"], [1, "a", 1]],
    ),
    ({"type": "array", "items": False}, [[]], [[1]]),
    ({"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 1000}, [[1, 1], [1] * 1000], [[1], [1] * 1001]),
    ({"type": "string", "maxLength": 3}, ["", "日本語", "🙂🙂🙂"], ["abcd"]),
    ({"type": "integer", "minimum": 0.5, "exclusiveMaximum": 3}, [1, 2], [0, 3]),
    ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.9999999999999999], [0, 1, 0.0, 1.0, 1.5]),
    ({"type": "number", "exclusiveMinimum": 0, "minimum": 1, "maximum": 3, "exclusiveMaximum": 3}, [1, 2.5], [0.5, 3, 3.0]),
    (
        {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}, "x-order": 1},
        [{"a": 1.5}],
        [{"a": "b"}],
    ),
    (True, [1, {}], []),
]


@pytest.mark.parametrize(("schema", "valid", "invalid"), CASES, ids=[str(i) for i in range(len(CASES))])
def test_keywords(schema, valid, invalid):
    masks, rng = masks_of(grammar_of(schema)), random.Random(5)
    for value in valid:
        judge(schema if schema is True or "nullable" not in str(schema) else True).validate(value)
        assert not write(masks, dumped(value, rng), rng)
    assert not any(reads(masks, json.dumps(value)) for value in invalid)
    check_exactly(masks, rng)


BAD = [
    ({"type": "object", "patternProperties": {}}, "patternProperties"),
    ({"not": {}}, "not"),
    ({"if": {}}, "if"),
    ({"type": "str"}, "type is str"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "integer", "multipleOf": 3}, "multipleOf"),
    ({"type": "string", "format": "uri"}, "format uri"),
    ({"type": "string", "pattern": "(?=a)"}, "looking ahead"),
    ({"type": "string", "pattern": "a", "maxLength": 3}, "together"),
    ({"properties": {"a": {"contains": {}}}}, "/properties/a: contains"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "may both hold"),
    ({"$ref": "#"}, "refers to itself"),
    ([], "a schema is"),
    ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "refers to itself"),
    ({"$ref": "http://x.example/"}, "is not supported: it must be #"),
    ({"$ref": "#/$defs/none"}, "leads nowhere"),
    ({"type": "integer", "minimum": 5, "maximum": 4}, "no text"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no text"),
    ({"enum": 3}, "enum must be"),
    ({"type": "object", "minProperties": 1}, "minProperties"),
    ({"type": "object", "propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"type": "array", "items": [{}]}, "prefixItems"),
    ({"enum": []}, "no text"),
    ({"allOf": [{"additionalProperties": False}, {"properties": {"a": {}}}]}, "additionalProperties"),
    ({"minimum": "1"}, "minimum must be"),
    ({"maxLength": -1}, "maxLength"),
    ({"required": "a"}, "required must be"),
    ({"minimum": 1e200}, "digits"),
    ({"minimum": -1.797e308}, "digits"),
    ({"maximum": 10**400}, "digits"),
    ({"maximum": float("nan")}, "maximum must be a number"),
    ({"anyOf": []}, "anyOf must be"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
    ({"$ref": "#/a", "title": "", "minimum": 1, "a": {"$ref": "#/a", "minimum": 1}}, "a is not supported"),
    ({"$defs": {"a": {"$ref": "#/$defs/a", "minimum": 1}}, "$ref": "#/$defs/a"}, "refers to itself|nested"),
]


@pytest.mark.parametrize(("schema", "word"), BAD)
def test_what_is_not_supported_is_named(schema, word):
    with pytest.raises(UsageError, match=word) as caught:
        masks_of(grammar_of(schema))
    assert "\n" not in str(caught.value)


def nested(depth):
    schema = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(n):
    """Each holds the next one twice."""
    twice = {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}", "title": "t"}]} for i in range(n)}
    return {"anyOf": [{"$ref": "#/$defs/a0"}], "$defs": {**twice, f"a{n}": {"type": "null"}}}


STRANGE = {
    "deep": nested(5000),
    "doubling": doubling(40),
    "large": {"properties": {str(i): {"enum": [f"{i} {j}" * 20 for j in range(40)]} for i in range(400)}},
    "many items": {"type": "array", "prefixItems": [{}] * 3000},
    "product": {"allOf": [{"anyOf": [{"minLength": i}] * 30} for i in range(30)]},
}


@pytest.mark.parametrize("schema", STRANGE.values(), ids=STRANGE)
def test_a_strangers_schema_takes_no_memory_and_no_time(schema):
    with pytest.raises(UsageError) as caught:
        masks_of(grammar_of(schema))
    assert "\n" not in str(caught.value)


RICH = {
    "$defs": {"t": {"properties": {"v": {"type": "integer"}, "k": {"items": {"$ref": "#/$defs/t"}}}, "required": ["v"]}},
    "allOf": [{"$ref": "#/$defs/t"}, {"properties": {"v": {"maximum": 5, "exclusiveMinimum": 1.5}}}],
    "oneOf": [
        {"properties": {"kind": {"const": 1}}, "required": ["kind"]},
        {"properties": {"kind": {"enum": [2, 3]}}, "required": ["kind"]},
    ],
    "anyOf": [{"properties": {"s": {"type": "string", "pattern": "^a+$"}}}, {"properties": {"s": {"format": "date"}}}],
    "minProperties": 1,
}


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_schema_holds_it_is_built_or_refused(seed):
    from fuzz_serve import VALUES, _nodes

    rng, built = random.Random(seed), 0
    for _ in range(500):
        schema = json.loads(
            json.dumps(rng.choice((RICH, RECURSIVE, {"properties": {"a": RICH}}, {"anyOf": [RICH, RECURSIVE]})))
        )
        for _ in range(rng.randrange(3)):
            container, key = rng.choice(_nodes(schema, []) or [({"": 0}, "")])
            if rng.random() < 0.3:
                del container[key]
            elif isinstance(container, dict) and rng.random() < 0.3:
                container[rng.choice((*KNOWN, "\ud800"))] = rng.choice(VALUES)
            else:
                container[key] = rng.choice(VALUES)
        try:
            masks = masks_of(grammar_of(json.loads(json.dumps(schema))))
        except UsageError as error:
            message = str(error)
            assert "\n" not in message
            assert len(message) < 500
            continue
        built += 1
        walk(masks, rng, 5)
    assert built > 50


def test_a_token_may_be_a_part_of_a_character():
    masks = masks_of(grammar_of({"const": "é"}))
    state = masks.advance(masks.start, b'"\xc3')
    assert [TOKENS[id] for id in masks.mask(state)] == [b"\xa9"]
