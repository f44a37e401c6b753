"""One answer, bit for bit: logits depend on no number of threads, no way of cutting a text into passes, no earlier work."""

import numpy as np
import pytest
from native_calls import each_format, each_level, executors, host_level

from pocketlm.runtime.kv_cache import KINDS
from pocketlm.runtime.native.sizes import QUERIES, SPAN

CUTS = (1, 2, 3, 5, 8, 13, 128)


def logits(native, ids, cut):
    """All logits of `ids` in passes of `cut` tokens, from an empty cache."""
    native.cache.truncate(0)
    return np.concatenate([native.forward(ids[at : at + cut], rows="all").copy() for at in range(0, len(ids), cut)])


def same_bits(a, b):
    return (a.view(np.uint32) == b.view(np.uint32)).all()


@each_level
@each_format
def test_however_a_text_is_cut_and_on_however_many_threads(level, fmt):
    ids, first = np.random.default_rng(1).integers(0, 64, 40), None
    for threads in (1, 2, 3, 8):
        native, reference = executors(level, fmt, threads, n_vocab=64, n_ctx=64)
        reference.close()
        for cut in (*CUTS, len(ids)) if threads <= 2 else (3, 13, len(ids)):
            found = logits(native, ids, cut)
            first = found if first is None else first
            assert same_bits(found, first), f"{threads} threads, passes of {cut} tokens"
        native.close()


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("group", [1, 3, 25], ids="{} queries a key".format)
def test_across_spans_of_positions(position, group, kv):
    """Long texts: spans are shared out among threads, or walked through by one; more queries than a task takes at a time."""
    if position == "alibi" and group != 1:
        pytest.skip("the slopes of such numbers of heads are another test's")
    ids, first = np.random.default_rng(2).integers(0, 64, 3 * SPAN + 7), None
    for threads in (1, 2, 8):
        options = {"n_head": 2 * group, "n_kv_head": 2, "head_dim": 16, "n_embd": 64, "n_layer": 1, "position": position}
        native, reference = executors(host_level(), "F16", threads, n_vocab=64, n_ctx=4 * SPAN, kv=kv, **options)
        reference.close()
        for cut in (*CUTS, 100) if threads <= 2 else (13, 100):
            found = logits(native, ids, cut)
            first = found if first is None else first
            assert same_bits(found, first), f"{threads} threads, passes of {cut} tokens"
        native.close()


@each_level
def test_a_pass_that_comes_to_a_span_with_any_of_its_tokens(level):
    """So that all, some or none of the queries that share a tile see positions of the next span."""
    ids = np.random.default_rng(2).integers(0, 64, SPAN + 40)
    options = {"n_head": 2, "n_kv_head": 2, "head_dim": 16, "n_embd": 64, "n_layer": 1}
    native, reference = executors(level, "F16", 1, n_vocab=64, n_ctx=2 * SPAN, **options)
    reference.close()
    expected = logits(native, ids, 1)
    for start in reversed(range(SPAN - QUERIES - 1, SPAN + 2)):
        native.cache.truncate(start)
        assert same_bits(native.forward(ids[start : start + QUERIES], rows="all"), expected[start : start + QUERIES]), start
    native.close()


@each_level
@pytest.mark.parametrize("kv", KINDS)
def test_a_prefix_that_was_there_already(level, kv):
    native, reference = executors(level, "Q4_0", 2, n_vocab=64, n_ctx=64, kv=kv)
    reference.close()
    ids, other = np.random.default_rng(3).integers(0, 64, (2, 50))
    whole = logits(native, ids, 50)
    logits(native, np.concatenate([ids[:20], other[20:]]), 7)
    native.cache.truncate(20)
    assert same_bits(native.forward(ids[20:], rows="all"), whole[20:])
    native.cache.truncate(33)
    assert same_bits(native.forward(ids[33:])[0], whole[-1])
    fork = native.cache.fork(17)
    for n in (1, 2, 30):
        rows = native.step([(fork, ids[fork.length :][:n], n)])[0][0]
        assert same_bits(rows, whole[fork.length - len(rows) : fork.length])
    native.close()


@each_level
@pytest.mark.parametrize(("fmt", "kv"), [("F16", "q16"), ("F16", "q8"), ("Q4_0", "q16"), ("Q6_K", "q16")])
def test_whatever_other_texts_share_the_passes(level, fmt, kv):
    """Eight texts of different lengths, some in chunks of a prompt, some token by token, beside fewer and fewer others."""
    random = np.random.default_rng(4)
    native, reference = executors(level, fmt, 2, n_vocab=64, n_ctx=300, kv=kv)
    reference.close()
    texts = [random.integers(0, 64, n) for n in (1, 2, 9, 40, 41, 130, 260, 290)]
    alone = [logits(native, ids, 128) for ids in texts]
    for step in (1, 3, 14):
        caches, found = [native.new_cache(300) for _ in texts], [[] for _ in texts]
        while any(cache.length < len(ids) for cache, ids in zip(caches, texts, strict=True)):
            going = [i for i, ids in enumerate(texts) if caches[i].length < len(ids)]
            work = [(caches[i], texts[i][caches[i].length :][: step + i % 3], 99) for i in going]
            for i, rows in zip(going, native.step(work)[0], strict=True):
                found[i].append(rows.copy())
        for rows, expected in zip(found, alone, strict=True):
            assert same_bits(np.concatenate(rows), expected)
    native.close()


@each_level
@pytest.mark.parametrize("kv", KINDS)
def test_what_lies_behind_the_last_position_does_not_matter(level, kv):
    """A text that was given up may have left anything there, even what is no number, as scales of bytes -1 are."""
    native, reference = executors(level, "F16", 1, n_vocab=64, n_ctx=64, kv=kv)
    reference.close()
    ids = np.random.default_rng(5).integers(0, 64, 9)
    expected = logits(native, ids, 9)
    native.cache.memory[:] = -1
    for cut in (1, 2, 9):
        assert same_bits(logits(native, ids, cut), expected)
    native.close()
