"""What the tests of checkpoints of home-made code share: a model file beside the logits of that code's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_checks import onnx_logits_of

import pocketlm
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export

torch = pytest.importorskip("torch", reason="checkpoints are made with PyTorch")
made = pytest.importorskip("home_made_models")
models = pytest.importorskip("torch_models")
rounded_numbers = pytest.importorskip("rounded_numbers")

LIMIT = 1e-3
SIZES = {"n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "n_ff": 48, "n_vocab": 61}


def agree(path: Path, backend: str, expected: np.ndarray, ids: np.ndarray) -> None:
    """The logits of a model file, in one block and token by token."""
    limit = rounded_numbers.NATIVE if backend == "native" else LIMIT
    with pocketlm.load(path, backend=backend, threads=2) as model:
        assert np.abs(model.logits(ids) - expected).max() < limit
        executor = model.executor
        executor.cache.truncate(0)
        steps = np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(len(ids))])
        assert np.abs(steps - expected).max() < limit


def logits_of(module: Any, ids: np.ndarray, kept: bool) -> np.ndarray:
    """What a PyTorch module computes; `kept`: with keys and values rounded as the native executor's cache keeps them."""
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for owner, name in ((made, "attention"), (models, "causal_attention")):
            plain = getattr(owner, name)

            def rounded(q: Any, k: Any, v: Any, *rest: Any, plain: Any = plain) -> Any:
                return plain(q, rounded_numbers.keys(k), rounded_numbers.values(v), *rest)

            if kept:
                patch.setattr(owner, name, rounded)
        return module(torch.from_numpy(ids)).numpy()


def check(module: Any, source: Path, n: int = 40, **options: Any) -> tuple[CanonicalModel, list[str]]:
    """Exported and run, `source` computes what `module` does on n tokens; the model and the receipt's notes."""
    model = read_canonical(source, tokenizer="none", **options)
    out = source.parent / "out.gguf"
    receipt = export(model, source, out, quant="f32", n_threads=1)
    ids = np.random.default_rng(n).integers(0, model.hyper.n_vocab, n)
    for backend in ("numpy", "native"):
        agree(out, backend, logits_of(module, ids, kept=backend == "native"), ids)
    return model, receipt.notes


def in_onnx(module: Any, model: CanonicalModel, out: Path) -> None:
    """onnxruntime's logits of the model, all tokens at once."""
    export(model, "test", out, container="onnx", quant="f32", n_threads=1)
    ids = np.random.default_rng(2).integers(0, model.hyper.n_vocab, 40)
    assert np.abs(onnx_logits_of(out, ids.tolist()) - logits_of(module, ids, kept=False)).max() < LIMIT
