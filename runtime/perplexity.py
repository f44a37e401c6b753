"""How well a model predicts a text: perplexity over windows of the context.

In: an executor and the text's ids. Out: the sum of negative log-likelihoods. Knows no text and no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError

ROWS = 128  # positions whose logits are held at once: 128 rows of a 50,000-word vocabulary are 25 MB


@dataclass(frozen=True)
class Result:
    nats: float  # sum of -ln p(token | the tokens before it in its window)
    n_tokens: int  # tokens predicted: the first of every window is not, unless a begin-of-text token stands before it
    window: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nats / self.n_tokens, 700.0))


def surprise(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum of -ln p(target), in nats; logits float64 [n, n_vocab], targets int [n]."""
    top = logits.max(1)
    return float(np.sum(np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[np.arange(len(targets)), targets]))


def perplexity(executor: Any, ids: list[int], bos_id: int | None, window: int = 1024) -> Result:
    """Perplexity of `ids` in windows of at most `window` tokens that do not overlap, each from an empty cache.

    `bos_id`, where given, is put in front of every window. Raises PocketlmError for a text of fewer than two tokens.
    """
    window = min(window, executor.n_ctx)
    lead = [] if bos_id is None else [bos_id]
    step = window - len(lead)
    nats, n_tokens = 0.0, 0
    for start in range(0, len(ids), max(step, 1)):
        block = np.array(lead + ids[start : start + step], np.int32)
        executor.cache.truncate(0)
        for at in range(0, len(block) - 1, ROWS):
            logits = executor.forward(block[at : min(at + ROWS, len(block) - 1)], rows="all").astype(np.float64)
            nats += surprise(logits, block[at + 1 : at + 1 + len(logits)])
            n_tokens += len(logits)
    executor.cache.truncate(0)
    if not n_tokens:
        raise PocketlmError("the text is too short: perplexity needs at least two tokens")
    return Result(nats, n_tokens, window)
