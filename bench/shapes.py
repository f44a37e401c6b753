"""Models that are only a shape: random weights, written by the `gguf` package in a second or two, for measuring speed.

Quantised weights are random bytes with a scale that keeps activations near one: speed does not depend on their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError

N_VOCAB, N_CTX = 32000, 1024
BLOCKS = {"Q4_0": (32, 16), "Q8_0": (32, 32)}  # weights in a block, bytes of them behind its float16 scale


@dataclass(frozen=True)
class Shape:
    """A GPT-2: learned positions, LayerNorm, GELU, biases, a tied head, vocabulary 32000."""

    n_layer: int
    width: int
    n_head: int
    n_ff: int


SHAPES = {"48M": Shape(10, 512, 8, 2048), "1.3B-class": Shape(28, 1536, 24, 6144)}
NAMES = tuple(f"{shape}-{kind}" for shape in SHAPES for kind in (*BLOCKS, "F16"))


def find(name: str, folder: Path) -> Path:
    """The file of one of NAMES in `folder`, written first where it is not there yet."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        shape, _, kind = name.rpartition("-")
        part = path.with_suffix(".part")
        _write(part, SHAPES[shape], kind)
        part.replace(path)
    return path


def _write(path: Path, shape: Shape, kind: str) -> None:
    try:
        import gguf
    except ImportError:
        raise PocketlmError("a shape with random weights needs the package gguf; get it with: pip install gguf") from None
    random = np.random.default_rng(0)
    writer: Any = gguf.GGUFWriter(str(path), "gpt2")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    known = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]] + ["to", "ke"]
    writer.add_token_list(known + [f"token{i}" for i in range(N_VOCAB - len(known) - 1)] + ["<|endoftext|>"])
    writer.add_token_types([1] * (N_VOCAB - 1) + [3])
    writer.add_token_merges(["t o", "k e"])
    writer.add_eos_token_id(N_VOCAB - 1)

    def matrix(name: str, rows: int, columns: int, spread: float | None = None) -> None:
        data = _weights(random, kind, rows, columns, spread or columns**-0.5)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str, n: int, centre: float = 0.0) -> None:
        writer.add_tensor(name, (centre + 0.1 * random.standard_normal(n)).astype(np.float32))

    width, inner = shape.width, shape.n_ff
    matrix("token_embd.weight", N_VOCAB, width, 0.1)
    writer.add_tensor("position_embd.weight", (0.1 * random.standard_normal((N_CTX, width))).astype(np.float32))
    for i in range(shape.n_layer):
        at = f"blk.{i}."
        for name in ("attn_norm", "ffn_norm"):
            vector(f"{at}{name}.weight", width, 1.0)
            vector(f"{at}{name}.bias", width)
        for name, rows, columns in (("attn_qkv", 3 * width, width), ("attn_output", width, width), ("ffn_up", inner, width),
                                    ("ffn_down", width, inner)):  # fmt: skip
            matrix(f"{at}{name}.weight", rows, columns)
            vector(f"{at}{name}.bias", rows)
    vector("output_norm.weight", width, 1.0)
    vector("output_norm.bias", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights(random: np.random.Generator, kind: str, rows: int, columns: int, spread: float) -> np.ndarray:
    if kind == "F16":
        return (random.standard_normal((rows, columns), np.float32) * spread).astype(np.float16)
    size, n_bytes = BLOCKS[kind]
    blocks = np.empty((rows * columns // size, 2 + n_bytes), np.uint8)
    blocks[:, 2:] = np.frombuffer(random.bytes(len(blocks) * n_bytes), np.uint8).reshape(-1, n_bytes)
    deviation = 2.0 ** (8 * n_bytes // size) / 12**0.5  # of the whole numbers that random bits stand for
    blocks[:, :2] = np.frombuffer(np.float16(spread / deviation).tobytes(), np.uint8)
    return blocks.reshape(rows, -1)
