"""From logits to the next token: penalties, filters, temperature and the draw, put together once into one function.

In: logits, float32 (n_vocab,), and the ids so far. Out: an id and its log-probability. Knows nothing about models, text
or when to stop.

The order is llama.cpp's default one (`llama_sampler_chain` as its `common/sampling.cpp` builds it): logit bias, penalties,
top-k, top-p, min-p, temperature, draw; top-p and min-p therefore look at the probabilities before the temperature.

What makes it quick for a large vocabulary: the three filters all keep the likeliest few, so once the candidates are sorted
each of them is only a question of how many of the first stay, and the vocabulary itself is never sorted. Top-k hands over k
candidates; without it, min-p gives a threshold for the logits, and for top-p alone the likeliest few hundred are tried first.
Weights and their sums are float64, in an order that compiled code keeps as well (`_Weights`): with float32, two ways to sum up
50,000 tokens would draw another one in thousands of times.
Measured (2.5 GHz x86-64, NumPy 2.4, 49,152 tokens): greedy 6 µs, the defaults 105 µs, the log-probability 70 µs more.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable, Mapping, Sequence, Set
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.sampling_options import SamplingOptions

Sampler = Callable[[np.ndarray, Sequence[int]], tuple[int, float]]
"""(logits float32 (n_vocab,), ids so far) -> (id, logprob). The logits are left as they are.

`logprob` is the natural logarithm of the token's probability under the plain softmax of the logits: temperature 1, no
penalty, no filter; computed in float32 (error about 1e-6), NaN from a sampler made with `logprobs=False`.
"""

Process = Callable[[np.ndarray, Sequence[int]], None]
"""(a copy of the logits float32 (n_vocab,), a copy of the ids so far): changes the logits in place, returns nothing."""

Allowed = Callable[[], np.ndarray]
"""Which tokens may come next: their ids, int64, or for each whether it may not, bool (n_vocab,); contiguous."""

GREEDY_BELOW = 1e-5  # a temperature this low is greedy: dividing by it would only overflow
FIRST_NUCLEUS = 256  # how many tokens are looked at first where top-p is the only filter; a peaked distribution needs few
N_ROWS = 64  # the vocabulary seen as this many rows: to reduce over rows is several times faster than along one


CHAT_PENALTY = 1.1
FEWEST_WORDS = 1000  # tokens of a vocabulary of words; of a smaller one the last 64 tokens are most of what can come next


def chat_defaults(n_vocab: int) -> dict[str, Any]:
    """What an answer in a chat is drawn with unless asked otherwise, by a model of so many tokens: small models left alone
    repeat themselves turn after turn. One of letters has to repeat them, so its answers are not penalised.
    """
    return {"repeat_penalty": CHAT_PENALTY if n_vocab >= FEWEST_WORDS else 1.0}


class Selection(Protocol):
    """What an executor may do faster than NumPy: the ids of the k largest logits, in any order; the sum of exp(x - largest);
    a whole sampler, which draws the same tokens, or None where it has none.
    """

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray: ...

    def sum_exp(self, logits: np.ndarray, largest: float) -> float: ...

    def draw(
        self, o: SamplingOptions, exempt: Set[int], logprobs: bool, uniform: Callable[[], float], allowed: Allowed | None, /
    ) -> DrawingSampler | None: ...


class DrawingSampler(Protocol):
    """A sampler that also draws inside an executor's passes (`Executor.step`): prepared for at most `MOST` tokens after a text
    and none after one of `ends`, it gives those that were drawn as calls would have returned them.
    """

    MOST: int

    def __call__(self, logits: np.ndarray, ids: Sequence[int]) -> tuple[int, float]: ...

    def prepare(self, text: array[int], most: int, ends: Set[int]) -> None: ...

    def take(self, n: int) -> list[tuple[int, float]]: ...


def make_sampler(
    *,
    n_vocab: int,
    selection: Selection | None = None,
    exempt: Set[int] = frozenset(),
    logprobs: bool = True,
    process: Process | None = None,
    allowed: Allowed | None = None,
    **options: Any,
) -> Sampler:
    """The sampler for `options`, the fields of SamplingOptions. Its draws depend on the seed and the logits alone.

    `selection` is how an executor finds the largest logits and sums them up; NumPy's way where it is None. The penalties leave
    `exempt` ids alone: the end tokens, of which a chat's prompt is full, and an answer must be able to end. `logprobs=False`
    saves a pass over the vocabulary for a caller that does not look at them. `process(logits, ids)` changes a copy of the
    logits in place, after bias and penalties; then all but what is `allowed`, as a grammar wants it, are -inf. Raises
    UsageError for a bad option. The sampler raises PocketlmError where no token can be chosen: the logits hold NaN or +inf, or
    are all -inf.
    """
    o = SamplingOptions(**options)
    adjust: list[Process] = []
    if o.logit_bias:
        adjust.append(_bias(o.logit_bias, n_vocab))
    if (o.repeat_penalty, o.presence_penalty, o.frequency_penalty) != (1, 0, 0):
        adjust.append(_penalties(o, exempt))
    if process is not None:
        adjust.append(_given(process))
    if allowed is not None:
        adjust.append(_restriction(allowed))
    uniform = random.Random(o.seed).random  # numpy.random is left out of a packed executable
    if selection and process is None and (sampler := selection.draw(o, exempt, logprobs, uniform, allowed)):
        return sampler
    scores, weights = np.empty(n_vocab, np.float32), _Weights(n_vocab)
    is_greedy = o.temperature < GREEDY_BELOW or o.top_k == 1
    choose = None if is_greedy else _draw(o, weights, selection.top_k if selection else top_k, uniform)
    sum_exp = selection.sum_exp if selection else _sum_exp

    @np.errstate(under="ignore")  # a weight too small to be told from 0 is 0, though the caller has NumPy raise
    def sample(logits: np.ndarray, ids: Sequence[int]) -> tuple[int, float]:
        used = logits
        if adjust:
            np.copyto(scores, logits)
            used = scores
            for step in adjust:
                step(scores, ids)
        likeliest = int(used.argmax())  # of a NaN, should there be one: argmax takes it for the largest
        if not math.isfinite(used[likeliest]):
            raise PocketlmError(NO_CHOICE if used[likeliest] == -math.inf else BROKEN)
        id = choose(used, likeliest) if choose else likeliest
        if not logprobs:
            return id, math.nan
        largest = logits.max() if adjust else logits[likeliest]
        return id, float(logits[id] - largest) - math.log(sum_exp(logits, largest))

    return sample


BROKEN = "the model computed NaN or infinite logits; its weights are damaged, get the model file again"
NO_CHOICE = "no token is left to choose: every logit is -inf; look at logit_bias, or get the model file again"


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """The ids of the k largest logits, the largest first, lower ids before higher ones of the same value: int64 (min(k, n),).

    The k-th largest of the column maxima is at most the k-th largest of all, so few others are above it.
    """
    n = logits.size
    k = min(k, n)
    columns = n // N_ROWS
    coarse = logits[: columns * N_ROWS].reshape(N_ROWS, columns).max(axis=0) if k < columns // 2 else logits
    bound = np.partition(coarse, coarse.size - k)[coarse.size - k]
    ids = (logits >= bound).nonzero()[0]
    return ids[(-logits[ids]).argsort(kind="stable")[:k]]


def _sum_exp(logits: np.ndarray, largest: np.floating) -> float:
    return float(np.exp(logits - largest).sum())


# ---- steps on the logits of the whole vocabulary: in place --------------------------------------------------------------


def _bias(logit_bias: Mapping[int, float], n_vocab: int) -> Callable[[np.ndarray, Sequence[int]], None]:
    for id in logit_bias:
        if not isinstance(id, Integral) or not 0 <= id < n_vocab:
            raise UsageError(f"logit_bias names token {id!r}; the ids of this model are 0 to {n_vocab - 1}")
    where = np.array(list(logit_bias), np.intp)
    bias = np.array(list(logit_bias.values()), np.float32)

    def step(logits: np.ndarray, ids: Sequence[int]) -> None:
        logits[where] += bias

    return step


def _penalties(o: SamplingOptions, exempt: Set[int]) -> Callable[[np.ndarray, Sequence[int]], None]:
    repeat, presence = np.float32(o.repeat_penalty), np.float32(o.presence_penalty)

    def step(logits: np.ndarray, ids: Sequence[int]) -> None:
        recent = np.array([id for id in ids[-o.repeat_last_n :] if id not in exempt], np.intp)
        x = logits[recent]
        logits[recent] = np.where(x > 0, x / repeat, x * repeat) - presence  # an id that is there twice gets the same twice
        if o.frequency_penalty:
            np.subtract.at(logits, recent, o.frequency_penalty)

    return step


def _given(process: Process) -> Process:
    if not callable(process):
        raise UsageError(f"process is {process!r:.60}; it must be a function of logits and ids")

    def step(logits: np.ndarray, ids: Sequence[int]) -> None:
        changed: Any = process(logits, ids[:])  # a copy: the text could not grow while an array looks at it
        if isinstance(changed, np.ndarray) and changed is not logits:
            raise UsageError("process returned an array; it must change the logits that it is given in place")

    return step


def _restriction(allowed: Allowed) -> Process:
    def step(logits: np.ndarray, ids: Sequence[int]) -> None:
        mask = allowed()
        if mask.dtype == np.bool_:
            np.copyto(logits, -math.inf, where=mask)
        else:
            kept = logits[mask]
            logits.fill(-math.inf)
            logits[mask] = kept

    return step


# ---- choosing one -------------------------------------------------------------------------------------------------------


def _draw(
    o: SamplingOptions, weights: _Weights, top_k_of: Callable[[np.ndarray, int], np.ndarray], uniform: Callable[[], float]
) -> Callable[[np.ndarray, int], int]:
    filters: list[Callable[[np.ndarray, float], int]] = []
    if o.top_p < 1:
        filters.append(_top_p(o.top_p))
    if o.min_p > 0:
        limit = -math.log(o.min_p)
        filters.append(lambda x, total: int((-x).searchsorted(limit, side="right")))

    def candidates(logits: np.ndarray, best: np.floating) -> tuple[np.ndarray, float]:
        """Ids, ascending, with all the filters keep among them; and the sum of every exp(x) where top-p needs it."""
        if o.top_k:
            ids = np.sort(top_k_of(logits, min(o.top_k, logits.size)))
            return ids[logits[ids] > -math.inf], 0.0
        total = weights.fill(logits, best) if o.top_p < 1 else 0.0
        if o.min_p:
            return (logits >= best + np.float32(math.log(o.min_p) - 1e-3)).nonzero()[0], total
        ids = np.sort(top_k_of(logits, min(FIRST_NUCLEUS, logits.size)))
        if weights.used[ids].sum() < o.top_p * total * (1 + 1e-9):
            # all tokens less likely than (1 - p) / n together have less than 1 - p: the nucleus does not reach them
            ids = (weights.used >= (1 - o.top_p) * total / logits.size * 0.999).nonzero()[0]
        return ids, total

    def from_candidates(logits: np.ndarray, likeliest: int) -> int:
        best = logits[likeliest]
        ids, total = candidates(logits, best)
        x = logits[ids]
        order = (-x).argsort(kind="stable")  # equals stay in the order of their ids, whatever the executor's top_k gave
        x = x[order].astype(np.float64) - float(best)
        for keep in filters:
            x = x[: keep(x, total)]
        weights.fill(x, 0.0, 1 / o.temperature)
        return int(ids[order[weights.draw(uniform())]])

    def from_all(logits: np.ndarray, likeliest: int) -> int:
        weights.fill(logits, logits[likeliest], 1 / o.temperature)
        return weights.draw(uniform())

    return from_candidates if o.top_k or filters else from_all


def _top_p(p: float) -> Callable[[np.ndarray, float], int]:
    """How many of the descending logits `x` (the first is 0) stay; `total` is the sum of all exp(x), 0 where x is all."""

    def keep(x: np.ndarray, total: float) -> int:
        cumulative = np.exp(x).cumsum()
        return int(cumulative.searchsorted(p * (total or cumulative[-1]))) + 1

    return keep


def _falls_on(weights: np.ndarray, aim: float) -> tuple[int, float]:
    """The first index whose cumulative weight is above `aim`, never one of weight 0, and the weight before it."""
    cumulative = weights.cumsum()
    i = int(cumulative.searchsorted(aim, side="right"))
    if i == weights.size:  # rounded up to the sum: the last that has weight
        i = int(cumulative.searchsorted(cumulative[-1]))
    return i, float(cumulative[i - 1]) if i else 0.0


class _Weights:
    """exp of logits, float64, in memory that is used again; seen as N_ROWS rows, the last padded with zeros.

    What compiled code does in the same order gives the same sums (`native/softmax.py`): each column from the first row to the
    last, then the columns.
    """

    def __init__(self, n_vocab: int):
        self._memory = np.zeros(n_vocab + N_ROWS)

    def fill(self, x: np.ndarray, largest: float | np.floating, scale: float = 1.0) -> float:
        """Weights exp((x - largest) * scale) of x (n,), in `used`; returns their sum."""
        columns = -(-x.size // N_ROWS)
        self._table = self._memory[: N_ROWS * columns].reshape(N_ROWS, columns)
        self.used = self._memory[: x.size]
        np.subtract(x, largest, out=self.used, dtype=np.float64)
        if scale != 1:
            self.used *= scale
        np.exp(self.used, out=self.used)
        self._memory[x.size : N_ROWS * columns] = 0
        # NumPy adds up rows in their order, but the numbers of a single column in one of its own
        self._columns = self._table.sum(axis=0) if columns > 1 else self._memory[:N_ROWS].cumsum()[-1:]
        return float(self._columns.cumsum()[-1])

    def draw(self, u: float) -> int:
        """The index by the weights of the last `fill`: first its column, then, with what is left of `u`, the row in it."""
        column, before = _falls_on(self._columns, aim := u * float(self._columns.cumsum()[-1]))
        row, _ = _falls_on(self._table[:, column], aim - before)
        return row * self._table.shape[1] + column
