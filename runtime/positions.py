"""Where a token stands: the tables that rotary positions and ALiBi need. Shared by every executor.

In: a `Hyper`'s position options. Out: NumPy tables. Knows nothing about weights or caches.
"""

from __future__ import annotations

import math

import numpy as np

from pocketlm.runtime.hyper import Rope

_POSITIONS = 4096  # computed at once, in float64: the table itself is all that a long context costs


def rope_frequencies(rope: Rope, factors: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Angles a position turns every pair, float64 (n_dims/2,), and the factor on the rotated values.

    `factors` (n_dims/2,) divide the frequencies one by one (Llama 3's long-context tensor `rope_freqs.weight`).
    Linear scaling divides all by the factor; YaRN (arXiv:2309.00071, section 3.2) only the slow ones, with a ramp.
    """
    half = rope.n_dims // 2
    base = rope.theta ** (-np.arange(half, dtype=np.float64) / half)
    if factors is not None:
        base = base / factors.astype(np.float64)
    if rope.scaling == "none":
        return base, rope.attention_factor
    scaled = base / rope.factor
    if rope.scaling == "linear":
        return scaled, rope.attention_factor

    def pair_turning(times: float) -> float:  # the pair that turns `times` full circles over the original context
        return rope.n_dims * math.log(rope.original_ctx / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(0.0, math.floor(pair_turning(rope.beta_fast)))
    high = min(rope.n_dims - 1.0, math.ceil(pair_turning(rope.beta_slow)))
    ramp = 1.0 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0.0, 1.0)
    keep = ramp * rope.extrapolation
    return scaled * (1 - keep) + base * keep, rope.attention_factor * (1.0 + 0.1 * math.log(rope.factor))


def rope_table(rope: Rope, n_ctx: int, factors: np.ndarray | None = None) -> np.ndarray:
    """cos and sin of every position's angles, float32 (n_ctx, 2, n_dims/2)."""
    frequencies, magnitude = rope_frequencies(rope, factors)
    table = np.empty((n_ctx, 2, rope.n_dims // 2), np.float32)
    for start in range(0, n_ctx, _POSITIONS):
        rows = table[start : start + _POSITIONS]
        angles = np.arange(start, start + len(rows), dtype=np.float64)[:, None] * frequencies
        rows[:, 0], rows[:, 1] = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    return table


def rope_table_bytes(rope: Rope | None, n_ctx: int) -> int:
    """Bytes of a `rope_table`; 0 for a model without one."""
    return 4 * n_ctx * rope.n_dims if rope else 0


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, pairs: str) -> None:
    """Rotate the first 2·half values of every head, in place. x [..., head_dim]; cos, sin broadcast to [..., half]."""
    half = cos.shape[-1]
    if pairs == "interleaved":
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
    rotated = a * cos - b * sin
    b[...] = a * sin + b * cos
    a[...] = rotated


def alibi_slopes(n_head: int, max_bias: float) -> np.ndarray:
    """Slope of every head's linear penalty on distance, float32 (n_head,) (ALiBi, arXiv:2108.12409).

    Head counts that are not a power of two take the even powers of the next one for the rest, as the paper's code does.
    """
    power = 1 << (n_head.bit_length() - 1)
    first = 2.0 ** (-max_bias * np.arange(1, power + 1) / power)
    rest = 2.0 ** (-max_bias * np.arange(1, 2 * (n_head - power), 2) / (2 * power))
    return np.concatenate([first, rest]).astype(np.float32)
