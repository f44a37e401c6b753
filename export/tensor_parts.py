"""Tensors made of tensors: rows of one, several in one, rows in another order.

In: tensors by role. Out: others, which read the first when they are read themselves. Knows no configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from pocketlm.export.canonical import CanonicalTensor

Tensors = dict[str, CanonicalTensor]


def rows(tensor: CanonicalTensor, start: int, stop: int) -> CanonicalTensor:
    return tensor.changed(lambda all: np.ascontiguousarray(all[start:stop]), stop - start, *tensor.shape[1:])


def rows_of_experts(tensor: CanonicalTensor, start: int, stop: int) -> CanonicalTensor:
    """Rows `start` to `stop` of every expert."""
    n, _, *columns = tensor.shape
    return tensor.changed(lambda all: np.ascontiguousarray(all[:, start:stop]), n, stop - start, *columns)


def stacked(parts: Sequence[CanonicalTensor], axis: int = 0) -> CanonicalTensor:
    shape = [*parts[0].shape]
    shape[axis] = sum(part.shape[axis] for part in parts)
    return CanonicalTensor(tuple(shape), lambda: np.concatenate([part.read() for part in parts], axis))


def layered(parts: Sequence[CanonicalTensor]) -> CanonicalTensor:
    """The parts stacked along a new first dimension."""
    return CanonicalTensor((len(parts), *parts[0].shape), lambda: np.stack([part.read() for part in parts]))


def transposed(tensor: CanonicalTensor) -> CanonicalTensor:
    return tensor.changed(lambda values: np.ascontiguousarray(values.T), *tensor.shape[::-1])


def constant(values: np.ndarray) -> CanonicalTensor:
    return CanonicalTensor(values.shape, values.copy)


def in_layers(tensors: Tensors, expression: str) -> list[str]:
    """The roles in layers whose rest matches the expression."""
    return [role for role in tensors if re.fullmatch(rf"blk\.\d+\.(?:{expression})", role)]


def reorder(tensors: Tensors, expression: str, order: np.ndarray) -> None:
    """Reorder the rows of the tensors in layers that match, in place. The plan will refuse those of another number of rows."""
    for role in in_layers(tensors, expression):
        if tensors[role].shape[0] == len(order):
            tensors[role] = tensors[role].changed(lambda values: values[order])


def scale_queries(tensors: Tensors, n_rows: int, factor: float) -> None:
    """Multiply every query by `factor`, in place, by its norm where it has one; `n_rows`: rows of the queries, which come first
    where they are fused.
    """
    for role in in_layers(tensors, r"attn_q_norm\.\w+") or in_layers(tensors, r"attn_q(kv)?\.(weight|bias)"):
        tensor = tensors[role]
        factors = np.ones((tensor.shape[0], *(1,) * (len(tensor.shape) - 1)), np.float32)
        factors[:n_rows] = factor
        tensors[role] = tensor.changed(lambda values, factors=factors: values * factors)


def interleave(tensors: Tensors, heads: tuple[int, int, int], n_dims: int, back: bool = False) -> None:
    """Reorder queries and keys, in place, from half-split rotary pairs (0, n/2), (1, n/2+1), … to interleaved ones.

    n is `n_dims`; the rows of a head behind the first n stay. `heads`: n_head, n_kv_head, head_dim. `back`: from interleaved
    to half-split.
    """
    n_head, n_kv_head, head_dim = heads
    pairs = np.arange(n_dims).reshape(2, -1).T.ravel()
    head = np.concatenate([pairs, np.arange(n_dims, head_dim)])
    for part, n in (("q", n_head), ("k", n_kv_head)):
        order = (np.arange(n)[:, None] * head_dim + head).ravel()
        reorder(tensors, rf"attn_{part}\.(weight|bias)", np.argsort(order) if back else order)


def gate_before_up(tensors: Tensors, end: str, fused: str, axis: int = 0) -> None:
    """Join every ffn_gate and ffn_up (with this `end` of their names) into a tensor called `fused`, in place, gate first. The
    plan will miss a layer that has only one of them.
    """
    for gate in in_layers(tensors, rf"ffn_gate{end}\.weight"):
        if (up := gate.replace("gate", "up")) in tensors:
            parts = [tensors.pop(gate), tensors.pop(up)]
            tensors[gate.replace(f"ffn_gate{end}", fused)] = stacked(parts, axis)


def split_qkv(tensors: Tensors, q: int, kv: int) -> None:
    """Replace every attn_qkv by three tensors, in place; `q`, `kv`: rows of the queries, and of the keys or values."""
    for role in in_layers(tensors, "attn_qkv.(weight|bias)"):
        if tensors[role].shape[0] != q + 2 * kv:
            continue  # the plan says what is wrong
        both = tensors.pop(role)
        for part, start, stop in (("q", 0, q), ("k", q, q + kv), ("v", q + kv, q + 2 * kv)):
            tensors[role.replace("qkv", part)] = rows(both, start, stop)


def fuse_qkv(tensors: Tensors, n_layer: int, q: int, kv: int) -> None:
    """Replace queries, keys and values by one attn_qkv, in place, with zeros where only some of them have a bias."""
    for i in range(n_layer):
        at = f"blk.{i}.attn_"
        weights = [f"{at}{part}.weight" for part in "qkv"]
        if not all(name in tensors for name in weights):
            continue
        tensors[f"{at}qkv.weight"] = stacked([tensors.pop(name) for name in weights])
        biases = [f"{at}{part}.bias" for part in "qkv"]
        if any(name in tensors for name in biases):
            zeros = [constant(np.zeros(n, np.float32)) for n in (q, kv, kv)]
            tensors[f"{at}qkv.bias"] = stacked([tensors.pop(name, zero) for name, zero in zip(biases, zeros, strict=True)])
