"""How far a backend's logits on a fixed text are from the float32 reference's: no backend is fast by being wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from pocketlm.runtime.perplexity import perplexity

# Rounding activations to 8 bits per 32 keeps the cosine above 0.999 and 95 % of first choices. Below these a backend
# does not compute this model any more, whatever the reason.
LEAST_COSINE, MOST_PERPLEXITY_OFF = 0.99, 0.05


def compare(exact: np.ndarray, other: np.ndarray, ids: list[int]) -> dict[str, Any]:
    """Logits [n, n_vocab] of `ids` by the reference and by a backend."""
    if other.shape != exact.shape:
        return {"agrees": False, "reason": f"logits of {other.shape} where {exact.shape} are expected"}
    if not np.isfinite(other).all():
        return {"agrees": False, "reason": "logits that are NaN or infinite"}
    a, b = exact.astype(np.float64), other.astype(np.float64)
    norms = np.sqrt(np.einsum("nv,nv->n", a, a) * np.einsum("nv,nv->n", b, b))
    cosines = np.einsum("nv,nv->n", a, b) / np.maximum(norms, np.finfo(np.float64).tiny)
    exact_perplexity, own = (_perplexity(logits, ids) for logits in (exact, other))
    off = own / exact_perplexity - 1
    result = {
        "n_tokens": len(ids), "cosine": float(cosines.mean()), "worst_cosine": float(cosines.min()),
        "same_first": float((a.argmax(1) == b.argmax(1)).mean()), "perplexity": own, "perplexity_off": off,
    }  # fmt: skip
    reasons = [f"cosine {result['cosine']:.4f}"] if result["cosine"] < LEAST_COSINE else []
    reasons += [f"perplexity off by {off:+.1%}"] if abs(off) > MOST_PERPLEXITY_OFF else []
    return {**result, "agrees": not reasons, "reason": ", ".join(reasons)}


class _Replay:
    """Logits that are there already, as the executor that `perplexity` runs."""

    def __init__(self, logits: np.ndarray):
        self._logits, self.n_ctx, self._at = logits, len(logits), 0
        self.cache = SimpleNamespace(truncate=self._truncate)

    def _truncate(self, length: int) -> None:
        self._at = length

    def forward(self, ids: np.ndarray, rows: str) -> np.ndarray:
        self._at += len(ids)
        return self._logits[self._at - len(ids) : self._at]


def _perplexity(logits: np.ndarray, ids: list[int]) -> float:
    return perplexity(_Replay(logits), ids, None, len(ids)).perplexity
