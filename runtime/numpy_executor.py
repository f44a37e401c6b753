"""The reference executor: a decoder in NumPy, float32, meant to be read.

In: a plan, the tensors it names, token ids. Out: logits. Every method below is one operation of the plan; the comment
on its first line gives the shapes, n being the number of tokens in this call and t the positions known after it.
Weights are dequantised once. A product's rows are shared by a pool of threads, each with a single-threaded BLAS; a prompt
goes through in blocks of tokens, several texts one after the other. Knows nothing about text, sampling or files.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from pocketlm.errors import PocketlmError
from pocketlm.locks import ForkedLock
from pocketlm.runtime import blas_threads
from pocketlm.runtime import operations as P
from pocketlm.runtime.activations import ACTIVATIONS, beside
from pocketlm.runtime.ids import Ids, check_ids
from pocketlm.runtime.kv_cache import ByteCache, KVCache
from pocketlm.runtime.memory import in_one_piece, release_pages
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.positions import alibi_slopes, key_turns, rope_tables, rope_tables_bytes, rotary, rotate
from pocketlm.runtime.tensor import Tensor, check_finite
from pocketlm.runtime.threads import ThreadPool, share

BLOCK = 512  # tokens a pass: bounds the scratch memory; larger gains nothing measurable
CACHES = {"q16": KVCache, "q8": ByteCache}
SMALL = 1 << 16  # multiplications below which waking the other threads costs more than it saves
HEAD_START = 48 << 10  # multiplications that the caller has done when the others are awake: 4 % of a token of a 48M model


class NumpyExecutor:
    """Runs a plan, as executors.Executor says. Holds the dequantised weights, the KV cache and a pool of threads."""

    name = "numpy"
    block = BLOCK
    same_bits = False  # products of few rows are summed in another order than those of many

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int, kv: str = "q16"):
        self._kind, self.arithmetic = CACHES[kv], "numpy" + " q8" * (kv == "q8")
        self.plan, self.hyper, self.n_ctx, self.n_threads = plan, plan.hyper, n_ctx, n_threads
        self._run = {
            P.Embed: self._embed, P.Norm: self._norm, P.Linear: self._linear, P.Rotate: self._rotate,
            P.Attend: self._attend, P.Convolve: self._convolve, P.Activate: self._activate, P.Add: self._add,
            P.Scale: self._scale, P.Softcap: self._softcap, P.Gate: self._gate, P.Route: self._route,
            P.Experts: self._experts, P.Mix: self._mix, P.Logits: self._linear,
        }  # fmt: skip
        matrices = [op.matrix for op in plan.ops if isinstance(op, P.Linear | P.Logits)]
        stacked = {name for matrix in matrices if len(matrix.weights) > 1 for name in matrix.weights}
        alone = [(name,) for name in plan.weights if name not in stacked and name not in plan.experts]
        stacks = {names: [tensors[n] for n in names] for names in (*alone, *(m.weights for m in matrices))}
        places = in_one_piece([4 * sum(math.prod(t.shape) for t in stack) for stack in stacks.values()])
        self._weights = {n: self._stack(stack, place) for (n, stack), place in zip(stacks.items(), places, strict=True)}
        self._tensors = {name: tensors[name] for name in plan.experts}  # the file's own: few of many experts are needed
        self._biases = {m: self._stack_biases(m) for m in matrices}
        self._rope = rope_tables(plan.ops, self._rows, n_ctx)
        self._turns = key_turns(plan.ops, self._rows, n_ctx)
        self._slopes = functools.cache(alibi_slopes)
        self.cache = self._cache = self.new_cache()  # its own, and that of the text now worked on
        self._one_at_a_time, self._closed = ForkedLock(), False
        self._pool = ThreadPool(n_threads)  # last: whatever fails before leaves no threads behind

    @staticmethod
    def memory(plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int, kv: str = "q16") -> tuple[int, int, int]:
        """Bytes of weights, cache and scratch that an executor of this plan takes at most, when the context is full."""
        hyper, n = plan.hyper, min(BLOCK, n_ctx)
        experts = plan.experts
        weights = 4 * sum(math.prod(shape) for name, shape in plan.weights.items() if name not in experts)
        inner = [width for name, width in plan.buffers.items() if name != "logits"]
        alibi = any(isinstance(op, P.Attend) and op.alibi_max_bias for op in plan.ops)
        scores = 4 * hyper.n_head * n * n_ctx * (1 + alibi) + n * n_ctx * (8 + 1 + 4 * alibi)  # and distances, masks
        activations = 4 * n * (sum(inner) + 3 * max(inner)) + 4 * hyper.n_vocab
        scratch = rope_tables_bytes(plan.ops, n_ctx) + max(scores + activations, KVCache.bytes_to_move(hyper, n_ctx))
        return weights, CACHES[kv].bytes_for(hyper, n_ctx, plan.windows, plan.columns), scratch

    def close(self) -> None:
        self._closed = True
        self._pool.close()
        with self._one_at_a_time.here:
            self._weights.clear()
            self._tensors.clear()
            self.cache.release()

    def new_cache(self, n_ctx: int | None = None) -> KVCache:
        n_ctx = min(n_ctx or self.n_ctx, self.n_ctx)
        return self._kind(self.hyper, n_ctx, self._turns, self.plan.windows, self.plan.columns)

    def new_selection(self) -> None:
        """NumPy's own is all there is."""

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        return self.step([(self.cache, ids, len(ids) if rows == "all" else 1)])[0][0]

    def step(self, work: Sequence[tuple[KVCache, Ids, int]], *_: object) -> tuple[list[np.ndarray], int]:
        """One pass, in which one text comes after the other: samplers draw outside."""
        # BLAS's own threads wait by spinning: 20 tokens/s became 2 when another program wanted a core
        # numbers that are not finite are told of the logits, in one line
        with self._one_at_a_time.here, blas_threads.one_thread(self), np.errstate(all="ignore"):
            self._check_open()
            checked = [(c, check_ids(ids, self.hyper.n_vocab, c.length, c.n_ctx), rows) for c, ids, rows in work]
            logits = [self._append(*one) for one in checked]
            self._cache = self.cache  # no other text's memory is held on to
            return logits, 1

    def _append(self, cache: KVCache, ids: np.ndarray, rows: int) -> np.ndarray:
        self._cache, parts, first = cache, [], len(ids) - rows  # the first whose logits are wanted
        for i in range(0, len(ids), BLOCK):
            block = ids[i : i + BLOCK]
            parts.append(self._block(block, min(i + len(block) - first, len(block))))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _check_open(self) -> None:
        if self._closed:
            raise PocketlmError("this model is closed; load it again")

    def _block(self, ids: np.ndarray, rows: int) -> np.ndarray:  # [n] -> [rows, n_vocab], of the last
        state = {"ids": ids}
        self._cache.about_to_write(ids)
        for op in self.plan.ops:
            self._check_open()
            if isinstance(op, P.Logits):
                if rows <= 0:
                    state[op.out] = np.empty((0, self.hyper.n_vocab), np.float32)
                    break
                state[op.x] = state[op.x][-rows:]
            self._run[type(op)](op, state)
        self._cache.length += len(ids)
        return state["logits"]

    def _embed(self, op: P.Embed, state: dict[str, np.ndarray]) -> None:  # [n] -> [n, n_embd]
        table, start = self._rows(op.table), self._cache.length
        if op.before:
            before = table[self._cache.ids[max(start - 1, 0) : start + len(state["ids"]) - 1]]
            state[op.out] = before if start else np.concatenate([np.zeros((1, table.shape[1]), np.float32), before])
            return
        state[op.out] = table[state["ids"]]
        if op.positions:
            state[op.out] += self._rows(op.positions)[start : start + len(state["ids"])]

    def _norm(self, op: P.Norm, state: dict[str, np.ndarray]) -> None:  # [n, width] -> [n, width], or columns of it in place
        columns = slice(op.column, op.column + op.n_groups * op.width)
        x = state[op.x][:, columns].reshape(-1, op.n_groups, op.width)
        if op.kind == "layer":
            x = x - np.add.reduce(x, -1, keepdims=True) / np.float32(op.width)
        variance = np.add.reduce(x * x, -1, keepdims=True) / np.float32(op.width)
        y = x / np.sqrt(variance + np.float32(op.eps))
        if op.weight:
            y *= self._rows(op.weight)
        if op.bias:
            y += self._rows(op.bias)
        y = y.reshape(len(y), -1)
        if y.shape[1] == state[op.x].shape[1]:
            state[op.out] = y
        else:
            state[op.out][:, columns] = y

    def _linear(self, op: P.Linear | P.Logits, state: dict[str, np.ndarray]) -> None:  # [n, n_in] -> [n, n_out]
        w, x = self._weights[op.matrix.weights], state[op.x]
        y = state[op.out] = np.empty((len(x), len(w)), np.float32)
        lead = min(HEAD_START // (len(x) * w.shape[1]), len(w) // 2)

        def product(part: int, parts: int) -> None:
            mine = share(len(w), part, parts, lead)
            with np.errstate(all="ignore"):  # each thread has its own
                if len(x) == 1:  # matrix times vector: matmul with one row takes a third longer
                    np.dot(w[mine], x[0], out=y[0, mine])
                else:
                    np.matmul(x, w[mine].T, out=y[:, mine])

        if w.size * len(x) < SMALL:
            product(0, 1)
        else:
            self._pool.run(product)
        if (bias := self._biases[op.matrix]) is not None:
            y += bias

    def _rotate(self, op: P.Rotate, state: dict[str, np.ndarray]) -> None:  # [n, qkv], in place
        qkv, start = state[op.qkv], self._cache.length
        table = self._rope[rotary(op, self.n_ctx)][start : start + len(qkv), :, None]  # [n, 2, 1, n_dims/2]
        heads = qkv[:, : op.n_heads * op.head_dim].reshape(len(qkv), op.n_heads, op.head_dim)
        rotate(heads, table[:, 0], table[:, 1], op.rope.pairs)

    def _attend(self, op: P.Attend, state: dict[str, np.ndarray]) -> None:  # [n, qkv] -> [n, q_width]
        qkv, start, n_kv, d = state[op.qkv], self._cache.length, op.n_kv_head, op.head_dim
        n, group = len(qkv), op.n_head // n_kv
        q = qkv[:, : op.n_head * d].reshape(n, n_kv, group, d)
        kv = qkv[:, op.n_head * d :].reshape(n, 2, n_kv, d)
        self._cache.write_keys(op.layer, start, kv[:, 0].swapaxes(0, 1))  # [n_kv_head, n, head_dim]
        self._cache.write_values(op.layer, start, kv[:, 1].swapaxes(0, 1))
        first = max(start - op.window + 1, 0) if op.window else 0  # what the first query sees; t positions from here on
        keys, values = self._cache.seen(op.layer, first, start + n)
        t = keys.shape[1]
        q = self._cache.queries(q.transpose(1, 2, 0, 3).reshape(n_kv, group * n, d))  # heads of a group share keys
        scores = q @ keys.swapaxes(1, 2)  # [n_kv_head, group * n, t]
        scores *= np.float32(op.scale)
        if op.softcap:
            scores /= np.float32(op.softcap)
            np.tanh(scores, out=scores)
            scores *= np.float32(op.softcap)
        scores = scores.reshape(op.n_head, n, t)
        if n > 1 or op.alibi_max_bias:
            distance = np.arange(t) - np.arange(start - first, t)[:, None]  # [n, t]; above zero is the future
            if op.alibi_max_bias:
                scores += self._slopes(op.n_head, op.alibi_max_bias)[:, None, None] * distance.astype(np.float32)
            scores[:, distance > 0] = -np.inf
            if op.window:
                scores[:, distance <= -op.window] = -np.inf
        largest = np.maximum.reduce(scores, -1, keepdims=True)  # [n_head, n, 1]
        sinks = self._rows(op.sinks)[:, None, None] if op.sinks else None
        if sinks is not None:
            largest = np.maximum(largest, sinks)
        scores -= largest
        np.exp(scores, out=scores)
        total = np.add.reduce(scores, -1, keepdims=True)
        if sinks is not None:
            total += np.exp(sinks - largest)
        scores /= total
        mix = scores.reshape(n_kv, group * n, t) @ values  # [n_kv_head, group * n, head_dim]
        state[op.out] = mix.reshape(op.n_head, n, d).swapaxes(0, 1).reshape(n, op.n_head * d)

    def _convolve(self, op: P.Convolve, state: dict[str, np.ndarray]) -> None:  # [n, 3 width] -> [n, width]
        (b, c, z), start = np.split(state[op.x], 3, 1), self._cache.length
        self._cache.write_columns(op.layer, start, (b * z)[None])
        first = max(start - op.taps + 1, 0)  # what the first token sees
        seen = self._cache.read_columns(op.layer, first, start + len(b))[0]
        before_the_text = np.zeros((op.taps - 1 - (start - first), op.n), np.float32)
        seen = np.concatenate([before_the_text, seen])  # [taps - 1 + n, width]
        weight = self._rows(op.weight)
        state[op.out] = c * np.add.reduce([weight[:, j] * seen[j : j + len(b)] for j in range(op.taps)])

    def _activate(self, op: P.Activate, state: dict[str, np.ndarray]) -> None:  # [n, ff] -> [n, n_ff]
        x, f = state[op.x], ACTIVATIONS[op.kind]
        state[op.out] = f(x[:, : op.n]) * beside(op.kind, x[:, op.n :]) if op.gated else f(x)

    def _add(self, op: P.Add, state: dict[str, np.ndarray]) -> None:  # [n, width] += [n, width]
        state[op.out] += state[op.x] if op.factor == 1 else np.float32(op.factor) * state[op.x]

    def _gate(self, op: P.Gate, state: dict[str, np.ndarray]) -> None:  # columns of [n, width] += [n, n_groups * width]
        x, y, columns = state[op.x], state[op.y], slice(op.column, op.column + op.n_groups * op.width)
        weight = self._rows(op.weight).reshape(op.n_groups, -1)
        gates = np.float32(op.factor) / (1 + np.exp(-(x[:, : op.n_columns] @ weight.T)))  # [n, n_groups]
        state[op.out][:, columns] += np.repeat(gates, op.width, 1) * y

    def _scale(self, op: P.Scale, state: dict[str, np.ndarray]) -> None:  # [n, width] -> [n, width]
        state[op.out] = np.float32(op.factor) * state[op.x]

    def _softcap(self, op: P.Softcap, state: dict[str, np.ndarray]) -> None:  # [n, width] -> [n, width]
        state[op.out] = np.float32(op.cap) * np.tanh(state[op.x] / np.float32(op.cap))

    def _route(self, op: P.Route, state: dict[str, np.ndarray]) -> None:  # [n, n_experts] -> [n, 2 n_used]
        x = state[op.x]
        chosen = np.argsort(-x, axis=-1, kind="stable")[:, : op.n_used]
        scores = np.take_along_axis(x, chosen, -1)
        weights, everything = (np.exp(of - scores[:, :1]) for of in (scores, x))
        total = np.add.reduce(weights if op.normalised else everything, -1, keepdims=True)
        state[op.out] = np.concatenate([chosen.astype(np.float32), weights / total], -1)

    def _experts(self, op: P.Experts, state: dict[str, np.ndarray]) -> None:  # [n, (n_used) n_in] -> [n, parts n_used rows]
        chosen, n_in = state[op.chosen][:, : op.n_used].astype(np.int64), op.matrix.n_in
        n, n_parts = len(chosen), len(op.matrix.weights)
        x = np.broadcast_to(state[op.x].reshape(n, -1, n_in), (n, op.n_used, n_in))
        out = np.empty((n, n_parts, op.n_used, op.matrix.n_out // n_parts), np.float32)
        for number in sorted(set(chosen.ravel().tolist())):
            tokens, places = np.nonzero(chosen == number)
            for i, (name, bias) in enumerate(zip(op.matrix.weights, op.matrix.biases, strict=True)):
                expert = self._tensors[name].part(number)
                check_finite(expert)
                y = x[tokens, places] @ expert.to_float32().T
                out[tokens, i, places] = y + self._rows(bias)[number] if bias else y
        state[op.out] = out.reshape(n, -1)

    def _mix(self, op: P.Mix, state: dict[str, np.ndarray]) -> None:  # [n, n_used n_embd] -> [n, n_embd]
        weights = state[op.chosen][:, None, op.n_used :]
        state[op.out] = (weights @ state[op.x].reshape(len(weights), op.n_used, -1))[:, 0]

    def _rows(self, name: str) -> np.ndarray:
        return self._weights[name,]

    def _stack(self, tensors: list[Tensor], place: np.ndarray) -> np.ndarray:
        """The tensors below each other in `place`, dequantised: float32 (sum of rows, columns) or (n,)."""
        out = place.view(np.float32).reshape(-1, *tensors[0].shape[1:])
        start = 0
        for tensor in tensors:
            check_finite(tensor)
            tensor.to_float32(out[start : start + tensor.shape[0]])
            release_pages(tensor.data)
            start += tensor.shape[0]
        return out

    def _stack_biases(self, matrix: P.Matrix) -> np.ndarray | None:
        if not any(matrix.biases):
            return None
        parts = [
            self._rows(b) if b else np.zeros(self.plan.weights[w][0], np.float32)
            for w, b in zip(matrix.weights, matrix.biases, strict=True)
        ]
        return np.concatenate(parts)
