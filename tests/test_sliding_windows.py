"""Layers with a sliding window keep the window only, those with a short convolution the last columns; and whatever is done with
a text it is answered as if they kept all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import pytest
from families import write_random

import pocketlm
from pocketlm.errors import FileError
from pocketlm.model import Model
from pocketlm.runtime import kv_cache
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.kv_cache import MARGIN, KVCache
from pocketlm.runtime.native.caches import NativeCache
from pocketlm.runtime.native.sizes import SPAN
from pocketlm.runtime.state_file import HEADER

SIZES = {"n_layer": 7, "n_ctx": 4096, "n_embd": 32, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "n_ff": 32}
WINDOW, N = 20, 2600  # the rings go round twice and more
TEXT = np.random.default_rng(0).integers(0, 256, N)
KEYS = {
    "gemma3": {}, "gptneo": {"attention.sliding_window_pattern": [i % 2 == 1 for i in range(7)]},
    "lfm2": {"attention.sliding_window": 0, "shortconv.l_cache": 4, "attention.head_count_kv": [0, 1, 0, 0, 1, 0, 0]},
}  # fmt: skip


@pytest.fixture(scope="module", params=["gemma3", "lfm2"])
def path(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp("windows"), request.param)


def write(folder, arch):
    keys = {"attention.sliding_window": WINDOW, **KEYS[arch]}
    return write_random(folder / f"{arch}.gguf", arch, SIZES, keys, {})


@pytest.fixture(params=["numpy", "native"])
def model(request, path) -> Iterator[Model]:
    with pocketlm.load(path, backend=request.param, threads=2) as model:
        assert min(model.executor.cache.rows) < N // 2
        yield model


def same(model: Model, found: np.ndarray, expected: np.ndarray) -> None:
    """Native: the same bits. NumPy: as close as its sums of other orders are."""
    if model.executor.name == "native":
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("arch", KEYS)
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_long_text_has_the_logits_that_a_cache_of_every_position_gives(tmp_path, monkeypatch, arch, backend):
    file = write(tmp_path, arch)
    with pocketlm.load(file, backend=backend, threads=2, ctx=4096) as model:
        ring = model.executor.cache.rows
        found = model.logits(TEXT)
    monkeypatch.setattr(kv_cache, "MARGIN", 1 << 20)
    with pocketlm.load(file, backend=backend, threads=2, ctx=4096) as model:
        assert set(model.executor.cache.rows) == {4096}
        assert min(ring) < N // 2 < max(ring) == 4096
        np.testing.assert_array_equal(found, model.logits(TEXT))


def test_a_long_text_does_not_depend_on_how_it_is_cut_nor_on_what_shares_its_passes(model):
    if model.executor.name == "numpy":
        pytest.skip("the NumPy executor promises closeness, not bits")
    executor, expected = model.executor, model.logits(TEXT)
    caches = [executor.new_cache() for _ in (1, 7, 50)]
    while any(cache.length < N for cache in caches):
        going = [(c, TEXT[c.length :][:n]) for c, n in zip(caches, (1, 7, 50), strict=True) if c.length < N]
        logits, _ = executor.step([(cache, ids, len(ids)) for cache, ids in going])
        for (cache, ids), rows in zip(going, logits, strict=True):
            np.testing.assert_array_equal(rows, expected[cache.length - len(ids) : cache.length])


def test_what_a_window_has_left_behind_does_not_matter(model):
    """Not even where it is no number: nobody reads it."""
    executor, expected = model.executor, model.logits(TEXT)
    cache = executor.new_cache()
    for n in (1500, N):
        while cache.length < n:
            executor.step([(cache, TEXT[cache.length : n][: executor.block], 0)])
        for layer, window in enumerate(cache.windows):
            if layer in cache.convolved:
                kept = cache.read_columns(layer, n - window + 1, n)
                cache.convolved[layer][:] = np.nan
                cache.write_columns(layer, n - window + 1, kept)
            elif window:
                kept = cache.read_keys(layer, n - WINDOW, n), cache.read_values(layer, n - WINDOW, n)
                for memory in cache.layers[layer]:
                    memory[:] = np.nan if memory.dtype == np.float32 else -1  # scales of bytes -1 are no numbers
                stored = np.zeros_like(cache.read_keys(layer, n - 300, n))  # the native one reads whole spans of 256
                cache.write_keys(layer, n - 300, stored)
                cache.write_values(layer, n - 300, stored)
                cache.write_keys(layer, n - WINDOW, kept[0])
                cache.write_values(layer, n - WINDOW, kept[1])
    same(model, executor.step([(cache, TEXT[:1], 1)])[0][0][0].copy(), model.logits([*TEXT, TEXT[0]])[-1])
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("back", [1, 100, MARGIN, MARGIN + 2000, N - 1])
def test_a_text_that_is_cut_back_goes_on_as_if_it_had_never_been_longer(model, back):
    state, ids = model.session().state, TEXT.tolist()
    state.advance(ids)
    again = [*ids[: N - back], 7, 8, 9]
    logits, n_there = state.advance(again)
    assert n_there == (N - back if back <= MARGIN else 0)  # what a window lacks is computed again, and all behind it
    same(model, logits, model.logits(again)[-1])
    assert state.ids == again


@pytest.mark.parametrize("n", [300, 2000])
def test_forks_and_files_go_on_alike(model, tmp_path, n):
    session, ids = model.session(), TEXT[:n].tolist()
    session.state.advance(ids)
    session.save(tmp_path / "a.state")
    loaded = model.session(load=tmp_path / "a.state")
    for other in (session.fork(), loaded, session):
        for ending in ([5], [9] * MARGIN):
            logits, n_there = other.state.advance(ids + ending)
            assert n_there == n
            same(model, logits, model.logits(ids + ending)[-1])


@pytest.mark.parametrize("n", [40, 300, N - MARGIN, N - 7])
def test_a_session_lends_only_what_its_windows_still_have(model, n):
    donor, other, ids = model.session(), model.session(), TEXT.tolist()
    donor.state.advance(ids)
    again = [*ids[:n], 7, 8, 9]
    other.state.borrow(donor.state, again)
    assert len(other.state.ids) == (n if donor.state.cache.goes_on_from(n) else 0)
    same(model, other.state.advance(again)[0], model.logits(again)[-1])
    assert donor.state.ids == ids


def test_a_file_of_one_executor_goes_on_in_the_other(path, tmp_path):
    for saves, loads in (("numpy", "native"), ("native", "numpy")):
        with pocketlm.load(path, backend=saves, threads=1) as model:
            session = model.session()
            session.state.advance(TEXT.tolist())
            session.save(tmp_path / saves)
        with pocketlm.load(path, backend=loads, threads=1) as model:
            session = model.session(load=tmp_path / saves)
            logits, n_there = session.state.advance([*TEXT, 9])
            assert n_there == N
            assert np.abs(logits - model.logits([*TEXT, 9])[-1]).max() < 0.02


def test_a_file_that_begins_behind_its_end_is_refused(model, tmp_path):
    session, file = model.session(), tmp_path / "a.state"
    session.state.advance(TEXT.tolist())
    session.save(file)
    content = file.read_bytes()
    for first in (N + 1, (1 << 32) - 1):
        damaged = content[: HEADER.size - 36] + first.to_bytes(4, "little") + content[HEADER.size - 32 : -32]
        file.write_bytes(damaged + hashlib.sha256(damaged).digest())
        with pytest.raises(FileError, match=f"begins behind its end, at {first} of {N} tokens"):
            session.load(file)


def test_only_what_a_text_can_go_on_from_is_saved(model, tmp_path):
    """Keys that were moved are not saved `exactly`; where that leaves less than a window needs, nothing is."""
    session, ids = model.session(), TEXT.tolist()
    session.state.advance(ids)
    shorter = ids[:50] + ids[400:]
    session.state.advance([*shorter, 1], shift=True)
    assert session.state.n_exact == 50
    session.save(tmp_path / "a.state", exactly=True)
    loaded = model.session()
    loaded.load(tmp_path / "a.state", exactly=True)
    logits, n_there = loaded.state.advance(ids[:60])
    assert n_there == 0
    same(model, logits, model.logits(ids[:60])[-1])


@pytest.mark.parametrize(("start", "stop"), [(0, 300), (40, 1700), (2100, 2200), (1000, 2590), (100, 2000)])
def test_turns_that_are_dropped_leave_what_a_cache_of_every_position_would_hold(model, path, monkeypatch, start, stop):
    """Moved keys are an approximation; that of the ring is the same. Where a window would lack something, all is computed."""
    shorter = [*TEXT[:start].tolist(), *TEXT[stop:].tolist(), 3]
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "MARGIN", 1 << 20)
        with pocketlm.load(path, backend=model.executor.name, threads=2) as whole:
            session = whole.session()
            session.state.advance(TEXT.tolist())
            moved, n_moved = session.state.advance(shorter, shift=True)
    state = model.session().state
    state.advance(TEXT.tolist())
    found, n_there = state.advance(shorter, shift=True)
    if n_there:
        same(model, found, moved)
        assert n_there == n_moved
        assert state.note == ""
    else:
        assert stop > N - MARGIN - 300 or stop - start > 1500
        same(model, found, model.logits(shorter)[-1])
    ending = [4] * (2 * WINDOW)
    state.advance(shorter + ending)
    assert state.ids == shorter + ending


def test_drafts_that_are_taken_back_leave_no_trace(model):
    state, ids = model.session().state, TEXT.tolist()
    state.advance(ids[:1000])
    random, at = np.random.default_rng(1), 1000
    while at < 2400:
        draft = random.integers(0, 256, 7).tolist()
        state.append(ids[at], draft, lambda rows: [0])
        at += 1
    same(model, state.append(ids[at])[0], model.logits(ids[: at + 1])[-1])


def test_a_pass_that_was_interrupted_can_be_made_again(model):
    """It may have written all of its keys, and the text has not become longer."""
    executor, cache = model.executor, model.executor.new_cache()
    whole = model.logits(TEXT)
    at = 0
    while at < N:
        block = TEXT[at : at + executor.block]
        for ids in ((block + 1) % 256, block):  # the first is given up
            logits = executor.step([(cache, ids, len(ids))])[0][0].copy()
            if ids is not block:
                cache.truncate(at)
                assert cache.length == at
        same(model, logits, whole[at : at + len(block)])
        at += len(block)


def test_sessions_that_come_and_go_answer_like_fresh_ones(model):
    """Random walks: texts grow, are cut back, forked, and lose a part of their middle end."""
    random = np.random.default_rng(2)
    sessions = [model.session() for _ in range(3)]
    texts: list[list[int]] = [[], [], []]
    for step in range(30):
        i = int(random.integers(3))
        keep = int(random.integers(len(texts[i]) + 1)) if random.random() < 0.3 else len(texts[i])
        if random.random() < 0.2:
            j = int(random.integers(3))
            sessions[j], texts[j] = sessions[i].fork(), list(texts[i])
        texts[i] = [*texts[i][:keep], *random.integers(0, 256, int(random.integers(1, 500))).tolist()][-4000:]
        logits, _ = sessions[i].state.advance(texts[i])
        if step % 4 == 0:
            same(model, logits, model.logits(texts[i])[-1])


@pytest.mark.parametrize("window", [None, 900, 1500])
def test_the_spans_that_a_lone_token_sees_are_shared_out_evenly(tmp_path, window):
    """Every task of a head has as many of them as any other, or one more: those before the window are nobody's work."""
    file = write_random(tmp_path / "a.gguf", "gemma3", SIZES, {"attention.sliding_window": window or SIZES["n_ctx"]}, {})
    with pocketlm.load(file, backend="native", threads=2) as model:
        executor = model.executor
        executor.forward(TEXT)
        executor.forward(TEXT[:1])
        entries = executor._arrays["entries"][: executor._record["n_entries"][0]]
        seen = range(max(0, N + 1 - (window or N + 1)) // SPAN, N // SPAN + 1)
        shares = [[span for span in seen if span >= e["first"] and (span - e["first"]) % e["apart"] == 0] for e in entries]
        assert sorted(span for share in shares for span in share) == list(seen)
        assert len(entries) > 1
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gemma_3_270m_takes_a_fifth_of_the_memory_at_32k(tmp_path):
    keys = {
        "general.architecture": "gemma3", "gemma3.context_length": 32768, "gemma3.embedding_length": 640,
        "gemma3.block_count": 18, "gemma3.feed_forward_length": 2048, "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 1, "gemma3.attention.key_length": 256, "gemma3.attention.value_length": 256,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-6, "gemma3.attention.sliding_window": 512,
    }  # fmt: skip
    hyper = read_hyper(keys, 262144, tmp_path)
    windows = [0 if i % 6 == 5 else 512 for i in range(18)]
    assert NativeCache.bytes_for(hyper, 32768) == 32768 * 18 * 2 * (256 * 2 + 4)
    assert NativeCache.bytes_for(hyper, 32768, windows) <= 126 * 10**6
    assert KVCache.bytes_for(hyper, 32768, windows) <= 251 * 10**6


def test_what_is_said_of_the_memory_is_what_is_taken(model):
    cache = model.executor.cache
    taken = sum(array.nbytes for array in (cache.memory, *cache.convolved.values()))
    assert taken == cache.bytes_for(model.hyper, model.n_ctx, cache.windows, cache.columns) == model.session_bytes(model.n_ctx)
    assert cache.nbytes_at(model.n_ctx) == taken
    assert cache.nbytes_to_come == cache.nbytes_at(model.n_ctx)
    model.logits(TEXT)
    assert 0 < cache.nbytes_to_come < cache.nbytes_at(model.n_ctx) // 3
    assert model.executor.memory(model._plan, model.tensors, model.n_ctx, 2)[1] == cache.nbytes_at(model.n_ctx)
