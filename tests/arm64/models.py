"""Small models of every architecture and in every format, with the logits that the NumPy executor of this machine gives.

    python tests/arm64/models.py FOLDER [NAME...]

For `walk.py`, which runs them on another processor. Weights are random; those of a format are random bits in every field of a
block, so that all codes occur.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # of the tests
import test_families_llama_cpp as published
from families import write_random
from native_calls import FORMAT_NAMES, random_blocks, round_as_native
from tiny_models import ARCHITECTURES as PLAIN
from tiny_models import write_model

import pocketlm
from pocketlm.export.gguf_writer import copy_gguf
from pocketlm.export.rules import F32_ENDS
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.kv_cache import KINDS

N = 24  # tokens of a text
SHAPE = {"n_embd": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64, "n_ff": 256, "n_layer": 2}  # rows of every format's blocks
OURS = {  # that llama.cpp has not, and keys that change what they compute
    "gptneo": {"attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True]},
    "nanochat": {
        "attention.sliding_window": 8, "attention.sliding_window_pattern": [False, True], "residual_scale": [1.0, 0.9],
        "embedding_scale": [0.2, 0.1], "smear_scale": 0.3, "backout_scale": 0.2, "final_logit_softcapping": 15.0,
    },
}  # fmt: skip
SMEAR = {"smear_gate.weight": (1, 24), "blk.1.attn_v_gate.weight": (2, 12), "blk.1.attn_v_embd.weight": (263, 128)}

DEEP = 8  # a row with more layers is there for what its number of layers means, not for what a layer computes


def make(folder: Path, names: Sequence[str] = ()) -> int:
    """Write NUMBER.gguf and NUMBER.npz (name, ids, logits, kv) for every model of the table, or for those named; how many."""
    rows = list(enumerate(_rows()))
    assert {*names} <= {name for _, (name, *_) in rows}
    assert {fmt for _, (_, fmt, *_) in rows} == {name for name, row in FORMATS.items() if row.dequantize}
    seen, chosen = set(), [(n, row) for n, row in rows if not names or row[0] in names]
    for n, (name, fmt, kv, write) in chosen:
        write(plain := folder / "plain")
        path = _recoded(plain, folder / f"{n}.gguf", fmt)
        plain.unlink()
        with pocketlm.load(path, backend="numpy", threads=1, kv=kv) as model:
            if kv == "q16":
                round_as_native(model.executor)
            ids = np.random.default_rng(n).integers(0, model.hyper.n_vocab, N)
            np.savez(path.with_suffix(".npz"), name=name, ids=ids, logits=model.executor.forward(ids, rows="all"), kv=kv)
            seen.add(model.hyper.architecture)
    assert names or seen == set(ARCHITECTURES), set(ARCHITECTURES) ^ seen
    return len(chosen)


def _rows() -> Iterator[tuple[str, str, str, Callable[[Path], object]]]:
    """Name, format, cache, and what writes it in float32: every architecture in float32 and in a format, one after the other;
    every format in a Llama and in a mixture of experts; every kind of cache.
    """
    formats = itertools.cycle(name for name in FORMAT_NAMES if name != "F32")
    for name, write in _architectures():
        for fmt in ("F32", next(formats)):
            yield f"{name}, {fmt}", fmt, "q16", write
    llama = partial(write_model, **SHAPE)
    experts = published.Row("qwen3moe", published.EXPERTS | {"expert_feed_forward_length": 256})
    for fmt in FORMAT_NAMES:
        yield f"Llama, {fmt}", fmt, "q16", llama
        yield f"experts, {fmt}", fmt, "q16", partial(published.write, row=experts, shape=SHAPE)
    for kv, fmt in itertools.product(KINDS, ("F16", "Q4_0")):
        yield f"Llama, {fmt}, cache of {kv}", fmt, kv, llama


def _architectures() -> Iterator[tuple[str, Callable[[Path], object]]]:
    for arch in PLAIN:
        yield arch, partial(write_model, arch=arch, **{**SHAPE, "n_kv_head": 4})
    for arch, keys in OURS.items():
        smear = SMEAR if arch == "nanochat" else {}
        yield arch, partial(write_random, arch=arch, sizes={**SHAPE, "n_ctx": 64}, keys=keys, extra=smear)
    for name, row in published.MODELS.items():
        if row.sizes.get("n_layer", 0) <= DEEP:
            yield name, partial(published.write, row=row, shape=SHAPE)


def _recoded(path: Path, out: Path, fmt: str) -> Path:
    """The same model with random blocks of a format in every matrix whose rows are whole blocks."""
    random = np.random.default_rng(0)
    with open_gguf(path) as file, open(out, "wb") as copy:
        tensors = dict(file.tensors)
        for name, tensor in tensors.items():
            columns, rows = tensor.shape[-1], int(np.prod(tensor.shape[:-1]))
            exact = fmt == "F32" or len(tensor.shape) < 2 or name.endswith(F32_ENDS)
            if not exact and columns % FORMATS[fmt].block_size == 0:
                data = random_blocks(fmt, rows, columns, random)
                tensors[name] = dataclasses.replace(tensor, format=FORMATS[fmt], data=data)
        assert fmt in {tensor.format.name for tensor in tensors.values() if len(tensor.shape) > 1}, path
        copy_gguf(copy, file.metadata, tensors)
    return out


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), sys.argv[2:]), "models")
