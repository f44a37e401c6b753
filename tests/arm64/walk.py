"""Runs a folder of models (`models.make`) at a level and compares: other threads and other passes must give the same bits, and
these be near the logits that stand beside each model.

    python walk.py FOLDER LEVEL

Needs nothing but pocketlm and NumPy. One line for each model and each number of threads that is wrong; exit status 1 then.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

import pocketlm
from pocketlm.runtime.native import levels, workers

THREADS = (2, 4)
PASSES = (24,), (7, 7, 7, 3), (1, 1, 1, 18, 1, 1, 1)  # tokens at a time: the whole text of models.py, and others beside it
KL = 1e-5  # nats, the largest of all positions
NEAR = 2e-3  # of the largest logit: a number of the cache in the middle may be rounded otherwise


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def walk(path: Path, level: str) -> tuple[str, float, float, list[str]]:
    """What the model is called, the largest KL and error, and what is wrong."""
    beside = np.load(path.with_suffix(".npz"))
    name, ids, expected, kv = str(beside["name"]), beside["ids"], beside["logits"], str(beside["kv"])
    workers.LOST = 0  # no thread is left out, however late it comes: on a busy machine four would be one
    found: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}
    wrong = []
    for threads in THREADS:
        with pocketlm.load(path, backend="native", threads=threads, kv=kv) as model:
            for passes in PASSES:
                model.executor.cache.truncate(0)
                parts, ran = [], set()
                for part in np.split(ids, np.cumsum(passes)[:-1]):
                    parts.append(model.executor.forward(part, rows="all").copy())
                    ran.add(int(model.executor._record["n_threads"][0]))
                found[threads, passes] = np.concatenate(parts)
                if ran != {threads}:
                    wrong.append(f"{threads} threads, passes of {passes}: {ran} computed")
    first = found[THREADS[0], PASSES[0]]
    p, q = log_softmax(expected), log_softmax(first)
    kl, error = float((np.exp(p) * (p - q)).sum(-1).max()), float(np.abs(first - expected).max() / np.abs(expected).max())
    others = [key for key, logits in found.items() if logits.tobytes() != first.tobytes()]
    wrong += [f"{threads} threads, passes of {passes}: other bits" for threads, passes in others]
    if not (kl <= KL and error <= NEAR):
        wrong.append(f"KL {kl:.1e}, error {error:.1e} of the largest logit")
    return name, kl, error, wrong


def main(folder: Path, level: str) -> int:
    if (found := levels.detect().name) != level:
        print(f"this processor's level is {found}")
        return 1
    start, worst, failed = time.monotonic(), {}, 0
    paths = sorted(folder.glob("*.gguf"), key=lambda path: int(path.stem))
    for path in paths:
        name, *figures, wrong = walk(path, level)
        worst[name] = figures
        if wrong:
            failed += 1
            print(f"{name}: {'; '.join(wrong)}", flush=True)
    (kl, kl_of), (error, error_of) = (max((figures[i], name) for name, figures in worst.items()) for i in range(2))
    print(
        f"{level}: {len(paths)} models with {' and '.join(map(str, THREADS))} threads, {failed} wrong;"
        f" largest KL {kl:.1e} ({kl_of}), largest error {error:.1e} ({error_of}), {time.monotonic() - start:.0f} s"
    )
    return int(failed > 0 or not paths)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
