"""Reads llama2.c's `model.bin`, versions 0, 1 and 2: a header and the weights one after the other.

In: a mapped file. Out: the weights by the names of its training code, and the sizes as that code's `model_args`. Version 0 has
no magic number: a file is taken for one if it is exactly as long as its header says. Version 2 stores matrices as 8-bit
numbers with a float32 scale for every group of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketlm.errors import FileError
from pocketlm.export.arrays import Buffer, LazyTensor, forget

MAGIC, HEADER = b"24ka", 256  # 0x616b3432, little-endian; of versions 1 and 2
LIMIT = 1 << 24
ATTENTION = ("wq", "wk", "wv", "wo")
FEED_FORWARD = ("w1", "w2", "w3")


class _Header(NamedTuple):
    version: int
    dim: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    vocab: int
    seq_len: int
    tied: bool
    group: int  # of version 2: numbers that share a scale

    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of everything in the file, in its order. Names without a dot are tables that are not needed."""
        kv = self.dim // self.n_heads * self.n_kv_heads
        matrices = {
            "wq": (self.dim, self.dim), "wk": (kv, self.dim), "wv": (kv, self.dim), "wo": (self.dim, self.dim),
            "w1": (self.hidden, self.dim), "w2": (self.dim, self.hidden), "w3": (self.hidden, self.dim),
        }  # fmt: skip

        def layers(names: tuple[str, ...], part: str) -> list[tuple[str, tuple[int, ...]]]:
            return [
                (f"layers.{i}.{part}{name}.weight", matrices.get(name, (self.dim,)))
                for name in names
                for i in range(self.n_layers)
            ]

        table, norm = [("tok_embeddings.weight", (self.vocab, self.dim))], [("norm.weight", (self.dim,))]
        head = [] if self.tied else [("output.weight", (self.vocab, self.dim))]
        attention, feed_forward = layers(ATTENTION, "attention."), layers(FEED_FORWARD, "feed_forward.")
        norms = (layers(("attention_norm",), ""), layers(("ffn_norm",), ""))
        if self.version:
            return [*norms[0], *norms[1], *norm, *table, *attention, *feed_forward, *head]
        rotary = [(name, (self.seq_len, self.dim // self.n_heads // 2)) for name in ("freqs_cos", "freqs_sin")]
        return [*table, *norms[0], *attention, *norms[1], *feed_forward, *norm, *rotary, *head]

    def n_bytes(self, shape: tuple[int, ...]) -> int:
        size = math.prod(shape)
        return size + 4 * (size // self.group) if self.group and len(shape) > 1 else 4 * size

    @property
    def length(self) -> int:
        """Bytes of the whole file."""
        return (HEADER if self.version else 28) + sum(self.n_bytes(shape) for _, shape in self.shapes())


def _header(buffer: Buffer) -> _Header | None:
    """The header; None if its numbers cannot be those of a model."""
    version, start = 0, 0
    if buffer[:4] == MAGIC:
        version, start = struct.unpack_from("<i", buffer, 4)[0] if len(buffer) >= HEADER else 0, 8
        if version not in (1, 2):
            return None
    if len(buffer) < 28 + start:
        return None
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab, seq_len = struct.unpack_from("<7i", buffer, start)
    tied, group = vocab > 0, 0
    if version:
        tied = bool(buffer[36])
        group = struct.unpack_from("<i", buffer, 37)[0] if version == 2 else 0
    header = _Header(version, dim, hidden, n_layers, n_heads, n_kv_heads, abs(vocab), seq_len, tied, group)
    if not all(0 < n < LIMIT for n in header[1:8]) or n_layers > 1 << 10 or n_kv_heads > n_heads or dim % (2 * n_heads):
        return None
    if version == 2 and (group < 1 or any(math.prod(s) % group for _, s in header.shapes() if len(s) > 1)):
        return None
    return header


def looks_like_llama2c(buffer: Buffer) -> bool:
    """Whether it has the magic number, or is exactly as long as a header of version 0 says."""
    if buffer[:4] == MAGIC:
        return True
    header = _header(buffer)
    return header is not None and header.length == len(buffer)


def read_llama2c(buffer: Buffer, path: Path) -> dict[str, Any]:
    """{"model": the weights by name, "model_args": the sizes}. Raises FileError."""
    header = _header(buffer)
    if header is None:
        raise FileError(path, "has the magic of llama2.c's model.bin, but no version 1 or 2 of it", "export it again")
    if header.length != len(buffer):
        problem = f"is {len(buffer)} bytes long where llama2.c's version {header.version} has {header.length}"
        raise FileError(path, problem, "the file is damaged or cut short")
    tensors, at = {}, HEADER if header.version else 28
    for name, shape in header.shapes():
        if "." in name:
            tensors[name] = LazyTensor("", shape, "float32", _reader(buffer, at, shape, header.group), (at,))
        at += header.n_bytes(shape)
    args = {
        "dim": header.dim, "n_layers": header.n_layers, "n_heads": header.n_heads, "n_kv_heads": header.n_kv_heads,
        "vocab_size": header.vocab, "max_seq_len": header.seq_len,
    }  # fmt: skip
    return {"model": tensors, "model_args": args}


def _reader(buffer: Buffer, at: int, shape: tuple[int, ...], group: int) -> Callable[[], np.ndarray]:
    size, quantised = math.prod(shape), bool(group) and len(shape) > 1

    def read() -> np.ndarray:
        if quantised:
            codes = np.frombuffer(buffer, np.int8, size, at).reshape(-1, group)
            values = codes * np.frombuffer(buffer, "<f4", size // group, at + size)[:, None]
        else:
            values = np.frombuffer(buffer, "<f4", size, at).astype(np.float32)
        forget(buffer, at, size if quantised else 4 * size)
        return np.ascontiguousarray(values, np.float32).reshape(shape)

    return read
