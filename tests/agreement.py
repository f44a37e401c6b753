"""How far apart two models' logits are, in the figures that the promises are made in. NumPy float64, nothing of pocketlm."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Agreement(NamedTuple):
    max_error: float
    kl: float  # mean over positions of sum p ln(p / q), p being the exact one
    same_first: float  # share of positions whose likeliest token is the same
    worst_cosine: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def compare(exact: np.ndarray, other: np.ndarray) -> Agreement:
    """Logits [n, n_vocab] of an exact forward and of another one."""
    p, q = log_softmax(exact), log_softmax(other)
    a, b = exact.astype(np.float64), other.astype(np.float64)
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    kl = float((np.exp(p) * (p - q)).sum(-1).mean())
    return Agreement(float(np.abs(a - b).max()), kl, float((a.argmax(-1) == b.argmax(-1)).mean()), float(cosine.min()))


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """Of ids[1:], given the logits of ids[:-1] or more."""
    n = len(ids) - 1
    return float(np.exp(-log_softmax(logits[:n])[np.arange(n), ids[1:]].mean()))
