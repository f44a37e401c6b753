"""Stages of mixtures of experts: which experts a token goes to, tokens gathered by expert, their products, the weighted sum.

In: the run's and an operation's record (records.py), a task number. Out: IR functions. Knows no formats.

`group` sorts the pass's pairs of a token and one of its experts by expert: PAIR records, and a GROUP for each expert that is
wanted. `gather` rounds a pair's activations to where the tile of its group begins (matrix.py), and `experts` takes a chunk of
an expert's rows for all tokens of its group. A row's result depends on its pair alone, whoever else is in the group.

Experts that lie in the file's order are tiled in the thread's own memory, at `tiled_at`, a chunk at a time: only what is wanted
is read, and nothing is kept but what the system keeps of the file.
"""

from __future__ import annotations

from pocketlm.runtime.native.ir import F32, I32, I64, PTR, Function, Type, Value
from pocketlm.runtime.native.matrix import product_of, round_into, tile_of, tile_places, tile_size
from pocketlm.runtime.native.record_reader import Records, each_number, fill
from pocketlm.runtime.native.records import GROUP, PAIR, RUN
from pocketlm.runtime.native.sizes import EXPERT_CHUNK, LANES, PAGES, WILL_NEED
from pocketlm.runtime.native.vector_math import exp


def route(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The numbers of the largest scores, and weights. NaN counts as the smallest: n_used are found, whatever scores are."""
    x, out = (r.op(name, PTR) + task * r.op(f"{name}_stride") for name in ("x", "out"))
    n_used, n_experts = r.op("n_used"), r.op("n")
    weights = out + n_used * 4
    smallest = f.const(F32, float("-inf"))
    last, last_at = f.var(F32, float("inf")), f.var(I64, -1)
    largest = f.var(F32, smallest)
    with f.range(0, n_used) as k:
        best, best_at = f.var(F32, smallest), f.var(I64, -1)
        with f.range(0, n_experts) as i:
            found = f.load(F32, x + i * 4)
            score = f.select(found.equals(found), found, smallest)
            is_left = (score < last.get()) | (score.equals(last.get()) & (i > last_at.get()))
            with f.when(is_left & ((score > best.get()) | (best_at.get() < 0))):
                best.set(score)
                best_at.set(i)
        with f.when(k.equals(0)):
            largest.set(best.get())
        last.set(best.get())
        last_at.set(best_at.get())
        f.store(f.cast("sitofp", best_at.get(), F32), out + k * 4)

    def share(score: Value) -> Value:
        return exp(f, score - largest.get())

    total = f.var(F32, 0.0)
    with f.range(0, n_used) as k:
        weight = share(f.load(F32, x + f.cast("fptosi", f.load(F32, out + k * 4), I64) * 4))
        f.store(weight, weights + k * 4)
        total.set(total.get() + weight)
    with f.when(r.op("normalised").equals(0)):
        total.set(0.0)
        with f.range(0, n_experts) as i:
            total.set(total.get() + share(f.load(F32, x + i * 4)))
    with f.range(0, n_used) as k:
        f.store(f.load(F32, weights + k * 4) / total.get(), weights + k * 4)


def group(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The pass's pairs, sorted by expert; pairs of one expert in the order of their tokens."""
    n_used, counts, pairs, groups = r.op("n_used"), r.run("counts", PTR), r.run("pairs", PTR), r.run("groups", PTR)

    def count_of(token: Value, slot: Value) -> Value:
        number = f.load(F32, r.op("x", PTR) + token * r.op("x_stride") + slot * 4)
        return counts + f.cast("fptosi", number, I64) * 8

    with f.range(0, r.op("n")) as i:
        f.store(f.const(I64, 0), counts + i * 8, 8)
    with f.range(0, n) as token, f.range(0, n_used) as slot:
        at = count_of(token, slot)
        f.store(f.load(I64, at, 8) + 1, at, 8)
    start, place, found = f.var(I64, 0), f.var(I64, 0), f.var(I64, 0)
    with f.range(0, r.op("n")) as i:
        count = f.load(I64, counts + i * 8, 8)
        with f.when(count > 0):
            first, last = start.get(), start.get() + count
            fill(f, GROUP, groups + found.get() * GROUP.itemsize, expert=i, first=first, last=last, place=place.get())
            f.store(first, counts + i * 8, 8)  # from now on: where its next pair goes
            with f.range(first, last) as p:
                fill(f, PAIR, pairs + p * PAIR.itemsize, first=first, last=last, place=place.get())
            start.set(last)
            place.set(place.get() + tile_places(f, level, count))
            found.set(found.get() + 1)
    with f.range(0, n) as token, f.range(0, n_used) as slot:
        at = count_of(token, slot)
        here = f.load(I64, at, 8)
        fill(f, PAIR, pairs + here * PAIR.itemsize, token=token, slot=slot)
        f.store(here + 1, at, 8)
    fill(f, RUN, f.args()[0], n_chosen=found.get())


def gather(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """A pair's activations, as PREPARE leaves a token's."""
    pair, width, x_bytes = r.pair(task), r.op("n"), r.op("x_bytes")
    columns = ((width + 31) >> 5) << 5
    number = task - pair("first")  # of its group
    first, size = tile_of(f, level, pair("last") - pair("first"), number)
    place, tile = number - first, r.run("activations", PTR) + (pair("place") + first) * x_bytes
    to = tile + place * columns * 4
    x = r.op("x", PTR) + pair("token") * r.op("x_stride") + pair("slot") * r.op("slot_stride")
    each_number(f, 0, width, lambda type, i: f.store(f.load(type, x + i * 4), to + i * 4))
    with f.range(width, columns) as i:
        f.store(f.const(F32, 0.0), to + i * 4)
    round_into(f, tile, columns, size, place, to, (task + 1).equals(pair("last")), 1)


def experts(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """A chunk of an expert's rows, for all tokens of its group."""
    chunk, n_rows, n_groups, n_blocks = (r.op(name) for name in ("chunk", "n", "n_groups", "n_blocks"))
    chunks = (n_groups + chunk - 1) // chunk
    chosen, start = r.group(task // chunks), (task % chunks) * chunk
    expert, last = chosen("expert"), chosen("last")
    stop = f.minimum(start + chunk, n_groups)
    w, total = f.var(PTR, r.op("weight", PTR)), f.var(I64, r.op("n_experts") * n_groups)
    skipped = f.var(I64, expert * n_groups)
    with f.when(r.op("tile") > 0):
        tiled = own + r.run("tiled_at")
        whole = r.op("weight", PTR) + expert * r.op("expert_bytes")
        with f.when(start.equals(0)):
            _announce(f, r, whole, r.op("expert_bytes"))
        source = whole + start * r.op("group_bytes")
        left, here = n_rows - start * LANES, stop - start
        f.call_pointer(r.op("tile", PTR), source, tiled, left, here, n_blocks, f.const(I64, 0), here, linkage="entry")
        w.set(tiled)
        total.set(here)
        skipped.set(0 - start)
    y, y_stride = own + r.run("products_at"), EXPERT_CHUNK * LANES * 4
    done = f.var(I64, chosen("first"))
    with f.loop_while(lambda: done.get() < last):
        first = done.get()
        place = chosen("place") + (first - chosen("first"))
        size, x = tile_size(f, level, last - first), r.run("activations", PTR) + place * r.op("x_bytes")
        kernel = product_of(f, level, r, "", size)
        begin = skipped.get() + start
        f.call_pointer(kernel, w.get(), total.get(), begin, skipped.get() + stop, n_blocks, x, y, f.const(I64, y_stride))
        with f.range(0, f.minimum(last - first, size)) as t:
            pair = r.pair(first + t)
            out = r.op("out", PTR) + pair("token") * r.op("out_stride") + pair("slot") * n_rows * 4
            bias = r.op("bias", PTR) + expert * r.op("weight_stride")
            _finish(f, y + t * y_stride, bias, out, start * LANES, f.minimum(stop * LANES, n_rows))
        done.set(first + size)


def _announce(f: Function, r: Records, first: Value, n_bytes: Value) -> None:
    """Tell the system that these bytes of the file are wanted: it reads them at once, and (`read_as_told`) no others."""
    with f.when(r.run("advise") > 0):
        over = f.emit(I64, f"ptrtoint ptr {first} to i64") & (PAGES - 1)
        where, length = first + (0 - over), n_bytes + over
        f.call_pointer(r.run("advise", PTR), where, length, f.const(I32, WILL_NEED), returns=I32, linkage="system")


def _finish(f: Function, y: Value, bias: Value, out: Value, first: Value, last: Value) -> None:
    """Rows [first, last) of the products at y, plus the bias, to out."""

    def write(type: Type, row: Value) -> None:
        f.store(f.load(type, y + (row - first) * 4) + f.load(type, bias + row * 4), out + row * 4)

    each_number(f, first, last, write)


def mix(f: Function, level: str, r: Records, own: Value, task: Value, n: Value) -> None:
    """The parts of a row, each times its weight, in their order."""
    x, out = (r.op(name, PTR) + task * r.op(f"{name}_stride") for name in ("x", "out"))
    weights, n_used, width = r.op("weight", PTR) + task * r.op("weight_stride"), r.op("n_used"), r.op("n")

    def add_up(type: Type, i: Value) -> None:
        total = f.var(type, 0.0)
        with f.range(0, n_used) as k:
            weight, part = f.load(F32, weights + k * 4), f.load(type, x + (k * width + i) * 4)
            total.set(f.fma(part, f.splat(weight, type.lanes), total.get()))
        f.store(total.get(), out + i * 4)

    each_number(f, 0, width, add_up)
