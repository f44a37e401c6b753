"""What an executor says it will take is what it takes: every allocation of a full context counted, and the process measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.cli import main
from pocketlm.runtime import executors, memory
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.positions import rope_table
from pocketlm.runtime.session import Session

MB = 1 << 20
EXECUTORS = {"numpy": NumpyExecutor, "native": NativeExecutor}
MODELS = {
    "llama": {"n_embd": 256, "n_head": 8, "n_ff": 512, "n_ctx": 1 << 17},
    "grouped": {"n_embd": 256, "n_head": 8, "n_kv_head": 2, "head_dim": 48, "n_ctx": 1 << 17},
    "learned positions": {"arch": "gpt2", "n_embd": 128, "n_ctx": 6000},
    "alibi": {"arch": "refact", "n_embd": 128, "n_head": 8, "n_ctx": 1 << 17},
    "one layer": {"n_layer": 1, "n_embd": 64, "n_head": 1, "n_ctx": 1 << 17},
    "many rows": {"n_embd": 64, "rows": 20_000},
}


def estimate(model, backend: str, n_ctx: int, n_threads: int) -> int:
    return sum(EXECUTORS[backend].memory(model._plan, model.tensors, n_ctx, n_threads=n_threads))


@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("n_ctx", [700, 5000])
def test_a_full_context_takes_what_was_said(tmp_path, backend, options, n_ctx):
    """tracemalloc counts NumPy's own memory, too, to the byte."""
    path = write_model(tmp_path / "model.gguf", **options)
    with pocketlm.load(path, backend=backend, threads=2, ctx=64) as model:  # compiled, imported
        said = estimate(model, backend, n_ctx, 2)
        model.logits([1, 2, 3])
        tracemalloc.start()
        try:
            executor = executors.make_executor(backend, model._plan, model.tensors, n_ctx, 2, path)
            session = Session(executor)
            ids = np.random.default_rng(0).integers(0, 256, n_ctx).tolist()
            session.advance(ids)
            session.advance([*ids[:10], *ids[20:]], shift=True)
            took = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        executor.close()
    assert took <= 1.05 * said + 2 * MB
    assert said <= 2 * took + 2 * MB


CHILD = """
import json, sys, pocketlm
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.native.executor import NativeExecutor
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) << 10
path, backend, n_ctx = sys.argv[1], sys.argv[2], int(sys.argv[3])
with pocketlm.load(path, backend=backend, threads=2, ctx=16) as model:
    model.logits([1, 2, 3])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # what there is now is the peak from here on: compiling has taken more
    before = peak()
    kind = {"numpy": NumpyExecutor, "native": NativeExecutor}[backend]
    said = sum(kind.memory(model._plan, model.tensors, n_ctx, n_threads=2))
with pocketlm.load(path, backend=backend, threads=2, ctx=n_ctx) as model:
    list(model.generate([1] * n_ctx, max_tokens=1))
    print(json.dumps([said, peak() - before]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the process's peak")
@pytest.mark.parametrize("backend", EXECUTORS)
@pytest.mark.parametrize("options", [MODELS["llama"], {**MODELS["grouped"], "n_layer": 6}], ids=["llama", "six layers"])
def test_a_process_grows_by_what_was_said(tmp_path, backend, options):
    path = write_model(tmp_path / "model.gguf", **options)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), backend, "6000"], capture_output=True, text=True, check=True, timeout=300,
        env={**os.environ, "POCKETLM_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    said, grew = json.loads(run.stdout)
    assert grew <= 1.3 * said + 16 * MB
    assert said <= 3 * grew + 16 * MB


@pytest.mark.parametrize("backend", ["numpy", "native", "auto"])
def test_a_context_of_millions_is_refused_before_anything_large_is_allocated(tmp_path, capsys, monkeypatch, backend):
    """There is room for the weights and the cache, but not for the table of rotary positions or the threads' scores."""
    n_ctx = 1 << 24
    path = write_model(tmp_path / "model.gguf", n_layer=1, n_embd=64, n_head=8, n_kv_head=1)
    with pocketlm.load(path, backend="numpy") as model:
        weights, cache, _ = NumpyExecutor.memory(model._plan, model.tensors, n_ctx, n_threads=2)
    monkeypatch.setattr(memory, "available_bytes", partial(int, weights + cache + 300 * MB))
    tracemalloc.start()
    try:
        status = main(["generate", str(path), "-p", "then", "--ctx", str(n_ctx), "--backend", backend, "--threads", "2"])
        took = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    out, error = capsys.readouterr()
    assert (status, out) == (1, "")
    assert error.count("\n") == 1
    assert "MB scratch, but only" in error
    assert "--ctx" in error
    assert took < 20 * MB


def test_a_table_of_positions_is_the_same_however_it_is_cut(tmp_path):
    with pocketlm.load(write_model(tmp_path / "model.gguf"), backend="numpy") as model:
        rope = model.hyper.rope
    whole = rope_table(rope, 10_000)
    angles = np.arange(10_000.0)[:, None] * rope.theta ** (-np.arange(rope.n_dims // 2) / (rope.n_dims // 2))
    expected = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    np.testing.assert_array_equal(whole, expected)
