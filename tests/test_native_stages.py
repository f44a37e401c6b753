"""Normalising, rounding, rotation and attention, each against NumPy in float64 written out here."""

import ctypes

import numpy as np
import pytest
from native_calls import activation_records, compiled, each_level, executors, host_level, round_activations

from pocketlm.runtime.hyper import Rope
from pocketlm.runtime.kv_cache import keys_to_words, values_to_words
from pocketlm.runtime.native import levels, stages
from pocketlm.runtime.native.dot import WHOLE
from pocketlm.runtime.native.ir import I64, PTR, VOID, Module
from pocketlm.runtime.native.linker import load
from pocketlm.runtime.native.matrix import RECORD, tile_of, tile_places, tile_size
from pocketlm.runtime.native.sizes import SPAN


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


# ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rounded_records(level, x):
    """A tile of tokens x [tokens, n] as the compiled code rounds it: uint8 [bytes]."""
    module = Module(levels.host_abi())
    stages._define_round(module, level.name in WHOLE)
    arguments = {"x": PTR, "n": I64, "records": PTR, "record_stride": I64}
    with module.function("apply", arguments, linkage="entry") as f:
        f.call(VOID, "round", *f.args())
    code, (tokens, n) = load(compiled(module, level)), x.shape
    tile = np.zeros(x.size * 13 // 2, np.uint8)
    tile[: 4 * x.size] = x.view(np.uint8).reshape(-1)
    apply, at = code.function("apply", None, *[ctypes.c_int64] * 4), tile.ctypes.data
    for t in range(tokens):
        apply(at + 4 * n * t, n, at + 4 * x.size + RECORD * t, RECORD * tokens)
    code.close()
    return tile


@pytest.mark.parametrize(("name", "sizes"), [("avx2", {3: (4,), 9: (4, 4, 1), 13: (4, 4, 4, 1)}),
    ("avx512-vnni", {9: (8, 1), 13: (8, 8), 22: (8, 8, 8)}),
    ("amx", {9: (8, 1), 12: (8, 4), 13: (16,), 22: (16, 8), 26: (16, 8, 2), 29: (16, 16)})])  # fmt: skip
def test_tokens_find_the_tiles_that_products_take(name, sizes):
    """`tile_of` for each token, and the tiles one after the other by `tile_size`, as the products' loops go."""
    module = Module(levels.host_abi())
    with module.function("places", {"n": I64, "token": I64, "to": PTR}, linkage="entry") as f:
        n, token, to = f.args()
        found = (*tile_of(f, name, n, token), tile_places(f, name, n), tile_size(f, name, n))
        for i, value in enumerate(found):
            f.store(value, to + 8 * i, 8)
    code, out = load(compiled(module, host_level())), np.zeros(4, np.int64)
    places = code.function("places", None, *[ctypes.c_int64] * 3)

    def ask(n, token):
        places(n, token, out.ctypes.data)
        return out.tolist()

    for n in range(1, 50):
        tiles, at = [], 0
        while at < n:
            tiles.append((at, ask(n - at, 0)[3]))
            at += tiles[-1][1]
        assert {(first, size) for first, size, *_ in (ask(n, token) for token in range(n))} == set(tiles)
        assert all(first <= token < first + size for token in range(n) for first, size, *_ in [ask(n, token)])
        assert ask(n, 0)[2] == at <= 8 * n // 5  # what scratch.py has room for
        if n in sizes:
            assert [size for _, size in tiles] == [*sizes[n]]
    code.close()


@pytest.mark.parametrize("fmt", ["Q8_0", "F16"])
def test_what_a_tile_has_too_many_is_zero(fmt):
    """What is left from other tiles may be subnormal numbers, which processors are slow with."""
    executor, reference = executors(host_level(), fmt, 1, n_vocab=64, n_layer=1, n_ff=96)
    memory = executor._arrays["activations"].view(np.uint8).reshape(-1)
    memory[:] = 1
    executor.forward(np.arange(3))  # the last product that all share is the one with 96 columns
    values = memory[: 4 * 96 * 4].reshape(4, -1)
    scales = memory[4 * 96 * 4 :][: 3 * 4 * RECORD].reshape(3, 4, RECORD)[..., 64:72]
    assert not scales[:, 3:].any()
    assert scales[:, :3].any(-1).all()
    assert values[3:].any() == (fmt != "F16")  # nobody reads them where weights are integers
    executor.close()
    reference.close()


def scales(tile, tokens, n):
    records = tile[4 * n * tokens :].reshape(n // 32, tokens, RECORD)
    return records[..., 64:68].copy().view(np.float32)[..., 0].T


@each_level
def test_activations_are_rounded_as_numpy_rounds_them(level):
    random, n = np.random.default_rng(1), 96
    x = random.standard_normal((200, n)) * np.exp2(random.integers(-60, 60, (200, 1)))
    x[::3] *= np.exp2(random.integers(-20, 20, (67, n)))
    x[5:40:5, 32:64] = 0
    x = x.astype(np.float32)
    assert (rounded_records(level, x) == activation_records(level.name, x)).all()
    assert np.abs(round_activations(x)[0]).max() == 32639  # the high byte stays a signed byte


@each_level
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 7, 15, 16, 31])
def test_what_is_no_number_stays_visible_in_its_scale(level, value, place):
    x = np.ones((1, 64), np.float32)
    x[0, 32 + place] = value
    first, second = scales(rounded_records(level, x), 1, 64)[0]
    assert first == np.float32(1) * np.float32(1 / 32639)
    assert not np.isfinite(second)


@each_level
def test_tiny_activations_stay_tiny(level):
    x = np.full((1, 32), 1e-40, np.float32)
    x[0, 3] = 0
    records = rounded_records(level, x)
    low, high = records[4 * 32 :][:64].view(np.int8).reshape(2, 32).astype(np.float64)
    whole = records[4 * 32 :][:64].view(np.int16) if level.name in WHOLE else low + 256 * high
    assert (np.abs(whole * scales(records, 1, 32)[0, 0].astype(np.float64)) <= 1e-35).all()


# ── whole models, without formats: float32 weights ───────────────────────────────────────────────────────────────────


def forward(plan_hyper, tensors, ids):
    """A decoder with RMSNorm or LayerNorm and SwiGLU, one token after the other, float64; keys and values as int16."""
    h, w = plan_hyper, {name: tensor.to_float32().astype(np.float64) for name, tensor in tensors.items()}
    group, caches, out = h.n_head // h.n_kv_head, [([], []) for _ in range(h.n_layer)], []
    slopes = 2.0 ** (-8 * np.arange(1, h.n_head + 1) / h.n_head)  # head counts here are powers of two

    def norm(x, name):
        x = x - x.mean() if h.norm == "layer" else x
        return x / np.sqrt((x**2).mean() + h.norm_eps) * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return w[f"{name}.weight"] @ x + w.get(f"{name}.bias", 0)

    def rotate(heads, position):
        half = h.rope.n_dims // 2
        pairs = [(2 * i, 2 * i + 1) if h.rope.pairs == "interleaved" else (i, i + half) for i in range(half)]
        turned = heads.copy()
        for i, (a, b) in enumerate(pairs):
            turn = np.exp(1j * position * h.rope.theta ** (-i / half))
            z = (heads[:, a] + 1j * heads[:, b]) * turn
            turned[:, a], turned[:, b] = z.real, z.imag
        return turned

    for position, token in enumerate(ids):
        x = w["token_embd.weight"][token] + (w["position_embd.weight"][position] if h.position == "learned" else 0)
        for layer, (keys, values) in enumerate(caches):
            at = f"blk.{layer}."
            y = norm(x, f"{at}attn_norm")
            q, k, v = (linear(y, f"{at}attn_{name}").reshape(-1, h.head_dim) for name in "qkv")
            if h.rope:
                q, k = rotate(q, position), rotate(k, position)
            for kept, keep, heads in ((keys, keys_to_words, k), (values, values_to_words, v)):
                words, their_scales = keep(heads.astype(np.float32))
                kept.append(words * their_scales[:, None].astype(np.float64))
            all_keys, all_values = np.array(keys), np.array(values)  # [t, n_kv_head, head_dim]
            mix = []
            for head in range(h.n_head):
                scores = all_keys[:, head // group] @ q[head] / np.sqrt(h.head_dim)
                if h.position == "alibi":
                    scores += slopes[head] * (np.arange(position + 1) - position)
                mix.append(softmax(scores) @ all_values[:, head // group])
            x = x + linear(np.concatenate(mix), f"{at}attn_output")
            y = norm(x, f"{at}ffn_norm")
            gate = linear(y, f"{at}ffn_gate")
            x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{at}ffn_up"), f"{at}ffn_down")
        out.append(linear(norm(x, "output_norm"), "token_embd"))
    return np.array(out)


def agrees(level, n=40, blocks=(23,), **options):
    """The native executor's logits for n tokens, in blocks of these lengths and then one by one, against `forward`."""
    limit = 5e-3  # queries and weights are rounded, too
    native, reference = executors(level, "F32", 2, n_layer=1, n_vocab=64, n_ctx=max(64, n), **options)
    reference.close()
    ids, got, start = np.random.default_rng(n).integers(0, 64, n), [], 0
    for length in (*blocks, *[1] * (n - sum(blocks))):
        got.append(native.forward(ids[start : start + length], rows="all").copy())
        start += length
    assert np.abs(np.concatenate(got) - forward(native.hyper, native._tensors, ids)).max() <= limit
    native.close()


@each_level
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_norms_and_positions(level, norm, position):
    agrees(level, norm=norm, position=position, bias=norm == "layer")


@each_level
@pytest.mark.parametrize("pairs", ["interleaved", "half"])
@pytest.mark.parametrize("n_dims", [2, 6, 16])
def test_rotation_in_both_orders(level, pairs, n_dims):
    agrees(level, rope=Rope(1000.0, n_dims, pairs))


@each_level
@pytest.mark.parametrize("group", range(1, 9))
def test_heads_in_groups(level, group):
    agrees(level, n=30, blocks=(9, 13), n_head=2 * group, n_kv_head=2, head_dim=8, n_embd=64)


@pytest.mark.parametrize("head_dim", [4, 6, 8, 16, 20, 24, 32, 40, 48, 64, 80, 96, 100, 112, 128])
@pytest.mark.parametrize("group", [1, 3])
def test_heads_of_any_width(head_dim, group):
    agrees(host_level(), n=36, n_head=2 * group, n_kv_head=2, head_dim=head_dim, n_embd=64)


@each_level
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_contexts_of_several_spans(level, position, group):
    n = 3 * SPAN + 5
    if position == "alibi" and group == 3:
        pytest.skip("the slopes of 6 heads are another test's")
    agrees(
        level,
        n=n,
        blocks=(SPAN - 3, 7 + SPAN, SPAN - 9),
        position=position,
        n_head=2 * group,
        n_kv_head=2,
        head_dim=16,
        n_embd=64,
    )


def test_a_prompt_and_single_tokens_give_the_same():
    native, reference = executors(host_level(), "F16", 2, n_ctx=700, position="alibi")
    reference.close()
    ids = np.random.default_rng(0).integers(0, 390, 600)
    prompt = native.forward(ids, rows="all")
    native.cache.truncate(0)
    one_by_one = np.concatenate([native.forward(ids[i : i + 1]).copy() for i in range(len(ids))])
    assert np.abs(prompt - one_by_one).max() <= 5e-3  # as in `agrees`
    native.cache.truncate(0)
    assert np.abs(native.forward(ids)[0] - prompt[-1]).max() <= 1e-5  # "last" is the last of "all", up to the order of sums
    native.close()
