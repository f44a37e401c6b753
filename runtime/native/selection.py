"""What sampling asks of a vocabulary's logits, in compiled code: the next token, or what leads to it.

In: logits. Out: an id and its log-probability; the ids of the k largest, a sum. Does not know the model.
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
from pocketlm.runtime.sampling import BROKEN, GREEDY_BELOW, NO_CHOICE, SamplingOptions, top_k

FLOAT32 = np.dtype(np.float32)


class Selection:
    """`draw` for the usual chains of filters; `top_k` and `sum_exp` for others. Logits are float32 [n_vocab], contiguous."""

    def __init__(self, core: Loaded, n_vocab: int):
        p, i, d = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
        self._n_vocab, self._shape = n_vocab, (n_vocab,)
        self._draw = core.function("draw", i, p, p, p, i, d, alone=True)
        self._top_k = core.function("top_k", None, p, p, i, alone=True)
        self._sum_exp = core.function("sum_exp", ctypes.c_float, p, i, ctypes.c_float, alone=True)
        self._arrays = {
            "chunks": np.full(-(-n_vocab // CHUNK) + ROWS, -np.inf, np.float32),
            "values": np.empty(n_vocab + ROWS + 1, np.float32),
            "ids": np.empty(n_vocab + ROWS + 1, np.int32),
            "top_x": np.empty(sizes.MAX_K + 1, np.float32),
            "top_ids": np.empty(sizes.MAX_K + 1, np.int32),
            "weights": np.empty(sizes.MAX_K, np.float64),
        }
        self._record = aligned(1, SAMPLER)
        self._set(n_vocab=n_vocab)

    def _set(self, **numbers: Any) -> None:
        """Fields of the record."""
        for name, number in {**numbers, **{name: memory.ctypes.data for name, memory in self._arrays.items()}}.items():
            self._record[name] = number

    def top_k(self, logits: np.ndarray, k: int) -> np.ndarray:
        """Ids of the k largest, the largest first, lower ids before higher ones of the same value: int64 [min(k, n_vocab)].

        UsageError for logits of another shape or type, and for k < 1.
        """
        address = self._checked(logits)
        if k < 1:
            raise UsageError(f"the {k} largest logits: expected at least 1")
        k = min(k, self._n_vocab)
        if k > sizes.MAX_K:
            return top_k(logits, k)
        self._top_k(self._record.ctypes.data, address, k)
        return self._arrays["top_ids"][:k].astype(np.int64)

    def sum_exp(self, logits: np.ndarray, largest: float) -> float:
        """Sum of exp(logit - largest). UsageError for logits of another shape or type."""
        return self._sum_exp(self._checked(logits), self._n_vocab, largest)

    def draw(
        self, o: SamplingOptions, exempt: Set[int], logprobs: bool, uniform: Callable[[], float]
    ) -> Callable[[np.ndarray, Sequence[int]], tuple[int, float]] | None:
        """A sampler as sampling.py makes it, which draws the same tokens; None for a chain that does not begin with top-k.

        It edits the logits while it is at work. LogitsError for logits that allow no choice; UsageError for those of another
        shape or type, and for ids outside the vocabulary.
        """
        k = 1 if o.temperature < GREEDY_BELOW else o.top_k
        if not 1 <= k <= sizes.MAX_K:
            return None
        penalties = (o.repeat_penalty, o.presence_penalty, o.frequency_penalty) != (1, 0, 0)
        bias = o.logit_bias or {}
        arrays, record = self._arrays, self._record
        arrays |= {
            "exempt": np.array(sorted(exempt), np.int64),
            "bias_ids": np.array(list(bias), np.int64),
            "biases": np.array(list(bias.values()), np.float32),
            "saved": np.empty(len(bias) + min(o.repeat_last_n, 64), np.float32),
        }
        self._set(
            k=k, edits=bool(bias) or penalties, logprobs=logprobs, last_n=min(o.repeat_last_n, 1 << 40) if penalties else 0,
            repeat=o.repeat_penalty, presence=o.presence_penalty, frequency=o.frequency_penalty,
            n_exempt=len(exempt), n_bias=len(bias),
            top_p=o.top_p, min_p=-math.log(o.min_p) if o.min_p else math.inf, temperature=o.temperature,
        )  # fmt: skip
        call, address = self._draw, record.ctypes.data
        results, at = record.view(np.uint8), ctypes.c_char.from_buffer
        logit, total = (ctypes.c_double.from_buffer(results, offset(SAMPLER, name)) for name in ("logit", "sum"))
        last_n, room, greedy = int(record["last_n"][0]), len(arrays["saved"]) - len(bias), k == 1

        def sample(logits: np.ndarray, ids: Sequence[int]) -> tuple[int, float]:
            nonlocal room
            if logits.shape != self._shape or logits.dtype != FLOAT32 or not logits.flags.c_contiguous:
                self._checked(logits)
            if not logits.flags.writeable:
                logits = logits.copy()
            if type(ids) is not array or ids.typecode != "i":
                ids = array("i", ids[-last_n:] if last_n else ())
            ids_at, n_ids = ids.buffer_info()
            if min(n_ids, last_n) > room:
                room = 2 * n_ids
                arrays["saved"] = np.empty(len(bias) + room, np.float32)
                record["saved"] = arrays["saved"].ctypes.data
            id = call(address, ctypes.addressof(at(logits)), ids_at, n_ids, 0.0 if greedy else uniform())
            if id < 0:
                raise _no_token(id)
            return id, logit.value - math.log(total.value) if logprobs else math.nan

        return sample

    def _checked(self, logits: np.ndarray) -> int:
        """The address: compiled code reads n_vocab float32 from there, whatever is there."""
        if logits.shape != (self._n_vocab,) or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise UsageError(f"logits {logits.dtype} {logits.shape}: expected contiguous float32 ({self._n_vocab},)")
        return logits.ctypes.data


def _no_token(reason: int) -> PocketlmError:
    if reason == sizes.UNKNOWN_ID:
        return UsageError("the text so far holds a token that is not in the vocabulary")
    return PocketlmError(NO_CHOICE if reason == sizes.NO_CHOICE else BROKEN)
