"""The stages of a token besides the weight formats: embedding, normalising and rounding, products, the cache.

In: the run's and an operation's record (records.py), a task number. Out: IR functions, one a stage; the run loop
(run_loop.py) hands out the tasks. Knows the mathematics of the plan's operations, not the formats.

A thread's own memory, from `scratch`: one token's activations (matrix.py); at `products_at` two areas of products; attention.py
has the rest.
"""

from __future__ import annotations

from functools import partial

from pocketlm.runtime.native import attention, elements, experts, next_token
from pocketlm.runtime.native.cache_numbers import Words
from pocketlm.runtime.native.dot import WHOLE
from pocketlm.runtime.native.ir import F32, I8, I16, I32, I64, PTR, Function, Module, Type, Value
from pocketlm.runtime.native.matrix import ROW, product_of, round_into, tile_of, tile_size
from pocketlm.runtime.native.record_reader import Records, each_number, vectors
from pocketlm.runtime.native.sizes import AS_IT_IS, LANES, LAYER_NORM, MAX_CHUNK, PARTIALS, RMS_NORM, SPAN, TWO_PARTS, tiles
from pocketlm.runtime.native.vector_math import nearest

ORDER = [4 * i + at for i in range(4) for at in (0, 2, 1, 3)]  # of sixteen whole activations, as matrix.py has it
STAGE = {"run": PTR, "op": PTR, "own": PTR, "task": I64, "n": I64}  # n: the tokens of the operation


def define(module: Module, level: str, numbers: Words) -> None:
    """Define the stages of sizes.STAGES, each `(run, op, own, task, n)`."""
    elements.define(module)
    _define_round(module, level in WHOLE)
    attention.define(module, level, numbers)
    stages = {
        "embed": _embed, "prepare": _prepare, "norm": elements.norm, "rotate": _rotate, "gate": elements.gate,
        "join": attention.join, "matrix": _matrix, "store": partial(_store, numbers=numbers),
        "attend": partial(attention.attend, numbers=numbers), "each": elements.each,
        "route": experts.route, "group": experts.group, "gather": experts.gather, "experts": experts.experts,
        "mix": experts.mix, "convolve": _convolve, "sample": next_token.sample,
    }  # fmt: skip
    for name, body in stages.items():
        with module.function(name, STAGE) as (f, run, op, own, task, n):
            body(f, level, Records(f, run, op), own, task, n)


# embedding


def _embed(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    out, token = r.op("out", PTR) + task * r.op("out_stride"), r.token(task)
    which = r.op("row_is")
    row = f.select(which.equals(0), token("id"), f.select(which.equals(1), token("position"), token("before")))
    known = f.maximum(row, 0)
    f.call_pointer(r.op("row", PTR), r.op("weight", PTR), r.op("n_groups"), r.op("n_blocks"), known, own)
    with f.range(0, r.op("n")) as i:
        value = f.select(row < 0, 0.0, f.load(F32, own + i * 4))
        before = f.select(r.op("add").equals(1), f.load(F32, out + i * 4), 0.0)
        f.store(value + before, out + i * 4)


# normalising and rounding


def _define_round(module: Module, whole_ones: bool) -> None:
    """round(x, n, records, record_stride): the rounded forms of n float32 activations, n a multiple of 32 (layout: matrix.py).

    The record of the first 32 columns goes to `records`, the following ones in strides. Bytes that nobody reads are not
    written: to write a cache line that another thread has read takes 8 to 40 ns instead of 0.7, the longer the more there are
    (measured on two cores of a Zen 4, 4 to 256 KB).
    """
    arguments = {"x": PTR, "n": I64, "records": PTR, "record_stride": I64}
    with module.function("round", arguments) as (f, x, n, records, record_stride), f.range(0, n, 32) as i:
        parts = [f.load(ROW, x + (i + 16 * h) * 4, 4) for h in (0, 1)]
        # compared as integers, where NaN is larger than every number
        bits = [f.bitcast(f.intrinsic("fabs", p), I32.vec(LANES)) for p in parts]
        largest = f.bitcast(f.reduce(f.maximum(*bits), "max"), F32)
        # the high byte of the largest must stay an int8 after rounding: 32639 = 127 * 256 + 127
        scale = largest * (1 / 32639)
        inverse = f.select(largest > 0.0, 32639.0 / largest, 0.0)
        record = records + (i >> 5) * record_stride
        f.store(scale, record + 64, 4)
        sums = []
        for h, part in enumerate(parts):
            whole = nearest(f, part * f.splat(inverse, LANES))  # NaN and infinity: the scale carries them on
            if whole_ones:
                f.store(f.shuffle(f.cast("trunc", whole, I16), ORDER), record + 32 * h)
            else:
                high = f.emit(whole.type, f"ashr {whole.type} {whole + 128}, {f.const(whole.type, 8)}")
                f.store(f.cast("trunc", whole - (high << 8), I8), record + 16 * h)
                f.store(f.cast("trunc", high, I8), record + (32 + 16 * h))
            sums.append(f.reduce(whole, "add"))
            f.store(sums[h], record + (72 + 4 * h), 4)
        f.store(scale * f.cast("sitofp", sums[0] + sums[1], F32), record + 68, 4)


def _prepare(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    width, source = r.op("n"), r.op("source")
    columns = ((width + 31) >> 5) << 5
    # a single token is prepared by every thread for itself; others lie in tiles
    alone, (first, size) = n.equals(1), tile_of(f, level, n, task)
    place = task - first
    tile = f.select(alone, own, r.run("activations", PTR) + first * r.run("activation_stride"))
    # the values themselves stay with the thread unless a product reads them
    to = f.select(r.op("floats").equals(1), tile + place * columns * 4, own)
    token = f.var(I64, task)
    with f.when(r.op("tail").equals(1)):
        token.set(f.load(I64, r.run("rows", PTR) + task * 8, 8))
    x = r.op("x", PTR) + token.get() * r.op("x_stride")
    with f.when(source.equals(AS_IT_IS)), vectors(f, width) as at:
        f.store(f.load(ROW, x + at, 4), to + at, 4)
    with f.when(source.equals(RMS_NORM)):
        squares = f.var(ROW, 0.0)
        with vectors(f, width) as at:
            v = f.load(ROW, x + at, 4)
            squares.set(f.fma(v, v, squares.get()))
        _scaled(f, r, x, to, f.const(ROW, 0.0), squares.get(), width)
    with f.when(source.equals(LAYER_NORM)):
        sums, squares = f.var(ROW, 0.0), f.var(ROW, 0.0)
        with vectors(f, width) as at:
            sums.set(sums.get() + f.load(ROW, x + at, 4))
        mean = f.splat(f.reduce(sums.get(), "add") / f.cast("sitofp", width, F32), LANES)
        lanes = f.vector(I64.vec(LANES), range(LANES))
        with vectors(f, width) as at:
            real = f.splat(at >> 2, LANES) + lanes < f.splat(width, LANES)  # what fills up the last vector does not count
            v = f.select(real, f.load(ROW, x + at, 4) - mean, 0.0)
            squares.set(f.fma(v, v, squares.get()))
        _scaled(f, r, x, to, mean, squares.get(), width)
    with f.when(source.equals(PARTIALS)):
        attention.join_partials(f, r, own, to, r.token(token.get()))
    round_into(f, tile, columns, size, place, to, (task + 1).equals(n), r.op("floats").equals(1))


def _scaled(f: Function, r: Records, x: Value, to: Value, mean: Value, squares: Value, width: Value) -> None:
    """(x - mean) / sqrt(mean square + epsilon) * weight + bias."""
    square = f.reduce(squares, "add") / f.cast("sitofp", width, F32)
    scale = f.splat(1.0 / f.intrinsic("sqrt", square + r.op("epsilon", F32)), LANES)
    weight, bias = r.op("weight", PTR), r.op("bias", PTR)
    with vectors(f, width) as at:
        v = (f.load(ROW, x + at, 4) - mean) * scale
        f.store(f.fma(v, f.load(ROW, weight + at, 4), f.load(ROW, bias + at, 4)), to + at, 4)


# products


def _matrix(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The stage. A task is a chunk of groups, for all tokens or one half: products go into the thread's own memory, then come
    bias, activation, gate and residual.
    """
    chunk, n_rows, n_chunks, half = r.op("chunk"), r.op("n"), chunks(r), half_of(f, r, n)
    is_later, start = task >= n_chunks, task % n_chunks * chunk
    stop = f.minimum(start + chunk, (n_rows + (LANES - 1)) // LANES)
    stride = r.run("activation_stride")
    x = f.select(n.equals(1), own, r.run("activations", PTR))
    y, y_stride = own + r.run("products_at"), MAX_CHUNK * LANES * 4
    up = y + tiles(level)[-1] * y_stride
    gated = r.op("up", PTR).differs(0)

    def product(prefix: str, size: Value, w: Value, groups: Value, first: Value, blocks: Value, x: Value, y: Value) -> None:
        kernel = product_of(f, level, r, prefix, size)
        f.call_pointer(kernel, w, groups, first + start, first + stop, blocks, x, y, f.const(I64, y_stride))

    done, until = f.var(I64, f.select(is_later, half, 0)), f.select(is_later, n, half)
    with f.loop_while(lambda: done.get() < until):
        token = done.get()
        left, here = n - token, x + token * stride
        size = tile_size(f, level, left)
        product("", size, r.op("weight", PTR), r.op("n_groups"), f.const(I64, 0), r.op("n_blocks"), here, y)
        with f.when(gated):
            product("up_", size, r.op("up", PTR), r.op("up_groups"), r.op("up_first"), r.op("up_blocks"), here, up)
        with f.range(0, f.minimum(left, size)) as t:
            out = r.op("out", PTR) + (token + t) * r.op("out_stride")
            _finish(f, r, y + t * y_stride, up + t * y_stride, gated, out, start * LANES, f.minimum(stop * LANES, n_rows))
        done.set(token + size)


def chunks(r: Records) -> Value:
    """Into how many chunks an operation divides its rows."""
    return ((r.op("n") + (LANES - 1)) // LANES + r.op("chunk") - 1) // r.op("chunk")


def half_of(f: Function, r: Records, n: Value) -> Value:
    """How many of n tokens are MATRIX's first half, whole tiles of 16; all n in a short pass. In halves, a thread computes
    products of tokens that it has prepared itself, which are in its own cache.
    """
    return f.select((n >= TWO_PARTS) & (r.run("n_threads") > 1), ((n + 31) >> 5) << 4, n)


def _finish(f: Function, r: Records, y: Value, up: Value, gated: Value, out: Value, first: Value, last: Value) -> None:
    """Rows [first, last) of the products at y (and up), to out."""
    lanes = f.stack(F32, LANES)
    with f.range(first, last, LANES) as row:
        at, to = (row - first) * 4, out + row * 4
        v = f.var(ROW, f.load(ROW, y + at, 4) + f.load(ROW, r.op("bias", PTR) + row * 4, 4))
        with f.when(r.op("activation") > 0):
            v.set(f.call(ROW, "activate", r.op("activation"), v.get()))
        with f.when(gated):
            beside = f.load(ROW, up + at, 4) + f.load(ROW, r.op("up_bias", PTR) + row * 4, 4)
            v.set(v.get() * f.call(ROW, "beside", r.op("activation"), beside))
        with f.when(r.op("add").equals(1)):
            v.set(v.get() * f.splat(r.op("factor", F32), LANES) + f.load(ROW, to, 4))
        with f.when(row + LANES <= last):
            f.store(v.get(), to, 4)
        with f.when(row + LANES > last):  # the next rows may be another matrix's
            f.store(v.get(), lanes, 64)
            with f.range(0, last - row) as i:
                f.store(f.load(F32, lanes + i * 4), to + i * 4)


# the cache


def _rotate(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The heads of a token that an operation rotates."""
    vector, position = r.op("x", PTR) + task * r.op("x_stride"), r.token(task)("position")
    with f.range(0, r.op("n_groups")) as head:
        _turn(f, r, vector + head * r.op("n") * 4, position)


def _turn(f: Function, r: Records, vector: Value, position: Value) -> None:
    """Turn the pairs of a head by the angles of a position, sixteen pairs at a time where there are as many."""
    half, adjacent = r.op("rope_half"), r.op("rope_interleaved").equals(1)
    cosines = r.op("rope", PTR) + position * half * 8
    sines, whole = cosines + half * 4, half & -LANES

    def turned(x: Value, y: Value, at: Value) -> tuple[Value, Value]:
        cos, sin = f.load(x.type, cosines + at * 4, 4), f.load(x.type, sines + at * 4, 4)
        return x * cos - y * sin, x * sin + y * cos

    with f.range(0, whole, LANES) as i:
        with f.when(adjacent):
            both = f.join([f.load(ROW, vector + i * 8 + 64 * k, 4) for k in (0, 1)])
            evens = range(0, 2 * LANES, 2)
            x, y = turned(f.shuffle(both, evens), f.shuffle(both, [k + 1 for k in evens]), i)
            for k in (0, 1):
                pairs = [lane + LANES * odd for lane in range(8 * k, 8 * k + 8) for odd in (0, 1)]
                f.store(f.shuffle(x, pairs, y), vector + i * 8 + 64 * k, 4)
        with f.when(~adjacent):
            x, y = turned(f.load(ROW, vector + i * 4, 4), f.load(ROW, vector + (i + half) * 4, 4), i)
            f.store(x, vector + i * 4, 4)
            f.store(y, vector + (i + half) * 4, 4)
    with f.range(whole, half) as i:
        a, b = vector + f.select(adjacent, i * 2, i) * 4, vector + f.select(adjacent, i * 2 + 1, i + half) * 4
        x, y = turned(f.load(F32, a), f.load(F32, b), i)
        f.store(x, a)
        f.store(y, b)


def _store(f: Function, level: str, r: Records, own: Value, task: Value, n: Value, *, numbers: Words) -> None:
    """The stage. A task is a token, or one head of it: queries and keys are normalised and rotated where the operation says so,
    keys and values written to the cache.
    """
    n_heads, apart = r.run("n_head") + r.run("n_kv_head"), heads_apart(r, n)
    first = f.select(apart, task % n_heads, 0)
    with f.range(first, f.select(apart, first + 1, n_heads)) as head:
        _store_head(f, level, r, f.select(apart, task // n_heads, task), head, numbers)


def heads_apart(r: Records, n: Value) -> Value:
    """Whether STORE has a task for each head of a token; where there are tokens enough, one for all of them."""
    return n < r.run("n_threads") * 2


def _store_head(f: Function, level: str, r: Records, number: Value, head: Value, numbers: Words) -> None:
    n_head, n_kv, dim = r.run("n_head"), r.run("n_kv_head"), r.run("head_dim")
    token = r.token(number)
    position = token("position")
    vector = r.op("x", PTR) + number * r.op("x_stride") + head * dim * 4
    with f.when(r.op("source") > 0):
        is_key = head >= n_head
        group = f.select(is_key, head - n_head, head)
        weight = f.select(is_key, r.op("key_weight", PTR), r.op("weight", PTR)) + group * r.op("weight_stride")
        elements.normalise(f, r, vector, vector, weight, None, dim)
    _turn(f, r, vector, position)
    numbers.spread(f, vector, dim)
    with f.when(head >= n_head):
        keys, values = attention.cache_of(r, numbers, token, head - n_head, position)
        padded, row, value = r.run("padded_dim"), position % SPAN, vector + n_kv * dim * 4
        lane, start = row & 15, (row >> 4) * (numbers.row_bytes(padded) * LANES)
        of_key, of_value = numbers.key_scale(f, vector, dim), numbers.value_scale(f, value, dim)
        for group, scale in ((keys + start, of_key), (values + start, of_value)):
            f.store(scale, numbers.scales_at(group, padded) + lane * 4, 4)
        of_key, of_value = (f.select(scale > 1e-30, 1.0 / scale, 0.0) for scale in (of_key, of_value))
        to, whole = numbers.value_row(values, row, padded), dim & -LANES
        with f.range(0, whole, LANES) as d:
            key, its_value = (f.load(ROW, x + d * 4, 4) for x in (vector, value))
            key, its_value = numbers.kept(f, key, of_key), numbers.kept(f, its_value, of_value)
            for column in range(LANES):
                f.store(f.extract(key, column), numbers.key_at(keys + start, lane, d + column), 1)
                f.store(f.extract(its_value, column), to + (d + column) * (2 * numbers.n_bytes), 1)
        with f.range(whole, dim) as d:
            f.store(numbers.kept(f, f.load(F32, vector + d * 4), of_key), numbers.key_at(keys + start, lane, d), 1)
            f.store(numbers.kept(f, f.load(F32, value + d * 4), of_value), to + d * (2 * numbers.n_bytes), 1)


# short convolutions


def _convolve(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """A chunk of columns of all tokens, in order: a text's columns are kept before its next token reads them."""
    columns, taps, first = r.op("n"), r.op("taps"), task * r.op("chunk") * LANES
    last = f.minimum(first + r.op("chunk") * LANES, columns)
    with f.range(0, n) as number:
        token = r.token(number)
        x, out = r.op("x", PTR) + number * r.op("x_stride"), r.op("out", PTR) + number * r.op("out_stride")
        rows, position = r.layer(token)("rows"), token("position")
        kept = token("columns", PTR) + r.layer(token)("offset")

        def convolve(type: Type, at: Value) -> None:
            b, c, z = (f.load(type, x + (columns * part + at) * 4, 4) for part in range(3))
            f.store(b * z, kept + ((position % rows) * columns + at) * 4, 4)
            total, oldest = f.var(type, 0.0), position - taps + 1
            with f.range(f.maximum(f.const(I64, 0) - oldest, 0), taps) as tap:
                column = f.load(type, kept + (((oldest + tap) % rows) * columns + at) * 4, 4)
                total.set(f.fma(f.load(type, r.op("weight", PTR) + (tap * columns + at) * 4, 4), column, total.get()))
            f.store(c * total.get(), out + at * 4, 4)

        each_number(f, first, last, convolve)
