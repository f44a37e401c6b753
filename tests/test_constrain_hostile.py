"""Schemas that a stranger sends to take a server's time: they are built or refused at once."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from constraining import END_ID, VOCABULARY, allowed, masks_of

from pocketlm.constrain import combining, grammar, states
from pocketlm.constrain.automaton import build
from pocketlm.constrain.combining import key_of
from pocketlm.constrain.grammar import Chars, Grammar, Repeat, Sequence, literal
from pocketlm.constrain.guides import Guide
from pocketlm.constrain.masks import Masks
from pocketlm.constrain.patterns import whole
from pocketlm.constrain.schema import grammar_of
from pocketlm.constrain.vocabulary import Vocabulary
from pocketlm.errors import UsageError

NESTS = {
    "arrays": "{'type': 'array', 'items': s}",
    "counted arrays": "{'type': 'array', 'items': s, 'minItems': 1, 'maxItems': 5}",
    "dicts": "{'type': 'object', 'additionalProperties': s}",
    "arrays of objects": "{'type': 'array', 'items': {'type': 'object', 'properties': {'a': s, 'b': {}}}}",
    "optional arrays": "{'anyOf': [{'type': 'array', 'items': s}, {'type': 'null'}]}",
    "merged arrays": "{'allOf': [{'type': 'array', 'items': s}, {'minItems': 1}]}",
    "tuples": "{'type': 'array', 'prefixItems': [s, {}]}",
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_what_is_nested_takes_no_time_that_doubles_with_each_level(nest):
    """In a process of its own, for what takes 2^60 steps cannot be ended. Twice, for equal trees were compared as well."""
    program = f"""
from constraining import masks_of, allowed
from pocketlm.constrain.schema import grammar_of
from pocketlm.constrain.vocabulary import Vocabulary
from pocketlm.errors import UsageError
for depth in (30, 60, 120):
    for _ in range(2):
        s = {{"type": "integer"}}
        for _ in range(depth):
            s = {nest}
        try:
            masks = masks_of(grammar_of(s))
            allowed(masks, masks.start)
        except UsageError as error:
            assert depth > 30, error
            assert "large" in str(error) or "nested too deeply" in str(error), error
"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent, timeout=60, check=True)


def test_equal_trees_are_one_and_are_forgotten():
    def tree():
        return Sequence((literal("only here"), Repeat(Chars(((1, 2),)), 0, 123)))

    assert tree() is tree()
    made = tree()
    assert made is tree()
    assert made != Sequence((literal("only here"), Repeat(Chars(((1, 2),)), 0, 124)))
    gc.collect()
    n = len(grammar._made)
    del made
    gc.collect()
    assert len(grammar._made) < n


def test_every_string_has_what_was_counted_for_the_first():
    VOCABULARY.counted.clear()
    for schema in ({"type": "string"}, {"properties": {"a": {"type": "string", "maxLength": 9}}, "required": ["a"]}):
        masks = masks_of(grammar_of(schema))
        masks.mask(masks.advance(masks.start, b'"' if "type" in schema else b'{"a":"'))
    assert len(VOCABULARY.counted) == 1


def test_counts_that_forbid_no_other_token_have_one_mask():
    masks = masks_of(grammar_of({"type": "string", "minLength": 2, "maxLength": 500}))
    far, farther, late = (masks.mask(masks.advance(masks.start, b'"' + b"a" * n)) for n in (10, 200, 499))
    assert far is farther
    assert late is not far


def test_what_was_counted_for_one_form_is_not_taken_for_a_state_of_another():
    """The node where the first form's `.` begins is one in the middle of a character to the second."""
    tokens = [bytes([byte]) for byte in range(256)] + ["éa".encode()]
    vocabulary, whole_character = Vocabulary(tokens, [], len(tokens)), len(tokens) - 1
    for pattern in (".{2,5}aa", ".{2,5}a"):
        masks = Masks(build(Grammar(whole(pattern), {}, "regex")), vocabulary, "regex")
        assert allowed(masks, masks.start)[whole_character]
        assert not allowed(masks, masks.advance(masks.start, b"b" + "é".encode()[:1]))[whole_character]


RUNS = {  # to a vocabulary of long runs, as those of code models are
    "three characters many times": r"(?:(?:[^a]{3}){2,10}){2,}",
    "short ways to go on": r"(?:[^a]{2}|\w+a\w{1,}|(?:a+)*)+",
    "many parts of three": r"(?:a{3}){2,51}",
    "many counts of one byte": r"(?:(?:[b-z]|[^a]?){3,52}|(?:[a ]{3,})?|\s{4,12})",
}


@pytest.mark.parametrize("pattern", RUNS.values(), ids=RUNS)
def test_long_runs_are_walked_once_not_from_each_of_their_nodes(pattern, monkeypatch):
    tokens = [bytes([byte]) for byte in range(256)] + [text * n for text in (b"a", b" ", b"b-") for n in range(2, 129)]
    vocabulary, below, calls = Vocabulary(tokens, [], len(tokens)), Vocabulary.below, []
    monkeypatch.setattr(Vocabulary, "below", lambda self, nodes: calls.append(0) or below(self, nodes))
    masks = Masks(build(Grammar(whole(pattern), {}, "regex")), vocabulary, "regex")
    masks.mask(masks.start)
    assert len(calls) < 2000


def test_a_way_that_was_gone_holds_its_places_no_more():
    masks = masks_of(Grammar(whole("(?:a{3}|a{5}|a{7}){1,40}"), {}, "regex"))
    masks.mask(masks.start)
    gone = [way for ways in masks._states._ways for way in ways or () if way.number != states.NONE]
    assert gone
    assert not any(way.places for way in gone)


def discriminated(n):
    kinds = {f"k{i}": {"type": "object", "properties": {"kind": {"const": i}, "v": {}}, "required": ["kind"]} for i in range(n)}
    return {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in kinds], "$defs": kinds}


LISTS = {
    "two enums": ({"enum": list(range(5000)), "allOf": [{"enum": list(range(1, 5001))}]}, ""),
    "many enums": ({"allOf": [{"enum": list(range(i, 3000 + i))} for i in range(300)]}, "too large"),
    "a constant of many": ({"enum": list(range(9000)), "const": list(range(9000))}, "no text"),
    "members twice": ({"allOf": [{"properties": {str(i): {} for i in range(j, 5000 + j)}} for j in (0, 1)]}, "too large"),
    "enums apart": ({"oneOf": [{"enum": [f"{i} {j}" for j in range(100)]} for i in range(100)]}, ""),
    "branches of a kind": (discriminated(200), ""),
    "too many of a kind": (discriminated(1000), "compared for oneOf"),
}


@pytest.mark.parametrize(("schema", "refused"), LISTS.values(), ids=LISTS)
def test_lists_that_are_compared_take_no_time_that_grows_with_their_square(schema, refused, monkeypatch):
    keys = []
    monkeypatch.setattr(combining, "key_of", lambda value: keys.append(0) or key_of(value))
    monkeypatch.setattr("pocketlm.constrain.schema.key_of", combining.key_of)
    if refused:
        with pytest.raises(UsageError, match=refused):
            masks_of(grammar_of(schema))
    else:
        masks_of(grammar_of(schema))
    assert len(keys) < 50_000


LONG = {
    "a string": ({"type": "string", "maxLength": 9000}, "lorem ipsum " * 700),
    "strings": ({"type": "array", "items": {"type": "string", "maxLength": 900}, "maxItems": 99}, ["lorem ipsum " * 40] * 20),
    "nested": ({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, json.loads("[" * 800 + "]" * 800)),
}


@pytest.mark.parametrize(("schema", "value"), LONG.values(), ids=LONG)
def test_a_long_answer_forgets_what_it_has_left_behind(schema, value, monkeypatch):
    monkeypatch.setattr(states, "MOST_STACKS", 2000)
    guide, text = Guide(masks_of(grammar_of(schema))), json.dumps(value).encode()
    passed = {guide._masks}
    for byte in text:
        assert not guide.is_over()
        guide.follow(byte)
        passed.add(guide._masks)
    assert guide.allowed().tolist() == [END_ID]
    assert len(passed) > 2


def test_a_count_in_a_count_is_left_in_one_way_at_every_count():
    """In a way for each, a mask of 49,152 tokens took a second and a half."""
    masks = masks_of(Grammar(whole("(?:.{2}){1,50}(?:.{3}){1,50}"), {}, "regex"))
    state, n_states = masks.start, []
    for _ in range(60):
        allowed(masks, state)
        n_states.append(len(masks._states.by_number))
        state = masks.advance(state, b"a")
    assert n_states[-1] == n_states[20]


def test_nothing_is_repeated_without_end():
    """In a process of its own, for it would take hours."""
    program = """
from pocketlm.constrain.automaton import build
from pocketlm.constrain.grammar import Grammar
from pocketlm.constrain.patterns import whole
build(Grammar(whole("(?:(?:(?:(?:(?:){99999}){99999}){99999}|b{0})a){5}"), {}, "regex"))
"""
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)
