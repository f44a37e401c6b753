"""What a large vocabulary takes in memory, and that its compact form is the tuple and the dictionary it stands for."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest

from pocketlm.tokenizer import from_metadata
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.texts import index_of

MB = 1 << 20
MARKERS = ["<unk>", "<s>", "</s>"]


def words(n: int) -> tuple[list[str], list[str]]:
    """`n` tokens that can all be merged from two others, the 256 bytes apart, and those merges."""
    rng, tokens, merges, known = random.Random(0), list(LETTERS), [], set(LETTERS)
    while len(tokens) < n:
        left, right = rng.choice(tokens), rng.choice(tokens[:2000])
        if len(left + right) <= 12 and left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    return tokens, merges


def byte_bpe(n: int) -> dict:
    tokens, merges = words(n)
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}


def sentencepiece(n: int) -> dict:
    tokens = words(n)[0]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 256)]
    tokens = [*MARKERS, *(f"<0x{byte:02X}>" for byte in range(256)), *tokens[256:]]
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array(types, "i4"),
        "tokenizer.ggml.scores": -np.arange(len(tokens), dtype="f4"),
    }  # fmt: skip


def copy_of(text: str) -> str:
    return (text + " ")[:-1]


@pytest.mark.parametrize("make", [byte_bpe, sentencepiece])
def test_a_vocabulary_takes_at_most_72_bytes_a_word(make):
    """Python's own lists and dictionaries take 230 to 350."""
    n = 50_000
    metadata = make(n)
    from_metadata(metadata, "large.gguf").encode("so it is")  # modules, patterns
    tracemalloc.start()
    try:
        copied = {key: [*map(copy_of, value)] if isinstance(value, list) else value for key, value in metadata.items()}
        tokenizer = from_metadata(copied, "large.gguf")
        tokenizer.encode("so it is")
        held = tracemalloc.get_traced_memory()[0]
        del copied
        took = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert held - took > 48 * n  # the lists are let go of
    assert took <= 72 * n + MB // 2
    assert tokenizer.n_vocab == (n if make is byte_bpe else n + 3)


ODD = ["", "a", "\0", "a\0b", "▁the", "🦊", "é", "e\u0301", " ", "\n"]


@pytest.mark.parametrize("texts", [ODD, [], ["one"], [t for t in ODD if "\0" not in t], [str(i) for i in range(5000)]])
def test_compact_texts_are_the_tuple_and_the_dictionary_of_them(texts):
    kept, index = index_of(texts)
    usual = {text: i for i, text in enumerate(texts) if text}
    assert (list(kept), len(kept)) == (texts, len(texts))
    assert [kept[i] for i in range(-len(texts), len(texts))] == texts + texts
    for wrong in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            kept[wrong]
    assert (dict(index.pairs()), list(index), len(index)) == (usual, list(usual), len(usual))
    asked = [*texts, "absent", "", "\ud800", "aa"]
    assert [index.get(text) for text in asked] == [usual.get(text) for text in asked]
    assert [text in index for text in asked] == [text in usual for text in asked]
    with pytest.raises(KeyError):
        index["absent"]
    assert index.has_all(usual)
    assert not index.has_all([*usual, "absent"])
    rest = index.without([0, 1, 4])
    assert dict(rest.pairs()) == {text: i for text, i in usual.items() if i not in (0, 1, 4)}
    assert rest.get("a") is None
