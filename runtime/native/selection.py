"""What sampling asks of a vocabulary's logits, in compiled code: the next token, or what leads to it.

In: logits, or a text and the passes that go on with it (`DrawingSampler`). Out: an id and its log-probability; the ids of the k
largest, a sum. Does not know the model.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.memory import aligned
from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.linker import Loaded
from pocketlm.runtime.native.records import SAMPLER, offset
from pocketlm.runtime.native.sizes import CHUNK
from pocketlm.runtime.native.tiling import ROWS
from pocketlm.runtime.sampling import BROKEN, GREEDY_BELOW, N_ROWS, NO_CHOICE, Allowed
from pocketlm.runtime.sampling_options import SamplingOptions


class Selection:
    """Makes samplers (`draw`); `top_k` and `sum_exp` are for chains with a step of the caller's own (`process`), which NumPy
    runs. Logits are float32 [n_vocab], contiguous.
    """

    def __init__(self, core: Loaded, n_vocab: int):
        p, i, d = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        self._n_vocab = n_vocab
        self._draw = core.function("draw", i, p, p, p, i, d, alone=True)
        self._top_k = core.function("top_k", None, p, p, i, alone=True)
        self._sum_exp = core.function("sum_exp", ctypes.c_float, p, i, ctypes.c_float, alone=True)
        self._arrays = {
            "chunks": np.full(-(-n_vocab // CHUNK) + ROWS, -np.inf, np.float32),
            "values": np.empty(n_vocab + ROWS + 1, np.float32),
            "ids": np.empty(n_vocab + ROWS + 1, np.int32),
            "sorted": np.empty(n_vocab, np.float32),
            "sorted_ids": np.empty(n_vocab, np.int32),
            "columns": np.empty(-(-n_vocab // N_ROWS), np.float64),
        }
        self._record = aligned(1, SAMPLER)
        self._set(n_vocab=n_vocab, n_allowed=sizes.ALL)

    def _set(self, **numbers: Any) -> None:
        """Fields of the record."""
        for name, number in {**numbers, **{name: memory.ctypes.data for name, memory in self._arrays.items()}}.items():
            self._record[name] = number

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Ids of the k largest, the largest first, lower ids before higher ones of the same value: int64 [min(k, n_vocab)].

        UsageError for logits of another shape or type, and for k < 1.
        """
        address = self.checked(logits)
        if k < 1:
            raise UsageError(f"the {k} largest logits: expected at least 1")
        k = min(k, self._n_vocab)
        self._top_k(self._record.ctypes.data, address, k)
        return self._arrays["ids"][:k].astype(np.int64)

    def sum_exp(self, logits: np.ndarray, largest: float) -> float:
        """Sum of exp(logit - largest). UsageError for logits of another shape or type."""
        return self._sum_exp(self.checked(logits), self._n_vocab, largest)

    def draw(
        self, o: SamplingOptions, exempt: Set[int], logprobs: bool, uniform: Callable[[], float], allowed: Allowed | None
    ) -> DrawingSampler:
        """A sampler as sampling.py makes it, which draws the same tokens."""
        k = 1 if o.temperature < GREEDY_BELOW else min(o.top_k, self._n_vocab)
        limit = -math.log(o.min_p) if o.min_p else math.inf
        # all tokens less likely than (1 - p) / n together have less than 1 - p: top-p keeps none of them
        nucleus = math.log(self._n_vocab) - math.log(1 - o.top_p) if o.top_p < 1 else math.inf
        penalties = (o.repeat_penalty, o.presence_penalty, o.frequency_penalty) != (1, 0, 0)
        bias = o.logit_bias or {}
        if allowed:
            self._arrays["masked"] = np.empty(self._n_vocab + ROWS, np.float32)
        self._arrays |= {
            "exempt": np.array(sorted(exempt), np.int64),
            "bias_ids": np.array(list(bias), np.int64),
            "biases": np.array(list(bias.values()), np.float32),
        }
        self._set(
            k=k, edits=bool(bias) or penalties, logprobs=logprobs, last_n=min(o.repeat_last_n, 1 << 40) if penalties else 0,
            repeat=o.repeat_penalty, presence=o.presence_penalty, frequency=o.frequency_penalty,
            n_exempt=len(exempt), n_bias=len(bias),
            top_p=o.top_p, min_p=limit, reach=min(limit, nucleus) + 1e-3, scale=1 / max(o.temperature, GREEDY_BELOW),
        )  # fmt: skip
        return DrawingSampler(self, self._draw, self._record, (lambda: 0.0) if k == 1 else uniform, allowed)

    def checked(self, logits: np.ndarray) -> int:
        """The address: compiled code reads n_vocab float32 from there, whatever is there."""
        if logits.shape != (self._n_vocab,) or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise UsageError(f"logits {logits.dtype} {logits.shape}: expected contiguous float32 ({self._n_vocab},)")
        return logits.ctypes.data


class DrawingSampler:
    """A sampler in compiled code, in two ways: a call draws from the logits that it is given; after `prepare`, the passes of an
    executor draw by themselves (`NativeExecutor.step`), and `take` tells what.

    A call edits the logits while it is at work. It raises PocketlmError for logits that allow no choice, UsageError for those
    of another shape or type and for ids outside the vocabulary.
    """

    def __init__(
        self, selection: Selection, call: Any, record: np.ndarray, uniform: Callable[[], float], allowed: Allowed | None
    ):  # fmt: skip
        """`record`: a SAMPLER of the selection's, complete but for what it has for drawing inside passes."""
        self._selection, self._call, self._record, self._uniform, self._allowed = selection, call, record, uniform, allowed
        self.MOST: int = 1 if allowed else sizes.MAX_PASSES  # tokens that it can be prepared for
        self._last_n, self._n_bias, self._logprobs = (int(record[name][0]) for name in ("last_n", "n_bias", "logprobs"))
        self._address, fields = record.ctypes.data, record.view(np.uint8)
        self._logit, self._sum = (ctypes.c_double.from_buffer(fields, offset(SAMPLER, name)) for name in ("logit", "sum"))
        self._n_text = ctypes.c_int64.from_buffer(fields, offset(SAMPLER, "n_text"))  # NumPy takes several times as long
        self._begins_with, self._room = 0, -1
        self._ends: Set[int] | None = None
        self._mask: np.ndarray | None = None
        # arrays of Python's: NumPy is no longer in the processor's caches after a pass, and takes several times as long then
        self._uniforms, self._logits, self._sums = (array("d", bytes(8 * sizes.MAX_PASSES)) for _ in range(3))
        self._drawn = array("q", bytes(8 * sizes.MAX_PASSES))
        self._n_ahead = 0  # random numbers at the beginning of _uniforms that no token was drawn with so far
        for name in ("uniforms", "drawn", "logits", "sums"):
            record[name] = getattr(self, f"_{name}").buffer_info()[0]
        self._make_room(min(self._last_n, 64))

    def _make_room(self, n: int) -> None:
        """Memory for n of the last tokens, and for what is drawn after them."""
        if n <= self._room:
            return
        self._room = max(n, 2 * self._room)
        n = self._room + sizes.MAX_PASSES
        self._saved, self._text = np.empty(self._n_bias + n, np.float32), np.empty(n, np.int32)
        self._text_at = self._text.ctypes.data
        self._record["saved"], self._record["text"] = self._saved.ctypes.data, self._text_at

    def __call__(self, logits: np.ndarray, ids: Sequence[int]) -> tuple[int, float]:
        address = self._selection.checked(logits)
        if not logits.flags.writeable:
            logits = logits.copy()
            address = logits.ctypes.data
        if type(ids) is not array or ids.typecode != "i":
            ids = array("i", ids[-self._last_n :] if self._last_n else ())
        ids_at, n_ids = ids.buffer_info()
        self._make_room(min(n_ids, self._last_n))
        self._draw_ahead(1)
        self._restrict()
        id = self._call(self._address, address, ids_at, n_ids, self._uniforms[0])
        told = self._told(id, self._logit.value, self._sum.value)
        self._drop(1)
        return told

    def _restrict(self) -> None:
        """Ask which tokens may come next, and tell compiled code."""
        if self._allowed and (mask := self._allowed()) is not self._mask:
            self._mask = mask  # as long as compiled code reads it
            n_allowed = sizes.FORBIDDEN if mask.dtype == np.bool_ else len(mask)
            self._record["allowed"], self._record["n_allowed"] = mask.ctypes.data, n_allowed

    def _draw_ahead(self, n: int) -> None:
        """Have n random numbers at least."""
        for at in range(self._n_ahead, n):
            self._uniforms[at] = self._uniform()
        self._n_ahead = max(self._n_ahead, n)

    def _drop(self, n: int) -> None:
        """The first n random numbers were used."""
        self._n_ahead -= n
        if self._n_ahead:
            self._uniforms[: self._n_ahead] = self._uniforms[n : n + self._n_ahead]

    def prepare(self, text: array[int], most: int, ends: Set[int]) -> None:
        """Get ready to draw at most `most` tokens after `text` (an array of type "i"), none after one of `ends`."""
        n = self._begins_with = min(len(text), self._last_n)
        self._make_room(n)
        if n:
            ctypes.memmove(self._text_at, text.buffer_info()[0] + 4 * (len(text) - n), 4 * n)
        self._draw_ahead(most)
        self._restrict()
        if ends is not self._ends:
            self._ends, self._end_ids = ends, np.array(sorted(ends), np.int64)
            self._record["ends"], self._record["n_ends"] = self._end_ids.ctypes.data, len(ends)

    def begin(self) -> int:
        """The address of the SAMPLER record, set back to what `prepare` made it: what was drawn since is drawn again."""
        self._n_text.value = self._begins_with
        return self._address

    def ids(self, n: int) -> array[int]:
        """The first n that were drawn."""
        return self._drawn[:n]

    def take(self, n: int) -> list[tuple[int, float]]:
        """The first n tokens that were drawn, as calls would have returned them.

        Where the first could not be drawn, raises what a call would have raised. A later one that could not be is left out; it
        is the first of the next passes.
        """
        n -= n > 1 and self._drawn[n - 1] < 0
        told = [self._told(*drawn) for drawn in zip(self._drawn[:n], self._logits, self._sums, strict=False)]
        self._drop(n)
        return told

    def _told(self, id: int, logit: float, total: float) -> tuple[int, float]:
        if id < 0:
            raise _no_token(id)
        return id, logit - math.log(total) if self._logprobs else math.nan


def _no_token(reason: int) -> PocketlmError:
    if reason == sizes.UNKNOWN_ID:
        return UsageError("the text so far holds a token that is not in the vocabulary")
    return PocketlmError(NO_CHOICE if reason == sizes.NO_CHOICE else BROKEN)
