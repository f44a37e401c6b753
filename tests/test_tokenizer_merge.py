"""Merging is exact whatever the table, and a run of ten million equal characters costs ten times one of a million."""

import random
import time
import tracemalloc
from itertools import pairwise

import pytest

from pocketlm import tokenizer
from pocketlm.tokenizer import merge as merging
from pocketlm.tokenizer.merge import NO_MERGE, MergeTable, merge

LARGE = ["gpt-2", "llama-spm", "starcoder"]


def one_after_the_other(symbols, pairs, stride):
    """The rule as it is written: the lowest rank, the leftmost of those, until there is none."""
    symbols = list(symbols)
    while True:
        values = [pairs.get(left * stride + right) for left, right in pairwise(symbols)]
        ranks = [value >> 32 for value in values if value is not None]
        if not ranks:
            return symbols
        i = next(i for i, value in enumerate(values) if value is not None and value >> 32 == min(ranks))
        symbols[i : i + 2] = [values[i] & 0xFFFFFFFF]


def random_table(chance):
    """Merges of some symbols in random order: some like a trained vocabulary, some with ties, some absurd."""
    n_letters = chance.randint(1, 4)
    stride = n_letters + chance.randint(1, 12)
    kind = chance.choice(["trained", "equal neighbours", "ties", "absurd"])
    pairs = {}
    for new in range(n_letters, stride):
        left = chance.randrange(new)
        right = left if kind == "equal neighbours" else chance.randrange(new)
        rank = {"ties": chance.randint(0, 3), "absurd": chance.randint(0, 99)}.get(kind, new)
        pairs[left * stride + right] = rank << 32 | new
    return n_letters, stride, pairs


@pytest.mark.parametrize("seed", range(10))
def test_every_way_of_merging_gives_what_the_rule_says(seed, monkeypatch):
    for trial in range(200):
        chance = random.Random(1000 * seed + trial)
        n_letters, stride, pairs = random_table(chance)
        often = chance.random()
        letters = [0 if chance.random() < often else chance.randrange(n_letters) for _ in range(chance.randint(1, 70))]
        expected = one_after_the_other(letters, pairs, stride)

        def resolve(left, right, pairs=pairs, stride=stride):
            return pairs.get(left * stride + right, NO_MERGE)

        ties = len({value >> 32 for value in pairs.values()}) < len(pairs)
        assert merge(list(letters), MergeTable(stride, resolve, ties)) == expected
        assert merge(list(letters), MergeTable(stride, resolve, ties=True)) == expected, "the heap"
        with monkeypatch.context() as patch:
            patch.setattr(merging, "_SHORT", 0)
            patch.setattr(merging, "_LONG", 1)
            patch.setattr(merging, "_PART", 5)
            assert merge(list(letters), MergeTable(stride, resolve, ties)) == expected, "few different symbols"


def seconds(tok, text, times):
    start = time.process_time()
    for _ in range(times):
        tok.encode(text)
    return time.process_time() - start


@pytest.mark.parametrize("name", [f"ggml-vocab-{name}" for name in LARGE[:2]])
@pytest.mark.parametrize("character", ["a", " "])
def test_ten_million_equal_characters_take_no_more_than_their_share_of_time(name, character, vocabulary_file):
    """About 11 times as long as a million; squares would take 100 times, and a busy machine's caches have made 14 of 11."""
    tok = tokenizer.load(vocabulary_file(name))
    tok.encode(character * 5000)
    ratios = []
    for _ in range(3):  # both are measured over the same time: other programs slow them alike
        ratios.append(seconds(tok, character * 10_000_000, 1) / (seconds(tok, character * 1_000_000, 10) / 10))
        if ratios[-1] <= 25:
            return
    pytest.fail(f"{ratios} times as long")


def test_equal_characters_take_no_more_memory_than_their_list():
    table = MergeTable(16, lambda left, right: left << 32 | left + 1 if left == right < 8 else NO_MERGE)
    symbols = [0] * (1 << 21)
    tracemalloc.start()
    try:
        assert merge(symbols, table) == [8] * (1 << 13)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(symbols)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["gguf-default", "gguf-llama", *(f"ggml-vocab-{name}" for name in LARGE)])
@pytest.mark.parametrize("text", ["😀", "中", "=", "7", "\n", "é", "ab", "no space at all;"])
def test_long_texts_without_words_come_back(name, text, vocabulary_file):
    tok = tokenizer.load(vocabulary_file(name))
    ids = tok.encode(text * 20_000)
    assert tok.decode(ids) == text * 20_000
