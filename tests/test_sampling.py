"""Sampling: every filter, penalty and draw against a plain float64 version that sorts the whole vocabulary."""

import itertools
import math
import random
from fractions import Fraction
from numbers import Integral
from types import SimpleNamespace

import numpy as np
import pytest

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime import sampling
from pocketlm.runtime.sampling import make_sampler, top_k
from pocketlm.runtime.sampling_options import SamplingOptions

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}


def replace_uniform(monkeypatch, uniform):
    """The sampler's uniform numbers are those that `uniform()` returns."""
    monkeypatch.setattr(sampling, "random", SimpleNamespace(Random=lambda seed: SimpleNamespace(random=uniform)))


def penalised(logits, ids, o: SamplingOptions) -> list[float]:
    out = list(logits)  # stays float32, so that ties stay ties
    for id, bias in (o.logit_bias or {}).items():
        out[id] += np.float32(bias)
    recent, repeat = list(ids)[-o.repeat_last_n :], np.float32(o.repeat_penalty)
    for id in set(recent):
        out[id] = out[id] / repeat if out[id] > 0 else out[id] * repeat
        out[id] -= np.float32(o.presence_penalty) + np.float32(o.frequency_penalty) * np.float32(recent.count(id))
    return [float(x) for x in out]


def probabilities(logits, ids, o: SamplingOptions) -> dict[int, float] | None:
    """Token -> probability; None where rounding decides whether a token is in."""
    x = penalised(logits, ids, o)
    order = sorted((i for i in range(len(x)) if x[i] > -math.inf), key=lambda i: (-x[i], i))

    def softmax(ids, temperature=1.0):
        weights = [math.exp((x[i] - x[order[0]]) / temperature) for i in ids]
        return [w / math.fsum(weights) for w in weights]

    if o.temperature == 0:
        return {order[0]: 1.0}
    if o.top_k:
        order = order[: o.top_k]
    if o.top_p < 1:
        kept, total = [], 0.0
        for i, p in zip(order, softmax(order), strict=True):
            if abs(total - o.top_p) < 1e-6:
                return None
            if total >= o.top_p:
                break
            kept.append(i)
            total += p
        order = kept
    if o.min_p > 0:
        p = softmax(order)
        if any(abs(q - o.min_p * p[0]) < 1e-9 for q in p if q != p[0]):
            return None
        order = [i for i, q in zip(order, p, strict=True) if q >= o.min_p * p[0]]
    return dict(zip(order, softmax(order, o.temperature), strict=True))


def random_logits(rng: np.random.Generator, n: int) -> np.ndarray:
    logits = rng.normal(size=n) * rng.choice([0.1, 1, 4])
    if rng.random() < 0.5:
        logits = np.round(logits)  # many ties
    if rng.random() < 0.3:
        logits[rng.random(n) < 0.3] = -np.inf
        logits[rng.integers(n)] = 1
    return logits.astype(np.float32)


def test_every_chain_gives_each_token_its_share_of_the_uniform_draw(monkeypatch):
    """The draw is replaced by an even grid: then a token of probability p must come up p * grid times, give or take one."""
    grid = 41
    rng, checked = np.random.default_rng(5), 0
    for _ in range(1000):
        replace_uniform(monkeypatch, iter([(i + 0.5) / grid for i in range(grid)]).__next__)
        n = int(rng.choice([1, 2, 3, 17, 64, 100, 700, 2500], p=[0.02, 0.03, 0.1, 0.3, 0.1, 0.25, 0.15, 0.05]))
        logits, ids = random_logits(rng, n), rng.integers(n, size=100).tolist()
        o = SamplingOptions(
            temperature=float(rng.choice([0.3, 1, 1.7])),
            top_k=int(rng.choice([0, 0, 2, 40, 5000])),
            top_p=float(rng.choice([1, 0.1, 0.5, 0.95, 0.9999])),
            min_p=float(rng.choice([0, 0.001, 0.05, 0.5, 1])),
            repeat_penalty=float(rng.choice([1, 1.1, 2, 0.5])),
            presence_penalty=float(rng.choice([0, 0.75])),
            frequency_penalty=float(rng.choice([0, 0.25])),
            repeat_last_n=int(rng.choice([1, 7, 64, 500])),
            logit_bias={int(rng.integers(n)): float(rng.choice([3, -3]))} if rng.random() < 0.3 else None,
        )
        expected = probabilities(logits, ids, o)
        if expected is None:
            continue
        sampler = make_sampler(n_vocab=n, logprobs=False, **vars(o))
        drawn = np.bincount([sampler(logits, ids)[0] for _ in range(grid)], minlength=n)
        assert set(np.flatnonzero(drawn)) <= set(expected), o
        for id, p in expected.items():
            # within a set that two sums lead to (no filter at all) a token's share may begin inside two steps of the grid
            assert abs(drawn[id] - grid * p) <= 1.01, (o, id, p)
        checked += 1
    assert checked > 900


def chi_square_is_plausible(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Against the 1 - 1e-6 quantile (Wilson and Hilferty 1931); categories with fewer than 10 expected are put together."""
    few = expected < 10
    if few.any():
        counts, expected = np.append(counts[~few], counts[few].sum()), np.append(expected[~few], max(expected[few].sum(), 1e-9))
    chi2, df = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    return chi2 < df * (1 - 2 / (9 * df) + 4.75 * math.sqrt(2 / (9 * df))) ** 3


@pytest.mark.parametrize("options", [OFF, {}], ids=["softmax", "defaults"])
def test_100000_draws_follow_the_distribution(options):
    n, draws, ids = 200, 100_000, [3, 5, 3]
    logits = (np.random.default_rng(1).normal(size=n) * 2).astype(np.float32)
    sampler = make_sampler(n_vocab=n, logprobs=False, seed=11, **options)
    counts = np.bincount([sampler(logits, ids)[0] for _ in range(draws)], minlength=n)
    p = probabilities(logits, ids, SamplingOptions(**options))
    assert p is not None
    expected = np.array([p.get(i, 0.0) * draws for i in range(n)])
    assert not counts[expected == 0].any()
    assert chi_square_is_plausible(counts[expected > 0], expected[expected > 0])


def test_pure_softmax_draws_agree_with_torch():
    torch = pytest.importorskip("torch", reason="the distribution is compared with PyTorch's softmax")
    n, draws = 1000, 30_000
    logits = (np.random.default_rng(2).normal(size=n) * 2).astype(np.float32)
    sampler = make_sampler(n_vocab=n, logprobs=False, seed=4, **{**OFF, "temperature": 0.8})
    counts = np.bincount([sampler(logits, [])[0] for _ in range(draws)], minlength=n)
    expected = torch.softmax(torch.from_numpy(logits).double() / 0.8, 0).numpy() * draws
    assert chi_square_is_plausible(counts, expected)


def test_greedy_is_the_first_of_the_largest():
    rng = np.random.default_rng(3)
    greedy = [make_sampler(n_vocab=500, **{**OFF, **o}) for o in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-9})]
    for _ in range(300):
        logits = random_logits(rng, 500)
        assert {s(logits, [])[0] for s in greedy} == {logits.tolist().index(logits.max())}


@pytest.mark.parametrize("n", [1, 5, 64, 1000, 32_000])
def test_top_k_is_what_sorting_everything_gives(n):
    rng = np.random.default_rng(n)
    for _ in range(25):
        logits = random_logits(rng, n)
        for k in {1, 2, 40, n // 3 + 1, n, n + 7}:
            assert top_k(logits, k).tolist() == np.argsort(-logits.astype(np.float64), kind="stable")[:k].tolist()


class Unordered:
    def top_k(self, logits, k):
        return np.argpartition(logits, -k)[-k:]

    def sum_exp(self, logits, largest):
        return float(np.exp(logits.astype(np.float64) - largest).sum())

    def draw(self, *_):
        return None


def test_an_executor_may_name_the_top_k_in_any_order():
    logits = np.random.default_rng(8).normal(size=1000).astype(np.float32)
    own, given = (make_sampler(n_vocab=1000, seed=9, selection=s, **{**OFF, "top_k": 30}) for s in (None, Unordered()))
    for _ in range(200):
        (id, logprob), expected = given(logits, []), own(logits, [])
        assert id == expected[0]
        assert logprob == pytest.approx(expected[1], abs=1e-5)


def test_penalties_are_those_of_ctrl_and_of_openai():
    logits = np.array([2.0, -2.0, 0.5, 0.0, 1.9], np.float32)

    def choice(ids, **options):
        return make_sampler(n_vocab=5, **{**OFF, "temperature": 0, **options})(logits, ids)[0]

    assert choice([0], repeat_penalty=1.04) == 0  # 2 / 1.04 = 1.923
    assert choice([0], repeat_penalty=1.06) == 4  # 2 / 1.06 = 1.887
    assert choice([0] * 9, repeat_penalty=1.04) == 0  # how often does not matter
    assert choice([0] * 9, presence_penalty=0.09) == 0  # 1.91
    assert choice([0], presence_penalty=0.11) == 4
    assert choice([0] * 2, frequency_penalty=0.04) == 0  # 1.92
    assert choice([0] * 3, frequency_penalty=0.04) == 4  # 1.88
    assert choice([0] + [2] * 64, presence_penalty=1.0) == 0  # 65 tokens ago
    assert choice([0] + [2] * 63, presence_penalty=1.0) == 4
    negative = np.array([-1.0, -1.1], np.float32)  # a negative logit is multiplied
    assert make_sampler(n_vocab=2, **{**OFF, "temperature": 0, "repeat_penalty": 1.2})(negative, [0])[0] == 1
    assert choice([], logit_bias={3: 5.0}) == 3
    assert choice([], logit_bias={0: -math.inf, 4: -math.inf}) == 2


def test_exempt_ids_are_not_penalised():
    logits = np.array([2.0, 1.9], np.float32)
    penalties = {**OFF, "temperature": 0, "repeat_penalty": 1.5, "presence_penalty": 1, "frequency_penalty": 1}
    assert make_sampler(n_vocab=2, **penalties)(logits, [0, 0])[0] == 1
    assert make_sampler(n_vocab=2, exempt={0}, **penalties)(logits, [0, 0])[0] == 0


def test_filters_look_at_the_probabilities_before_the_temperature():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for filters, kept in (({"top_p": 0.75}, {0, 1}), ({"min_p": 0.2}, {0, 1, 2}), ({"top_k": 3, "top_p": 0.9}, {0, 1, 2})):
        sampler = make_sampler(n_vocab=4, seed=0, **{**OFF, **filters, "temperature": 100.0})
        assert {sampler(logits, [])[0] for _ in range(300)} == kept


def test_top_p_counts_within_the_top_k():
    logits = np.log(np.array([0.4, 0.2, 0.2, 0.2], np.float32))  # of the top 2 alone: 2/3 and 1/3
    sampler = make_sampler(n_vocab=4, seed=0, **{**OFF, "top_k": 2, "top_p": 0.6})
    assert {sampler(logits, [])[0] for _ in range(300)} == {0}


def test_a_seed_gives_the_same_ids_and_a_token_takes_one_draw(monkeypatch):
    rng = np.random.default_rng(6)
    stream = [random_logits(rng, 300) for _ in range(100)]
    for options in (OFF, {}, {**OFF, "top_p": 0.9}, {**OFF, "min_p": 0.1}):
        runs = []
        for seed in (5, 5, 6):
            sampler = make_sampler(n_vocab=300, seed=seed, **options)
            runs.append([sampler(logits, [1, 2])[0] for logits in stream])
        assert runs[0] == runs[1] != runs[2]
        with monkeypatch.context() as m:
            uniform = itertools.count()
            replace_uniform(m, lambda numbers=uniform: next(numbers) * 1e-6)
            sampler = make_sampler(n_vocab=300, **options)
        for logits in stream:
            sampler(logits, [])
        assert next(uniform) == len(stream)


def test_logprob_is_that_of_the_plain_softmax_and_the_logits_stay_as_they_are():
    rng = np.random.default_rng(7)
    for options in ({}, OFF, {"temperature": 0}, {"logit_bias": {4: 50.0}}):
        for n in (5, 64, 1000, 49_152):
            logits = random_logits(rng, n)
            before = logits.copy()
            id, logprob = make_sampler(n_vocab=n, seed=0, **options)(logits, [0, 1, 1, n - 1])
            x = logits.astype(np.float64)
            assert logprob == pytest.approx(x[id] - x.max() - math.log(np.exp(x - x.max()).sum()), abs=2e-5)
            assert (logits == before).all()
    assert math.isnan(make_sampler(n_vocab=5, logprobs=False)(np.zeros(5, np.float32), [])[1])


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_a_banned_token_is_never_drawn(monkeypatch, u):
    replace_uniform(monkeypatch, lambda: u)
    rng = random.Random(u)
    for options in (OFF, {**OFF, "top_k": 40}, {**OFF, "top_p": 0.999}, {**OFF, "min_p": 1e-9}):
        for _ in range(100):
            logits = np.full(200, -np.inf, np.float32)
            allowed = rng.sample(range(200), rng.randint(1, 30))
            logits[allowed] = [rng.gauss(0, 5) for _ in allowed]
            banned = dict.fromkeys(allowed[1::2], -math.inf)
            id, _ = make_sampler(n_vocab=200, logit_bias=banned, **options)(logits, [])
            assert id in set(allowed) - set(banned)


@pytest.mark.parametrize("options", [OFF, {}, {"temperature": 0}, {**OFF, "top_p": 0.9}], ids=str)
def test_logits_that_allow_no_choice_are_an_error_not_a_token(options):
    sampler = make_sampler(n_vocab=100, **options)
    for bad in (math.nan, math.inf):
        logits = np.zeros(100, np.float32)
        logits[60] = bad
        with pytest.raises(PocketlmError, match="NaN"):
            sampler(logits, [1, 60])
    with pytest.raises(PocketlmError, match="no token is left"):
        sampler(np.full(100, -np.inf, np.float32), [1])
    ban_all = make_sampler(n_vocab=100, logit_bias=dict.fromkeys(range(100), -math.inf), **options)
    with pytest.raises(PocketlmError, match="logit_bias"):
        ban_all(np.zeros(100, np.float32), [1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"),
        ("top_k", -1), ("top_k", 2.5), ("top_k", True), ("top_p", 0), ("top_p", 1.01), ("min_p", -0.1), ("min_p", 2),
        ("repeat_penalty", 0), ("repeat_penalty", math.nan), ("presence_penalty", math.inf), ("frequency_penalty", None),
        ("repeat_last_n", 0), ("seed", -1), ("seed", 1.5), ("logit_bias", [1]), ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}), ("logit_bias", {100: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {"a": 1.0}),
    ],
)  # fmt: skip
def test_a_bad_option_is_one_line_with_its_name_and_range(name, value):
    with pytest.raises(UsageError, match=name) as error:
        make_sampler(n_vocab=100, **{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [
    {"top_k": np.uint8(40)}, {"top_k": np.int8(5), "top_p": np.float16(0.5)}, {"temperature": np.float16(0.7)},
    {"temperature": Fraction(7, 10)}, {"repeat_last_n": np.uint64(64), "repeat_penalty": np.float32(3)},
    {"seed": np.uint8(7), "min_p": Fraction(1, 20)},
])  # fmt: skip
def test_numbers_of_other_kinds_are_as_good_as_pythons(options):
    """`-np.uint64(64)` is no index from the end, `1024 - np.uint8(40)` no number at all."""
    logits = np.random.default_rng(0).normal(0, 3, 1024).astype(np.float32)
    ids = logits.argsort()[-100:].tolist()
    alike = {name: int(value) if isinstance(value, Integral) else float(value) for name, value in options.items()}
    one, other = (make_sampler(n_vocab=1024, **{"seed": 1, **given}) for given in (options, alike))
    assert [one(logits, ids) for _ in range(50)] == [other(logits, ids) for _ in range(50)]


@pytest.mark.parametrize("options", [{"temperature": 1e-4}, {"logit_bias": {5: -1e6, 7: 1e6}}, {"top_k": 0, "min_p": 1e-300}])
def test_a_caller_who_has_numpy_raise_gets_a_token(options):
    logits = np.arange(100, dtype=np.float32)
    with np.errstate(all="raise"):
        assert make_sampler(n_vocab=100, seed=1, **options)(logits, [1])[0] == (7 if "logit_bias" in options else 99)
