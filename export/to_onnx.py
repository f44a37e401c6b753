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
from functools import partial
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from pocketlm.errors import PocketlmError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.onnx_store import Store
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.runtime import operations as P
from pocketlm.runtime.activations import CLAMP, CLAMPED_SCALE, GELU_TANH_CUBE, GELU_TANH_SCALE
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.positions import Rotary, alibi_slopes, rope_tables, rotary

OPSET, IR_VERSION = 17, 8
MASKED = -1e30  # a score that softmax turns into 0; -inf would make NaN of a row that is all padding


class Graph:
    """The nodes of one model. `build` makes the ONNX model; `done`: what was written for every tensor."""

    def __init__(self, plan: Plan, model: CanonicalModel, encoder: Encoder, store: Store, half: bool, int8: bool):
        """`int8`: the graph is for onnxruntime's dynamic quantisation. That needs a separate matrix for a tied head; and the
        matrices behind the activation are quantised here, because their inputs have outliers a hundred times the rest.
        """
        self.hyper, self._plan, self._model, self._encoder, self._store = plan.hyper, plan, model, encoder, store
        self._half, self._int8 = half, int8
        self._nodes: list[Any] = []
        self._values: dict[str, str] = {}  # buffer of the plan -> the name of the value it holds now
        self._done: dict[str, Encoded] = {}
        self._write: dict[type, Callable[[Any], None]] = {
            P.Embed: self._embed, P.Norm: self._norm, P.Linear: self._linear, P.Rotate: self._rotate,
            P.Attend: self._attend, P.Activate: self._activate, P.Add: self._add, P.Scale: self._scale,
            P.Softcap: self._softcap, P.Gate: self._gate, P.Convolve: self._convolve, P.Logits: self._linear,
        }  # fmt: skip
        self._regrouped = self._to_regroup()
        self._visible: dict[int, str] = {}  # window -> which keys a query sees
        self._penalties: dict[float, str] = {}  # ALiBi's max_bias -> what it adds to the scores
        self._rotations: dict[Rotary, tuple[str, str]] = {}  # -> cos and sin of the queries' positions

    @property
    def done(self) -> list[Encoded]:
        return list(self._done.values())

    def build(self) -> ModelProto:
        """The whole model, written in the order of the plan."""
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
        """Cast to float16 or back, if the model is in half precision."""
        return self._node("Cast", x, to=TensorProto.FLOAT16 if half else TensorProto.FLOAT) if self._half else x

    def _weight(self, name: str, array: np.ndarray) -> str:
        return self._store.add(name, array.astype(np.float16) if self._half else array)

    def _eight_bits(self, name: str, matrix: np.ndarray) -> str:
        """A matrix [n_in, n_out] that is stored in 8 bits, with a scale for each column, but multiplied in float32."""
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
        """Add the positions of keys and queries, the masks of the keys that a query may see, and the tables made from these."""
        end = self._ints(np.iinfo(np.int64).max)
        n, total = (self._node("Slice", self._node("Shape", x), self._ints(1), end) for x in ("input_ids", "attention_mask"))
        keys = self._node("CumSum", "attention_mask", self._ints(1))
        keys = self._node("Max", self._node("Sub", keys, self._ints(1)), self._ints(0))  # [batch, total]
        queries = self._node("Slice", keys, self._node("Neg", n), end, self._ints(1))  # [batch, n]
        zero, one, stop = (self._node("Squeeze", x) for x in (self._ints(0), self._ints(1), total))
        places = self._node("Range", zero, stop, one)  # [total]
        mine = self._node("Slice", places, self._node("Neg", n), end)  # [n]
        causal = self._node("LessOrEqual", places, self._unsqueeze(mine, 1))  # [n, total]
        real = self._unsqueeze(self._node("Equal", "attention_mask", self._ints(1)), 1, 2, 3)
        self._values["positions"] = queries
        visible = self._node("And", causal, real)  # [batch, 1, 1, n, total]
        ops = self._plan.ops
        attends = [op for op in ops if isinstance(op, P.Attend)]
        for window in {op.window: None for op in attends}:
            near = self._node("Greater", self._distance(keys), self._ints(-window)) if window else ""
            self._visible[window] = self._node("And", visible, near) if window else visible
        for max_bias in {op.alibi_max_bias: None for op in attends if op.alibi_max_bias}:
            slopes = alibi_slopes(self.hyper.n_head, max_bias).reshape(self.hyper.n_kv_head, -1, 1, 1)
            stored = self._store.add(f"alibi_slopes_{max_bias!r}", slopes)
            distance = self._node("Cast", self._distance(keys), to=TensorProto.FLOAT)
            self._penalties[max_bias] = self._node("Mul", distance, stored)
        for number, (key, table) in enumerate(rope_tables(ops, self._read, self.hyper.n_ctx).items()):
            names = []
            for i, name in enumerate(("cos", "sin")):  # [batch, n, 1, half]
                stored = self._store.add(f"rope_{name}" + (f"_{number}" if number else ""), table[:, i])
                names.append(self._unsqueeze(self._node("Gather", stored, queries), 2))
            self._rotations[key] = (names[0], names[1])

    def _distance(self, keys: str) -> str:
        """Positions of keys minus those of queries, int64 [batch, 1, 1, n, total]: negative for the past."""
        if "distance" not in self._values:
            queries = self._unsqueeze(self._values["positions"], 1, 2, 4)
            self._values["distance"] = self._node("Sub", self._unsqueeze(keys, 1, 2, 3), queries)
        return self._values["distance"]

    # ── the operations of the plan ───────────────────────────────────────────────────────────────────────────────────

    def _embed(self, op: P.Embed) -> None:
        if op.before:  # a pass does not know what came before it
            raise PocketlmError("this model looks at the token before each, which an ONNX graph is not told; export a GGUF")
        x = self._cast(self._node("Gather", self._weight(op.table, self._read(op.table)), "input_ids"), False)
        if op.positions:
            rows = self._node("Gather", self._weight(op.positions, self._read(op.positions)), self._values["positions"])
            x = self._node("Add", x, self._cast(rows, False))
        self._values[op.out] = x

    def _norm(self, op: P.Norm) -> None:
        """Normalise a row, or some columns of it, in groups."""
        x, before, after = self._values[op.x], op.column, self._plan.buffers[op.x] - op.column - op.n_groups * op.width
        is_all = not before and not after and op.n_groups == 1
        parts = [x] if is_all else self._split(x, before, op.n_groups * op.width, after)
        at = int(before > 0)
        groups = parts[at] if is_all else self._reshape(parts[at], 0, 0, op.n_groups, op.width)
        y = self._normalised(op, groups)
        parts[at] = y if is_all else self._reshape(y, 0, 0, op.n_groups * op.width)
        self._values[op.out] = self._node("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]

    def _normalised(self, op: P.Norm, x: str) -> str:
        weight, bias = ([self._vector(name)] if name else [] for name in (op.weight, op.bias))
        if op.kind == "layer" and not any(len(self._plan.weights[name]) > 1 for name in (op.weight, op.bias) if name):
            ones = weight or [self._store.add(f"ones_{op.width}", np.ones(op.width, np.float32))]
            return self._node("LayerNormalization", x, *ones, *bias, epsilon=op.eps)
        if op.kind == "layer":
            x = self._node("Sub", x, self._node("ReduceMean", x, axes=[-1]))
        mean = self._node("ReduceMean", self._node("Mul", x, x), axes=[-1])
        y = self._node("Div", x, self._node("Sqrt", self._node("Add", mean, self._number(op.eps))))
        y = self._node("Mul", y, *weight) if weight else y
        return self._node("Add", y, *bias) if bias else y

    def _linear(self, op: P.Linear | P.Logits) -> None:
        names, biases = op.matrix.weights, op.matrix.biases
        if not self._int8 and names == (self._plan.ops[0].table,):  # type: ignore[union-attr]  # the first op is Embed
            weight = self._node("Transpose", names[0], perm=[1, 0])  # done once, when the model is loaded
        else:
            rows = self._half_split(op.out, np.concatenate([self._read(name) for name in names]))
            write = self._eight_bits if self._int8 and op.x == "act" else self._weight
            weight = write("+".join(names) + ".T", rows.T)
        y = self._cast(self._node("MatMul", self._cast(self._values[op.x], True), weight), False)
        if any(biases):
            parts = [
                self._read(bias) if bias else np.zeros(self._plan.weights[name][0], np.float32)
                for name, bias in zip(names, biases, strict=True)
            ]
            bias = self._half_split(op.out, np.concatenate(parts))
            y = self._node("Add", y, self._store.add("+".join(names) + ".bias", bias))
        self._values[op.out] = y

    def _half_split(self, out: str, rows: np.ndarray) -> np.ndarray:
        """Reorder rows of queries and keys from interleaved to half-split pairs, which changes no attention score."""
        op = self._regrouped
        if op is None or op.qkv != out:
            return rows
        n_dims, d, n_rows = op.rope.n_dims, op.head_dim, op.n_heads * op.head_dim
        order = [*range(0, n_dims, 2), *range(1, n_dims, 2), *range(n_dims, d)]
        heads = rows[:n_rows].reshape(-1, d, *rows.shape[1:])[:, order]
        return np.concatenate([heads.reshape(n_rows, *rows.shape[1:]), rows[n_rows:]])

    def _to_regroup(self) -> P.Rotate | None:
        """The rotation, if all layers have the same one, of interleaved pairs, and no norm depends on the order of its rows."""
        rotations = [op for op in self._plan.ops if isinstance(op, P.Rotate)]
        kinds = {(op.qkv, op.n_heads, op.head_dim, op.rope.n_dims, op.rope.pairs) for op in rotations}
        if len(kinds) != 1 or rotations[0].rope.pairs == "half":
            return None
        is_normed = any(isinstance(op, P.Norm) and op.out == rotations[0].qkv for op in self._plan.ops)
        return None if is_normed else rotations[0]

    def _rotate(self, op: P.Rotate) -> None:
        cos, sin = self._rotations[rotary(op, self.hyper.n_ctx)]
        half, width = op.rope.n_dims // 2, op.n_heads * op.head_dim
        turned, *values = self._split(self._values[op.qkv], width, self._plan.buffers[op.qkv] - width)
        heads = self._reshape(turned, 0, 0, op.n_heads, op.head_dim)
        adjacent = op.rope.pairs == "interleaved" and self._regrouped is None
        if adjacent:
            pairs, *rest = self._split(heads, 2 * half, op.head_dim - 2 * half)
            both = self._split(self._reshape(pairs, 0, 0, op.n_heads, half, 2), 1, 1)
            a, b = (self._reshape(x, 0, 0, op.n_heads, half) for x in both)
        else:
            a, b, *rest = self._split(heads, half, half, op.head_dim - 2 * half)
        first = self._node("Sub", self._node("Mul", a, cos), self._node("Mul", b, sin))
        second = self._node("Add", self._node("Mul", a, sin), self._node("Mul", b, cos))
        if adjacent:
            both = self._node("Concat", self._unsqueeze(first, -1), self._unsqueeze(second, -1), axis=-1)
            heads = self._reshape(both, 0, 0, op.n_heads, 2 * half)
            heads = self._node("Concat", heads, *rest, axis=-1) if rest else heads
        else:
            heads = self._node("Concat", first, second, *rest, axis=-1)
        self._values[op.qkv] = self._node("Concat", self._reshape(heads, 0, 0, width), *values, axis=-1)

    def _attend(self, op: P.Attend) -> None:
        kv, group, d = op.n_kv_head, op.n_head // op.n_kv_head, op.head_dim
        q, *new = self._split(self._values[op.qkv], op.n_head * d, kv * d, kv * d)
        q = self._node("Mul", q, self._number(op.scale))
        q = self._node("Transpose", self._reshape(self._cast(q, True), 0, 0, kv, group, d), perm=[0, 2, 3, 1, 4])
        cached = []
        for x, part in zip(new, ("key", "value"), strict=True):
            x = self._node("Transpose", self._reshape(self._cast(x, True), 0, 0, kv, d), perm=[0, 2, 1, 3])
            x = self._node("Concat", f"past_key_values.{op.layer}.{part}", x, out=f"present.{op.layer}.{part}", axis=2)
            cached.append(self._unsqueeze(x, 2))  # [batch, n_kv_head, 1, total, head_dim]: heads of a group share it
        keys, values = cached
        scores = self._cast(self._node("MatMul", q, self._node("Transpose", keys, perm=[0, 1, 2, 4, 3])), False)
        if op.softcap:
            scores = self._capped(scores, op.softcap)
        if op.alibi_max_bias:
            scores = self._node("Add", scores, self._penalties[op.alibi_max_bias])
        scores = self._node("Where", self._visible[op.window], scores, self._number(MASKED))
        if op.sinks:  # one more score, whose share is dropped
            sinks = self._store.add(op.sinks, self._read(op.sinks).reshape(kv, group, 1, 1))
            first = self._node("Slice", scores, self._ints(0), self._ints(1), self._ints(-1))
            sinks = self._node("Add", self._node("Mul", first, self._number(0.0)), sinks)
            shares = self._node("Softmax", self._node("Concat", sinks, scores, axis=-1), axis=-1)
            end = self._ints(np.iinfo(np.int64).max)
            shares = self._cast(self._node("Slice", shares, self._ints(1), end, self._ints(-1)), True)
        else:
            shares = self._cast(self._node("Softmax", scores, axis=-1), True)  # [batch, n_kv_head, group, n, total]
        mix = self._node("Transpose", self._cast(self._node("MatMul", shares, values), False), perm=[0, 3, 1, 2, 4])
        self._values[op.out] = self._reshape(mix, 0, 0, op.n_head * d)

    def _convolve(self, op: P.Convolve) -> None:  # there is no name for its state that others would look for
        raise PocketlmError("this model has short convolutions, whose state pocketlm's ONNX graphs do not keep; export a GGUF")

    def _activate(self, op: P.Activate) -> None:
        x, up = self._values[op.x], ""
        if op.gated:
            x, up = self._split(x, op.n, op.n)
        y = {
            "silu": self._silu, "relu": partial(self._node, "Relu"), "gelu_erf": self._gelu_erf, "gelu_tanh": self._gelu_tanh,
            "relu_squared": self._relu_squared, "swiglu_clamped": self._swiglu_clamped,
        }[op.kind](x)  # fmt: skip
        if up and op.kind == "swiglu_clamped":
            up = self._node("Clip", up, self._number(-CLAMP), self._number(CLAMP))
            up = self._node("Add", up, self._number(1.0))
        self._values[op.out] = self._node("Mul", y, up) if up else y

    def _add(self, op: P.Add) -> None:
        x = self._values[op.x] if op.factor == 1 else self._node("Mul", self._values[op.x], self._number(op.factor))
        self._values[op.out] = self._node("Add", self._values[op.out], x)

    def _gate(self, op: P.Gate) -> None:
        width = op.n_groups * op.width
        seen, *_ = self._split(self._values[op.x], op.n_columns, self._plan.buffers[op.x] - op.n_columns)
        gates = self._node("MatMul", seen, self._store.add(f"{op.weight}.T", self._read(op.weight).T.copy()))
        gates = self._unsqueeze(self._node("Mul", self._node("Sigmoid", gates), self._number(op.factor)), -1)
        y = self._reshape(self._values[op.y], 0, 0, op.n_groups, op.width)
        y = self._reshape(self._node("Mul", y, gates), 0, 0, width)
        before, after = op.column, self._plan.buffers[op.out] - op.column - width
        parts = self._split(self._values[op.out], before, width, after)
        at = int(before > 0)
        parts[at] = self._node("Add", parts[at], y)
        self._values[op.out] = self._node("Concat", *parts, axis=-1) if len(parts) > 1 else parts[0]

    def _scale(self, op: P.Scale) -> None:
        self._values[op.out] = self._node("Mul", self._values[op.x], self._number(op.factor))

    def _softcap(self, op: P.Softcap) -> None:
        self._values[op.out] = self._capped(self._values[op.x], op.cap)

    def _capped(self, x: str, cap: float) -> str:
        return self._node("Mul", self._node("Tanh", self._node("Div", x, self._number(cap))), self._number(cap))

    # ── activations, as in runtime/activations.py ────────────────────────────────────────────────────────────────────

    def _silu(self, x: str) -> str:
        return self._node("Mul", x, self._node("Sigmoid", x))

    def _swiglu_clamped(self, x: str) -> str:
        x = self._node("Min", x, self._number(CLAMP))
        return self._node("Mul", x, self._node("Sigmoid", self._node("Mul", x, self._number(CLAMPED_SCALE))))

    def _relu_squared(self, x: str) -> str:
        y = self._node("Relu", x)
        return self._node("Mul", y, y)

    def _gelu_erf(self, x: str) -> str:
        return self._gelu(x, self._node("Erf", self._node("Mul", x, self._number(math.sqrt(0.5)))))

    def _gelu_tanh(self, x: str) -> str:
        cube = self._node("Mul", self._node("Mul", x, x), self._node("Mul", x, self._number(GELU_TANH_CUBE)))
        inner = self._node("Mul", self._node("Add", x, cube), self._number(GELU_TANH_SCALE))
        return self._gelu(x, self._node("Tanh", inner))

    def _gelu(self, x: str, curve: str) -> str:
        return self._node("Mul", self._node("Mul", x, self._number(0.5)), self._node("Add", curve, self._number(1.0)))
