"""Caches of int16: what is kept is near, stays what it is, and no sum of products is larger than 31 bits."""

import dataclasses
import math

import numpy as np
import pytest
from native_calls import each_level, executors, make_hyper, tensors_of, wide

from pocketlm.runtime import kv_cache
from pocketlm.runtime.kv_cache import MAX_KEY, MAX_VALUE, ScaledCache, keys_to_words, values_to_words
from pocketlm.runtime.native import cache_numbers
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.native.sizes import POSITIONS
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import make_plan

RANDOM = np.random.default_rng(0)
WIDEST = 512  # columns of a head


def rows(dim: int) -> np.ndarray:
    """Of every size, all zero, with one number that is not, and two whose lengths lie at the ends of a scale's range."""
    x = RANDOM.standard_normal((2, 4000, dim)) * np.exp(RANDOM.normal(0, 5, (2, 4000, 1)))
    x[0, 0] = 0
    x[0, 1, 1:] = 0
    for i, length in enumerate((MAX_KEY, MAX_KEY + 0.4, MAX_KEY / 2, MAX_VALUE, MAX_VALUE + 0.4)):
        x[1, i] *= length / np.linalg.norm(x[1, i])
        x[1, i + 5] *= length / np.abs(x[1, i + 5]).max()
    return x.astype(np.float32)


@pytest.mark.parametrize("keep", [keys_to_words, values_to_words])
@pytest.mark.parametrize("dim", [1, 3, 16, 64, 80, WIDEST])
def test_what_is_read_and_kept_again_stays_the_same(keep, dim):
    x = rows(dim)
    words, scales = keep(x)
    assert (np.abs(words * scales[..., None].astype(np.float64) - x) <= scales[..., None] / 2).all()
    once = words * scales[..., None]
    again, new_scales = keep(once)
    np.testing.assert_array_equal(again * new_scales[..., None], once)


@pytest.mark.parametrize("dim", [1, 64, WIDEST])
def test_keys_and_values_use_the_bits_that_sums_leave_them(dim):
    x = rows(dim)
    keys, values = keys_to_words(x)[0].astype(np.float64), values_to_words(x)[0]
    lengths, largest = np.linalg.norm(keys, axis=-1).reshape(-1)[1:], np.abs(values).max(-1).reshape(-1)[1:]  # not of zeros
    assert lengths.max() <= MAX_KEY
    assert lengths.min() > MAX_KEY / 2 - math.sqrt(dim)
    assert largest.max() <= MAX_VALUE
    assert largest.min() >= MAX_VALUE // 2


def test_no_sum_of_products_needs_more_than_31_bits():
    """By Cauchy and Schwarz a sum is at most the lengths' product; rounding makes a vector √dim / 2 longer at most."""
    rounding = math.sqrt(WIDEST) / 2
    assert cache_numbers.MAX_KEY + rounding <= MAX_KEY < 2**15
    assert MAX_KEY * (cache_numbers.MAX_QUERY + rounding) < 2**31
    assert MAX_VALUE * cache_numbers.MAX_WEIGHT * POSITIONS < 2**31


def test_a_key_that_is_no_number_stays_none():
    x = np.array([[np.nan, 1], [1, 2]], np.float32)
    for keep in (keys_to_words, values_to_words):
        words, scales = keep(x)
        assert np.isnan(words * scales[:, None]).tolist() == [[True, True], [False, False]]


@each_level
@pytest.mark.parametrize("kv", kv_cache.KINDS)
@pytest.mark.parametrize("head_dim", [8, 24, 64])
def test_compiled_code_keeps_what_numpy_keeps(level, kv, head_dim):
    """Both executors' keys and values of the first layer, which no rounding of attention has changed."""
    native, reference = executors(level, "F32", 1, n_embd=96, n_head=3, n_kv_head=1, head_dim=head_dim, n_ctx=512, kv=kv)
    assert isinstance(reference.cache, ScaledCache)
    ids = RANDOM.integers(0, 300, 300)
    for executor in (native, reference):
        executor.forward(ids, rows="last")
    for name in ("read_keys", "read_values"):
        got, expected = (getattr(executor.cache, name)(0, 0, 300) for executor in (native, reference))
        step = np.abs(expected).max(-1, keepdims=True) * {"q16": 2.0**-11, "q8": 2.0**-6}[kv] + 1e-6
        assert (np.abs(got - expected) <= step).all()
        assert np.abs(got - expected).mean() <= np.abs(expected).mean() * {"q16": 1e-4, "q8": 2e-2}[kv]
    native.close()
    reference.close()


@each_level
def test_queries_beyond_the_numbers_of_float16_find_what_they_ask_for(level, monkeypatch):
    """Attention looks at one position then, the same in both executors."""
    shape = make_hyper(**wide("F32"))
    tensors = tensors_of(shape, "F32")
    for name in [name for name in tensors if "attn_q" in name]:
        large = tensors[name].to_float32() * np.float32(1e7)
        tensors[name] = dataclasses.replace(tensors[name], data=large.reshape(-1).view(np.uint8))
    plan = make_plan(shape, {name: tensor.shape for name, tensor in tensors.items()}, "model")
    monkeypatch.setenv("POCKETLM_ISA", level.name)
    # the same at every level: in one text of thirty two positions score alike, and rounding says which is looked at
    ids, found = np.random.default_rng(1).integers(0, 300, 40), []
    for executor in (NativeExecutor(plan, tensors, 64, 1), NumpyExecutor(plan, tensors, 64, 1)):
        found.append(executor.forward(ids, rows="all"))
        executor.close()
    assert np.abs(found[0] - found[1]).max() < 0.02
