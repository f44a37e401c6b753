"""Writes the plan of a model down as an ONNX graph (opset 17), with its KV cache as inputs and outputs.

In: a `CanonicalModel`. Out: a graph whose names and shapes are those that Optimum and transformers.js use:

    input_ids                  int64    [batch, n]
    attention_mask             int64    [batch, past + n], 0 where a position is padding
    past_key_values.{i}.key    float    [batch, n_kv_head, past, head_dim], and .value; past may be 0
    logits                     float32  [batch, n, n_vocab]
    present.{i}.key            float    [batch, n_kv_head, past + n, head_dim], and .value

Positions come from the mask, so the rows of a batch may be padded on the left. Every method below whose name is an
operation of the plan writes that operation, as `runtime/numpy_executor.py` computes it. A model in half precision
computes products and keeps its cache in float16; norms, softmax and the residual stream stay float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from pocketlm.errors import PocketlmError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.onnx_store import Store
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.runtime import plan as P
from pocketlm.runtime.activations import GELU_TANH_CUBE, GELU_TANH_SCALE
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.positions import alibi_slopes, rope_table

OPSET, IR_VERSION = 17, 8
MASKED = -1e30  # a score that softmax turns into 0; -inf would make NaN of a row that is all padding


class Graph:
    """The nodes of one model. `done` tells what became of every tensor; `build` makes the ONNX model."""

    def __init__(self, plan: P.Plan, model: CanonicalModel, encoder: Encoder, store: Store, half: bool, int8: bool):
        """`int8`: onnxruntime's dynamic quantisation comes after. It wants a matrix of its own for a tied head, and the
        matrices behind the activation are taken out of its hands: their inputs have outliers a hundred times the rest.
        """
        self.hyper, self._plan, self._model, self._encoder, self._store = plan.hyper, plan, model, encoder, store
        self._half, self._int8 = half, int8
        self._nodes: list[Any] = []
        self._values: dict[str, str] = {}  # buffer of the plan -> the name of the value it holds now
        self._done: dict[str, Encoded] = {}
        self._write: dict[type, Callable[[Any], None]] = {
            P.Embed: self._embed, P.Norm: self._norm, P.Linear: self._linear, P.Rotate: self._rotate,
            P.Attend: self._attend, P.Activate: self._activate, P.Add: self._add, P.Logits: self._linear,
        }  # fmt: skip

    @property
    def done(self) -> list[Encoded]:
        return list(self._done.values())

    def build(self) -> ModelProto:
        """The whole model, in the order of the plan."""
        hyper, kind = self.hyper, TensorProto.FLOAT16 if self._half else TensorProto.FLOAT
        self._positions()
        for op in self._plan.ops:
            self._write[type(op)](op)
        self._node("Identity", self._values["logits"], out="logits")

        def cache(side: str, length: str) -> list[Any]:
            names = [f"{side}.{i}.{part}" for i in range(hyper.n_layer) for part in ("key", "value")]
            shape = ["batch", hyper.n_kv_head, length, hyper.head_dim]
            return [helper.make_tensor_value_info(name, kind, shape) for name in names]

        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "n"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "n", hyper.n_vocab])
        graph = helper.make_graph(
            self._nodes, hyper.architecture, inputs + cache("past_key_values", "past"), [logits, *cache("present", "total")],
            self._store.tensors,
        )  # fmt: skip
        built = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="pocketlm")
        built.ir_version = IR_VERSION
        return built

    # ── pieces of a graph ────────────────────────────────────────────────────────────────────────────────────────────

    def _node(self, op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        """Add an operation; the name of its output."""
        out = out or f"{op}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [out], name=f"{op}_{len(self._nodes)}", **attributes))
        return out

    def _split(self, x: str, *sizes: int) -> list[str]:
        """Cut the last dimension into pieces of these sizes; empty ones are left out."""
        kept = [size for size in sizes if size]
        name = f"Split_{len(self._nodes)}"
        parts = [f"{name}_{i}" for i in range(len(kept))]
        self._nodes.append(helper.make_node("Split", [x, self._ints(*kept)], parts, name=name, axis=-1))
        return parts

    def _ints(self, *values: int) -> str:
        return self._store.add("ints_" + "_".join(map(str, values)), np.array(values, np.int64))

    def _number(self, value: float) -> str:
        return self._store.add(f"number_{value!r}", np.array(value, np.float32))

    def _reshape(self, x: str, *shape: int) -> str:  # 0 keeps a dimension
        return self._node("Reshape", x, self._ints(*shape))

    def _unsqueeze(self, x: str, *axes: int) -> str:
        return self._node("Unsqueeze", x, self._ints(*axes))

    def _cast(self, x: str, half: bool) -> str:
        """To float16 or back, in a model of half precision."""
        return self._node("Cast", x, to=TensorProto.FLOAT16 if half else TensorProto.FLOAT) if self._half else x

    def _weight(self, name: str, array: np.ndarray) -> str:
        return self._store.add(name, array.astype(np.float16) if self._half else array)

    def _eight_bits(self, name: str, matrix: np.ndarray) -> str:
        """A matrix [n_in, n_out] kept in 8 bits, with a scale for each column, and multiplied in float32."""
        scale = np.maximum(np.abs(matrix).max(0) / 127, np.finfo(np.float32).tiny).astype(np.float32)
        codes = self._store.add(name, np.rint(matrix / scale).astype(np.int8))
        return self._node("DequantizeLinear", codes, self._store.add(f"{name}.scale", scale), axis=1)

    def _read(self, name: str) -> np.ndarray:
        weights, largest = self._encoder.read(name, self._model.tensors[name])
        half = self._half and weights.ndim > 1
        if half and largest > 65504:
            raise PocketlmError(f"tensor {name} has weights up to {largest:.3g}, too large for float16; use --quant f32")
        if name not in self._done:
            self._done[name] = Encoded(name, weights.shape, FORMATS["F16" if half else "F32"])
            for _ in self._encoder.pieces(self._done[name], weights):  # measures what float16 costs
                pass
        return weights

    def _vector(self, name: str) -> str:
        return self._store.add(name, self._read(name))

    # ── positions, for all layers at once ────────────────────────────────────────────────────────────────────────────

    def _positions(self) -> None:
        """Where keys and queries stand, which keys a query may see, and the tables that follow from that."""
        hyper, end = self.hyper, self._ints(np.iinfo(np.int64).max)
        n, total = (self._node("Slice", self._node("Shape", x), self._ints(1), end) for x in ("input_ids", "attention_mask"))
        keys = self._node("CumSum", "attention_mask", self._ints(1))
        keys = self._node("Max", self._node("Sub", keys, self._ints(1)), self._ints(0))  # [batch, total]
        queries = self._node("Slice", keys, self._node("Neg", n), end, self._ints(1))  # [batch, n]
        zero, one, stop = (self._node("Squeeze", x) for x in (self._ints(0), self._ints(1), total))
        places = self._node("Range", zero, stop, one)  # [total]
        mine = self._node("Slice", places, self._node("Neg", n), end)  # [n]
        causal = self._node("LessOrEqual", places, self._unsqueeze(mine, 1))  # [n, total]
        real = self._unsqueeze(self._node("Equal", "attention_mask", self._ints(1)), 1, 2, 3)
        self._values["visible"] = self._node("And", causal, real)  # [batch, 1, 1, n, total]
        self._values["positions"] = queries
        if hyper.position == "alibi":
            distance = self._node("Sub", self._unsqueeze(keys, 1, 2, 3), self._unsqueeze(queries, 1, 2, 4))
            slopes = alibi_slopes(hyper.n_head, hyper.alibi_max_bias).reshape(hyper.n_kv_head, -1, 1, 1)
            distance = self._node("Cast", distance, to=TensorProto.FLOAT)
            self._values["alibi"] = self._node("Mul", distance, self._store.add("alibi_slopes", slopes))
        if hyper.rope:
            factors = self._read(self._plan.rope_factors) if self._plan.rope_factors else None
            table = rope_table(hyper.rope, hyper.n_ctx, factors)
            for i, name in enumerate(("cos", "sin")):  # [batch, n, 1, half]
                rows = self._node("Gather", self._store.add(f"rope_{name}", table[:, i]), queries)
                self._values[name] = self._unsqueeze(rows, 2)

    # ── the operations of the plan ───────────────────────────────────────────────────────────────────────────────────

    def _embed(self, op: P.Embed) -> None:
        x = self._cast(self._node("Gather", self._weight(op.table, self._read(op.table)), "input_ids"), False)
        if op.positions:
            rows = self._node("Gather", self._weight(op.positions, self._read(op.positions)), self._values["positions"])
            x = self._node("Add", x, self._cast(rows, False))
        self._values[op.out] = x

    def _norm(self, op: P.Norm) -> None:
        x, weight, bias = self._values[op.x], self._vector(op.weight), [self._vector(op.bias)] if op.bias else []
        if op.kind == "layer":
            self._values[op.out] = self._node("LayerNormalization", x, weight, *bias, epsilon=op.eps)
            return
        mean = self._node("ReduceMean", self._node("Mul", x, x), axes=[-1])
        size = self._node("Sqrt", self._node("Add", mean, self._number(op.eps)))
        y = self._node("Mul", self._node("Div", x, size), weight)
        self._values[op.out] = self._node("Add", y, *bias) if bias else y

    def _linear(self, op: P.Linear | P.Logits) -> None:
        names, biases = op.matrix.weights, op.matrix.biases
        if not self._int8 and names == (self._plan.ops[0].table,):  # type: ignore[union-attr]  # the first op is Embed
            weight = self._node("Transpose", names[0], perm=[1, 0])  # done once, when the model is loaded
        else:
            rows = np.concatenate([self._half_split(name, self._read(name)) for name in names])
            write = self._eight_bits if self._int8 and op.x == "act" else self._weight
            weight = write("+".join(names) + ".T", rows.T)
        y = self._cast(self._node("MatMul", self._cast(self._values[op.x], True), weight), False)
        if any(biases):
            parts = [
                self._half_split(bias, self._read(bias)) if bias else np.zeros(self._plan.weights[name][0], np.float32)
                for name, bias in zip(names, biases, strict=True)
            ]
            y = self._node("Add", y, self._store.add("+".join(names) + ".bias", np.concatenate(parts)))
        self._values[op.out] = y

    def _half_split(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Rows of queries and keys from interleaved to half-split pairs: every score stays what it was."""
        hyper, n_q, n_k = self.hyper, self.hyper.n_head, self.hyper.n_kv_head
        n_heads = {"attn_q": n_q, "attn_k": n_k, "attn_qkv": n_q + n_k}.get(name.split(".")[-2], 0)
        if not n_heads or not hyper.rope or hyper.rope.pairs == "half":
            return rows
        n_dims, n_rows = hyper.rope.n_dims, n_heads * hyper.head_dim
        order = [*range(0, n_dims, 2), *range(1, n_dims, 2), *range(n_dims, hyper.head_dim)]
        heads = rows[:n_rows].reshape(n_heads, hyper.head_dim, *rows.shape[1:])[:, order]
        return np.concatenate([heads.reshape(n_rows, *rows.shape[1:]), rows[n_rows:]])

    def _rotate(self, op: P.Rotate) -> None:
        hyper, cos, sin = self.hyper, self._values["cos"], self._values["sin"]
        assert hyper.rope
        half = hyper.rope.n_dims // 2
        turned, values = self._split(self._values[op.qkv], hyper.q_width + hyper.kv_width, hyper.kv_width)
        heads = self._reshape(turned, 0, 0, hyper.n_head + hyper.n_kv_head, hyper.head_dim)
        a, b, *rest = self._split(heads, half, half, hyper.head_dim - 2 * half)
        first = self._node("Sub", self._node("Mul", a, cos), self._node("Mul", b, sin))
        second = self._node("Add", self._node("Mul", a, sin), self._node("Mul", b, cos))
        heads = self._node("Concat", first, second, *rest, axis=-1)
        self._values[op.qkv] = self._node("Concat", self._reshape(heads, 0, 0, hyper.q_width + hyper.kv_width), values, axis=-1)

    def _attend(self, op: P.Attend) -> None:
        hyper, kv, group = self.hyper, self.hyper.n_kv_head, self.hyper.n_head // self.hyper.n_kv_head
        q, *new = self._split(self._values[op.qkv], hyper.q_width, hyper.kv_width, hyper.kv_width)
        q = self._node("Mul", q, self._number(1 / math.sqrt(hyper.head_dim)))
        q = self._node("Transpose", self._reshape(self._cast(q, True), 0, 0, kv, group, hyper.head_dim), perm=[0, 2, 3, 1, 4])
        cached = []
        for x, part in zip(new, ("key", "value"), strict=True):
            x = self._node("Transpose", self._reshape(self._cast(x, True), 0, 0, kv, hyper.head_dim), perm=[0, 2, 1, 3])
            x = self._node("Concat", f"past_key_values.{op.layer}.{part}", x, out=f"present.{op.layer}.{part}", axis=2)
            cached.append(self._unsqueeze(x, 2))  # [batch, n_kv_head, 1, total, head_dim]: heads of a group share it
        keys, values = cached
        scores = self._cast(self._node("MatMul", q, self._node("Transpose", keys, perm=[0, 1, 2, 4, 3])), False)
        if "alibi" in self._values:
            scores = self._node("Add", scores, self._values["alibi"])
        scores = self._node("Where", self._values["visible"], scores, self._number(MASKED))
        shares = self._cast(self._node("Softmax", scores, axis=-1), True)  # [batch, n_kv_head, group, n, total]
        mix = self._node("Transpose", self._cast(self._node("MatMul", shares, values), False), perm=[0, 3, 1, 2, 4])
        self._values[op.out] = self._reshape(mix, 0, 0, hyper.q_width)

    def _activate(self, op: P.Activate) -> None:
        x, up = self._values[op.x], ""
        if op.gated:
            x, up = self._split(x, self.hyper.n_ff, self.hyper.n_ff)
        y = {"silu": self._silu, "relu": self._relu, "gelu_erf": self._gelu_erf, "gelu_tanh": self._gelu_tanh}[op.kind](x)
        self._values[op.out] = self._node("Mul", y, up) if up else y

    def _add(self, op: P.Add) -> None:
        self._values[op.out] = self._node("Add", self._values[op.out], self._values[op.x])

    # ── activations, as in runtime/activations.py ────────────────────────────────────────────────────────────────────

    def _silu(self, x: str) -> str:
        return self._node("Mul", x, self._node("Sigmoid", x))

    def _relu(self, x: str) -> str:
        return self._node("Relu", x)

    def _gelu_erf(self, x: str) -> str:
        return self._gelu(x, self._node("Erf", self._node("Mul", x, self._number(math.sqrt(0.5)))))

    def _gelu_tanh(self, x: str) -> str:
        cube = self._node("Mul", self._node("Mul", x, x), self._node("Mul", x, self._number(GELU_TANH_CUBE)))
        inner = self._node("Mul", self._node("Add", x, cube), self._number(GELU_TANH_SCALE))
        return self._gelu(x, self._node("Tanh", inner))

    def _gelu(self, x: str, curve: str) -> str:
        return self._node("Mul", self._node("Mul", x, self._number(0.5)), self._node("Add", curve, self._number(1.0)))
