"""The k largest logits in compiled code: the same as NumPy's, and nothing but n_vocab contiguous float32 gets there."""

import numpy as np
import pytest
from native_calls import host_level

from pocketlm.errors import UsageError
from pocketlm.runtime import sampling
from pocketlm.runtime.native.kernels import CORE, loaded
from pocketlm.runtime.native.selection import Selection

N = 5000


@pytest.fixture(scope="module")
def selection():
    return Selection(loaded(CORE, host_level()), N)


@pytest.mark.parametrize("k", [1, 2, 40, 1000, N - 1, N, N + 7])
def test_it_finds_what_numpy_finds(selection, k):
    random = np.random.default_rng(k)
    for logits in (random.standard_normal(N), random.integers(0, 30, N), np.zeros(N), -np.arange(N)):
        logits = logits.astype(np.float32)
        assert selection.top_k(logits, k).tolist() == sampling.top_k(logits, k).tolist()


def test_the_sum_is_numpys(selection):
    logits = np.random.default_rng(0).standard_normal(N).astype(np.float32) * 5
    expected = np.exp(logits.astype(np.float64) - logits.max()).sum()
    assert selection.sum_exp(logits, logits.max()) == pytest.approx(expected, rel=1e-5)


WRONG = {
    "too few": np.zeros(N - 1, np.float32),
    "none": np.zeros(0, np.float32),
    "too many": np.zeros(N + 1, np.float32),
    "a table": np.zeros((1, N), np.float32),
    "float64": np.zeros(N),
    "float16": np.zeros(N, np.float16),
    "int32": np.zeros(N, np.int32),
    "the other byte order": np.zeros(N, np.dtype(np.float32).newbyteorder()),
    "every other element": np.zeros(2 * N, np.float32)[::2],
    "backwards": np.zeros(N, np.float32)[::-1],
}


@pytest.mark.parametrize("name", WRONG)
def test_other_logits_are_refused(selection, name):
    for call in (lambda x: selection.top_k(x, 5), lambda x: selection.top_k(x, N), lambda x: selection.sum_exp(x, 0.0)):
        with pytest.raises(UsageError, match=r"expected contiguous float32 \(5000,\)"):
            call(WRONG[name])


@pytest.mark.parametrize("k", [0, -1, -(10**9)])
def test_fewer_than_one_is_refused(selection, k):
    with pytest.raises(UsageError, match="at least 1"):
        selection.top_k(np.zeros(N, np.float32), k)
