"""How much each weight's error counts: the mean square of what it is multiplied with (an importance matrix, "imatrix").

In: a text, which the float32 weights are run over; or a file that llama.cpp's llama-imatrix made of one. Out: for every
matrix a float32 [columns], for those of experts [experts, columns]. Knows no formats; with verify.py the only module here
that runs a model.

An error e of a weight changes a product by e·x, so its square counts as much as the mean of x².
Formats: llama.cpp, tools/imatrix (a GGUF; until 2025 a list of its own).
"""

from __future__ import annotations

import math
import struct
from contextlib import closing
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, refused
from pocketlm.export.canonical import CanonicalModel, Float32Tensors
from pocketlm.runtime.operations import Experts, Linear, Logits

LONGEST = 1 << 16  # tokens of a text that are run: enough for means, and minutes for a small model
WINDOW = 512
LEAST = 1e-3  # of the mean: a column that the text never used counts a little
Importance = dict[str, np.ndarray]


def importance(path: Path, model: CanonicalModel) -> Importance:
    """How much each column of the model's matrices counts, by `path`: a text in UTF-8, or llama.cpp's importance matrix.

    Returns name -> float32 [columns], of experts [experts, columns], above zero, with a mean of 1. A row of zeros means that
    nothing is known, as of an expert that no token used. FileError: `path` is neither, or of another model.
    """
    with refused(path, "check the path"), open(path, "rb") as file:
        start = file.read(4)
    data = path.read_bytes() if start != b"GGUF" else b""
    found = _of_gguf(path) if start == b"GGUF" else _of_list(data) or _of_text(data, path, model)
    shapes = {name: t.shape for name, t in model.tensors.items() if len(t.shape) in (2, 3) and name in found}
    matrices = {name: (*shape[:-2], shape[-1]) for name, shape in shapes.items()}
    wrong = [name for name, shape in matrices.items() if found[name].size != math.prod(shape)]
    if wrong or not matrices:
        what = f"{wrong[0]} has {found[wrong[0]].size} columns there" if wrong else "names none of its matrices"
        raise FileError(path, f"is the importance matrix of another model: {what}", "make one of a text: --imatrix TEXT")
    return {name: _relative(found[name].reshape(shape)) for name, shape in matrices.items()}


def _relative(squares: np.ndarray) -> np.ndarray:  # [..., columns] -> the same
    squares = np.where(np.isfinite(squares) & (squares > 0), squares, 0).astype(np.float64)
    says_something = squares.max(-1, keepdims=True) > squares.min(-1, keepdims=True)  # llama.cpp writes 1 for the unknown
    mean = np.maximum(squares.mean(-1, keepdims=True), 1e-300)
    return np.where(says_something, np.maximum(squares / mean, LEAST), 0).astype(np.float32)


def _of_gguf(path: Path) -> Importance:
    from pocketlm.runtime.gguf_reader import open_gguf

    sums, counts = ".in_sum2", ".counts"
    with open_gguf(path) as file:
        tensors = {name: tensor.to_float32() for name, tensor in file.tensors.items() if name.endswith((sums, counts))}
    names = [name.removesuffix(sums) for name in tensors if name.endswith(sums) and name.removesuffix(sums) + counts in tensors]
    found: Importance = {}
    for name in names:
        total, n = tensors[name + sums].ravel(), tensors[name + counts].ravel()  # a count for each expert
        if n.size and total.size % n.size == 0:
            with np.errstate(all="ignore"):  # a count of zero: nothing is known of the matrix
                found[name] = total.reshape(n.size, -1) / n[:, None]
    return found


def _of_list(data: bytes) -> Importance | None:
    """llama.cpp's old format: entries of a name, a number of runs, and sums. None if the bytes are something else."""
    found: Importance = {}
    try:
        (n_entries,), at = struct.unpack_from("<i", data), 4
        for _ in range(n_entries):
            (length,) = struct.unpack_from("<i", data, at)
            name = data[at + 4 : at + 4 + length].decode()
            runs, n_values = struct.unpack_from("<ii", data, at + 4 + length)
            if length < 0 or n_values < 0:  # it would go back, perhaps without end
                return None
            at += 12 + length
            found[name] = np.frombuffer(data, "<f4", n_values, at) / np.float32(max(runs, 1))
            at += 4 * n_values
    except (struct.error, ValueError):  # UnicodeDecodeError is one
        return None
    return found or None


def _of_text(data: bytes, path: Path, model: CanonicalModel) -> Importance:
    from pocketlm.tokenizer import from_metadata

    if "tokenizer.ggml.tokens" not in model.metadata:
        raise FileError(path, "is a text, and the model has no tokenizer", "name one with --tokenizer")
    with refused(path):
        text = data.decode("utf-8-sig")
    tokenizer = from_metadata(model.metadata, path)
    ids = np.array(tokenizer.encode(tokenizer.encodable(text))[:LONGEST], np.int64)
    if len(ids) < WINDOW:
        raise FileError(path, f"has {len(ids)} tokens", f"an importance matrix needs at least {WINDOW}, better 20,000")
    return _mean_squares(model, ids, path)


def _mean_squares(model: CanonicalModel, ids: np.ndarray, path: Path) -> Importance:
    from pocketlm.runtime.numpy_executor import NumpyExecutor
    from pocketlm.runtime.threads import default_threads

    sums: Importance = {}

    class Listening(NumpyExecutor):
        """Adds up the squares of what every matrix is multiplied with."""

        def _linear(self, op: Linear | Logits, state: dict[str, np.ndarray]) -> None:
            squares = np.einsum("ij,ij->j", state[op.x], state[op.x], dtype=np.float64)
            for name in op.matrix.weights:
                sums[name] = sums.get(name, 0) + squares
            super()._linear(op, state)

        def _experts(self, op: Experts, state: dict[str, np.ndarray]) -> None:
            chosen, n_in = state[op.chosen][:, : op.n_used].astype(np.int64), op.matrix.n_in
            x = np.broadcast_to(state[op.x].reshape(len(chosen), -1, n_in), (*chosen.shape, n_in))
            squares = np.zeros((op.n_experts, n_in))
            for number in np.unique(chosen):
                mine = x[chosen == number]
                squares[number] = np.einsum("ij,ij->j", mine, mine, dtype=np.float64)
            for name in op.matrix.weights:
                sums[name] = sums.get(name, 0) + squares
            super()._experts(op, state)

    plan = model.plan(path)
    window = min(WINDOW, model.hyper.n_ctx)
    with closing(Listening(plan, Float32Tensors(model, path), window, default_threads())) as executor:
        for start in range(0, len(ids) - window + 1, window):
            executor.cache.truncate(0)
            executor.forward(ids[start : start + window], rows="all")
    return sums
