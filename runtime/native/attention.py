"""Attention: the queries of one key-value head over spans of positions, and the spans joined in order.

In: the run's and an operation's record, an ENTRY (records.py): neighbouring tokens of one text and the spans that they attend
to. Out: results in the tokens' slots: sums of values, the largest score, the sum of weights. Knows the cache, no weights.

All products are of integers: queries are rounded to int16 as keys are, and so are the weights, with one scale for POSITIONS
neighbouring positions. Float16 numbers, multiplied as float32, would take twice as long and be less exact: an int16 with a
scale has up to 15 bits, a float16 has 11.

A token's result has the same bits however many queries share a task and whichever thread computes a span: within a span of SPAN
positions, scores, weights and sums are made in one order, and spans are joined in order, by the task or by `join_partials`.
Positions that a query may not see have weight 0, which changes no sum.

A thread's own memory, for each query of a task: at `rows_at` a QUERY record; at `queries_at` its numbers, int16 [columns / 2,
queries, 2]; at `scores_at` its scores in a span, float32 [SPAN], later its weights, int16; at `mixed_at` its result of a span.
Online softmax: Milakov and Gimelshein, arXiv:1805.02867.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from pocketlm.runtime.native import attention_weights
from pocketlm.runtime.native.attention_weights import FACTORS, OLDEST, POSITION, RESULT, SCALE, part
from pocketlm.runtime.native.cache_numbers import MAX_QUERY, Words, rounded, size_of
from pocketlm.runtime.native.dot import pair_dot
from pocketlm.runtime.native.ir import F32, I16, I32, I64, PTR, VOID, Function, Module, Type, Value
from pocketlm.runtime.native.matrix import FAR_AHEAD, ROW, fetch_far
from pocketlm.runtime.native.record_reader import Records, each_number, fill
from pocketlm.runtime.native.records import QUERY
from pocketlm.runtime.native.sizes import LANES, POSITIONS, QUERIES, SPAN, TWO_PARTS
from pocketlm.runtime.native.vector_math import AVX512, exp


def cache_of(r: Records, numbers: Words, token: Callable[..., Value], kv: Value, row: Value) -> tuple[Value, Value]:
    """A head's keys and values in the operation's layer of a token's cache: where those of a row's span begin."""
    layer, n_bytes = r.layer(token), numbers.span_bytes(r.run("padded_dim"))
    keys = token("cache", PTR) + (layer("offset") + kv * (n_bytes * 2) + row % layer("rows") // SPAN * layer("stride"))
    return keys, keys + n_bytes


# (queries, vectors of 16 positions) whose scores fit into a level's registers, the most queries first, one query last. The sums
# of values of as many queries fit, too
_NARROW = ((6, 1), (3, 2), (2, 2), (1, 4))
TILES = {
    **dict.fromkeys(AVX512, ((6, 4), (4, 4), (3, 1), (2, 1), (1, 1))),
    **dict.fromkeys(("avx-vnni", "avx2", "dotprod", "neon"), _NARROW),
    "sse4": ((3, 1), (2, 1), (1, 2)),
}
Ahead = Callable[[Value], Value]
PART = 64  # positions whose keys many queries meet together
FEW = 3  # queries up to which memory is the limit: keys and values are fetched ahead


def define(module: Module, level: str, numbers: Words) -> None:
    """Define `span`, which `attend` calls, and the functions that it calls: `scores6`, `mix6` … for 6 queries, and so on."""
    _define_merge(module)
    attention_weights.define(module, level, numbers)
    for queries, n_vectors in TILES[level]:
        _define_scores(module, level, numbers, queries, n_vectors)
        _define_mix(module, level, numbers, queries)
    _define_span(module, level)


def attend(f: Function, level: str, r: Records, own: Value, task: Value, n: Value, *, numbers: Words) -> None:
    """The stage. A task is one key-value head of an ENTRY: its queries meet the entry's spans, QUERIES of them at a time."""
    (entry, kv), group = _place(f, r, task), r.run("n_head") // r.run("n_kv_head")
    all_rows = entry("n_tokens") * group
    token = r.token(entry("token"))
    with f.range(0, all_rows, QUERIES) as start:
        rows = f.minimum(all_rows - start, QUERIES)
        with f.range(0, rows) as row:
            number = start + row
            _begin(f, r, own, row, entry("token") + number // group, kv * group + number % group, entry("apart"))
        known = own + r.run("rows_at")
        last = f.load(I64, known + (rows - 1) * QUERY.itemsize + POSITION, 8)
        first, step, oldest = entry("first"), f.maximum(entry("apart"), 1), f.load(I64, known + OLDEST, 8) // SPAN
        skipped = f.maximum(oldest - first + step - 1, 0) // step
        with f.range(first + skipped * step, last // SPAN + 1, step) as span:
            keys, values = cache_of(r, numbers, token, kv, span * SPAN)
            f.call(VOID, "span", f.args()[0], own, keys, values, rows, span, f.minimum(entry("apart"), 1))


def _place(f: Function, r: Records, task: Value) -> tuple[Callable[..., Value], Value]:
    """The entry and the key-value head of a task.

    In a short pass all heads of an entry come one after the other, because the heads of a span are neighbours in memory. In a
    long one the tokens are halved, as for MATRIX, and within a half all entries of a head follow each other: the keys and
    values that they share stay in the second-level cache.
    """
    n_entries, n_kv = r.run("n_entries"), r.run("n_kv_head")
    half = (n_entries + 1) >> 1
    is_later, is_long = task >= half * n_kv, r.run("n_tokens") >= TWO_PARTS
    first = f.select(is_later, half, 0)
    here, rest = f.select(is_later, f.maximum(n_entries - half, 1), half), task - first * n_kv
    return r.entry(f.select(is_long, first + rest % here, task // n_kv)), f.select(is_long, rest // here, task % n_kv)


def _begin(f: Function, r: Records, own: Value, row: Value, number: Value, head: Value, apart: Value) -> None:
    """Round a query to integers, fill its QUERY record, and begin with a result of no positions."""
    dim, padded, token = r.run("head_dim"), r.run("padded_dim"), r.token(number)
    x, to = r.op("x", PTR) + number * r.op("x_stride") + head * dim * 4, own + r.run("queries_at") + row * 4
    length, largest = size_of(f, x, dim, limit=lambda f, x: x)
    scale = f.maximum(length / f.const(F32, MAX_QUERY), largest / f.const(F32, 32767.0)) + (length - length)
    inverse, whole = f.select(scale > 1e-30, 1.0 / scale, 0.0), dim & -LANES
    with f.range(0, whole, LANES) as d:
        pairs = f.bitcast(rounded(f, f.load(ROW, x + d * 4, 4), inverse, I16), I32.vec(LANES // 2))
        for pair in range(LANES // 2):
            f.store(f.extract(pairs, pair), to + ((d >> 1) + pair) * (4 * QUERIES), 4)
    with f.range(whole, padded) as d:
        f.store(f.const(I16, 0), to + (d >> 1) * (4 * QUERIES) + (d & 1) * 2, 2)
    with f.range(whole, dim) as d:
        number_there = rounded(f, f.load(F32, x + d * 4), inverse, I16)
        f.store(number_there, to + (d >> 1) * (4 * QUERIES) + (d & 1) * 2, 2)
    known, slope, result = own + r.run("rows_at") + row * QUERY.itemsize, f.var(F32, 0.0), _slot(r, token("slot"), head)
    with f.when(r.op("slopes", PTR).differs(0)):
        slope.set(f.load(F32, r.op("slopes", PTR) + head * 4))
    position, softcap, scale = token("position"), r.op("softcap", F32), scale * r.op("query_scale", F32)
    fill(f, QUERY, known, position=position, oldest=_oldest(f, r, position), result=result)
    fill(f, QUERY, known, slope=slope.get(), softcap=softcap, scale=scale)
    with f.when(apart.equals(0)):
        _clear(f, result, padded)


def _oldest(f: Function, r: Records, position: Value) -> Value:
    """The first position that a query in the operation's window sees."""
    window = r.op("window")
    return f.select(window.equals(0), 0, f.maximum(position - window + 1, 0))


def _slot(r: Records, slot: Value, head: Value) -> Value:
    """Where a result stands: padded_dim sums of values, the largest score, the sum of weights."""
    return r.run("partials", PTR) + (slot * r.run("n_head") + head) * ((r.run("padded_dim") + LANES) * 4)


def _clear(f: Function, to: Value, padded: Value) -> None:
    """A result of no positions."""
    with f.range(0, padded, LANES) as d:
        f.store(f.const(ROW, 0.0), to + d * 4, 4)
    f.store(f.const(F32, -math.inf), to + padded * 4, 4)
    f.store(f.const(F32, 0.0), to + padded * 4 + 4, 4)


def _define_merge(module: Module) -> None:
    """merge(to, add, padded): join a later span's result to that of the spans before it."""
    with module.function("merge", {"to": PTR, "add": PTR, "padded": I64}) as (f, to, add, padded):
        tops, sums = ([f.load(F32, p + padded * 4 + at, 4) for p in (to, add)] for at in (0, 4))
        largest = f.maximum(*tops)
        # one of the two is e^0; a NaN stays one
        powers = exp(f, f.join([f.splat(top - largest, 2) for top in tops]))
        old, new = f.extract(powers, 0), f.extract(powers, 2)
        f.store(largest, to + padded * 4, 4)
        f.store(f.fma(sums[1], new, sums[0] * old), to + padded * 4 + 4, 4)
        with f.range(0, padded, LANES) as d:
            value = f.fma(f.load(ROW, add + d * 4, 4), f.splat(new, LANES), f.load(ROW, to + d * 4, 4) * f.splat(old, LANES))
            f.store(value, to + d * 4, 4)


def _define_span(module: Module, level: str) -> None:
    """span(run, own, keys, values, rows, span, apart): a task's queries over one span.

    Its result joins those of the spans before it, or with `apart` goes to a slot of its own. The first-level cache is too small
    for a span: where there are many queries, some positions' keys, later values, meet all of them before the next ones do.
    """
    arguments = {"run": PTR, "own": PTR, "keys": PTR, "values": PTR, "rows": I64, "span": I64, "apart": I64}
    with module.function("span", arguments) as (f, run, own, keys, values, rows, span, apart):
        r = Records(f, run, run)
        padded, first = r.run("padded_dim"), span * SPAN
        mixed, result_bytes, is_one = own + r.run("mixed_at"), (padded + LANES) * 4, rows <= TILES[level][0][0]

        def every_query(call: Callable[[int, Value], object]) -> None:
            row = f.var(I64, 0)
            for queries, _ in TILES[level]:
                with f.loop_while(lambda queries=queries: row.get() + queries <= rows):
                    call(queries, row.get())
                    row.set(row.get() + queries)

        def in_parts(name: str, numbers_at: Value, n: int) -> None:
            step = f.select(is_one, SPAN, f.const(I64, n))
            with f.range(0, SPAN, step) as start:
                every_query(lambda queries, row: f.call(
                    VOID, f"{name}{queries}", run, own, row, first, numbers_at, start, start + step,
                ))  # fmt: skip

        with f.range(0, rows * result_bytes, 4 * LANES) as at:
            f.store(f.const(ROW, 0.0), mixed + at, 4)
        in_parts("scores", keys, PART)
        every_query(lambda queries, row: f.call(VOID, "softmax", run, own, row, f.const(I64, queries), first, values))
        in_parts("mix", values, POSITIONS)
        with f.range(0, rows) as i:
            known = own + r.run("rows_at") + i * QUERY.itemsize
            with f.when(_sees(f, known, first)):
                to = f.load(PTR, known + RESULT, 8) + apart * span * r.run("n_head") * result_bytes
                with f.when(apart.equals(1)):
                    _clear(f, to, padded)
                f.call(VOID, "merge", to, mixed + i * result_bytes, padded)


def _ahead(f: Function, numbers: Words, padded: Value, count: Value) -> Ahead:
    """Position → the distance, in bytes, to what will be read FAR_AHEAD bytes later. `count` of the span's positions are
    filled; what is read next (the values after the keys, the next head's keys after these) begins where all SPAN would end.
    """
    n_bytes = numbers.row_bytes(padded)
    filled = (count + (LANES - 1)) & -LANES
    last, rest = filled * n_bytes - FAR_AHEAD, (SPAN - filled) * n_bytes + FAR_AHEAD
    return lambda p: f.select(p * n_bytes < last, FAR_AHEAD, rest)


def _sees(f: Function, known: Value, first: Value) -> Value:
    """Whether a query sees any position of the span that begins at `first`."""
    return (f.load(I64, known + POSITION, 8) >= first) & (f.load(I64, known + OLDEST, 8) < first + SPAN)


_PART = {"run": PTR, "own": PTR, "row": I64, "first": I64, "numbers": PTR, "start": I64, "stop": I64}


def _define_scores(module: Module, level: str, numbers: Words, queries: int, n_vectors: int) -> None:
    """scores{queries}(run, own, row, first, keys, start, stop): q · k of `queries` queries, from `row` on, with positions
    [start, stop) of the span that begins at `first`. An instruction multiplies two columns.

    `n_vectors` vectors of 16 positions are computed at a time; for the last positions half or a quarter, if enough.
    """
    with module.function(f"scores{queries}", _PART) as (f, run, own, row, first, keys, start, stop):
        r = Records(f, run, run)
        padded, known = r.run("padded_dim"), own + r.run("rows_at") + row * QUERY.itemsize
        q, scores = own + r.run("queries_at") + row * 4, own + r.run("scores_at") + row * (SPAN * 4)
        skipped, count = part(f, known, queries, first)
        ahead, stop = _ahead(f, numbers, padded, count), f.minimum(count, stop)
        factors = [f.load(F32, known + (i * QUERY.itemsize + SCALE), 4) for i in range(queries)]

        def some(p: Value, n_vectors: int) -> None:
            sums = [[f.var(I32.vec(LANES), 0) for _ in range(n_vectors)] for _ in range(queries)]
            at, group_bytes = keys + p * numbers.row_bytes(padded), numbers.row_bytes(padded) * LANES
            distance, to_values = ahead(p), numbers.span_bytes(padded)
            for k in range(n_vectors if queries <= FEW else 0):  # the weights wait for the values' scales, a line in each group
                fetch_far(f, level, numbers.scales_at(at + group_bytes * k, padded), to_values)
            with f.range(0, padded, 2) as d:
                here = [numbers.load(f, at + group_bytes * k + d * (numbers.n_bytes * LANES)) for k in range(n_vectors)]
                for k in range(n_vectors if queries <= FEW else 0):
                    fetch_far(f, level, at + group_bytes * k + d * (numbers.n_bytes * LANES), distance)
                for i, own_sums in enumerate(sums):
                    pair = f.load(I32, q + (d * (2 * QUERIES) + 4 * i), 4)
                    for key, total in zip(here, own_sums, strict=True):
                        total.set(pair_dot(f, level, total.get(), key, pair))
            for k in range(n_vectors):
                scales = f.load(ROW, numbers.scales_at(at + group_bytes * k, padded), 4)
                for i, own_sums in enumerate(sums):
                    score = f.cast("sitofp", own_sums[k].get(), F32) * scales * f.splat(factors[i], LANES)
                    f.store(score, scores + (p * 4 + (SPAN * i + LANES * k) * 4), 4)

        fewer = [n_vectors >> i for i in range(1, n_vectors.bit_length())] if n_vectors > 2 else []
        with f.range(f.maximum(skipped, start), stop, LANES * n_vectors) as p:
            n = f.var(I64, n_vectors)
            for smaller in fewer:
                n.set(f.select(stop - p <= LANES * smaller, smaller, n.get()))
            for each in (n_vectors, *fewer):
                with f.when(n.get().equals(each)):
                    some(p, each)


def _define_mix(module: Module, level: str, numbers: Words, queries: int) -> None:
    """mix{queries}(run, own, row, first, values, start, stop): add weight · value of the positions [start, stop) of the span to
    the results of `queries` queries. An instruction multiplies two positions; sums over POSITIONS neighbours are exact.
    """
    with module.function(f"mix{queries}", _PART) as (f, run, own, row, first, values, begin, stop):
        r = Records(f, run, run)
        padded, known = r.run("padded_dim"), own + r.run("rows_at") + row * QUERY.itemsize
        weights, out_stride = own + r.run("scores_at") + row * (SPAN * 4), (padded + LANES) * 4
        skipped, count = part(f, known, queries, first)
        out, ahead = own + r.run("mixed_at") + row * out_stride, _ahead(f, numbers, padded, count)

        def columns(block: Value, distance: Value, start: Value, n_vectors: int) -> None:
            few = [[f.var(I32.vec(LANES), 0) for _ in range(n_vectors)] for _ in range(queries)]
            with f.range(block, f.minimum(block + POSITIONS, count), 2) as p:
                at, n = numbers.value_row(values, p, padded) + start * (2 * numbers.n_bytes), 2 * numbers.n_bytes * LANES
                here = [numbers.load(f, at + n * k) for k in range(n_vectors)]
                for k in range(n_vectors if queries <= FEW else 0):
                    fetch_far(f, level, at + n * k, distance)
                for i, some in enumerate(few):
                    pair = f.load(I32, weights + (p * 2 + i * (SPAN * 4)), 4)
                    for value, total in zip(here, some, strict=True):
                        total.set(pair_dot(f, level, total.get(), value, pair))
            for i, some in enumerate(few):
                factor = f.splat(f.load(F32, known + (i * QUERY.itemsize + FACTORS) + block // (POSITIONS // 4), 4), LANES)
                for k, total in enumerate(some):
                    to = out + out_stride * i + (start + LANES * k) * 4
                    f.store(f.fma(f.cast("sitofp", total.get(), F32), factor, f.load(ROW, to, 4)), to, 4)

        with f.range(f.maximum(skipped, begin), f.minimum(count, stop), POSITIONS) as block:
            distance, done = ahead(block), f.const(I64, 0)
            for n_vectors in (4, 2, 1) if level in AVX512 else (1,):  # a weight meets more than one where there are as many
                until = padded & (-LANES * n_vectors)
                with f.range(done, until, LANES * n_vectors) as start:
                    columns(block, distance, start, n_vectors)
                done = until


def join(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The stage: a token's output, into a buffer."""
    join_partials(f, r, own, r.op("out", PTR) + task * r.op("out_stride"), r.token(task))


def join_partials(f: Function, r: Records, own: Value, to: Value, token: Callable[..., Value]) -> None:
    """A token's output: its slots joined in order, each head's sums of values divided by the sum of weights.

    Spans before the window have left nothing in their slots. A sink is a weight without a value.
    """
    n_head, dim, padded = r.run("n_head"), r.run("head_dim"), r.run("padded_dim")
    apart = own + r.run("mixed_at")  # the slots stay: other threads may be joining them, too
    n_partials, sinks = token("n_partials"), r.op("sinks", PTR)
    start = _oldest(f, r, token("position")) // SPAN
    with f.range(0, n_head) as head:
        with f.when(n_partials > 1):
            _clear(f, apart, padded)
            with f.range(start, n_partials) as i:
                f.call(VOID, "merge", apart, _slot(r, token("slot") + i, head), padded)
        joined = f.select(n_partials > 1, apart, _slot(r, token("slot"), head))
        top, total = (f.load(F32, joined + padded * 4 + at, 4) for at in (0, 4))
        share, out = f.var(F32, 1.0 / total), to + head * dim * 4
        with f.when(sinks.differs(0)):  # last, so that spans are joined in one order with and without
            sink = f.load(F32, sinks + head * 4)
            largest = f.maximum(top, sink)
            powers = exp(f, f.join([f.splat(top - largest, 2), f.splat(sink - largest, 2)]))
            share.set(f.extract(powers, 0) / f.fma(total, f.extract(powers, 0), f.extract(powers, 2)))
        scale = share.get()

        def write(type: Type, d: Value) -> None:
            f.store(f.load(type, joined + d * 4, 4) * f.splat(scale, type.lanes), out + d * 4, 4)

        each_number(f, 0, dim, write)
    width = n_head * dim
    with f.range(width, ((width + 31) >> 5) << 5) as i:
        f.store(f.const(F32, 0.0), to + i * 4)
