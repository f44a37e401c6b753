"""How far a backend's logits on a fixed text are from the float32 reference's: no backend is fast by being wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError
from pocketlm.runtime.evaluation import Result, cosines, cross_entropy

# Rounding activations to 8 bits per 32 keeps the cosine above 0.999 and 95 % of first choices. Below these a backend
# does not compute this model any more, whatever the reason.
LEAST_COSINE, MOST_PERPLEXITY_OFF = 0.99, 0.05


def compare(exact: np.ndarray, other: np.ndarray, ids: list[int]) -> dict[str, Any]:
    """Logits [n, n_vocab] of `ids` by the reference and by a backend. Raises PocketlmError for fewer than two ids."""
    if len(ids) < 2:
        raise PocketlmError("the text is too short: perplexity needs at least two tokens")
    if other.shape != exact.shape:
        return {"agrees": False, "reason": f"logits of {other.shape} where {exact.shape} are expected"}
    if not np.isfinite(other).all():
        return {"agrees": False, "reason": "logits that are NaN or infinite"}
    a, b = exact.astype(np.float64), other.astype(np.float64)
    found = cosines(a, b)
    targets = np.array(ids[1:])
    results = (Result(cross_entropy(x[:-1], targets), len(targets), len(ids), range(1)) for x in (a, b))
    exact_perplexity, own = (result.perplexity for result in results)
    off = own / exact_perplexity - 1
    result = {
        "n_tokens": len(ids), "cosine": float(found.mean()), "worst_cosine": float(found.min()),
        "same_first": float((a.argmax(1) == b.argmax(1)).mean()), "perplexity": own, "perplexity_off": off,
    }  # fmt: skip
    reasons = [f"cosine {result['cosine']:.4f}"] if result["cosine"] < LEAST_COSINE else []
    reasons += [f"perplexity off by {off:+.1%}"] if abs(off) > MOST_PERPLEXITY_OFF else []
    return {**result, "agrees": not reasons, "reason": ", ".join(reasons)}
