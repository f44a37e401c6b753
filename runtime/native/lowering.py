"""The plan as a program for the run loop: addresses filled in, every step one record or a few.

In: a plan, its tiled matrices and vectors. Out: a NumPy array of operation records (records.py). Knows which stage computes a
step of fusion.py, and which records may run without a barrier between them; knows no mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pocketlm.runtime import operations as P
from pocketlm.runtime.native import fusion, sizes
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.records import OPERATION
from pocketlm.runtime.native.tiling import LAYOUTS, groups
from pocketlm.runtime.plan import Plan

NORMS = {"rms": sizes.RMS_NORM, "layer": sizes.LAYER_NORM}


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix as the kernels read it, or one for every expert, each of n_rows. `data`: uint8, 64-byte aligned. `mapped`: in
    the file's order, not in tiles; only experts' may be.
    """

    format: str
    n_rows: int
    n_columns: int
    data: np.ndarray
    mapped: bool = False


@dataclass(frozen=True)
class Storage:
    """Everything an encoded program points at; whoever runs the program keeps it alive."""

    matrices: Mapping[str, TiledMatrix]
    vectors: Callable[[str | None, int, float], np.ndarray]  # float32 of a name, or of that number; filled up with zeros
    buffers: Mapping[str, np.ndarray]  # name -> float32 [tokens, width filled up to 32]
    address: Callable[[str, str], int]  # of a format's kernel
    table: Callable[[P.Rotate], np.ndarray]  # cos and sin of its positions
    slopes: Callable[[P.Attend], np.ndarray]  # of ALiBi
    taps: Callable[[P.Convolve], np.ndarray]  # a convolution's weights, float32 [taps, n]
    tiles: Sequence[int]  # numbers of tokens that the level has kernels for


def check(plan: Plan, formats: Iterable[str]) -> None:
    """Raises NativeUnavailable where there is no code for an operation of the plan or for one of its matrices' formats."""
    if lacking := sorted(set(formats) - LAYOUTS.keys()):
        raise NativeUnavailable(f"there is no native code for {', '.join(lacking)} weights")
    heads = set()
    for op in plan.ops:
        if isinstance(op, P.Attend):
            heads.add((op.n_head, op.n_kv_head, op.head_dim))
        known = {P.Norm: NORMS, P.Activate: sizes.ACTIVATIONS}.get(type(op))
        if not isinstance(op, P.Op):
            raise NativeUnavailable(f"there is no native code for {type(op).__name__}")
        if known is not None and op.kind not in known:  # type: ignore[union-attr]
            raise NativeUnavailable(f"there is no native code for {type(op).__name__} of the kind {op.kind!r}")  # type: ignore[union-attr]
    if len(heads) > 1:
        raise NativeUnavailable("there is no native code for layers whose heads differ")


def encode(plan: Plan, storage: Storage, n_threads: int) -> np.ndarray:
    """The program, an array of OPERATION."""
    encoder = _Encoder(plan, storage, n_threads)
    for step in fusion.fuse(plan.ops):
        _STEPS[type(step)](encoder, step)
    encoder.emit(sizes.SAMPLE, **encoder.x("logits"), tail=1)
    return np.frombuffer(bytearray(b"".join(encoder.records)), OPERATION)  # np.concatenate takes 60 µs a record


class _Encoder:
    def __init__(self, plan: Plan, storage: Storage, n_threads: int):
        self.plan, self.storage, self.n_threads = plan, storage, n_threads
        self.records: list[np.ndarray] = []
        self.grouped = ""  # the choice of experts that tokens are sorted by
        self.tail = 0  # 1 behind the logits: only their rows go on

    def emit(self, kind: int, **fields: float) -> np.ndarray:
        record = np.zeros(1, OPERATION)
        for name, value in {"kind": kind, **fields}.items():
            record[name] = value
        self.records.append(record)
        return record

    def x(self, name: str) -> dict[str, int]:
        buffer = self.storage.buffers[name]
        return {"x": buffer.ctypes.data, "x_stride": buffer.strides[0]}

    def out(self, name: str, column: int = 0) -> dict[str, int]:
        buffer = self.storage.buffers[name]
        return {"out": buffer.ctypes.data + 4 * column, "out_stride": buffer.strides[0]}

    def vector(self, name: str | None, n: int, empty: float = 0.0) -> int:
        return self.storage.vectors(name, n, empty).ctypes.data

    def embed(self, op: P.Embed) -> None:
        for name, row_is in ((op.table, 2 * op.before), (op.positions, 1)):
            if name is not None:
                table = self.storage.matrices[name]
                self.emit(
                    sizes.EMBED, **self.out(op.out), n=table.n_columns, weight=table.data.ctypes.data,
                    n_groups=groups(table.n_rows), n_blocks=table.n_columns // LAYOUTS[table.format].block_size,
                    row=self.storage.address(table.format, "row"), row_is=row_is, add=row_is == 1, barrier=1,
                )  # fmt: skip

    def norm(self, op: P.Norm, out: str | None = None) -> None:
        """From buffer to buffer, or added to `out`."""
        at, own = 4 * op.column, self.norm_weights(op)
        x, to = self.x(op.x), self.out(out or op.out, op.column)
        x["x"] += at
        self.emit(
            sizes.NORM, **x, **to, n=op.width, n_groups=op.n_groups, source=NORMS[op.kind], epsilon=op.eps, barrier=1,
            add=out is not None, tail=self.tail, **own,
        )  # fmt: skip

    def norm_weights(self, op: P.Norm) -> dict[str, int]:
        """Weight and bias, ones and zeros where there are none, and the way to the next group's."""
        apart = any(name is not None and len(self.plan.weights[name]) > 1 for name in (op.weight, op.bias))
        n = op.width * op.n_groups if apart else op.width
        stride = 4 * op.width if apart else 0
        return {"weight": self.vector(op.weight, n, 1.0), "bias": self.vector(op.bias, n), "weight_stride": stride}

    def rotate(self, op: P.Rotate) -> None:
        self.emit(sizes.ROTATE, **self.x(op.qkv), n=op.head_dim, n_groups=op.n_heads, barrier=1, **self.rotation(op))

    def rotation(self, op: P.Rotate) -> dict[str, int]:
        adjacent = op.rope.pairs == "interleaved"
        return {"rope": self.storage.table(op).ctypes.data, "rope_half": op.rope.n_dims // 2, "rope_interleaved": adjacent}

    def attention(self, step: fusion.Attention) -> None:
        op, store = step.attend, {}
        if step.rotate:
            store |= self.rotation(step.rotate)
        if step.norms:
            own, keys = (self.norm_weights(norm) for norm in step.norms)
            store |= {"source": NORMS[step.norms[0].kind], "epsilon": step.norms[0].eps, "key_weight": keys["weight"], **own}
        self.emit(sizes.STORE, **self.x(op.qkv), barrier=1, layer=op.layer, **store)
        slopes = self.storage.slopes(op).ctypes.data if op.alibi_max_bias else 0
        self.emit(
            sizes.ATTEND, **self.x(op.qkv), barrier=1, layer=op.layer, query_scale=op.scale, softcap=op.softcap,
            window=op.window, slopes=slopes,
        )  # fmt: skip
        if step.joined:
            self.emit(sizes.JOIN, **self.out(op.out), barrier=1, **self.parts(op))

    def convolve(self, op: P.Convolve) -> None:
        self.emit(
            sizes.CONVOLVE, **self.x(op.x), **self.out(op.out), n=op.n, layer=op.layer, taps=op.taps, barrier=1,
            weight=self.storage.taps(op).ctypes.data, chunk=self.chunk(groups(op.n)),
        )  # fmt: skip

    def parts(self, op: P.Attend) -> dict[str, int]:
        """What joining attention's results needs to know."""
        return {"window": op.window, "sinks": self.vector(op.sinks, op.n_head) if op.sinks else 0}

    def product(self, step: fusion.Product) -> None:
        linear, before = step.linear, step.before
        if step.x == step.out:
            raise NativeUnavailable("there is no native code for a product that overwrites what it reads")
        n, self.tail = linear.matrix.n_in, int(isinstance(linear, P.Logits))
        fields: dict[str, float] = {"source": sizes.AS_IT_IS}
        if isinstance(before, P.Norm):
            own = self.norm_weights(before)
            fields = {"source": NORMS[before.kind], "weight": own["weight"], "bias": own["bias"], "epsilon": before.eps}
        elif before:
            fields = {"source": sizes.PARTIALS, **self.parts(before)}
        formats = {self.storage.matrices[name].format for name in linear.matrix.weights}
        fields["floats"] = any(LAYOUTS[name].block_size == 1 for name in formats)
        self.emit(sizes.PREPARE, **self.x(step.x), n=n, barrier=1, tail=self.tail, **fields)
        activation = 1 + sizes.ACTIVATIONS.index(step.activate.kind) if step.activate else 0
        if step.activate and step.activate.gated:
            self.gated(linear.matrix, step.out, activation)
        else:
            self.matrix(linear.matrix, step.out, step.add, activation)

    def matrix(self, matrix: P.Matrix, out: str, add: P.Add | None, activation: int) -> None:
        """One record a tensor; they need no barrier between them, since each has rows of its own."""
        column = 0
        for name, bias in zip(matrix.weights, matrix.biases, strict=True):
            w = self.storage.matrices[name]
            self.emit(
                sizes.MATRIX, **self.out(out, column), n=w.n_rows, bias=self.vector(bias, 16 * groups(w.n_rows)),
                add=add is not None, factor=add.factor if add else 1, activation=activation,
                chunk=self.chunk(groups(w.n_rows)), tail=self.tail, **self.weights(w),
            )  # fmt: skip
            column += w.n_rows
        self.records[-1]["barrier"] = 1

    def weights(self, w: TiledMatrix) -> dict[str, int]:
        return {
            "weight": w.data.ctypes.data, "n_groups": groups(w.n_rows),
            "n_blocks": w.n_columns // LAYOUTS[w.format].block_size,
            **{f"product{tile}": self.storage.address(w.format, f"product{tile}") for tile in self.storage.tiles},
        }  # fmt: skip

    def gated(self, matrix: P.Matrix, out: str, activation: int) -> None:
        """The gate's rows activated and multiplied with the same rows of the second matrix, or of the second half."""
        gate, up = (self.storage.matrices[matrix.weights[i]] for i in (0, -1))
        is_one = len(matrix.weights) == 1
        n_rows = matrix.n_out // 2
        n = 16 * groups(matrix.n_out if is_one else n_rows)
        bias, up_bias = self.vector(matrix.biases[0], n), self.vector(matrix.biases[-1], n)
        second = self.weights(up)
        self.emit(
            sizes.MATRIX, **self.out(out), n=n_rows, bias=bias, activation=activation, chunk=self.chunk(groups(n_rows)),
            barrier=1, **self.weights(gate), up=second["weight"], up_groups=second["n_groups"],
            up_first=groups(n_rows) if is_one else 0, up_blocks=second["n_blocks"],
            up_bias=up_bias + 4 * n_rows if is_one else up_bias,
            **{f"up_product{tile}": second[f"product{tile}"] for tile in self.storage.tiles},
        )  # fmt: skip

    def chunk(self, n_groups: int, most_groups: int = sizes.MAX_CHUNK) -> int:
        """Groups a task: about four tasks a thread, so that a slow thread does not hold the others, and as many for each."""

        def most(chunk: int) -> int:  # groups of the thread with the most
            tasks = -(-n_groups // chunk)
            return min(-(-tasks // self.n_threads) * chunk, n_groups)

        largest = max(1, min(most_groups, n_groups // (4 * self.n_threads)))
        return min(range(largest, largest // 2, -1), key=most)

    def route(self, op: P.Route) -> None:
        used: dict[str, float] = {"n": op.n_experts, "n_used": op.n_used, "barrier": 1}
        self.emit(sizes.ROUTE, **self.x(op.x), **self.out(op.out), **used, normalised=op.normalised)
        self.emit(sizes.GROUP, **self.x(op.out), **used)
        self.grouped = op.out

    def experts(self, op: P.Experts) -> None:
        """Tokens gathered by expert, then a record a tensor."""
        if op.chosen != self.grouped or op.x == op.out:
            raise NativeUnavailable("there is no native code for this order of routers and experts")
        x_bytes, n_in = sizes.activation_bytes(op.matrix.n_in), op.matrix.n_in
        self.emit(
            sizes.GATHER, **self.x(op.x), n=n_in, n_used=op.n_used, slot_stride=4 * n_in * op.own, x_bytes=x_bytes, barrier=1,
        )  # fmt: skip
        column = 0
        for name, bias in zip(op.matrix.weights, op.matrix.biases, strict=True):
            w, n_groups = self.storage.matrices[name], groups(self.storage.matrices[name].n_rows)
            row_bytes = w.n_columns // LAYOUTS[w.format].block_size * LAYOUTS[w.format].block_bytes
            self.emit(
                sizes.EXPERTS, **self.out(op.out, column), n=w.n_rows, n_experts=op.n_experts, x_bytes=x_bytes,
                bias=self.vector(bias, op.n_experts * w.n_rows if bias else 16 * n_groups),
                weight_stride=4 * w.n_rows if bias else 0, chunk=self.chunk(n_groups * op.n_used, sizes.EXPERT_CHUNK),
                tile=self.storage.address(w.format, "tile") if w.mapped else 0, expert_bytes=w.n_rows * row_bytes,
                group_bytes=16 * row_bytes, **self.weights(w),
            )  # fmt: skip
            column += op.n_used * w.n_rows
        self.records[-1]["barrier"] = 1

    def mix(self, op: P.Mix) -> None:
        chosen = self.storage.buffers[op.chosen]
        self.emit(
            sizes.MIX, **self.x(op.x), **self.out(op.out), n=self.plan.buffers[op.out], n_used=op.n_used, barrier=1,
            weight=chosen.ctypes.data + 4 * op.n_used, weight_stride=chosen.strides[0],
        )  # fmt: skip

    def each(self, how: int, op: P.Activate | P.Add | P.Scale | P.Softcap, n: int | None = None, **fields: float) -> None:
        n = self.plan.buffers[op.x] if n is None else n
        self.emit(sizes.EACH, **self.x(op.x), **self.out(op.out), n=n, source=how, barrier=1, tail=self.tail, **fields)

    def gate(self, op: P.Gate) -> None:
        y = self.storage.buffers[op.y]
        self.emit(
            sizes.GATE, **self.x(op.x), **self.out(op.out, op.column), y=y.ctypes.data, y_stride=y.strides[0], n=op.width,
            n_groups=op.n_groups, weight=self.vector(op.weight, op.n_groups * op.n_columns), weight_stride=4 * op.n_columns,
            factor=op.factor, barrier=1,
        )  # fmt: skip


_STEPS: dict[type, Callable[..., None]] = {
    P.Embed: _Encoder.embed, P.Norm: _Encoder.norm, P.Rotate: _Encoder.rotate, P.Gate: _Encoder.gate,
    P.Activate: lambda e, op: e.each(sizes.ACTIVATE, op, op.n, activation=1 + sizes.ACTIVATIONS.index(op.kind), add=op.gated),
    P.Add: lambda e, op: e.each(sizes.ADD, op, factor=op.factor), fusion.AddNorm: lambda e, step: e.norm(step.norm, step.out),
    P.Scale: lambda e, op: e.each(sizes.SCALE, op, factor=op.factor),
    P.Softcap: lambda e, op: e.each(sizes.SOFTCAP, op, factor=op.cap),
    P.Convolve: _Encoder.convolve, P.Route: _Encoder.route, P.Experts: _Encoder.experts, P.Mix: _Encoder.mix,
    fusion.Product: _Encoder.product, fusion.Attention: _Encoder.attention,
}  # fmt: skip
