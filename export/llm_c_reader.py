"""Reads llm.c's `model_00019560.bin` of a GPT-2: a header of 256 numbers, and the weights one after the other.

In: a mapped file. Out: the weights by the names of its C code (`fcprojw` as `fcproj.weight`), and the sizes as `model_args`.
The rows that round the token table up are left out: they were never trained, and llm.c draws none of them.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError
from pocketlm.export.arrays import Buffer, LazyTensor, Storage, bytes_each, view

MAGIC, HEADER = struct.pack("<i", 20240326), 1024
VERSIONS = {1: "float32", 3: "float32", 5: "bfloat16"}  # 1: its token table is not rounded up
LIMIT = 1 << 24


def looks_like_llm_c(buffer: Buffer) -> bool:
    """Whether it has the magic number."""
    return buffer[:4] == MAGIC


def read_llm_c(buffer: Buffer, path: Path) -> dict[str, Any]:
    """{"model": the weights by name, "model_args": the sizes}. Raises FileError."""
    version, n_ctx, vocab, n_layer, n_head, dim, rows = struct.unpack_from("<7i", buffer[4:32].ljust(28, b"\0"))
    rows = vocab if version == 1 else rows
    if version not in VERSIONS:
        raise FileError(path, f"is of version {version} of llm.c's model files", "read are " + ", ".join(map(str, VERSIONS)))
    if not all(0 < n < LIMIT for n in (n_ctx, vocab, n_layer, n_head, dim)) or n_layer > 1 << 10 or not vocab <= rows < LIMIT:
        raise FileError(path, "its header holds impossible sizes", "the file is damaged")
    layer = {"ln1": (dim,), "qkv": (3 * dim, dim), "attproj": (dim, dim), "ln2": (dim,), "fc": (4 * dim, dim),
             "fcproj": (dim, 4 * dim)}  # fmt: skip
    shapes = {"wte.weight": (vocab, dim), "wpe.weight": (n_ctx, dim)}
    for name, shape in layer.items():  # the matrix of every layer, then the bias of every layer
        for end, form in (("weight", shape), ("bias", shape[:1])):
            shapes |= {f"h.{i}.{name}.{end}": form for i in range(n_layer)}
    shapes |= {"lnf.weight": (dim,), "lnf.bias": (dim,)}
    dtype, at = VERSIONS[version], 0
    storage = Storage(buffer, HEADER, max(len(buffer) - HEADER, 0))
    tensors: dict[str, LazyTensor] = {}
    for name, shape in shapes.items():
        tensors[name] = view(path, storage, dtype, shape, offset=at)
        at += rows * dim if name == "wte.weight" else math.prod(shape)
    length = HEADER + at * bytes_each(dtype)
    if len(buffer) != length:
        raise FileError(path, f"is {len(buffer)} bytes long where its header says {length}", "the file is damaged")
    args = {"block_size": n_ctx, "vocab_size": vocab, "n_layer": n_layer, "n_head": n_head, "n_embd": dim}
    return {"model": tensors, "model_args": args}
