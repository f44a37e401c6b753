"""LFM2's convolutions keep their last columns beside keys and values: one answer bit for bit, whatever is done with a text.

What they share with sliding windows (texts that are cut back, forked, saved, shifted) is in test_sliding_windows.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from families import write_random
from native_calls import each_level
from tiny_models import write_out

import pocketlm
from pocketlm.errors import FileError
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.kv_cache import KINDS, KVCache
from pocketlm.runtime.native.caches import CACHES, NativeCache
from pocketlm.runtime.state_file import HEADER

SIZES = {"n_layer": 5, "n_ctx": 512, "n_embd": 72, "n_head": 3, "n_kv_head": 1, "head_dim": 24, "n_ff": 96}
KEYS = {"shortconv.l_cache": 3, "attention.head_count_kv": [0, 1, 0, 0, 1]}
CUTS = (1, 2, 3, 5, 8, 13, 128)
TEXT = np.random.default_rng(0).integers(0, 256, 150)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("lfm2") / "model.gguf", "lfm2", SIZES, KEYS, {})


def cut(executor, cache, ids, n):
    logits = [executor.step([(cache, ids[at : at + n], n)])[0][0].copy() for at in range(0, len(ids), n)]
    return np.concatenate(logits)


@each_level
@pytest.mark.parametrize("kv", KINDS)
def test_however_a_text_is_cut_and_on_however_many_threads(monkeypatch, path, level, kv):
    monkeypatch.setenv("POCKETLM_ISA", level.name)
    first = None
    for threads in (1, 2, 3, 8):
        with pocketlm.load(path, backend="native", threads=threads, kv=kv) as model:
            for n in CUTS if threads <= 2 else (3, 13):
                found = cut(model.executor, model.executor.new_cache(), TEXT, n)
                first = found if first is None else first
                np.testing.assert_array_equal(found, first, f"{threads} threads, passes of {n} tokens")


@pytest.mark.parametrize("kv", KINDS)
def test_whatever_other_texts_share_the_passes(path, kv):
    """Each with a state of its own, at a place of its own; one begins where another is long."""
    texts = np.random.default_rng(1).integers(0, 256, (4, 90))
    with pocketlm.load(path, backend="native", threads=2, kv=kv) as model:
        executor = model.executor
        expected = [cut(executor, executor.new_cache(), text, 128) for text in texts]
        caches, random = [executor.new_cache() for _ in texts], np.random.default_rng(2)
        while any(cache.length < 90 for cache in caches):
            work = []
            for i in random.permutation(4):
                n = int(random.integers(0, 9))
                if ids := texts[i][caches[i].length :][:n].tolist():
                    work.append((i, (caches[i], np.array(ids), n)))
            if work:
                for (i, (cache, ids, _)), rows in zip(work, executor.step([one for _, one in work])[0], strict=True):
                    np.testing.assert_array_equal(rows, expected[i][cache.length - len(ids) : cache.length])


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("kv", KINDS)
def test_generated_text_is_the_same_with_drafts_and_without(path, backend, kv):
    with pocketlm.load(path, backend=backend, threads=2, kv=kv) as model:
        if backend == "numpy":
            assert not model.executor.same_bits  # and so nothing is drafted
        ids = np.tile(TEXT[:12], 8).tolist()
        state = model.session().state
        state.advance(ids)
        plain, one = [], ids[-1]
        for _ in range(40):
            one = int(np.argmax(state.advance([*ids, *plain])[0]))
            plain.append(one)
        state.advance(ids)
        made, at = [plain[0]], 0
        while len(made) < 40:  # drafts that are right for a while: what is wrong is taken back
            draft = [*plain[len(made) : len(made) + at % 4], 1, 2][:7]

            def accept(rows: np.ndarray, draft=draft) -> list[int]:
                taken: list[int] = []
                for row, said in zip(rows, [*draft, None], strict=False):
                    taken.append(int(np.argmax(row)))
                    if taken[-1] != said:
                        break
                return taken

            made += state.append(made[-1], draft, accept)
            at += 1
        assert made[:40] == plain


@pytest.mark.parametrize("kv", KINDS)
def test_a_saved_text_goes_on_with_the_same_bits_and_a_damaged_one_is_refused(path, tmp_path, kv):
    with pocketlm.load(path, backend="native", threads=2, kv=kv) as model:
        session, file = model.session(), tmp_path / "a.state"
        session.state.advance(TEXT.tolist())
        session.save(file)
        logits, n_there = model.session(load=file).state.advance([*TEXT, 7])
        assert n_there == len(TEXT)
        np.testing.assert_array_equal(logits, model.logits([*TEXT, 7])[-1])
        n, row = len(TEXT), {"q16": 2 * model.hyper.head_dim + 4, "q8": 4 * model.hyper.head_dim}[kv]
        columns = HEADER.size + 4 * n  # layer 0 is a convolution
        assert file.stat().st_size == columns + 3 * n * 72 * 4 + 2 * 2 * n * row + 32
        content = bytearray(file.read_bytes())
        content[columns + 3] ^= 0x40
        file.write_bytes(content)
        with pytest.raises(FileError, match="checksum") as error:
            model.session(load=file)
        assert "\n" not in str(error.value)


def test_layers_with_a_convolution_take_no_memory_for_keys(tmp_path):
    """LFM2 1.2B: keys and values of 6 layers of 16, and 642 columns of 10; and all of it is known beforehand."""
    n_kv = np.array([0, 0, 8, 0, 0, 8, 0, 0, 8, 0, 8, 0, 8, 0, 8, 0])
    keys = {
        "general.architecture": "lfm2", "lfm2.context_length": 32768, "lfm2.embedding_length": 2048,
        "lfm2.block_count": 16, "lfm2.feed_forward_length": 8192, "lfm2.attention.head_count": 32,
        "lfm2.attention.head_count_kv": n_kv, "lfm2.shortconv.l_cache": 3,
    }  # fmt: skip
    hyper = read_hyper(keys, 65536, tmp_path)
    windows, columns = [0 if n else 3 for n in n_kv], [0 if n else 2048 for n in n_kv]
    rest = 10 * (2 + 128 + 512) * 2048 * 4
    assert NativeCache.bytes_for(hyper, 4096, windows, columns) == 6 * 4096 * 8 * (64 * 2 + 4) * 2 + rest
    assert KVCache.bytes_for(hyper, 4096, windows, columns) == 6 * 4096 * 8 * 64 * 2 * 4 + 10 * (2 + 512 + 512) * 2048 * 4
    assert CACHES["q8"].bytes_for(hyper, 4096, windows, columns) < NativeCache.bytes_for(hyper, 4096, windows, columns)
    assert NativeCache.bytes_for(hyper, 100, windows, columns) == 6 * 256 * 8 * (64 * 2 + 4) * 2 + 10 * 100 * 2048 * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attention.head_count_kv": [0, 1, 0, 0, 2]}, "head_count_kv differs from layer to layer"),
        ({"attention.head_count_kv": [0] * 5}, "head_count_kv differs from layer to layer"),
        ({"attention.head_count_kv": [0, 1, 0]}, "has 3 numbers for 5 layers"),
        ({"attention.head_count_kv": [1, 1, 0, 0, 1]}, "blk.0.attn_q.weight is missing"),
        ({"shortconv.l_cache": 4}, "blk.0.shortconv.conv.weight is 72x3, expected 72x4"),
        ({"shortconv.l_cache": 0}, "shortconv.l_cache is 0"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused_in_one_line(tmp_path, path, change, said):
    gguf = pytest.importorskip("gguf")
    from tiny_models import add_key, vocabulary

    reader, file = gguf.GGUFReader(path), tmp_path / "changed.gguf"
    writer = gguf.GGUFWriter(str(file), "lfm2")
    keys = {field.name: field.contents() for field in reader.fields.values() if field.name.startswith("lfm2.")}
    for key, value in {**keys, **{f"lfm2.{key}": value for key, value in change.items()}, **vocabulary()}.items():
        add_key(writer, key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    write_out(writer)
    with pytest.raises(FileError, match=said) as error:
        pocketlm.load(file)
    assert "\n" not in str(error.value)
