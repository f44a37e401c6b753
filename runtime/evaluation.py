"""How well a model predicts a text, and how alike the logits of two executors are.

In: an executor and a text's ids, or logits. Out: cross-entropy, perplexity, cosines. Knows no files and no tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError

ROWS = 128  # positions whose logits are held at once: 128 rows of a 50,000-word vocabulary are 25 MB

TEXT = (  # what executors are compared on by default
    "The lighthouse keeper had two habits that the village never understood. Every morning he swept the stairs from the top "
    "down, although nobody climbed them but himself, and every evening he wrote one line in a book with a blue cover.\n"
    "\"Wind from the west,\" he wrote, or \"Three ships, none of them ours.\" When he was asked what the book was for, he "
    "said that a day which has been written down is harder to lose.\n"
    "One winter the lamp failed. He lit a fire on the rocks, and kept it burning for eleven nights with driftwood, old rope "
    "and at last the stairs themselves, the lowest ones first. The next spring a captain came to thank him. \"How did you get "
    "down again?\" she asked. He thought about it, and then he wrote that down too.\n"
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    nats: float  # sum of -ln p(token | the tokens before it in its window)
    n_tokens: int  # tokens predicted: the first of every window is not, unless a begin-of-text token stands before it
    window: int
    unpredicted: range  # where in the text's ids those first ones are

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.n_tokens, 700.0))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of -ln p(target), in nats; logits float64 [n, n_vocab], targets int [n]."""
    top = logits.max(1)
    return float(np.sum(np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(targets)), targets]))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines between the rows of two float64 arrays [n, n_vocab]: float64 [n]; 0 where a row is all zeros."""
    norms = np.sqrt(np.einsum("nv,nv->n", a, a) * np.einsum("nv,nv->n", b, b))
    return np.einsum("nv,nv->n", a, b) / np.maximum(norms, np.finfo(np.float64).tiny)


def perplexity(executor: Any, ids: list[int], bos_id: int | None, window: int = 1024) -> Result:
    """Perplexity of `ids` in windows of at most `window` tokens that do not overlap, each from an empty cache.

    `bos_id`, where given, is put in front of every window. Raises PocketlmError for a text of fewer than two tokens.
    """
    window = min(window, executor.n_ctx)
    lead = [] if bos_id is None else [bos_id]
    step = window - len(lead)
    nats, n_tokens = 0.0, 0
    starts = range(0, len(ids), max(step, 1))
    for start in starts:
        block = np.array(lead + ids[start : start + step], np.int32)
        executor.cache.truncate(0)
        for at in range(0, len(block) - 1, ROWS):
            logits = executor.forward(block[at : min(at + ROWS, len(block) - 1)], rows="all").astype(np.float64)
            nats += cross_entropy(logits, block[at + 1 : at + 1 + len(logits)])
            n_tokens += len(logits)
    executor.cache.truncate(0)
    if not n_tokens:
        raise PocketlmError("the text is too short: perplexity needs at least two tokens")
    return Result(nats, n_tokens, window, range(0) if lead else starts)
