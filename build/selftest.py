"""Reference results stored with a model, and the check that another computer gets the same.

In: a model. Out: a few hundred logits as bytes; later, a line for every executor and instruction-set level that runs here.
Knows no executables.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketlm.errors import PocketlmError

if TYPE_CHECKING:
    from pocketlm.model import Model

N_IDS, N_LOGITS, CTX = 24, 512, 64
# The backends differ by rounding, up to 0.002 of the logits' spread over SmolLM2; a wrong kernel is off by about 1
TOLERANCE = 0.02


def reference(model: Model) -> bytes:
    """The results of `model` on this computer, as JSON of some kilobytes."""
    ids = np.linspace(0, model.tokenizer.n_vocab - 1, N_IDS).astype(int).tolist()
    logits = _logits(model, ids)
    picked = np.unique(np.linspace(0, len(logits) - 1, N_LOGITS).astype(int))
    best = int(logits.argmax())
    rows = {"ids": ids, "picked": picked.tolist(), "logits": [round(float(x), 5) for x in logits[picked]], "best": best}
    return json.dumps(rows, separators=(",", ":")).encode()


def _logits(model: Model, ids: list[int]) -> np.ndarray:
    model.executor.cache.truncate(0)
    return model.executor.forward(np.asarray(ids, np.int32))[0].astype(np.float64)


def distance(expected: dict[str, Any], logits: np.ndarray) -> float:
    """Root mean square difference from the reference, in units of the reference's standard deviation."""
    stored = np.asarray(expected["logits"])
    return float(np.sqrt(np.mean((logits[expected["picked"]] - stored) ** 2)) / max(stored.std(), 1e-9))


def runs(expected: dict[str, Any], load: Callable[[str], Model]) -> Iterator[tuple[str, float | str]]:
    """Every executor and level: its name, and the distance or why it does not run. `load(backend)` opens the model."""
    from pocketlm.runtime.native import levels

    machine = levels.host_machine()
    names = [level.name for level in levels.LEVELS.values() if level.machine == machine]
    for name in (*names, "numpy"):
        forced = os.environ.get("POCKETLM_ISA")
        try:
            if name != "numpy":
                os.environ["POCKETLM_ISA"] = name
            with load("numpy" if name == "numpy" else "native") as model:
                yield name, distance(expected, _logits(model, expected["ids"]))
        except PocketlmError as error:
            yield name, str(error)
        finally:
            if forced is None:
                os.environ.pop("POCKETLM_ISA", None)
            else:
                os.environ["POCKETLM_ISA"] = forced
