"""Tiny GGUF models with random weights, for any combination of architecture options, written by the `gguf` package.

Nothing of pocketlm takes part: `write_model` writes a file, `load_weights` reads one back the slow, independent way.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_reference import GGML_TYPES, quantize

ARCHITECTURES = {  # what a file of this architecture says without `pocketlm.*` keys
    "gpt2": {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated": False},
    "llama": {"norm": "rms", "position": "rope", "activation": "silu", "gated": True},
    "refact": {"norm": "rms", "position": "alibi", "activation": "silu", "gated": True},
    "pocketlm": {"norm": "rms", "position": "rope", "activation": "silu", "gated": True},
}
OWN_KEYS = ("norm", "position", "activation", "gated", "rope_pairs")
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_LETTERS = {b: chr(b) for b in _PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}
MERGES = ["t h", "h e", "i n", "Ġ th"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [BYTE_LETTERS[b] for b in range(256)] + [merge.replace(" ", "") for merge in MERGES] + SPECIALS


def vocabulary(tokens: list[str] | None = None) -> dict[str, Any]:
    """The keys of a byte-level BPE with the 256 bytes, four merges and three markers, which stand last."""
    tokens = TOKENS if tokens is None else tokens
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens], "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": tokens.index(SPECIALS[0]), "tokenizer.ggml.eos_token_id": tokens.index(SPECIALS[2]),
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


def write_model(
    path: str | Path, *, arch: str = "llama", n_layer: int = 2, n_embd: int = 64, n_head: int = 4, n_kv_head: int | None = None,
    head_dim: int | None = None, n_ff: int = 96, n_ctx: int = 128, rows: int | None = None, tokens: list[str] | None = None,
    norm: str | None = None, position: str | None = None, activation: str | None = None, gated: bool | None = None,
    rope_pairs: str | None = None, rope_dims: int | None = None, rope_theta: float = 10000.0,
    rope: Mapping[str, Any] | None = None, rope_factors: np.ndarray | None = None, max_bias: float | None = None,
    biases: bool | None = None, fused: bool | None = None, tied: bool = True, eps: float = 1e-5, spread: float = 1.0,
    seed: int = 0, format: str = "F32", formats: Mapping[str, str] | None = None, metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:  # fmt: skip
    """Write a model file and return its path.

    An option that is None is what the architecture has by itself; others are written as `pocketlm.*` keys. `rows`: of the
    token table (the vocabulary's size). `rope`: keys under `rope.scaling.`. `format` is that of every matrix, `formats`
    of single tensors by name; vectors are F32. `metadata` and `tensors` replace what would be written, None leaves it out.
    """
    gguf = pytest.importorskip("gguf", reason="the gguf package writes the test models")
    path = Path(path)
    own = {"norm": norm, "position": position, "activation": activation, "gated": gated, "rope_pairs": rope_pairs}
    chosen = ARCHITECTURES[arch] | {name: value for name, value in own.items() if value is not None}
    said = chosen if arch == "pocketlm" else {name: value for name, value in own.items() if value is not None}
    head_dim, n_kv_head = head_dim or n_embd // n_head, n_kv_head or n_head
    biases, fused = arch == "gpt2" if biases is None else biases, arch == "gpt2" if fused is None else fused
    words = vocabulary(tokens)
    keys: dict[str, Any] = {
        f"{arch}.context_length": n_ctx, f"{arch}.embedding_length": n_embd, f"{arch}.block_count": n_layer,
        f"{arch}.feed_forward_length": n_ff,
        f"{arch}.attention.head_count": n_head, f"{arch}.attention.head_count_kv": n_kv_head,
        f"{arch}.attention.layer_norm_{'rms_' if chosen['norm'] == 'rms' else ''}epsilon": eps,
        **{f"pocketlm.{name}": value for name, value in said.items()}, **words,
    }  # fmt: skip
    if head_dim * n_head != n_embd:
        keys |= {f"{arch}.attention.key_length": head_dim, f"{arch}.attention.value_length": head_dim}
    if chosen["position"] == "rope":
        keys |= {f"{arch}.rope.dimension_count": rope_dims or head_dim, f"{arch}.rope.freq_base": rope_theta}
        keys |= {f"{arch}.rope.scaling.{name}": value for name, value in (rope or {}).items()}
    if max_bias is not None:
        keys[f"{arch}.attention.max_alibi_bias"] = max_bias
    n_vocab, q, kv = rows or len(words["tokenizer.ggml.tokens"]), n_head * head_dim, n_kv_head * head_dim
    shapes = _shapes(n_layer, n_embd, q, kv, n_ff, n_ctx, n_vocab, chosen, biases, fused, tied)
    arrays = _random(shapes, seed, spread)
    if rope_factors is not None:
        arrays["rope_freqs.weight"] = np.asarray(rope_factors, np.float32)
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in {**keys, **(metadata or {})}.items():
        if key == "general.architecture":
            writer.kv_data[0].pop(key)
        if value is not None:
            add_key(writer, key, value)
    for name, array in {**arrays, **(tensors or {})}.items():
        if array is not None:
            kind = (formats or {}).get(name, format) if array.ndim > 1 else "F32"
            writer.add_tensor(name, _quantized(gguf, array, kind), raw_dtype=gguf.GGMLQuantizationType[kind])
    write_out(writer)
    return path


def write_out(writer: Any, *path: Path) -> None:
    """Have a GGUFWriter write its file."""
    writer.write_header_to_file(*path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a GGUF, dequantised by the `gguf` package: float32, shapes in NumPy's order."""
    gguf = pytest.importorskip("gguf", reason="the gguf package reads the test models")
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32) for t in gguf.GGUFReader(str(path)).tensors
    }


def _shapes(
    n_layer: int, width: int, q: int, kv: int, inner: int, n_ctx: int, n_vocab: int, chosen: Mapping[str, Any],
    biases: bool, fused: bool, tied: bool,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (n_vocab, width)}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (width,)
        if chosen["norm"] == "layer" and biases:
            shapes[f"{name}.bias"] = (width,)

    def linear(name: str, n_out: int, n_in: int) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if biases:
            shapes[f"{name}.bias"] = (n_out,)

    if chosen["position"] == "learned":
        shapes["position_embd.weight"] = (n_ctx, width)
    for i in range(n_layer):
        at = f"blk.{i}."
        norm(f"{at}attn_norm")
        for name, n_out in {"qkv": q + 2 * kv}.items() if fused else {"q": q, "k": kv, "v": kv}.items():
            linear(f"{at}attn_{name}", n_out, width)
        linear(f"{at}attn_output", width, q)
        norm(f"{at}ffn_norm")
        for name in ("gate", "up") if chosen["gated"] else ("up",):
            linear(f"{at}ffn_{name}", inner, width)
        linear(f"{at}ffn_down", width, inner)
    norm("output_norm")
    if not tied:
        shapes["output.weight"] = (n_vocab, width)
    return shapes


def _random(shapes: Mapping[str, tuple[int, ...]], seed: int, spread: float) -> dict[str, np.ndarray]:
    """Weights that keep activations near one and are nowhere near a special value, so that a mixed-up tensor shows."""
    random, arrays = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        noise = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            arrays[name] = 0.2 * noise + np.float32("norm.weight" in name)
        else:
            arrays[name] = noise * np.float32(0.3 if name.endswith("embd.weight") else spread / np.sqrt(shape[1]))
    return arrays


def _quantized(gguf: Any, array: np.ndarray, kind: str) -> np.ndarray:
    """The tensor's bytes as the writer wants them; those of K and IQ formats come from ggml itself."""
    if kind in ("F32", "F16"):
        return np.ascontiguousarray(array, {"F32": np.float32, "F16": np.float16}[kind])
    if kind.endswith("_K") or kind.startswith("IQ"):
        assert kind in GGML_TYPES
        return quantize(kind, array).reshape(len(array), -1)
    return gguf.quants.quantize(np.ascontiguousarray(array, np.float32), gguf.GGMLQuantizationType[kind])


def add_key(writer: Any, key: str, value: Any) -> None:
    """Write a key with the type that its Python value suggests."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
