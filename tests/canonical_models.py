"""Tiny models as the exporter's readers make them: random weights, every architecture option, a small vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.hyper import Hyper, Rope
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.tensor import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PIECES = [f"▁{a}" for a in LETTERS] + [a + b for a in "tshe" for b in LETTERS[:20]]


def vocabulary() -> dict[str, Any]:
    """The keys of a SentencePiece vocabulary with byte fallback that llama.cpp accepts."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES, "▁", *LETTERS]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]
    scores = [0.0] * 259 + [-1.0 - i for i in range(len(tokens) - 259)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


N_VOCAB = len(vocabulary()["tokenizer.ggml.tokens"])


def make_hyper(architecture: str = "pocketlm", **options: Any) -> Hyper:
    """Two layers, 48 wide, 6 heads in 2 groups; `options` replace any field."""
    fields: dict[str, Any] = {
        "n_layer": 2, "n_embd": 48, "n_head": 6, "n_kv_head": 2, "head_dim": 8, "n_ff": 80, "n_vocab": N_VOCAB, "n_ctx": 64,
        "norm": "rms", "norm_eps": 1e-5, "position": "rope", "activation": "silu", "gated": True, **options,
    }  # fmt: skip
    if fields["position"] == "rope":
        fields.setdefault("rope", Rope(10000.0, fields["head_dim"], "interleaved", original_ctx=fields["n_ctx"]))
    if fields["position"] == "alibi":
        fields.setdefault("alibi_max_bias", 8.0)
    return Hyper(architecture, **fields)


GPT2: dict[str, Any] = {"norm": "layer", "position": "learned", "activation": "gelu_tanh", "gated": False, "n_kv_head": 6}


def make_model(
    hyper: Hyper, *, tied: bool = True, bias: bool = False, fused: bool = False, spread: float = 0.2
) -> CanonicalModel:
    """A model with these hyper-parameters: head tied or not, biases everywhere or nowhere, q, k, v in one tensor or three."""
    random, tensors = np.random.default_rng(0), {}

    def add(name: str, *shape: int, centre: float = 0.0) -> None:
        array = (centre + spread * random.normal(size=shape)).astype(np.float32)
        tensors[name] = CanonicalTensor(shape, array.copy)

    def linear(name: str, n_out: int, n_in: int) -> None:
        add(f"{name}.weight", n_out, n_in)
        if bias:
            add(f"{name}.bias", n_out)

    def norm(name: str) -> None:
        add(f"{name}.weight", hyper.n_embd, centre=1.0)
        if bias:
            add(f"{name}.bias", hyper.n_embd)

    add("token_embd.weight", hyper.n_vocab, hyper.n_embd)
    if hyper.position == "learned":
        add("position_embd.weight", hyper.n_ctx, hyper.n_embd)
    for i in range(hyper.n_layer):
        at = f"blk.{i}."
        norm(at + "attn_norm")
        parts = {"attn_q": hyper.q_width, "attn_k": hyper.kv_width, "attn_v": hyper.kv_width}
        for name, rows in ({"attn_qkv": sum(parts.values())} if fused else parts).items():
            linear(at + name, rows, hyper.n_embd)
        linear(at + "attn_output", hyper.n_embd, hyper.q_width)
        norm(at + "ffn_norm")
        for name in ("ffn_gate", "ffn_up") if hyper.gated else ("ffn_up",):
            linear(at + name, hyper.n_ff, hyper.n_embd)
        linear(at + "ffn_down", hyper.n_embd, hyper.n_ff)
    norm("output_norm")
    if not tied:
        add("output.weight", hyper.n_vocab, hyper.n_embd)
    metadata = vocabulary() if hyper.n_vocab == N_VOCAB else {}
    return CanonicalModel(hyper, tensors, {"general.name": "tiny", **metadata}, "test")


def logits_of(model: CanonicalModel, ids: np.ndarray) -> np.ndarray:
    """What the numpy executor computes from the model's own float32 weights: [len(ids), n_vocab]."""
    tensors = {
        name: Tensor(name, tensor.shape, FORMATS["F32"], tensor.read().reshape(-1).view(np.uint8), 0, Path("model"))
        for name, tensor in model.tensors.items()
    }
    plan = make_plan(model.hyper, {name: tensor.shape for name, tensor in model.tensors.items()}, "model")
    executor = NumpyExecutor(plan, tensors, model.hyper.n_ctx, 1)
    logits = executor.forward(np.asarray(ids), rows="all")
    executor.close()
    return logits


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
