"""Does the exported file still compute what the checkpoint does? Both run over a text, side by side.

In: a `CanonicalModel` and the file made of it. Out: how alike their logits are, and how well each predicts the text.
The float32 weights run on the numpy executor, the reference; files of pocketlm on the executor that their users get, which
is the native one where it can run; ONNX files on onnxruntime. The only module of `export/` that knows executors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, PocketlmError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.runtime.evaluation import TEXT, cosines, cross_entropy
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.plan import Plan, make_plan
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import default_threads
from pocketlm.tokenizer import Tokenizer, from_metadata

WINDOW = 512  # tokens that are looked at together: bounds the logits in memory to 100 MB for 50,000 words
Runner = Callable[[np.ndarray], np.ndarray]  # ids int64 [n], from an empty cache -> logits float32 [n, n_vocab]


@dataclass(frozen=True)
class Comparison:
    """Cosines are of the logits of one position; the perplexities are of the same text in the same windows."""

    n_tokens: int
    cosine: float  # mean
    worst_cosine: float
    agreement: float  # share of positions where both think the same token likeliest
    perplexity: float  # of the exported file
    exact_perplexity: float  # of the float32 weights
    sample: str = ""  # what the tokens are, where they are not those of the whole text

    def line(self) -> str:
        """The comparison for a person."""
        return (
            f"verified on {self.n_tokens} tokens{self.sample}: cosine {self.cosine:.6f} (worst {self.worst_cosine:.6f}), "
            f"same first choice {self.agreement:.1%}, "
            f"perplexity {self.perplexity:.3f} (float32 weights: {self.exact_perplexity:.3f})"
        )


def verify(model: CanonicalModel, out: Path, text: str | None = None) -> Comparison:
    """Compare the file `out` with the float32 weights of `model` on `text`. None: on a short one that comes along, without
    the characters that the tokenizer does not take, or on random tokens where it takes too few of them.

    Raises FileError where the model has no tokenizer or is too large for the memory, PocketlmError for a text of fewer
    than two tokens or with characters that the tokenizer does not take.
    """
    if "tokenizer.ggml.tokens" not in model.metadata:
        raise FileError(out, "cannot be verified without a tokenizer", "name one with --tokenizer")
    tokenizer = from_metadata(model.metadata, out)
    found, sample = _own_ids(tokenizer) if text is None else (tokenizer.encode(text, bos=tokenizer.adds_bos), "")
    ids = np.array(found, np.int64)
    if len(ids) < 2:
        raise PocketlmError("the text is too short: verifying needs at least two tokens")
    found_cosines, same, nats, n_predicted = [], 0, np.zeros(2), 0
    window = min(WINDOW, model.hyper.n_ctx)
    with _exact_runner(model, out) as exact, _exported_runner(model, out) as exported:
        for start in range(0, len(ids), window):
            block = ids[start : start + window]
            a, b = (run(block).astype(np.float64) for run in (exact, exported))
            found_cosines += cosines(a, b).tolist()
            same += int((a.argmax(1) == b.argmax(1)).sum())
            nats += [cross_entropy(logits[:-1], block[1:]) for logits in (a, b)]
            n_predicted += len(block) - 1
    exact_perplexity, perplexity = (math.exp(min(total / max(n_predicted, 1), 700)) for total in nats)
    agreement = same / len(ids)
    return Comparison(
        len(ids), float(np.mean(found_cosines)), float(np.min(found_cosines)), agreement, perplexity, exact_perplexity, sample
    )


def _own_ids(tokenizer: Tokenizer) -> tuple[list[int], str]:
    """Ids of the text that comes along, and what is to be said about them."""
    usable = tokenizer.encodable(TEXT)
    if len(usable) < len(TEXT) // 2:
        ids = np.random.default_rng(0).integers(0, tokenizer.n_vocab, WINDOW).tolist()
        return ids, " drawn at random, since the tokenizer takes too few of the usual text's characters"
    left_out = "".join(sorted(set(TEXT) - set(usable)))
    what = f" of the usual text without {left_out!r}, which the tokenizer does not take" if left_out else ""
    return tokenizer.encode(usable, bos=tokenizer.adds_bos), what


class _Weights(Mapping[str, Tensor]):
    """A model's float32 weights as the tensors that executors take, read when they are asked for."""

    def __init__(self, model: CanonicalModel, path: Path):
        self._tensors, self._path = model.tensors, path

    def __getitem__(self, name: str) -> Tensor:
        weights = np.ascontiguousarray(self._tensors[name].read(), np.float32)
        return Tensor(name, weights.shape, FORMATS["F32"], weights.reshape(-1).view(np.uint8), 0, self._path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@contextmanager
def _exact_runner(model: CanonicalModel, out: Path) -> Iterator[Runner]:
    plan = make_plan(model.hyper, {name: tensor.shape for name, tensor in model.tensors.items()}, out)
    with _runner("numpy", plan, _Weights(model, out), out) as run:
        yield run


@contextmanager
def _exported_runner(model: CanonicalModel, out: Path) -> Iterator[Runner]:
    path = out / "model.gguf" if (out / "model.gguf").is_file() else out  # in the folder for Ollama
    if path.suffix.lower() == ".onnx":
        yield _onnx_runner(model, path)
        return
    with closing(open_model(path)) as opened:
        plan = make_plan(model.hyper, {name: tensor.shape for name, tensor in opened.tensors.items()}, path)
        with _runner("auto", plan, opened.tensors, path) as run:
            yield run


@contextmanager
def _runner(backend: str, plan: Plan, tensors: Mapping[str, Tensor], out: Path) -> Iterator[Runner]:
    with closing(make_executor(backend, plan, tensors, min(WINDOW, plan.hyper.n_ctx), default_threads(), out)) as executor:

        def run(ids: np.ndarray) -> np.ndarray:
            executor.cache.truncate(0)
            return executor.forward(ids, rows="all")

        yield run


def _onnx_runner(model: CanonicalModel, path: Path) -> Runner:
    try:
        import onnxruntime
    except ImportError:
        raise PocketlmError("verifying ONNX needs the package onnxruntime; get it with: pip install onnxruntime") from None
    session, hyper = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), model.hyper
    empty = np.zeros((1, hyper.n_kv_head, 0, hyper.head_dim), np.float32)
    past = {
        entry.name: empty.astype(np.float16 if "float16" in entry.type else np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }

    def run(ids: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **past}
        return np.asarray(session.run(["logits"], feed)[0])[0]

    return run
