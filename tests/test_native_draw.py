"""Tokens drawn in compiled code: the same ones as the NumPy sampler's with the same seed, and the logits as they were."""

import math
from array import array

import numpy as np
import pytest
from native_calls import each_level, host_level
from test_sampling import chi_square_is_plausible, replace_uniform

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime import sampling
from pocketlm.runtime.native.kernels import CORE, loaded
from pocketlm.runtime.native.selection import Selection
from pocketlm.runtime.sampling import make_sampler
from pocketlm.runtime.sampling_options import SamplingOptions


class OnlyNumpy:
    """A selection that knows no chain: the whole sampler is sampling.py's."""

    top_k = staticmethod(sampling.top_k)

    @staticmethod
    def sum_exp(logits, largest):
        return float(np.exp(logits.astype(np.float64) - largest).sum())

    @staticmethod
    def draw(*_):
        return None


def random_logits(rng, n):
    """All kinds: peaked, flat, with many equals, zeros of either sign, and tokens that are impossible."""
    logits = rng.normal(size=n) * rng.choice([0.1, 1, 4, 30])
    kind = rng.integers(6)
    if kind == 0:
        logits = np.round(logits)
    elif kind == 1:
        logits[rng.random(n) < 0.5] = logits.max()
    elif kind == 2:
        logits = np.where(rng.random(n) < 0.5, 0.0, -0.0)
    elif kind == 3:
        logits[rng.random(n) < 0.9] = -np.inf
        logits[rng.integers(n)] = 1
    elif kind == 4:
        logits = -np.abs(np.round(logits, 1))
    return logits.astype(np.float32)


def random_options(rng, n):
    return {
        "temperature": float(rng.choice([0, 0.3, 0.7, 1, 1.7])),
        "top_k": int(rng.choice([0, 0, 0, 0, 1, 2, 5, 40, 256, 3000])),
        "top_p": float(rng.choice([1, 1, 0.1, 0.5, 0.95, 0.9999, 1 - 1e-12])),
        "min_p": float(rng.choice([0, 0, 1e-6, 0.001, 0.05, 0.5, 1])),
        "repeat_penalty": float(rng.choice([1, 1.1, 2, 0.5])),
        "presence_penalty": float(rng.choice([0, 0.75])),
        "frequency_penalty": float(rng.choice([0, 0.25, 0.1])),
        "repeat_last_n": int(rng.choice([1, 7, 64, 5000])),
        "logit_bias": {int(i): float(rng.choice([3, -3, -math.inf])) for i in rng.integers(n, size=5)}
        if n > 6 and rng.random() < 0.3
        else None,
        "seed": int(rng.integers(1 << 40)),
    }


def random_restriction(rng, n):
    """What a form lets through: one token at least, as ids or as a mask of those that may not come."""
    may_come = rng.random(n) < rng.choice([0, 0.001, 0.1, 0.5, 1])
    may_come[rng.integers(n)] = True
    return may_come.nonzero()[0] if rng.random() < 0.5 else ~may_come


@each_level
def test_the_tokens_are_those_of_the_numpy_sampler(level):
    rng = np.random.default_rng(1)
    core, restriction = loaded(CORE, level), list[np.ndarray]()
    for case in range(600):
        n = int(rng.choice([1, 2, 3, 7, 16, 64, 65, 100, 129, 1000, 5003, 12_345, 100_000]))
        options, exempt = random_options(rng, n), set(rng.integers(n, size=3).tolist())
        ids = rng.integers(n, size=int(rng.choice([0, 3, 64, 300]))).tolist()
        is_restricted = rng.random() < 0.5
        if is_restricted:
            options["allowed"] = lambda: restriction[-1]
        native = make_sampler(n_vocab=n, selection=Selection(core, n), exempt=exempt, **options)
        reference = make_sampler(n_vocab=n, selection=OnlyNumpy(), exempt=exempt, **options)
        for _ in range(4):
            if is_restricted:
                restriction.append(random_restriction(rng, n))
            logits = random_logits(rng, n)
            before = logits.tobytes()
            try:
                expected = reference(logits, ids)
            except PocketlmError as error:
                with pytest.raises(PocketlmError, match=str(error)[:20]):
                    native(logits, ids)
            else:
                id, logprob = native(logits, array("i", ids) if case % 2 else ids)
                assert id == expected[0], (case, n, options)
                assert logprob == pytest.approx(expected[1], abs=max(2e-5, n * 1e-9))  # a sum of n equal float32
                ids.append(id)
            assert logits.tobytes() == before


CHAINS = {
    "defaults": {"top_k": 40}, "top-k": {"top_k": 3000, "top_p": 1.0, "min_p": 0.0}, "top-p, min-p": {"top_k": 0},
    "top-p": {"top_k": 0, "min_p": 0.0}, "min-p": {"top_k": 0, "top_p": 1.0}, "all": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
}  # fmt: skip
each_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


@each_level
@each_chain
@pytest.mark.parametrize("n", [1, 5, 16, 1000, 49_152])
def test_broken_logits_are_found_wherever_they_are(level, n, chain):
    options = {"repeat_penalty": 1.1, "logprobs": False, **chain}
    native = make_sampler(n_vocab=n, selection=Selection(loaded(CORE, level), n), **options)
    for place in {0, n // 2, n - 1}:
        for bad in (math.nan, -math.nan, math.inf):
            logits = np.zeros(n, np.float32)
            logits[place] = bad
            with pytest.raises(PocketlmError, match="NaN or infinite"):
                native(logits, [0])
    with pytest.raises(PocketlmError, match="no token is left"):
        native(np.full(n, -np.inf, np.float32), [0])


@each_chain
@pytest.mark.parametrize("u", [2.0**-53, 0.25, 0.5, 1 - 2**-53])
def test_the_ends_of_the_draw_are_numpys(monkeypatch, u, chain):
    """Where u times the sum is rounded up to the sum, and where it is next to nothing."""
    replace_uniform(monkeypatch, lambda: u)
    rng = np.random.default_rng(3)
    for n in (1, 3, 64, 65, 130, 5003):
        selection = Selection(loaded(CORE, host_level()), n)
        own, other = (make_sampler(n_vocab=n, selection=s, **chain) for s in (selection, OnlyNumpy()))
        for _ in range(30):
            logits = random_logits(rng, n)
            try:
                expected = other(logits, [])[0]
            except PocketlmError:
                continue  # all are -inf
            assert own(logits, [])[0] == expected


@each_level
@pytest.mark.parametrize("n", [3, 200, 5000])
def test_draws_from_all_follow_the_distribution(level, n):
    draws = 30_000
    logits = (np.random.default_rng(1).normal(size=n) * 2).astype(np.float32)
    sampler = make_sampler(n_vocab=n, selection=Selection(loaded(CORE, level), n), logprobs=False, seed=11, **CHAINS["all"])
    counts = np.bincount([sampler(logits, [])[0] for _ in range(draws)], minlength=n)
    shares = np.exp((logits.astype(np.float64) - logits.max()) / SamplingOptions().temperature)
    assert chi_square_is_plausible(counts, shares / shares.sum() * draws)


@pytest.fixture
def selection():
    return Selection(loaded(CORE, host_level()), 500)


@pytest.mark.parametrize("bad", [500, -1, 2**31 - 1])
def test_ids_outside_the_vocabulary_change_no_memory(selection, bad):
    memory = np.zeros(1500, np.float32)
    native = make_sampler(n_vocab=500, selection=selection, repeat_penalty=2.0, presence_penalty=1.0, logit_bias={3: 1.0})
    with pytest.raises(UsageError, match="not in the vocabulary"):
        native(memory[500:1000], [1, bad, 2])
    assert not memory.any()


def test_other_logits_are_refused_and_read_only_ones_are_not_written(selection):
    native = make_sampler(n_vocab=500, selection=selection, repeat_penalty=2.0)
    for wrong in (np.zeros(499, np.float32), np.zeros(500), np.zeros(1000, np.float32)[::2]):
        with pytest.raises(UsageError, match="expected contiguous"):
            native(wrong, [])
    fixed = np.ones(500, np.float32)
    fixed.flags.writeable = False
    assert 0 <= native(fixed, [1, 2])[0] < 500
