"""Reference results stored with a model, and the check that another computer gets the same.

In: a GGUF, when it is packed. Out: a few hundred logits as bytes; later, a line for every executor and instruction-set
level that runs there. Knows no executables.

The reference is NumPy's, in float32, from the GGUF as it was before it was tiled. It is the model's first layers
with its head, for the first tokens of the vocabulary: that takes every kernel that the whole takes, and little memory.
That the other layers' bytes have arrived is for `--check` to say.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pocketlm.errors import PocketlmError
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.gguf_reader import GGUF
from pocketlm.runtime.hyper import Hyper, read_hyper
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import default_threads

N_LAYER, N_ROWS, N_IDS, N_LOGITS, CTX = 2, 2048, 24, 512, 64
# The backends differ by rounding, up to 0.003 of the logits' spread over SmolLM2; a wrong kernel is off by about 1
TOLERANCE = 0.02
_TABLES = ("token_embd.weight", "output.weight")  # a row each for every token


def reference(file: GGUF) -> bytes:
    """The results of the model, as JSON of some kilobytes."""
    hyper = _hyper(file)
    n_rows = min(N_ROWS, hyper.n_vocab)
    tables = {name: _first_rows(file.tensors[name], n_rows) for name in _TABLES if name in file.tensors}
    ids = np.linspace(0, n_rows - 1, min(N_IDS, hyper.n_ctx)).astype(int).tolist()
    logits = _logits("numpy", replace(hyper, n_vocab=n_rows), {**file.tensors, **tables}, ids, file.path)
    picked = np.unique(np.linspace(0, n_rows - 1, N_LOGITS).astype(int))
    rows = {"ids": ids, "picked": picked.tolist(), "logits": [round(float(x), 5) for x in logits[picked]]}
    return json.dumps(rows, separators=(",", ":")).encode()


def _hyper(file: GGUF) -> Hyper:
    return read_hyper(file.metadata, file.tensors["token_embd.weight"].shape[0], file.path)


def _first_rows(tensor: Tensor, n: int) -> Tensor:
    row_bytes = tensor.data.nbytes // tensor.shape[0]
    return replace(tensor, shape=(n, *tensor.shape[1:]), data=tensor.data[: n * row_bytes])


def _logits(backend: str, hyper: Hyper, tensors: Mapping[str, Tensor], ids: list[int], path: object) -> np.ndarray:
    """float64 [n_vocab], after the first layers."""
    hyper = replace(hyper, n_layer=min(N_LAYER, hyper.n_layer))
    layers = tuple(f"blk.{i}." for i in range(hyper.n_layer))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blk.") or name.startswith(layers)}
    plan = make_plan(hyper, {name: tensor.shape for name, tensor in tensors.items()}, path)
    executor = make_executor(backend, plan, tensors, min(CTX, hyper.n_ctx), default_threads(), path)
    try:
        return executor.forward(np.asarray(ids, np.int32))[0].astype(np.float64)
    finally:
        executor.close()


def distance(expected: dict[str, Any], logits: np.ndarray) -> float:
    """Root mean square difference from the reference, in units of the reference's standard deviation."""
    stored = np.asarray(expected["logits"])
    return float(np.sqrt(np.mean((logits[expected["picked"]] - stored) ** 2)) / max(stored.std(), 1e-9))


def runs(expected: dict[str, Any], file: GGUF) -> Iterator[tuple[str, float | str]]:
    """Every executor and level: its name, and the distance or why it does not run."""
    from pocketlm.runtime.native import levels

    machine = levels.host_machine()
    names = [level.name for level in levels.LEVELS.values() if level.machine == machine]
    for name in (*names, "numpy"):
        forced = os.environ.get("POCKETLM_ISA")
        try:
            if name != "numpy":
                os.environ["POCKETLM_ISA"] = name
            backend = "numpy" if name == "numpy" else "native"
            yield name, distance(expected, _logits(backend, _hyper(file), file.tensors, expected["ids"], file.path))
        except PocketlmError as error:
            yield name, str(error)
        finally:
            if forced is None:
                os.environ.pop("POCKETLM_ISA", None)
            else:
                os.environ["POCKETLM_ISA"] = forced
