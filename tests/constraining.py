"""Walks under masks, with a vocabulary of all bytes and of pieces as vocabularies have them."""

from __future__ import annotations

import json
import random

import numpy as np

from pocketlm.constrain.automaton import build
from pocketlm.constrain.grammar import Grammar
from pocketlm.constrain.masks import Masks
from pocketlm.constrain.states import NOWHERE, WHOLE, State
from pocketlm.constrain.vocabulary import Vocabulary

END_ID = 256
PIECES = (
    '": "',
    '",',
    '"}',
    '"]',
    '": ',
    ', "',
    '{"',
    "\n",
    "\n  ",
    "    ",
    "}}",
    "]}",
    '"},',
    "the",
    "The ",
    " a",
    "ab",
    "abc",
    "bc",
    "aa",
    "aaa",
    "00",
    "01",
    "12",
    "2024-",
    "-0",
    "true",
    "false",
    "null",
    " tr",
    "nul",
    "\\u",
    "\\n",
    '\\"',
    "\\u00",
    "é",
    "ığ",
    "日本",
    "🙂",
    "name",
    "age",
    '"name',
    "ağaç",
    "a.b",
    "@",
    "[[",
    "[]",
    "{}",
    "1e",
    ".5",
    "-1",
    " ",
    "  ",
    "x" * 30,
    "a" * 30,
    "1" * 12,
)
HALVES = ("é".encode()[:1], "日".encode()[:2], "日".encode()[1:] + b"a", "🙂".encode()[:3], b"a" + "é".encode()[:1])
TOKENS = [bytes([b]) for b in range(256)] + [b""] + sorted({p.encode() for p in PIECES} | set(HALVES) - {b""})
VOCABULARY = Vocabulary(TOKENS, [END_ID], len(TOKENS) + 3)  # three rows more than tokens
BY_FIRST = {b: [id for id, data in enumerate(TOKENS) if data[:1] == bytes([b])] for b in range(256)}


def masks_of(grammar: Grammar) -> Masks:
    return Masks(build(grammar), VOCABULARY, grammar.of)


def allowed(masks: Masks, state: State) -> np.ndarray:
    """For each token whether it may come."""
    mask = masks.mask(state)
    return ~mask if mask.dtype == np.bool_ else np.isin(np.arange(masks.vocabulary.n_vocab), mask)


def reads(masks: Masks, text: str) -> bool:
    """Whether the whole text may be written, byte by byte."""
    state = masks.start
    for byte in text.encode():
        state = masks.advance(state, bytes([byte]))
    return WHOLE in state


def write(masks: Masks, text: str, rng: random.Random) -> str:
    """Write a text in tokens by chance, each of which has to be allowed; what went wrong, or nothing."""
    data, at, state = text.encode(), 0, masks.start
    while at < len(data):
        id = rng.choice([id for id in BY_FIRST[data[at]] if data.startswith(TOKENS[id], at)])
        if not allowed(masks, state)[id]:
            return f"{TOKENS[id]!r} is not allowed after {data[:at]!r} of {text!r}"
        state = masks.advance(state, TOKENS[id])
        at += len(TOKENS[id])
    return "" if allowed(masks, state)[END_ID] else f"{text!r} may not end"


def walk(masks: Masks, rng: random.Random, steps: int = 40) -> str | None:
    """A text of tokens by chance; after so many steps, of those that bring it to its end. None where it did not end."""
    state, data = masks.start, b""
    for step in range(steps + 600):
        ids = allowed(masks, state).nonzero()[0].tolist()
        assert ids, f"nothing may come after {data!r}"
        assert max(ids) < len(TOKENS)
        if END_ID in ids and (step >= steps or len(ids) == 1 or rng.random() < 0.2):
            return data.decode()  # UTF-8, or this raises
        ids = [id for id in ids if id != END_ID]
        closing = [id for byte in b'}]",:' for id in ids if TOKENS[id] == bytes([byte])] if step >= steps else []
        id = closing[0] if closing else rng.choice(ids)
        state = masks.advance(state, TOKENS[id])
        assert state != NOWHERE
        data += TOKENS[id]
    return None


def check_exactly(masks: Masks, rng: random.Random, steps: int = 12) -> None:
    """Along a walk, the masks are those that trying token after token gives: a state has a byte for a text that can end."""
    state = masks.start
    for _ in range(steps):
        found = allowed(masks, state)
        expected = np.zeros_like(found)
        for id, data in enumerate(TOKENS):
            expected[id] = bool(data) and masks.advance(state, data) != NOWHERE
        expected[END_ID] = WHOLE in state
        assert (found == expected).all(), [TOKENS[id] for id in (found != expected).nonzero()[0]]
        ids = [id for id in found.nonzero()[0].tolist() if id != END_ID]
        if not ids:
            return
        state = masks.advance(state, TOKENS[rng.choice(ids)])


def dumped(value: object, rng: random.Random) -> str:
    return json.dumps(value, indent=rng.choice((None, None, 1, 2, 4)), ensure_ascii=rng.random() < 0.5)
