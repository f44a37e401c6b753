"""Every operation in every executor, alone and among others, against float64 written out in operation_lists.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from native_calls import each_level, host_level
from operation_lists import LISTS, N_VOCAB, make, reference, tensors_of

from pocketlm.runtime import operations as P
from pocketlm.runtime.hyper import Rope
from pocketlm.runtime.native import fusion
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.native.sizes import ACTIVATIONS, SPAN
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import Plan

IDS = np.random.default_rng(3).integers(0, N_VOCAB, 40)
NEAR = 3e-3  # a key or value in the middle may be rounded to the other float16


def native(level, plan: Plan, tensors, threads: int = 2, n_ctx: int = 64) -> NativeExecutor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKETLM_ISA", level.name)
        return NativeExecutor(plan, tensors, n_ctx, threads)


def logits(executor, ids: np.ndarray, *lengths: int) -> np.ndarray:
    """All logits of a text, in passes of these lengths again and again."""
    executor.cache.truncate(0)
    parts, start, i = [], 0, 0
    while start < len(ids):
        part = ids[start : start + lengths[i % len(lengths)]]
        parts.append(executor.forward(part, rows="all").copy())
        start, i = start + len(part), i + 1
    return np.concatenate(parts)


# ── one operation ────────────────────────────────────────────────────────────────────────────────────────────────────

ROPE = Rope(100.0, 16, "half")


def attend(**options):
    """An operation of attention, with what it needs before it."""

    def list_it(m):
        m.embed()
        m.qkv("x")
        if rotation := options.get("rope"):
            m.rotate(rotation)
        m.attend(**{name: value for name, value in options.items() if name != "rope"})
        m.attention_output("y")
        m.logits("y")

    return list_it


def steps(*names_and_words):
    """x, then the builder's steps of these names, then logits of what the last one wrote."""

    def list_it(m):
        m.embed()
        for name, *words in names_and_words:
            getattr(m, name)(*words)
        m.logits(m.ops[-1].out)

    return list_it


def normed(kind, weight, own):
    def list_it(m):
        m.embed()
        m.qkv("x")
        m.norm_heads(*(("attn_q_norm", "attn_k_norm") if weight else (None, None)), kind=kind, own=own)
        m.scale("qkv", 1.0)
        m.linear("qkv", "y", ("back", m.hyper.n_embd))
        m.logits("y")

    return list_it


def feed_forward(m):
    m.embed()
    m.feed_forward("x")
    m.logits("y")


SINGLE = {
    "norm without weight": (steps(("norm", None)), {}),
    "layer norm without weight": (steps(("norm", None, "x", "h", "layer")), {}),
    "norm in place": (steps(("norm", "a_norm", "x", "x")), {}),
    "scale": (steps(("scale", "x", -1.7)), {}),
    "copy": (steps(("scale", "x", 1.0, "z"), ("add", "x", "z", 0.25)), {}),
    "softcap": (steps(("softcap", "x", 0.9)), {}),
    "softcap of logits": (lambda m: (m.embed(), m.logits("x"), m.softcap("logits", 0.7)), {}),
    "scale of logits": (lambda m: (m.embed(), m.logits("x"), m.scale("logits", 0.7)), {}),
    "window": (attend(window=5), {}),
    "window of one": (attend(window=1), {}),
    "cap of scores": (attend(softcap=0.8, scale=1.1), {}),
    "sinks": (attend(sinks="sinks"), {}),
    "all of attention": (attend(sinks="sinks", window=9, softcap=1.5, alibi_max_bias=8.0, rope=ROPE), {}),
    "rotation of adjacent pairs": (attend(rope=replace(ROPE, pairs="interleaved")), {}),
    "rotation of a part": (attend(rope=replace(ROPE, n_dims=6)), {}),
    **{
        f"{kind} of heads, {'own weights' if own else 'a weight' if weight else 'no weight'}": (normed(kind, weight, own), {})
        for kind in ("rms", "layer") for weight, own in ((True, False), (True, True), (False, False))
    },
    **{
        f"{kind}{' gated' if gated else ''}": (feed_forward, {"activation": kind, "gated": gated})
        for kind in ACTIVATIONS for gated in (False, True)
    },
    "swiglu_clamped beyond its ends": (
        lambda m: (m.embed(), m.scale("x", 30.0), m.feed_forward("x"), m.logits("y")), {"activation": "swiglu_clamped"},
    ),
    "heads of 6": (attend(window=5, sinks="sinks", rope=Rope(100.0, 4, "half")), {"head_dim": 6, "n_embd": 60}),
    "norm of heads of 6": (normed("rms", True, True), {"head_dim": 6, "n_embd": 60}),
    "width 52": (feed_forward, {"n_ff": 52, "n_embd": 60}),
}  # fmt: skip


def single_plan(name: str) -> Plan:
    operations, options = SINGLE[name]
    return make(operations, **{"n_layer": 1, "position": "none", **options})


PLANS = {**{name: partial(single_plan, name) for name in SINGLE}, **LISTS}  # single operations, and whole decoders
PASSES = {True: ((40,), (1,), (7, 2)), False: ((11, 1),)}  # by whether it is a single one


@pytest.mark.parametrize("name", PLANS)
def test_operations_are_what_they_say_in_numpy(name):
    plan = PLANS[name]()
    tensors = tensors_of(plan)
    executor = NumpyExecutor(plan, tensors, 64, 1)
    expected = reference(plan, tensors, IDS, 64, cached=lambda x: x)
    limit = (2e-5 if name in SINGLE else 1e-4) * np.abs(expected).max()
    for lengths in PASSES[name in SINGLE]:
        np.testing.assert_allclose(logits(executor, IDS, *lengths), expected, atol=limit)
    executor.close()


@each_level
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "single"])
@pytest.mark.parametrize("name", PLANS)
def test_operations_are_what_they_say_in_compiled_code(level, name, fused, monkeypatch):
    if not fused:
        monkeypatch.setattr(fusion, "fuse", fusion.single)
    plan = PLANS[name]()
    tensors = tensors_of(plan)
    executor = native(level, plan, tensors)
    expected = reference(plan, tensors, IDS, 64)
    limit = (NEAR if name in SINGLE else 2 * NEAR) * max(1, np.abs(expected).max())
    for lengths in PASSES[name in SINGLE]:
        np.testing.assert_allclose(logits(executor, IDS, *lengths), expected, atol=limit)
    executor.close()


# ── whole decoders ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", LISTS)
def test_fusion_changes_nothing_but_rounding(name, monkeypatch):
    plan = LISTS[name]()
    tensors = tensors_of(plan)
    fused = native(host_level(), plan, tensors)
    assert len(fusion.fuse(plan.ops)) < len(plan.ops)
    found = logits(fused, IDS, 9, 1, 1)
    fused.close()
    monkeypatch.setattr(fusion, "fuse", fusion.single)
    single = native(host_level(), plan, tensors)
    assert len(single._program) > len(fused._program)
    np.testing.assert_allclose(logits(single, IDS, 9, 1, 1), found, atol=NEAR * max(1, np.abs(found).max()))
    single.close()


NOT_IN_ONNX = {"gated", *(name for name, plan in LISTS.items() if plan().experts or plan().columns)}


@pytest.mark.parametrize("name", [name for name in LISTS if name not in NOT_IN_ONNX])
def test_a_list_of_operations_is_what_it_says_in_onnx(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs what was written")
    from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
    from pocketlm.export.onnx_store import Store
    from pocketlm.export.tensor_encoder import Encoder
    from pocketlm.export.to_onnx import Graph

    plan = LISTS[name]()
    tensors = tensors_of(plan)
    canonical = {n: CanonicalTensor(t.shape, t.to_float32) for n, t in tensors.items()}
    store = Store(None)
    with Encoder("test", 1) as encoder:
        model = CanonicalModel(plan.hyper, canonical, {}, "test")
        built = Graph(plan, model, encoder, store, half=False, int8=False).build()
    store.close(built, "data")
    session = onnxruntime.InferenceSession(built.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, hyper = reference(plan, tensors, IDS, plan.hyper.n_ctx, cached=lambda x: x), plan.hyper
    names = [entry.name for entry in session.get_inputs()[2:]]
    cache = [np.zeros((1, hyper.n_kv_head, 0, hyper.head_dim), np.float32)] * len(names)
    start = 0
    for n in (13, 1, 26):
        feed = {"input_ids": IDS[None, start : start + n], "attention_mask": np.ones((1, start + n), np.int64)}
        found, *cache = session.run(None, {**feed, **dict(zip(names, cache, strict=True))})
        np.testing.assert_allclose(found[0], expected[start : start + n], atol=1e-4 * np.abs(expected).max())
        start += n


# ── one answer ───────────────────────────────────────────────────────────────────────────────────────────────────────


def same_bits(a, b):
    return (a.view(np.uint32) == b.view(np.uint32)).all()


def has_one_answer(level, name):
    plan, first = LISTS[name](), None
    tensors = tensors_of(plan)
    for threads, cuts in ((1, ((40,), (1,), (2, 3), (8,), (13, 5, 1))), (2, ((40,), (9, 1)))):
        executor = native(level, plan, tensors, threads)
        for lengths in cuts:
            found = logits(executor, IDS, *lengths)
            first = found if first is None else first
            assert same_bits(found, first), f"{threads} threads, passes of {lengths}"
        executor.close()


@each_level
@pytest.mark.parametrize("name", LISTS)
def test_one_answer_however_a_text_is_cut(level, name):
    has_one_answer(level, name)


@pytest.mark.parametrize("name", LISTS)
def test_one_answer_without_fusion(name, monkeypatch):
    monkeypatch.setattr(fusion, "fuse", fusion.single)
    has_one_answer(host_level(), name)


def wide_window(m):
    m.embed()
    for b in m.layers():
        b.attention("x", window=(SPAN - 40, SPAN + 90)[b.layer], softcap=4.0, sinks="attn_sinks.weight")
        b.add()
    m.logits("x")


@pytest.mark.parametrize("group", [1, 5], ids="{} queries a key".format)
def test_windows_across_spans_of_positions(group):
    """Longer than the window by several spans: what lies before it is neither read nor joined, and the bits are the same."""
    plan = make(wide_window, n_head=2 * group, n_ctx=4 * SPAN)
    tensors, first = tensors_of(plan), None
    ids = np.random.default_rng(2).integers(0, N_VOCAB, 3 * SPAN + 7)
    for threads in (1, 8):
        executor = native(host_level(), plan, tensors, threads, 4 * SPAN)
        for lengths in ((128,), (1,), (13, 100)) if threads == 1 else ((100, 2),):
            found = logits(executor, ids, *lengths)
            first = found if first is None else first
            assert same_bits(found, first), f"{threads} threads, passes of {lengths}"
        executor.close()
    assert first is not None
    expected = reference(plan, tensors, ids, 4 * SPAN)
    np.testing.assert_allclose(first, expected, atol=NEAR * max(1, np.abs(expected).max()))


def test_a_window_forgets_what_lies_before_it():
    plan = make(attend(window=5), n_layer=1, position="none")
    tensors, other = tensors_of(plan), np.concatenate([IDS[:25][::-1], IDS[25:30]])
    for executor in (NumpyExecutor(plan, tensors, 64, 1), native(host_level(), plan, tensors)):
        whole, changed = (logits(executor, ids, 30) for ids in (IDS[:30], other))
        assert same_bits(whole[-1], changed[-1])
        assert not same_bits(whole[-2], changed[-2])
        executor.close()


# ── positions that differ from layer to layer ────────────────────────────────────────────────────────────────────────


def test_operations_that_rotate_alike_share_a_table():
    plan = LISTS["gemma3"]()
    tensors = tensors_of(plan)
    executor = native(host_level(), plan, tensors)
    assert len(executor._tables) == 2
    executor.close()
    plan = LISTS["gpt-oss"]()
    executor = native(host_level(), plan, tensors_of(plan))
    assert len(executor._tables) == 1
    executor.close()


@pytest.mark.parametrize(("n_ctx", "factors"), [(32, "rope_factors_short.weight"), (33, "rope_factors_long.weight")])
def test_long_contexts_have_factors_of_their_own(n_ctx, factors):
    plan = LISTS["phi3"]()
    tensors = tensors_of(plan)
    for executor in (NumpyExecutor(plan, tensors, n_ctx, 1), native(host_level(), plan, tensors, n_ctx=n_ctx)):
        expected = reference(plan, tensors, IDS[:30], n_ctx)
        np.testing.assert_allclose(logits(executor, IDS[:30], 30), expected, atol=NEAR * np.abs(expected).max())
        tables = executor._rope if executor.name == "numpy" else executor._tables
        assert [name for _, name in tables] == [factors]
        executor.close()


@pytest.mark.parametrize("name", ["gemma3", "smollm3", "phi3"])
def test_moved_keys_turn_by_their_layers_own_angles(name):
    """Keys taken back to a place are those that the same values would have had there: layer 0 sees ids and positions alone."""
    plan = LISTS[name]()
    tensors = tensors_of(plan)
    for executor in (NumpyExecutor(plan, tensors, 64, 1), native(host_level(), plan, tensors)):
        executor.forward(IDS)
        assert executor.cache.remove(5, 12)
        moved = executor.cache.read_keys(0, 5, 33)
        executor.cache.truncate(0)
        executor.forward(np.concatenate([IDS[:5], IDS[12:]]))
        np.testing.assert_allclose(moved, executor.cache.read_keys(0, 5, 33), atol=2e-2)
        executor.close()


def test_heads_that_differ_between_layers_are_refused():
    plan = LISTS["olmo"]()
    ops = [replace(op, n_kv_head=4) if isinstance(op, P.Attend) and op.layer else op for op in plan.ops]
    with pytest.raises(Exception, match="layers whose heads differ"):
        native(host_level(), replace(plan, ops=tuple(ops)), tensors_of(plan))
