"""The stages of a token besides the weight formats: embedding, normalising and rounding, products, cache, attention.

In: the run's and an operation's record (records.py), a task number. Out: IR functions, one a stage; the run loop
(run_loop.py) hands out the tasks. Knows the mathematics of the plan's operations, not the formats.

A thread's own memory, from `scratch`: one token's activations (matrix.py); at `products_at` two areas of products; at
`queries_at` scaled queries; at `scores_at` attention scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager

from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.ir import F16, F32, I1, I8, I16, I32, I64, PTR, Function, Module, Type, Value
from pocketlm.runtime.native.matrix import ROW
from pocketlm.runtime.native.records import OPERATION, RUN, offset
from pocketlm.runtime.native.sizes import (
    AS_IT_IS,
    LANES,
    LAYER_NORM,
    MAX_CHUNK,
    PARTIALS,
    QUERIES,
    RECORD,
    RMS_NORM,
    SPAN,
    TILE,
    TOKENS,
)  # fmt: skip
from pocketlm.runtime.native.vector_math import ACTIVATIONS, exp, from_half, to_half

MAX_HALF = 65504.0  # the largest number of float16
STAGE = {"run": PTR, "op": PTR, "own": PTR, "task": I64, "first": I64, "n": I64}  # first, n: the tokens of the operation


class Records:
    """Reads fields of the two records inside a function: `r.run("n_head")`, `r.op("x")`."""

    def __init__(self, f: Function, run: Value, op: Value):
        self._f, self._run, self._op = f, run, op

    def run(self, name: str, type: Type = I64) -> Value:
        return self._f.field(self._run, offset(RUN, name), type)

    def op(self, name: str, type: Type = I64) -> Value:
        return self._f.field(self._op, offset(OPERATION, name), type)


def define(module: Module, level: str) -> None:
    """Define the stages: embed, prepare, matrix, store and attend, each `(run, op, own, task, first, n)`."""
    _define_activate(module)
    _define_round(module)
    for queries in range(1, QUERIES + 1):
        _define_queries(module, level, queries)
    for name, body in (("embed", _embed), ("prepare", _prepare), ("matrix", _matrix), ("store", _store), ("attend", _attend)):
        with module.function(name, STAGE) as f:
            run, op, own, task, first, n = f.args()
            body(f, level, Records(f, run, op), own, task, first, n)


def _vectors(f: Function, n: Value) -> AbstractContextManager[Value]:
    """Loop over n floats (filled up to a multiple of 16), giving byte offsets."""
    return f.range(0, ((n + 15) >> 4) << 6, 4 * LANES)


def _pointer(f: Function, r: Records, name: str, stride: str, token: Value) -> Value:
    return r.op(name, PTR) + token * r.op(stride)


# embedding


def _embed(f: Function, level: str, r: Records, own: Value, task: Value, first: Value, n: Value) -> None:
    token = first + task
    out = _pointer(f, r, "out", "out_stride", token)
    row = f.var(I64, f.cast("sext", f.load(I32, r.run("ids", PTR) + token * 4), I64))
    with f.when(r.op("by_position").equals(1)):
        row.set(r.run("position") + token)
    f.call_pointer(r.op("row", PTR), r.op("weight", PTR), r.op("n_groups"), r.op("n_blocks"), row.get(), own)
    with f.range(0, r.op("n")) as i:
        value = f.load(F32, own + i * 4)
        before = f.select(r.op("add").equals(1), f.load(F32, out + i * 4), 0.0)
        f.store(value + before, out + i * 4)


# normalising and rounding


def _define_round(module: Module) -> None:
    """round(x, n): the rounded forms of the n float32 activations at x, n a multiple of 32 (matrix.py has the layout)."""
    with module.function("round", {"x": PTR, "n": I64}) as f:
        x, n = f.args()
        with f.range(0, n, 32) as i:
            parts = [f.load(ROW, x + (i + 16 * h) * 4, 4) for h in (0, 1)]
            # compared as integers, where NaN is larger than every number
            bits = [f.bitcast(f.intrinsic("fabs", p), I32.vec(LANES)) for p in parts]
            largest = f.bitcast(f.reduce(f.maximum(*bits), "max"), F32)
            # the high byte of the largest must stay an int8 after rounding: 32639 = 127 * 256 + 127
            scale = largest * (1 / 32639)
            inverse = f.select(largest > 0.0, 32639.0 / largest, 0.0)
            record = x + n * 6 + (i >> 5) * RECORD
            f.store(scale, record + 64, 4)
            sums = []
            for h, part in enumerate(parts):
                rounded = f.intrinsic("rint", part * f.splat(inverse, LANES))
                # NaN and infinity have no integer: freeze makes it an arbitrary one, and the scale carries the NaN on
                whole = f.emit(I32.vec(LANES), f"freeze {I32.vec(LANES)} {f.cast('fptosi', rounded, I32)}")
                high = f.emit(whole.type, f"ashr {whole.type} {whole + 128}, {f.const(whole.type, 8)}")
                f.store(f.cast("trunc", whole - (high << 8), I8), record + 16 * h)
                f.store(f.cast("trunc", high, I8), record + (32 + 16 * h))
                f.store(f.cast("trunc", whole, I16), x + n * 4 + (i + 16 * h) * 2)
                sums.append(f.reduce(whole, "add"))
            for at, total in ((68, sums[0] + sums[1]), (72, sums[0]), (76, sums[1])):
                f.store(scale * f.cast("sitofp", total, F32), record + at, 4)


def _prepare(f: Function, level: str, r: Records, own: Value, task: Value, first: Value, n: Value) -> None:
    token = first + task
    to = f.select(n.equals(1), own, r.run("activations", PTR) + task * r.run("activation_stride"))
    x, width = _pointer(f, r, "x", "x_stride", token), r.op("n")
    source = r.op("source")
    with f.when(source.equals(AS_IT_IS)), _vectors(f, width) as at:
        f.store(f.load(ROW, x + at, 4), to + at, 4)
    with f.when(source.equals(RMS_NORM)):
        squares = f.var(ROW, 0.0)
        with _vectors(f, width) as at:
            v = f.load(ROW, x + at, 4)
            squares.set(f.fma(v, v, squares.get()))
        _scaled(f, r, x, to, f.const(ROW, 0.0), squares.get(), width)
    with f.when(source.equals(LAYER_NORM)):
        sums, squares = f.var(ROW, 0.0), f.var(ROW, 0.0)
        with _vectors(f, width) as at:
            sums.set(sums.get() + f.load(ROW, x + at, 4))
        mean = f.splat(f.reduce(sums.get(), "add") / f.cast("sitofp", width, F32), LANES)
        lanes = f.vector(I64.vec(LANES), range(LANES))
        with _vectors(f, width) as at:
            real = f.splat(at >> 2, LANES) + lanes < f.splat(width, LANES)  # what fills up the last vector does not count
            v = f.select(real, f.load(ROW, x + at, 4) - mean, 0.0)
            squares.set(f.fma(v, v, squares.get()))
        _scaled(f, r, x, to, mean, squares.get(), width)
    with f.when(source.equals(PARTIALS)):
        _join_partials(f, r, to, token, n)
    f.call(Type("void"), "round", to, ((width + 31) >> 5) << 5)


def _scaled(f: Function, r: Records, x: Value, to: Value, mean: Value, squares: Value, width: Value) -> None:
    """(x - mean) / sqrt(mean square + epsilon) * weight + bias."""
    square = f.reduce(squares, "add") / f.cast("sitofp", width, F32)
    scale = f.splat(1.0 / f.intrinsic("sqrt", square + r.op("epsilon", F32)), LANES)
    weight, bias = r.op("weight", PTR), r.op("bias", PTR)
    with _vectors(f, width) as at:
        v = (f.load(ROW, x + at, 4) - mean) * scale
        f.store(f.fma(v, f.load(ROW, weight + at, 4), f.load(ROW, bias + at, 4)), to + at, 4)


# products


def _define_activate(module: Module) -> None:
    with module.function("activate", {"kind": I64, "x": ROW}, returns=ROW) as f:
        kind, x = f.args()
        for number, name in enumerate(sizes.ACTIVATIONS, 1):
            with f.when(kind.equals(number)):
                f.ret(ACTIVATIONS[name](f, x), ROW)
        f.ret(x, ROW)


def _matrix(f: Function, level: str, r: Records, own: Value, task: Value, first: Value, n: Value) -> None:
    """A chunk of groups, for all tokens: products into the thread's own memory, then bias, activation, gate, residual."""
    chunk, n_rows, n_groups = r.op("chunk"), r.op("n"), r.op("n_groups")
    start = task * chunk
    stop = f.minimum(start + chunk, n_groups)
    x_stride = r.run("activation_stride")
    x = f.select(n.equals(1), own, r.run("activations", PTR))
    y, y_stride = own + r.run("products_at"), MAX_CHUNK * LANES * 4
    up = y + TILE * y_stride
    token, tile = f.var(I64, 0), f.var(I64)

    def product(kernels: tuple[str, str], w: Value, blocks: Value, to: Value) -> None:
        kernel = f.select(tile.get().equals(1), r.op(kernels[0], PTR), r.op(kernels[1], PTR))
        here = x + token.get() * x_stride
        f.call_pointer(kernel, w, n_groups, start, stop, blocks, here, x_stride, to, f.const(I64, y_stride))

    with f.loop_while(lambda: token.get() < n):
        tile.set(f.select(token.get() + TILE <= n, f.const(I64, TILE), 1))
        product(("product1", "productN"), r.op("weight", PTR), r.op("n_blocks"), y)
        gated = f.emit(I1, f"icmp ne ptr {r.op('up', PTR)}, null")
        with f.when(gated):
            product(("up_product1", "up_productN"), r.op("up", PTR), r.op("up_blocks"), up)
        with f.range(0, tile.get()) as t:
            out = _pointer(f, r, "out", "out_stride", first + token.get() + t)
            _finish(f, r, y + t * y_stride, up + t * y_stride, gated, out, start * LANES, f.minimum(stop * LANES, n_rows))
        token.set(token.get() + tile.get())


def _finish(f: Function, r: Records, y: Value, up: Value, gated: Value, out: Value, first: Value, last: Value) -> None:
    """Rows [first, last) of the products at y (and up), to out."""
    lanes = f.stack(F32, LANES)
    with f.range(first, last, LANES) as row:
        at, to = (row - first) * 4, out + row * 4
        v = f.var(ROW, f.load(ROW, y + at, 4) + f.load(ROW, r.op("bias", PTR) + row * 4, 4))
        with f.when(r.op("activation") > 0):
            v.set(f.call(ROW, "activate", r.op("activation"), v.get()))
        with f.when(gated):
            v.set(v.get() * (f.load(ROW, up + at, 4) + f.load(ROW, r.op("up_bias", PTR) + row * 4, 4)))
        with f.when(r.op("add").equals(1)):
            v.set(v.get() + f.load(ROW, to, 4))
        with f.when(row + LANES <= last):
            f.store(v.get(), to, 4)
        with f.when(row + LANES > last):  # the next rows may be another matrix's
            f.store(v.get(), lanes, 64)
            with f.range(0, last - row) as i:
                f.store(f.load(F32, lanes + i * 4), to + i * 4)


# attention


def _store(f: Function, level: str, r: Records, own: Value, task: Value, first: Value, n: Value) -> None:
    """One head of one token: rotate its query, or rotate its key and write key and value to the cache."""
    n_head, n_kv, dim = r.run("n_head"), r.run("n_kv_head"), r.run("head_dim")
    token, head = first + task // (n_head + n_kv), task % (n_head + n_kv)
    position = r.run("position") + token
    vector = _pointer(f, r, "x", "x_stride", token) + head * dim * 4
    half = r.run("rope_half")
    table = r.run("rope", PTR) + position * half * 8
    adjacent = r.run("rope_interleaved")
    with f.range(0, half) as i:
        a = vector + f.select(adjacent.equals(1), i * 2, i) * 4
        b = vector + f.select(adjacent.equals(1), i * 2 + 1, i + half) * 4
        cos, sin = f.load(F32, table + i * 4), f.load(F32, table + (half + i) * 4)
        x, y = f.load(F32, a), f.load(F32, b)
        f.store(x * cos - y * sin, a)
        f.store(x * sin + y * cos, b)
    with f.when(head >= n_head):
        kv, padded = head - n_head, r.run("padded_dim")
        keys = r.op("keys", PTR) + kv * r.run("head_stride") + ((position >> 4) * padded * LANES + (position & 15)) * 2
        values = r.op("values", PTR) + kv * r.run("head_stride") + position * padded * 2
        value = vector + n_kv * dim * 4
        most, least = f.const(F32, MAX_HALF), f.const(F32, -MAX_HALF)

        def limited(x: Value) -> Value:  # an infinite key would make the whole answer NaN; a NaN stays one
            return to_half(f, level, f.maximum(least, f.minimum(most, x)))

        with f.range(0, dim) as d:
            f.store(limited(f.load(F32, vector + d * 4)), keys + d * (2 * LANES))
            f.store(limited(f.load(F32, value + d * 4)), values + d * 2)


def n_spans(f: Function, r: Records, n: Value) -> Value:
    """Tasks that share a query's positions: several while decoding a long context, one in a prompt."""
    return f.select(n.equals(1), r.run("position") // SPAN + 1, f.const(I64, 1))


def _partial(r: Records, token: Value, head: Value, spans: Value, span: Value | int) -> Value:
    """Where attention's result of one span stands: padded_dim sums of values, the largest score, the sum of weights."""
    return r.run("partials", PTR) + ((token * r.run("n_head") + head) * spans + span) * ((r.run("padded_dim") + LANES) * 4)


def _attend(f: Function, level: str, r: Records, own: Value, task: Value, first: Value, n: Value) -> None:
    """The queries of one kv head, for a block of tokens, over a span of positions; four at a time."""
    spans, n_kv = n_spans(f, r, n), r.run("n_kv_head")
    span, rest = task % spans, task // spans
    kv, block = rest % n_kv, rest // n_kv
    group = r.run("n_head") // n_kv
    start = block * TOKENS
    rows = f.minimum(n - start, f.const(I64, TOKENS)) * group
    with f.range(0, rows, QUERIES) as row:
        for queries in range(1, QUERIES + 1):
            here = rows - row >= QUERIES if queries == QUERIES else (rows - row).equals(queries)
            with f.when(here):
                arguments = (f.args()[0], f.args()[1], own, start, row, kv, span, spans)
                f.call(Type("void"), f"queries{queries}", *arguments)


def _define_queries(module: Module, level: str, queries: int) -> None:
    arguments = {"run": PTR, "op": PTR, "own": PTR, "start": I64, "row": I64, "kv": I64, "span": I64, "spans": I64}
    with module.function(f"queries{queries}", arguments) as f:
        run, op, own, start, row, kv, span, spans = f.args()
        r = Records(f, run, op)
        group, padded = r.run("n_head") // r.run("n_kv_head"), r.run("padded_dim")
        heads = [kv * group + (row + i) % group for i in range(queries)]
        tokens = [start + (row + i) // group for i in range(queries)]
        positions = [r.run("position") + token for token in tokens]
        q = [own + r.run("queries_at") + padded * (4 * i) for i in range(queries)]
        scores = [own + r.run("scores_at") + r.run("score_stride") * i for i in range(queries)]
        for i in range(queries):
            _scale_query(f, r, tokens[i], heads[i], q[i])
        first = span * SPAN
        last = f.select(spans > 1, f.minimum(first + SPAN, positions[-1] + 1), positions[-1] + 1)
        largest = _scores(f, level, r, q, scores, heads, positions, kv, first, last)
        totals = _weights(f, scores, largest, last - first)
        out = [_partial(r, tokens[i], heads[i], spans, span) for i in range(queries)]
        _mix(f, level, r, scores, out, kv, first, last)
        for i in range(queries):
            f.store(largest[i], out[i] + padded * 4, 4)
            f.store(totals[i], out[i] + padded * 4 + 4, 4)


def _scale_query(f: Function, r: Records, token: Value, head: Value, to: Value) -> None:
    dim, padded = r.run("head_dim"), r.run("padded_dim")
    x = _pointer(f, r, "x", "x_stride", token) + head * dim * 4
    with f.range(0, dim) as d:
        f.store(f.load(F32, x + d * 4) * r.run("query_scale", F32), to + d * 4)
    with f.range(dim, padded) as d:
        f.store(f.const(F32, 0.0), to + d * 4)


def _scores(
    f: Function, level: str, r: Records, q: Sequence[Value], scores: Sequence[Value], heads: Sequence[Value],
    positions: Sequence[Value], kv: Value, first: Value, last: Value,
) -> list[Value]:  # fmt: skip
    """q · k (+ ALiBi) for 16 positions at a time, -inf for the future; the largest score of every query."""
    padded = r.run("padded_dim")
    keys = r.op("keys", PTR) + kv * r.run("head_stride") + first * padded * 2
    chains = max(1, 4 // len(q))
    slopes = []
    for head in heads:
        slope = f.var(F32, 0.0)
        with f.when(f.emit(I1, f"icmp ne ptr {r.run('slopes', PTR)}, null")):
            slope.set(f.load(F32, r.run("slopes", PTR) + head * 4))
        slopes.append(f.splat(slope.get(), LANES))
    largest = [f.var(ROW, -math.inf) for _ in q]
    lanes = f.vector(I32.vec(LANES), range(LANES))
    with f.range(0, last - first, LANES) as p:
        sums = [[f.var(ROW, 0.0) for _ in range(chains)] for _ in q]
        with f.range(0, padded, 4) as d:
            for i in range(4):
                key = from_half(f, level, f.load(F16.vec(LANES), keys + (p * padded + (d + i) * LANES) * 2, 32))
                for query, own_sums in zip(q, sums, strict=True):
                    total = own_sums[i % chains]
                    total.set(f.fma(key, f.splat(f.load(F32, query + (d + i) * 4, 4), LANES), total.get()))
        here = f.splat(f.cast("trunc", first + p, I32), LANES) + lanes
        for i, own_sums in enumerate(sums):
            score = own_sums[0].get()
            for other in own_sums[1:]:
                score = score + other.get()
            ahead = here - f.splat(f.cast("trunc", positions[i], I32), LANES)
            score = f.fma(slopes[i], f.cast("sitofp", ahead, F32), score)
            score = f.select(ahead > 0, -math.inf, score)
            f.store(score, scores[i] + p * 4, 4)
            largest[i].set(f.maximum(largest[i].get(), score))
    return [f.reduce(v.get(), "max") for v in largest]


def _weights(f: Function, scores: Sequence[Value], largest: Sequence[Value], count: Value) -> list[Value]:
    """exp(score - largest) in place; the sum of every query's."""
    totals = []
    for score, top in zip(scores, largest, strict=True):
        total, high = f.var(ROW, 0.0), f.splat(top, LANES)
        with _vectors(f, count) as at:
            weight = exp(f, f.load(ROW, score + at, 4) - high)
            f.store(weight, score + at, 4)
            total.set(total.get() + weight)
        totals.append(f.reduce(total.get(), "add"))
    return totals


def _mix(
    f: Function, level: str, r: Records, scores: Sequence[Value], out: Sequence[Value], kv: Value, first: Value, last: Value
) -> None:
    """Sums of weight times value, 32 columns of the head at a time where there are as many."""
    padded = r.run("padded_dim")
    values = r.op("values", PTR) + kv * r.run("head_stride") + first * padded * 2

    def columns(start: Value, vectors: int) -> None:
        sums = [[f.var(ROW, 0.0) for _ in range(vectors)] for _ in out]
        with f.range(0, last - first) as p:
            row = [
                from_half(f, level, f.load(F16.vec(LANES), values + (p * padded + start + LANES * k) * 2, 32))
                for k in range(vectors)
            ]
            for score, own_sums in zip(scores, sums, strict=True):
                weight = f.splat(f.load(F32, score + p * 4, 4), LANES)
                for value, total in zip(row, own_sums, strict=True):
                    total.set(f.fma(value, weight, total.get()))
        for to, own_sums in zip(out, sums, strict=True):
            for k, total in enumerate(own_sums):
                f.store(total.get(), to + (start + LANES * k) * 4, 4)

    pairs = padded & -32
    with f.range(0, pairs, 32) as start:
        columns(start, 2)
    with f.range(pairs, padded, 16) as start:
        columns(start, 1)


def _join_partials(f: Function, r: Records, to: Value, token: Value, n: Value) -> None:
    """Attention's output from its spans: each weighted with exp(its largest score - the largest of all)."""
    n_head, dim, padded, spans = r.run("n_head"), r.run("head_dim"), r.run("padded_dim"), n_spans(f, r, n)
    with f.range(0, n_head) as head:
        largest, total = f.var(F32, -math.inf), f.var(F32, 0.0)
        with f.range(0, spans) as s:
            largest.set(f.maximum(largest.get(), f.load(F32, _partial(r, token, head, spans, s) + padded * 4)))
        with f.range(0, spans) as s:
            partial = _partial(r, token, head, spans, s)
            factor = exp(f, f.load(F32, partial + padded * 4) - largest.get())
            f.store(factor, partial + (padded * 4 + 8), 4)
            total.set(f.fma(factor, f.load(F32, partial + (padded * 4 + 4)), total.get()))
        scale = f.splat(1.0 / total.get(), LANES)
        with _vectors(f, dim) as at:  # what goes beyond the head is written over by the next one
            value = f.var(ROW, 0.0)
            with f.range(0, spans) as s:
                partial = _partial(r, token, head, spans, s)
                factor = f.splat(f.load(F32, partial + (padded * 4 + 8)), LANES)
                value.set(f.fma(factor, f.load(ROW, partial + at, 4), value.get()))
            f.store(value.get() * scale, to + head * dim * 4 + at, 4)
    width = n_head * dim
    with f.range(width, ((width + 31) >> 5) << 5) as i:
        f.store(f.const(F32, 0.0), to + i * 4)
