"""The softmax of attention, as IR: from the scores of some queries in a span to integer weights for its values.

In: scores, and the QUERY record of each query. Out: int16 weights in place of the scores, in the record a float32 factor for
each block of POSITIONS weights, in the query's result the largest score and the sum of the weights. Knows of values the scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pocketlm.runtime.native.cache_numbers import MAX_WEIGHT, Words, rounded
from pocketlm.runtime.native.ir import F32, I16, I32, I64, PTR, Function, Module, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.record_reader import Records, vectors
from pocketlm.runtime.native.records import QUERY, offset
from pocketlm.runtime.native.sizes import LANES, POSITIONS, SPAN
from pocketlm.runtime.native.vector_math import exp_of_negative

BLOCKS = SPAN // POSITIONS
POSITION, OLDEST, RESULT, SLOPE, SOFTCAP, SCALE, _, FACTORS = (offset(QUERY, name) for name in QUERY.names or ())


def part(f: Function, known: Value, queries: Value | int, first: Value) -> tuple[Value, Value]:
    """Which positions of the span that begins at `first` any of these queries sees: (how many to skip, how many from the span's
    beginning to the last). `known`: the first query's record; that one sees the oldest positions, the last one the newest. What
    a query between them does not see has weight 0.
    """
    last = f.load(I64, known + (queries - 1) * QUERY.itemsize + POSITION, 8)
    skipped = f.maximum(f.load(I64, known + OLDEST, 8) - first, 0) & -POSITIONS
    return skipped, f.minimum(last + 1 - first, SPAN)


def define(module: Module, level: str, numbers: Words) -> None:
    """softmax(run, own, row, queries, first, values) makes weights of the scores of queries from `row` on.

    Scores are capped and get ALiBi's bias, those of the future and from before the window are -inf. Weights are
    e^(score - largest), times the scale of their value, rounded to integers. The largest score and the sum of the weights go to
    each query's result of the span. The largest scores of all queries are found first, so that none is waited for.
    """
    with module.function("softmax", {"run": PTR, "own": PTR, "row": I64, "queries": I64, "first": I64, "values": PTR}) as f:
        run, own, row, queries, first, values = f.args()
        r = Records(f, run, run)
        padded, lanes = r.run("padded_dim"), f.vector(I32.vec(LANES), range(LANES))
        skipped, count = part(f, own + r.run("rows_at") + row * QUERY.itemsize, queries, first)
        with f.when(count <= 0):
            f.ret()

        def places(i: Value) -> tuple[Value, Value, Value]:
            """What is known of a query, its scores, its largest score and the sum of its weights."""
            mixed = own + r.run("mixed_at") + i * ((padded + LANES) * 4)
            return own + r.run("rows_at") + i * QUERY.itemsize, own + r.run("scores_at") + i * (SPAN * 4), mixed + padded * 4

        with f.range(row, row + queries) as i:
            known, scores, result = places(i)
            ahead = f.cast("trunc", first - f.load(I64, known + POSITION, 8), I32)
            slope, largest = f.splat(f.load(F32, known + SLOPE, 4), LANES), [f.var(ROW, -math.inf) for _ in range(2)]
            end = (count + (LANES - 1)) & -LANES
            with f.when((end & (POSITIONS - 1)).equals(LANES)):  # what lies behind the last position has no weight
                f.store(f.const(ROW, -math.inf), scores + end * 4, 4)
            cap = f.load(F32, known + SOFTCAP, 4)
            with f.when(cap > 0.0), vectors(f, count) as at:
                f.store(f.call(ROW, "softcap", f.load(ROW, scores + at, 4), cap), scores + at, 4)
            with f.range(0, f.minimum(f.load(I64, known + OLDEST, 8) - first, count)) as before:
                f.store(f.const(F32, -math.inf), scores + before * 4)
            # a span that lies behind the query as a whole, without ALiBi: nothing to change
            is_behind = f.load(F32, known + SLOPE, 4).equals(0.0) & (first + (SPAN - 1) <= f.load(I64, known + POSITION, 8))
            with f.when(is_behind), f.range(0, 4 * SPAN, 8 * LANES) as at:
                for n, found in enumerate(largest):
                    found.set(f.maximum(found.get(), f.load(ROW, scores + (at + 4 * LANES * n), 4)))
            with f.when(~is_behind), vectors(f, count) as at:
                distance = f.splat(ahead + f.cast("trunc", at >> 2, I32), LANES) + lanes
                score = f.fma(slope, f.cast("sitofp", distance, F32), f.load(ROW, scores + at, 4))
                score = f.select(distance > 0, -math.inf, score)
                f.store(score, scores + at, 4)
                largest[0].set(f.maximum(largest[0].get(), score))
            f.store(f.reduce(f.maximum(*(each.get() for each in largest)), "max"), result, 4)
        tops, inverses = f.stack(I32, LANES * BLOCKS), f.stack(F32, BLOCKS)
        with f.range(row, row + queries) as i:
            known, scores, result = places(i)
            top, total = f.splat(f.load(F32, result, 4), LANES), f.var(ROW, 0.0)
            with f.range(skipped, count, POSITIONS) as p:
                bits = []
                for start in range(0, POSITIONS, LANES):
                    at, here = scores + (p + start) * 4, values + (p + start) * numbers.row_bytes(padded)
                    weight = exp_of_negative(f, f.load(ROW, at, 4) - top, level)
                    total.set(total.get() + weight)
                    # the scale of a position that nobody sees may be no number
                    weight = f.select(weight.equals(0.0), 0.0, weight * f.load(ROW, numbers.scales_at(here, padded), 4))
                    f.store(weight, at, 4)
                    bits.append(f.bitcast(weight, I32.vec(LANES)))
                f.store(f.intrinsic("umax", *bits), tops + p * (4 * LANES // POSITIONS), 64)
            f.store(f.reduce(total.get(), "add"), result + 4, 4)
            # each block's largest weight, compared as integers, so that NaN is the largest; anything in blocks that nobody sees
            bits = [f.load(I32.vec(LANES), tops + 64 * n, 64) for n in range(BLOCKS)]
            largest = f.bitcast(_largest(f, bits), F32.vec(BLOCKS))
            f.store(largest * (1 / MAX_WEIGHT), known + FACTORS, 4)
            f.store(f.select(largest > 1e-30, MAX_WEIGHT / largest, 0.0), inverses, 4)
            with f.range(skipped, count, POSITIONS) as p:  # in place of the scores of half as many positions, which are rounded
                inverse = f.load(F32, inverses + p // (POSITIONS // 4), 4)
                found = [f.load(ROW, scores + (p + start) * 4, 4) for start in range(0, POSITIONS, LANES)]
                for n, weight in enumerate(found):
                    f.store(rounded(f, weight, inverse, I16), scores + (p * 2 + n * (2 * LANES)), 4)


def _largest(f: Function, vectors: Sequence[Value]) -> Value:
    """The largest lane of each of LANES / 2 vectors <16 x i32>, without its sign: <8 x i32>."""
    lanes = LANES
    while len(vectors) > 1:  # two by two: half as many numbers of each, side by side
        lanes //= 2
        low = [at + lane for at in range(0, 2 * LANES, 2 * lanes) for lane in range(lanes)]
        both = [f.join(list(pair)) for pair in zip(vectors[::2], vectors[1::2], strict=True)]
        vectors = [f.intrinsic("umax", f.shuffle(x, low), f.shuffle(x, [lane + lanes for lane in low])) for x in both]
    low = list(range(0, LANES, 2))
    return f.intrinsic("umax", *(f.shuffle(vectors[0], [lane + at for lane in low]) for at in (0, 1))) & 0x7FFFFFFF
