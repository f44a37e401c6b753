"""Where a token stands: the tables that rotary positions and ALiBi need. Shared by every executor.

In: the operations that turn queries and keys, and a function that reads a tensor of factors. Out: NumPy tables. Knows nothing
about weights or caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pocketlm.runtime.hyper_parameters import Rope
from pocketlm.runtime.operations import Attend, Embed, Op, Rotate

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
    scaled = base / rope.factor
    if rope.scaling != "yarn":
        return scaled, rope.attention_factor

    def pair_turning(times: float) -> float:  # the pair that turns `times` full circles over the original context
        return rope.n_dims * math.log(rope.original_ctx / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(0.0, low), min(rope.n_dims - 1.0, high)
    ramp = 1.0 - np.clip((np.arange(half) - low) / max(0.001, high - low), 0.0, 1.0)
    return scaled * (1 - ramp) + base * ramp, rope.attention_factor * yarn_magnitude(rope.factor)


def llama3_factors(theta: float, n_dims: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """What Llama 3.1 divides its rotary frequencies by, float32 [n_dims/2]: low ones by `factor`, high ones by 1."""
    frequencies = theta ** (-np.arange(0, n_dims, 2, dtype=np.float64) / n_dims)
    turns = original * frequencies / (2 * math.pi)  # full circles over the original context
    share = np.clip((turns - low) / (high - low), 0.0, 1.0) if high > low else (turns > low).astype(np.float64)
    return (1.0 / ((1 - share) / factor + share)).astype(np.float32)


def yarn_magnitude(factor: float) -> float:
    """What YaRN multiplies rotated values by, where nothing else is said."""
    return 1.0 + 0.1 * math.log(max(factor, 1.0))


def rope_table(rope: Rope, n_ctx: int, factors: np.ndarray | None = None) -> np.ndarray:
    """cos and sin of every position's angles, float32 (n_ctx, 2, n_dims/2)."""
    frequencies, magnitude = rope_frequencies(rope, factors)
    table = np.empty((n_ctx, 2, rope.n_dims // 2), np.float32)
    for start in range(0, n_ctx, _POSITIONS):
        rows = table[start : start + _POSITIONS]
        angles = np.arange(start, start + len(rows), dtype=np.float64)[:, None] * frequencies
        rows[:, 0], rows[:, 1] = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    return table


Rotary = tuple[Rope, str | None]  # what a table is made of: operations that agree in it share the table


def rotary(op: Rotate, n_ctx: int) -> Rotary:
    """The rope and the tensor of factors that an operation uses in a context of this length."""
    is_long = op.long_factors is not None and n_ctx > op.rope.original_ctx
    return op.rope, op.long_factors if is_long else op.factors


def rope_tables(ops: Iterable[Op], read: Callable[[str], np.ndarray], n_ctx: int) -> dict[Rotary, np.ndarray]:
    """A `rope_table` for every distinct rotary; `read` gives a tensor in float32."""
    keys = {rotary(op, n_ctx): None for op in ops if isinstance(op, Rotate)}
    return {key: rope_table(key[0], n_ctx, read(key[1]) if key[1] else None) for key in keys}


def rope_tables_bytes(ops: Iterable[Op], n_ctx: int) -> int:
    """Bytes of the `rope_tables`."""
    return sum(4 * n_ctx * rope.n_dims for rope, _ in {rotary(op, n_ctx) for op in ops if isinstance(op, Rotate)})


@dataclass(frozen=True)
class Turn:
    """How the keys of a layer turn with each position."""

    frequencies: np.ndarray  # float64 (n_dims/2,)
    pairs: str


def key_turns(ops: Iterable[Op], read: Callable[[str], np.ndarray], n_ctx: int) -> dict[int, Turn] | None:
    """Layers of the cache whose keys are turned; None where positions are learned, and mixed into keys and values."""
    turns: dict[int, Turn] = {}
    turn = None
    for op in ops:
        if isinstance(op, Embed) and op.positions:
            return None
        if isinstance(op, Rotate):
            rope, factors = rotary(op, n_ctx)
            turn = Turn(rope_frequencies(rope, read(factors) if factors else None)[0], rope.pairs)
        if isinstance(op, Attend):
            if turn is not None:
                turns[op.layer] = turn
            turn = None
    return turns


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
