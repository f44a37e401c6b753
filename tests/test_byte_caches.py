"""Caches of int8: the same in both executors, one answer bit for bit, half the memory, and nothing lost by moving or saving."""

from __future__ import annotations

import numpy as np
import pytest
import test_sliding_windows as sliding
from native_calls import each_level, executors, host_level, kl_divergence
from session_walk import Walk
from test_native_one_answer import same_bits
from tiny_models import write_model

import pocketlm
from pocketlm import cli
from pocketlm.build.persona import Persona, from_bytes
from pocketlm.errors import UsageError
from pocketlm.runtime.kv_cache import KINDS, ByteCache, spread, to_bytes
from pocketlm.runtime.native.caches import NativeByteCache, NativeCache
from pocketlm.runtime.native.sizes import SPAN

SHAPES = {
    "narrow": {"head_dim": 8, "n_embd": 64, "n_head": 2, "n_kv_head": 2},
    "groups, a width that fills no vectors": {"head_dim": 24, "n_embd": 64, "n_head": 6, "n_kv_head": 2},
    "alibi": {"position": "alibi"},
    "a power of two": {"head_dim": 64, "n_embd": 64, "n_head": 2, "n_kv_head": 1},
    "three times a power of two": {"head_dim": 96, "n_embd": 64, "n_head": 2, "n_kv_head": 1},
}


def logits(executor, ids, cut):
    executor.cache.truncate(0)
    return np.concatenate([executor.forward(ids[at : at + cut], rows="all").copy() for at in range(0, len(ids), cut)])


@each_level
@pytest.mark.parametrize("shape", SHAPES)
def test_both_executors_agree(level, shape):
    native, reference = executors(level, "F32", 2, n_vocab=64, n_ctx=2 * SPAN, kv="q8", **SHAPES[shape])
    ids = np.random.default_rng(1).integers(0, 64, SPAN + 40)
    exact, found = logits(reference, ids, 100), logits(native, ids, 100)
    assert kl_divergence(exact, found).max() < 1e-4  # a number that lies between two may be rounded to either
    for layer in range(native.hyper.n_layer):
        for read in ("read_keys", "read_values"):
            a, b = (getattr(executor.cache, read)(layer, 0, len(ids)) for executor in (native, reference))
            assert np.abs(a - b).max() <= np.abs(b).max() / 64
    native.close()


def test_sessions_that_come_and_go_say_what_they_say_alone(tmp_path):
    path = write_model(tmp_path / "tiny.gguf", n_ctx=512, n_kv_head=2, head_dim=24)
    with pocketlm.load(path, "native", 2, kv="q8") as model, pocketlm.load(path, "native", 1, kv="q8") as alone:
        walk = Walk(model, alone, tmp_path)
        walk.run(3000, seed=5)
        assert walk.wrong == []
        assert min(walk.done["saved"], walk.done["forked"]) > 0


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_saved_session_keeps_every_bit(tmp_path, backend):
    """Numbers that were rounded are the same when they are rounded again: from the other executor, too."""
    path, prompt = write_model(tmp_path / "tiny.gguf", n_kv_head=2, head_dim=24), list(range(3, 103))
    with pocketlm.load(path, backend, 1, kv="q8") as model:
        session = model.session()
        session.state.advance(prompt)
        cache = session.state.cache
        kept = [read(layer, 0, 100) for layer in (0, 1) for read in (cache.read_keys, cache.read_values)]
        session.save(tmp_path / "a.state")
        expected, _ = session.state.advance([*prompt, 5])
        loaded = model.session(load=tmp_path / "a.state")
        assert same_bits(loaded.state.advance([*prompt, 5])[0], expected)
    with pocketlm.load(path, "native" if backend == "numpy" else "numpy", 1, kv="q8") as other:
        cache = other.session(load=tmp_path / "a.state").state.cache
        found = [read(layer, 0, 100) for layer in (0, 1) for read in (cache.read_keys, cache.read_values)]
        assert all(same_bits(a, b) for a, b in zip(kept, found, strict=True))
    with pocketlm.load(path, "native", 1) as usual:  # and goes on where caches are not rounded
        session = usual.session(load=tmp_path / "a.state")
        logits, n_cached = session.state.advance([*prompt, 5])
        assert n_cached == 100
        assert kl_divergence(expected[None], logits[None]).max() < 1e-3


@pytest.mark.parametrize("x", [0.0, 1e-42, 1e-30, 1.0, 65504.0])
def test_rounding_is_done_once(x):
    numbers = np.random.default_rng(6).uniform(-1, 1, (50, 24)).astype(np.float32) * np.float32(x)
    rounded, scales = to_bytes(numbers)
    again, same = to_bytes(rounded * scales[:, None])
    assert (again == rounded).all()
    assert (same == scales).all() or x < 1e-29
    assert np.abs(rounded * scales[:, None] - numbers).max() <= max(scales.max() * 0.51, 1e-27)


@pytest.mark.parametrize("dim", [16, 48, 64, 96, 128, 24], ids="{} columns".format)
def test_keys_are_spread_over_all_columns_and_come_back(dim):
    x = np.random.default_rng(8).standard_normal((3, 5, dim)).astype(np.float32)
    columns, n = spread(np.eye(dim, dtype=np.float32)), dim & -dim if dim % 16 == 0 else 1
    assert np.isin(np.abs(columns).round(6), (0, np.float32(n**-0.5).round(6))).all()
    np.testing.assert_allclose(columns @ columns.T, np.eye(dim), atol=1e-6)
    np.testing.assert_allclose(spread(x), x @ columns, atol=1e-5)
    np.testing.assert_allclose(spread(spread(x)), x, atol=1e-5)


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_column_that_is_larger_than_all_others_costs_them_nothing(tmp_path, backend):
    """Without `spread` its size would say how large everybody's steps are."""
    path = write_model(tmp_path / "tiny.gguf", arch="llama", n_embd=128, n_head=2)
    random = np.random.default_rng(9)
    keys, query = (random.standard_normal((2, 100, 64)).astype(np.float32) for _ in range(2))
    keys[:, :, 47] += 40
    with pocketlm.load(path, backend, 1, kv="q8") as model:
        cache = model.session().state.cache
        cache.write_keys(0, 0, keys)
        found = cache.read_keys(0, 0, 100)
    others = np.arange(64) != 47
    wrong = (found - keys)[..., others] @ query.swapaxes(1, 2)[:, others]
    step = 40 / 127 * np.sqrt(63 / 12)  # the error of sums, were the largest column to say how large a step is
    assert np.sqrt((wrong**2).mean()) < step / 3


def test_layers_with_a_window_keep_rings_of_them(tmp_path):
    """Cut, forked, and saved after the rings have gone round: the same bits."""
    path, text = sliding.write(tmp_path, "gemma3"), sliding.TEXT[:1400].tolist()
    with pocketlm.load(path, "native", 2, kv="q8") as model, pocketlm.load(path, "numpy", 1, kv="q8") as reference:
        expected = model.logits([*text, 5])
        assert min(model.executor.cache.rows) < len(text)
        assert kl_divergence(reference.logits([*text, 5]), expected).max() < 1e-4
        session = model.session()
        for n in (1, 8, 700, 1400):
            session.state.advance(text[:n])
        session.save(tmp_path / "a.state")
        for one in (session.fork(), model.session(load=tmp_path / "a.state"), session):
            logits, n_cached = one.state.advance([*text, 5])
            assert n_cached == len(text)
            assert same_bits(logits, expected[-1])


def test_turns_that_go_are_moved_as_in_a_cache_of_floats(tmp_path):
    path, ids = write_model(tmp_path / "tiny.gguf", n_ctx=256), np.random.default_rng(7).integers(3, 250, 200).tolist()
    left, logits = ids[:20] + ids[60:], {}
    for kv in KINDS:
        with pocketlm.load(path, "native", 1, kv=kv) as model:
            state = model.session().state
            state.advance(ids)
            logits[kv], n_cached = state.advance([*left, 7], shift=True)
            assert n_cached == len(left)
    assert kl_divergence(logits["q16"][None], logits["q8"][None]).max() < 1e-3


def test_it_takes_half_the_memory():
    native, _ = executors(host_level(), "F16", 1, head_dim=64, n_embd=128, n_head=2, n_kv_head=2, n_ctx=512, kv="q8")
    hyper = native.hyper
    whole, half = NativeCache.bytes_for(hyper, 512), NativeByteCache.bytes_for(hyper, 512)
    assert half == native.cache.memory.nbytes == whole * 68 // 132
    assert ByteCache.bytes_for(hyper, 512) == half
    assert native.memory(native.plan, {}, 512, 1, "q8")[1] == half
    native.close()


def test_another_kind_is_refused_in_one_line(tmp_path):
    for kind in ("q4", 8, None):
        with pytest.raises(UsageError, match=f"kv {kind}: expected one of q16, q8"):
            pocketlm.load(write_model(tmp_path / "tiny.gguf"), kv=kind)


def test_commands_and_packed_programs_ask_for_it(tmp_path, capsys):
    path = write_model(tmp_path / "tiny.gguf")
    asked = {}

    def load(model, **options):
        asked.update(options)
        return pocketlm.load(model, **options)

    assert cli.main(["chat", str(path), "then", "--max-tokens=3", "--kv=q8"], load) == 0
    assert asked["kv"] == "q8"
    own = Persona(flags={"--kv": "q8", "--temp": 0.5})  # what pack --kv q8 writes
    assert from_bytes(own.to_bytes(), "friend").arguments() == ["--kv=q8", "--temp=0.5"]
    capsys.readouterr()
    assert cli.main(["chat", str(path), "then", "--kv=q9"]) == 2
    assert "kv q9: expected one of q16, q8" in capsys.readouterr().err
