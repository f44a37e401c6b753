"""Schemas that are combined hold as all of them do, or are refused: `jsonschema` says what is valid."""

import json
import random

import pytest
from constraining import dumped, masks_of, reads, write

from pocketlm.constrain.schema import grammar_of
from pocketlm.errors import UsageError

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema says what is valid")


def check(schema, valid, invalid):
    masks, rng = masks_of(grammar_of(schema)), random.Random(1)
    judge = jsonschema.Draft202012Validator(schema)
    for value in valid:
        judge.validate(value)
        assert not write(masks, dumped(value, rng), rng)
    for value in invalid:
        assert not judge.is_valid(value), value
        assert not reads(masks, json.dumps(value)), value


def refused(schema, word):
    with pytest.raises(UsageError, match=word) as caught:
        masks_of(grammar_of(schema))
    assert "\n" not in str(caught.value)


def test_true_is_no_number():
    refused({"allOf": [{"const": 1}, {"const": True}]}, "const in several schemas")
    refused({"allOf": [{"enum": [0]}, {"enum": [False]}]}, "no text")
    refused({"oneOf": [{"const": [1.0]}, {"const": [1]}]}, "may both hold")
    check({"allOf": [{"enum": [[True], "x"]}, {"enum": [[1], "x"]}]}, ["x"], [[1], [True]])
    check({"oneOf": [{"const": {"a": 0}}, {"const": {"a": False}}]}, [{"a": 0}, {"a": False}], [{"a": 1}])
    check({"allOf": [{"enum": [1.0, {"a": [2]}, 3]}, {"enum": [1, {"a": [2.0]}]}]}, [1.0, {"a": [2]}], [3])


def test_a_whole_number_is_an_integer_however_it_is_written():
    check({"type": "integer", "const": 1.0}, [1.0], [2])
    check({"type": "integer", "enum": [1.0, 1.5, 2, True]}, [1.0, 2], [1.5, True])


def test_what_items_says_is_said_of_the_first_ones_of_another_schema_as_well():
    string, integer = {"type": "string"}, {"type": "integer"}
    refused({"type": "array", "allOf": [{"prefixItems": [string]}, {"items": integer}], "minItems": 1}, "no text")
    check({"type": "array", "allOf": [{"prefixItems": [string]}, {"items": integer}]}, [[]], [["x", 1], ["x"], [1]])
    check(
        {"type": "array", "prefixItems": [{"minimum": 3}], "anyOf": [{"items": {"minimum": 5}}]},
        [[5], [6, 5]],
        [[3, 5], [5, 4]],
    )
    check(
        {
            "allOf": [
                {"type": "array", "prefixItems": [integer], "items": string},
                {"prefixItems": [{"minimum": 2}, {"minLength": 2}]},
            ]
        },
        [[], [2], [2, "ab"], [2, "ab", "a"]],
        [[1], [2, "a"], [2, "ab", 3], ["ab"]],
    )
    check({"type": "array", "prefixItems": [integer], "allOf": [{"items": False}]}, [[]], [[1]])
    refused({"allOf": [{"prefixItems": [{}]}, {"prefixItems": 3}]}, "prefixItems holds what")


def test_additional_properties_of_one_schema_hold_for_what_another_names():
    closed = {"type": "object", "additionalProperties": {"type": "integer"}, "required": ["x"]}
    refused({**closed, "anyOf": [{"properties": {"x": {"type": "string"}}}]}, "additionalProperties in one of")
    refused({**closed, "additionalProperties": False, "allOf": [{"properties": {"x": {}}}]}, "additionalProperties in one of")
    check({**closed, "anyOf": [{"required": ["y"]}]}, [{"x": 1, "y": 2}], [{"x": 1}, {"x": 1, "y": "a"}])


def test_a_reference_below_an_id_of_its_own_means_another_document():
    inside = {"x": {"$id": "http://b.example/", "items": {"$ref": "#/$defs/n"}}, "n": {"type": "null"}}
    refused({"$ref": "#/$defs/x", "$defs": inside}, "below an .id")
    refused({"properties": {"a": {"allOf": [{"$ref": "#/$defs/x/items"}, {}]}}, "$defs": inside}, "below an .id")
    plain = {"$id": "http://b.example/", "items": {"type": "null"}}
    check({"$id": "http://a.example/", "$ref": "#/$defs/n", "$defs": {"n": plain}}, [[None]], [[1]])
    named = {"type": "object", "properties": {"$id": {"$ref": "#/$defs/n"}}, "$defs": inside}
    check(named, [{"$id": None}, {}], [{"$id": 1}])


NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {}},
    "required": ["v"],
    "additionalProperties": False,
}
ITSELF = {
    "nullable": {"$ref": "#/$defs/n", "nullable": True},
    "type": {"type": ["object", "null"], "anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
    "types of one": {"type": "object", "allOf": [{"$ref": "#/$defs/n"}]},
    "one of": {"oneOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]},
    "one of, nullable": {"description": "d", "nullable": True, "oneOf": [{"$ref": "#/$defs/n"}, {"type": "integer"}]},
    "members": {"properties": {"v": {"minimum": 0}}, "allOf": [{"$ref": "#/$defs/n"}]},
}


@pytest.mark.parametrize("following", ITSELF.values(), ids=ITSELF)
def test_what_stands_beside_a_reference_may_lead_back_to_it(following):
    schema = {"$ref": "#/$defs/n", "$defs": {"n": {**NODE, "properties": {"v": {"type": "integer"}, "next": following}}}}
    masks, rng = masks_of(grammar_of(schema)), random.Random(2)
    value = {"v": 1}
    for _ in range(9):
        value = {"v": 1, "next": value}
    assert not write(masks, dumped(value, rng), rng)
    assert reads(masks, '{"v": 1, "next": {"v": 2, "next": null}}') == ("null" in str(following))
    assert not reads(masks, '{"v": 1, "next": {"v": 2, "next": {"next": {"v": 3}}}}')
    assert reads(masks, '{"v": 1, "next": {"v": 2, "next": {"v": -3}}}') == ("minimum" not in str(following))


def test_what_begins_with_itself_is_refused():
    refused({"anyOf": [{"allOf": [{"$ref": "#"}, {"title": "t"}]}, {"type": "null"}]}, "refers to itself|too large")
    refused(
        {"$defs": {"a": {"nullable": True, "$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "refers to itself|nested too deeply"
    )
