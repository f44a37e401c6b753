"""Models that are only a shape: random weights, written in a second or two, for measuring speed.

Quantised weights are random bytes with a scale that keeps activations near one: speed does not depend on their values.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.gguf_writer import copy_gguf
from pocketlm.runtime.atomic import replacing_file
from pocketlm.runtime.formats import FORMATS, dequantize
from pocketlm.runtime.tensor import HALF_SCALES, Tensor

N_VOCAB = 32000
KINDS = tuple(HALF_SCALES)


@dataclass(frozen=True)
class Shape:
    """With `n_kv_head` a Llama, without a GPT-2 (learned positions, LayerNorm, GELU, biases). A tied head, vocabulary 32000."""

    n_layer: int
    width: int
    n_head: int
    n_ff: int
    n_kv_head: int = 0
    n_ctx: int = 1024


SHAPES = {
    "48M": Shape(10, 512, 8, 2048), "1.3B-class": Shape(28, 1536, 24, 6144),
    "Llama-125M": Shape(16, 768, 12, 2048, 4),  # as SmolLM2, but of whole blocks of 256 columns
    "Llama-1.3B": Shape(24, 2048, 32, 5504, 32, 2048),
}  # fmt: skip
NAMES = tuple(f"{shape}-{kind}" for shape in SHAPES for kind in KINDS)


def find(name: str, folder: Path) -> Path:
    """The file of one of NAMES in `folder`, written first where it is not there yet."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        shape, _, kind = name.rpartition("-")
        with replacing_file(path) as part:
            _write(part, SHAPES[shape], kind)
    return path


def _write(path: Path, shape: Shape, kind: str) -> None:
    random, is_llama = np.random.default_rng(0), shape.n_kv_head > 0
    keys: dict[str, Any] = {
        "context_length": shape.n_ctx, "embedding_length": shape.width, "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff, "attention.head_count": shape.n_head, "attention.layer_norm_epsilon": 1e-5,
    }  # fmt: skip
    if is_llama:
        keys["attention.layer_norm_rms_epsilon"] = keys.pop("attention.layer_norm_epsilon")
        keys |= {"attention.head_count_kv": shape.n_kv_head, "rope.dimension_count": shape.width // shape.n_head}
    known = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]] + ["to", "ke"]
    vocabulary = {
        "model": "gpt2", "pre": "gpt-2", "merges": ["t o", "k e"], "eos_token_id": N_VOCAB - 1,
        "tokens": [*known, *(f"token{i}" for i in range(N_VOCAB - len(known) - 1)), "<|endoftext|>"],
        "token_type": [1] * (N_VOCAB - 1) + [3],
    }  # fmt: skip
    architecture, tensors = "llama" if is_llama else "gpt2", dict[str, Tensor]()

    def add(name: str, form: str, data: np.ndarray, *shape: int) -> None:
        tensors[name] = Tensor(name, shape, FORMATS[form], data.reshape(-1).view(np.uint8), 0, path)

    def matrix(name: str, rows: int, columns: int, spread: float | None = None) -> None:
        add(f"{name}.weight", kind, _weights(random, kind, rows, columns, spread or columns**-0.5), rows, columns)
        if not is_llama and name.startswith("blk."):
            vector(f"{name}.bias", rows)

    def vector(name: str, *shape: int, centre: float = 0.0) -> None:
        add(name, "F32", (centre + 0.1 * random.standard_normal(shape)).astype(np.float32), *shape)

    def norm(name: str) -> None:
        vector(f"{name}.weight", shape.width, centre=1.0)
        if not is_llama:
            vector(f"{name}.bias", shape.width)

    width, inner, of_keys = shape.width, shape.n_ff, shape.n_kv_head * shape.width // shape.n_head
    inputs = (("attn_q", width), ("attn_k", of_keys), ("attn_v", of_keys)) if is_llama else (("attn_qkv", 3 * width),)
    up = ("ffn_gate", "ffn_up") if is_llama else ("ffn_up",)
    matrix("token_embd", N_VOCAB, width, 0.1)
    if not is_llama:
        vector("position_embd.weight", shape.n_ctx, width)
    for i in range(shape.n_layer):
        at = f"blk.{i}."
        for name in ("attn_norm", "ffn_norm"):
            norm(f"{at}{name}")
        for name, rows in (*inputs, ("attn_output", width), *((name, inner) for name in up)):
            matrix(f"{at}{name}", rows, width)
        matrix(f"{at}ffn_down", width, inner)
    norm("output_norm")
    metadata = {f"{architecture}.{key}": value for key, value in keys.items()}
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    with open(path, "wb") as file:
        copy_gguf(file, {"general.architecture": architecture, **metadata}, tensors)


def _weights(random: np.random.Generator, kind: str, rows: int, columns: int, spread: float) -> np.ndarray:
    """Random blocks [rows, bytes of a row] whose weights have a root mean square of `spread`."""
    if kind == "F16":
        return (random.standard_normal((rows, columns), np.float32) * spread).astype(np.float16)
    form = FORMATS[kind]
    blocks = np.frombuffer(random.bytes(rows * columns // form.block_size * form.block_bytes), np.uint8)
    blocks = blocks.reshape(-1, form.block_bytes).copy()

    def scale(value: float) -> None:
        for at in HALF_SCALES[kind]:
            blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        if not HALF_SCALES[kind]:  # a power of two in the first byte
            blocks[:, 0] = 127 + round(np.log2(value))

    scale(1.0)
    sample = np.empty((min(len(blocks), 256), form.block_size), np.float32)
    dequantize(form, blocks[: len(sample)], sample)
    scale(spread / float(np.sqrt(np.mean(sample**2))))
    return blocks.reshape(rows, -1)
