"""The plan as a program for the run loop: operations fused where that saves a pass, addresses filled in.

In: a plan, its tiled matrices and vectors. Out: a NumPy array of operation records (records.py). Knows the order of
stages and which of them may run without a barrier; knows no mathematics.

    Embed                             EMBED (+ EMBED of the learned position)
    Norm, Linear                      PREPARE with the norm, MATRIX …
    Linear -> qkv [, Rotate], Attend  MATRIX, STORE, ATTEND
    Linear -> y, Add                  PREPARE, MATRIX that adds to the residual stream
    Linear -> ff, Activate            MATRIX that activates, and multiplies with the second matrix where gated
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketlm.runtime import plan as P
from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.records import OPERATION
from pocketlm.runtime.native.tiling import LAYOUTS, groups

NORMS = {"rms": sizes.RMS_NORM, "layer": sizes.LAYER_NORM}


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix as the kernels read it: uint8 `data`, 64-byte aligned."""

    format: str
    n_rows: int
    n_columns: int
    data: np.ndarray


@dataclass(frozen=True)
class Storage:
    """Everything an encoded program points at; whoever runs the program keeps it alive."""

    matrices: Mapping[str, TiledMatrix]
    vectors: Callable[[str | None, int], np.ndarray]  # a norm's or bias's float32, zeros for None, filled up with zeros
    buffers: Mapping[str, np.ndarray]  # name -> float32 [tokens, width filled up to 32]
    address: Callable[[str, str], int]  # of a format's kernel


def check(plan: P.Plan, formats: Iterable[str]) -> None:
    """Raises NativeUnavailable where there is no code for an operation of the plan or for one of its matrices' formats."""
    if lacking := sorted(set(formats) - LAYOUTS.keys()):
        raise NativeUnavailable(f"there is no native code for {', '.join(lacking)} weights")
    for _, ops in _fused(plan):
        for op in ops:
            known = {P.Norm: NORMS, P.Activate: sizes.ACTIVATIONS}.get(type(op))
            if known is not None and op.kind not in known:
                raise NativeUnavailable(f"there is no native code for {type(op).__name__} of the kind {op.kind!r}")


def encode(plan: P.Plan, storage: Storage, n_threads: int) -> np.ndarray:
    """The program, an array of OPERATION. Raises NativeUnavailable for an order of operations that it does not know."""
    encoder = _Encoder(storage, n_threads)
    for emit, ops in _fused(plan):
        emit(encoder, *ops)
    return np.frombuffer(bytearray(b"".join(encoder.records)), OPERATION)  # np.concatenate takes 60 µs a record


def _fused(plan: P.Plan) -> Iterator[tuple[Callable[..., None], Sequence[Any]]]:
    """The plan's operations in the groups that are encoded together, each with what encodes it."""
    ops: list[Any] = list(plan.ops)
    while ops:
        for pattern, emit in _PATTERNS:
            head = ops[: len(pattern)]
            if len(head) == len(pattern) and all(isinstance(op, kind) for op, kind in zip(head, pattern, strict=True)):
                yield emit, head
                ops = ops[len(pattern) :]
                break
        else:
            follows = f" before {type(ops[1]).__name__}" if len(ops) > 1 else ""
            raise NativeUnavailable(f"there is no native code for {type(ops[0]).__name__}{follows}")


class _Encoder:
    def __init__(self, storage: Storage, n_threads: int):
        self.storage, self.n_threads = storage, n_threads
        self.records: list[np.ndarray] = []

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

    def vector(self, name: str | None, n: int) -> int:
        return self.storage.vectors(name, n).ctypes.data

    def embed(self, op: P.Embed) -> None:
        for name, position in ((op.table, 0), (op.positions, 1)):
            if name is not None:
                table = self.storage.matrices[name]
                self.emit(
                    sizes.EMBED, **self.out(op.out), n=table.n_columns, weight=table.data.ctypes.data,
                    n_groups=groups(table.n_rows), n_blocks=table.n_columns // LAYOUTS[table.format].block_size,
                    row=self.storage.address(table.format, "row"), by_position=position, add=position, barrier=1,
                )  # fmt: skip

    def prepare(self, x: str, n: int, source: int, tail: bool = False, **fields: float) -> None:
        self.emit(sizes.PREPARE, **self.x(x), n=n, source=source, barrier=1, tail=tail, **fields)

    def norm(self, op: P.Norm, n: int, tail: bool = False) -> None:
        weight, bias = self.vector(op.weight, n), self.vector(op.bias, n)
        self.prepare(op.x, n, NORMS[op.kind], tail, weight=weight, bias=bias, epsilon=op.eps)

    def matrix(self, matrix: P.Matrix, out: str, add: bool = False, activation: int = 0, tail: bool = False) -> None:
        """One record a tensor; they need no barrier between them, since each has rows of its own."""
        column = 0
        for name, bias in zip(matrix.weights, matrix.biases, strict=True):
            w = self.storage.matrices[name]
            self.emit(
                sizes.MATRIX, **self.out(out, column), n=w.n_rows, bias=self.vector(bias, 16 * groups(w.n_rows)), add=add,
                activation=activation, chunk=self.chunk(groups(w.n_rows)), tail=tail, **self.weights(w),
            )  # fmt: skip
            column += w.n_rows
        self.records[-1]["barrier"] = 1

    def weights(self, w: TiledMatrix) -> dict[str, int]:
        return {
            "weight": w.data.ctypes.data, "n_groups": groups(w.n_rows),
            "n_blocks": w.n_columns // LAYOUTS[w.format].block_size,
            **{f"product{tile}": self.storage.address(w.format, f"product{tile}") for tile in sizes.TILES},
        }  # fmt: skip

    def gated(self, matrix: P.Matrix, out: str, activation: int) -> None:
        """The gate's rows activated and multiplied with the same rows of the second matrix."""
        gate, up = (self.storage.matrices[name] for name in matrix.weights)
        n = 16 * groups(gate.n_rows)
        second = self.weights(up)
        self.emit(
            sizes.MATRIX, **self.out(out), n=gate.n_rows, bias=self.vector(matrix.biases[0], n), activation=activation,
            chunk=self.chunk(groups(gate.n_rows)), barrier=1, **self.weights(gate), up=second["weight"],
            up_blocks=second["n_blocks"], up_bias=self.vector(matrix.biases[1], n),
            **{f"up_product{tile}": second[f"product{tile}"] for tile in sizes.TILES},
        )  # fmt: skip

    def chunk(self, n_groups: int) -> int:
        """Groups a task: about four tasks a thread, so that a slow thread does not hold the others, and as many for each."""

        def most(chunk: int) -> int:  # groups of the thread with the most
            tasks = -(-n_groups // chunk)
            return min(-(-tasks // self.n_threads) * chunk, n_groups)

        largest = max(1, min(sizes.MAX_CHUNK, n_groups // (4 * self.n_threads)))
        return min(range(largest, largest // 2, -1), key=most)

    def normed_linear(self, norm: P.Norm, linear: P.Linear) -> None:
        self.norm(norm, linear.matrix.n_in)
        self.matrix(linear.matrix, linear.out)

    def normed_feed_forward(self, norm: P.Norm, linear: P.Linear, activate: P.Activate) -> None:
        self.norm(norm, linear.matrix.n_in)
        activation = 1 + sizes.ACTIVATIONS.index(activate.kind)
        if activate.gated:
            self.gated(linear.matrix, activate.out, activation)
        else:
            self.matrix(linear.matrix, activate.out, activation=activation)

    def attend(self, op: P.Attend, linear: P.Linear, add: P.Add) -> None:
        for kind in (sizes.STORE, sizes.ATTEND):
            self.emit(kind, **self.x(op.qkv), barrier=1, layer=op.layer)
        self.prepare(op.out, linear.matrix.n_in, sizes.PARTIALS)
        self.matrix(linear.matrix, add.out, add=True)

    def rotated_attend(self, rotate: P.Rotate, op: P.Attend, linear: P.Linear, add: P.Add) -> None:
        self.attend(op, linear, add)  # STORE rotates

    def residual(self, linear: P.Linear, add: P.Add) -> None:
        self.prepare(linear.x, linear.matrix.n_in, sizes.AS_IT_IS)
        self.matrix(linear.matrix, add.out, add=True)

    def logits(self, norm: P.Norm, op: P.Logits) -> None:
        self.norm(norm, op.matrix.n_in, tail=True)
        self.matrix(op.matrix, op.out, tail=True)


_PATTERNS: tuple[tuple[tuple[type, ...], Callable[..., None]], ...] = (
    ((P.Embed,), _Encoder.embed),
    ((P.Norm, P.Linear, P.Activate), _Encoder.normed_feed_forward),
    ((P.Norm, P.Linear), _Encoder.normed_linear),
    ((P.Rotate, P.Attend, P.Linear, P.Add), _Encoder.rotated_attend),
    ((P.Attend, P.Linear, P.Add), _Encoder.attend),
    ((P.Linear, P.Add), _Encoder.residual),
    ((P.Norm, P.Logits), _Encoder.logits),
)
