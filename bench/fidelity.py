"""What every weight format costs, in the weights and in the computing.

    python bench/fidelity.py MODEL.gguf [--text FILE] [--tokens 5000] [--window 500] [--formats q4_0,q8_0] [--quantizer ggml]

The model is exported to every format, by pocketlm's quantiser or by ggml's: bits per weight, relative RMSE of the matrices, and
the perplexity of the file's weights, which the NumPy executor computes with exactly (float32). The native executor and
llama.cpp are compared with that over the same windows of the same text: KL divergence, which is what rounding activations
costs. `mxfp4` is of every matrix here, not only of experts. Prints a Markdown table. The default text comes with Python: the
topics of its `help()`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import pocketlm
from pocketlm.export import tensor_encoder
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.export import export
from pocketlm.export.from_model_file import read_model_file
from pocketlm.export.quantize import quantize
from pocketlm.export.rules import QUANTS
from pocketlm.runtime.model_file import open_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from llama_reference import GGML_TYPES, LlamaReference
from llama_reference import quantize as ggml_quantize


def by_ggml(name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """`quantize` by ggml, where it has the format."""
    return ggml_quantize(name, weights.reshape(1, -1)) if name in GGML_TYPES else quantize(name, weights, importance)


def error(model: CanonicalModel, path: Path) -> float:
    """Relative root mean square error of a file's matrices."""
    errors = squares = 0.0
    with open_model(path) as opened:
        for name, tensor in opened.tensors.items():
            if tensor.format.name != "F32":
                exact = model.tensors[name].read()
                errors += float(np.sum((tensor.to_float32() - exact) ** 2, dtype=np.float64))
                squares += float(np.sum(exact**2, dtype=np.float64))
    return (errors / squares) ** 0.5 if squares else 0.0


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Divergence:
    """Sums over the positions of a text: KL divergence, how often both have the same first choice, both perplexities."""

    def __init__(self) -> None:
        self.kl, self.n, self.same, self.nats, self.exact_nats, self.n_predicted = 0.0, 0, 0, 0.0, 0.0, 0

    def add(self, exact: np.ndarray, other: np.ndarray, ids: np.ndarray) -> None:
        """Logits [n, n_vocab] of ids [n]."""
        for at in range(0, len(ids), 64):  # float64 of 64 rows at a time
            p, q = _log_softmax(exact[at : at + 64]), _log_softmax(other[at : at + 64])
            self.kl += float((np.exp(p) * (p - q)).sum())
            self.same += int((p.argmax(-1) == q.argmax(-1)).sum())
            self.n += len(p)
            targets = ids[at + 1 : at + 1 + len(p)]
            rows = np.arange(len(targets))
            self.nats -= float(q[rows, targets].sum())
            self.exact_nats -= float(p[rows, targets].sum())
            self.n_predicted += len(targets)

    @property
    def row(self) -> str:
        off = float(np.expm1((self.nats - self.exact_nats) / self.n_predicted))
        return f"{self.kl / self.n:.1e} | {self.same / self.n:.2%} | {off:+.3%}"

    @property
    def exact_perplexity(self) -> float:
        return float(np.exp(self.exact_nats / self.n_predicted))


def divergences(path: Path, windows: list[np.ndarray], threads: int | None) -> dict[str, Divergence]:
    """How far the native executor and llama.cpp are from an exact forward pass of the file's weights, by name."""
    result, n_ctx = {"native": Divergence(), "llama.cpp": Divergence()}, len(windows[0])
    with (
        pocketlm.load(path, "numpy", threads, n_ctx) as exact, pocketlm.load(path, "native", threads, n_ctx) as native,
        LlamaReference(path, n_ctx + 12, native.n_threads) as llama,
    ):  # fmt: skip
        others: dict[str, Any] = {"native": native, "llama.cpp": llama}
        for ids in windows:
            reference = exact.logits(ids.tolist())
            for name, divergence in result.items():
                divergence.add(reference, others[name].logits(ids), ids)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=5000)
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--formats", default=",".join(QUANTS))
    parser.add_argument("--quantizer", choices=("pocketlm", "ggml"), default="pocketlm")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.text:
        text = options.text.read_text(encoding="utf-8")
    else:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    ids = np.array(pocketlm.tokenizer.load(options.model).encode(text)[: options.tokens], np.int32)
    windows = [ids[at : at + options.window] for at in range(0, len(ids), options.window)]
    print(f"{options.model.name}, {len(ids)} positions in windows of {options.window}\n", file=sys.stderr)
    if options.quantizer == "ggml":
        tensor_encoder.quantize = by_ggml  # pyright: ignore[reportPrivateImportUsage]
    QUANTS["mxfp4"] = QUANTS["mxfp4"]._replace(matrices="MXFP4", more={})
    model = read_model_file(options.model)
    both = " | ".join(f"{name}: KL | same first choice | perplexity" for name in ("native", "llama.cpp"))
    print(f"| weights | bits per weight | error | exact perplexity | {both} |")
    print(f"|---{'|--:' * 9}|", flush=True)
    for quant in options.formats.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{quant}.gguf")
            receipt = export(model, options.model, path, quant=quant)
            found, off = divergences(path, windows, options.threads), error(model, path)
            gc.collect()
        native, llama = found["native"], found["llama.cpp"]
        weights = f"{receipt.bits_per_weight:.2f} | {off:.3%} | {native.exact_perplexity:.3f}"
        print(f"| {quant} | {weights} | {native.row} | {llama.row} |", flush=True)


if __name__ == "__main__":
    main()
