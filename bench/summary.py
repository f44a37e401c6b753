"""Figures of several rounds as one: median, quartiles, and how far the median of another run may be away."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

FEWEST = 3  # rounds that say anything about the spread
NOTCH = 1.57  # half the notch of a box plot (McGill, Tukey, Larsen 1978): notches that do not overlap differ at about 95 %


def summarize(rounds: Sequence[float]) -> dict[str, Any]:
    """`uncertainty`: the median's, as a share of it: 1.57 interquartile ranges over the root of the number of rounds.

    None for fewer than three rounds: the range of two says nothing about a third.
    """
    low, median, high = (float(x) for x in np.percentile(rounds, (25, 50, 75)))
    uncertainty = NOTCH * (high - low) / math.sqrt(len(rounds)) / median if median else 0.0
    return {
        "median": median, "low": low, "high": high, "uncertainty": uncertainty if len(rounds) >= FEWEST else None,
        "rounds": [float(x) for x in rounds],
    }  # fmt: skip


def spread(rounds: Sequence[float]) -> dict[str, float | None]:
    """What llama-bench shows: mean and standard deviation (of a sample: n - 1). None for fewer than three rounds."""
    return {"mean": statistics.fmean(rounds), "deviation": statistics.stdev(rounds) if len(rounds) >= FEWEST else None}


def shown(figures: dict[str, Any]) -> tuple[float, float | None]:
    """The figure of a table or a bar, and its ± in the same unit: the mean where there is one, otherwise the median."""
    if "mean" in figures:
        return figures["mean"], figures["deviation"]
    uncertainty = figures["uncertainty"]
    return figures["median"], None if uncertainty is None else uncertainty * figures["median"]


def latency(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile of the times of single tokens, in milliseconds."""
    p50, p95, p99 = (1e3 * float(x) for x in np.percentile(seconds, (50, 95, 99)))
    return {"p50": p50, "p95": p95, "p99": p99}
