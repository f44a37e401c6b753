"""Figures of several rounds as one: median, quartiles, and how far the median of another run may be away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

NOTCH = 1.57  # half the notch of a box plot (McGill, Tukey, Larsen 1978): notches that do not overlap differ at about 95 %


def summarize(rounds: Sequence[float]) -> dict[str, Any]:
    """`uncertainty`: of the median, as a share of it: 1.57 interquartile ranges over the root of the number of rounds."""
    low, median, high = (float(x) for x in np.percentile(rounds, (25, 50, 75)))
    uncertainty = NOTCH * (high - low) / math.sqrt(len(rounds)) / median if median else 0.0
    return {"median": median, "low": low, "high": high, "uncertainty": uncertainty, "rounds": [float(x) for x in rounds]}


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile of the times of single tokens, in milliseconds."""
    p50, p95, p99 = (1e3 * float(x) for x in np.percentile(seconds, (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99}
