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
