"""What the memory check promises: honest figures, advice that fits, pages given back, and no growth over many tokens."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_model

import pocketlm
from pocketlm.errors import FileError
from pocketlm.runtime import memory
from pocketlm.runtime.kv_cache import KVCache
from pocketlm.runtime.native.caches import NativeCache

MIB = 1 << 20


def needs(n_ctx: int) -> tuple[int, int, int]:
    return 100 * MIB, n_ctx * 1024, n_ctx * 512


def complaint(monkeypatch, free: int | None, n_ctx: int) -> str:
    monkeypatch.setattr(memory, "available_bytes", lambda: free)
    with pytest.raises(FileError) as raised:
        memory.require("m.gguf", needs, n_ctx)
    return str(raised.value)


def test_what_fits_is_not_complained_about(monkeypatch):
    for free in (None, 101 * MIB + MIB // 2, 10**15):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        memory.require("m.gguf", needs, 1024)


@pytest.mark.parametrize("free", [101 * MIB, 120 * MIB, 150 * MIB])
def test_the_context_that_is_advised_is_the_largest_that_fits(monkeypatch, free):
    n_ctx = 1 << 20
    line = complaint(monkeypatch, free, n_ctx)
    assert f"104 MB for weights, 1073 MB for the cache of {n_ctx} tokens and 536 MB scratch" in line  # of 10^6 bytes
    assert f"only {free // 10**6} MB are free" in line
    fits = int(line.split("--ctx ")[1].split()[0])
    assert sum(needs(fits)) <= free < sum(needs(fits + 64))


def test_where_no_context_fits_a_smaller_model_is_advised(monkeypatch):
    for free in (0, 99 * MIB, 100 * MIB):
        assert "smaller or more quantised" in complaint(monkeypatch, free, 1 << 20)
    assert "smaller or more quantised" in complaint(monkeypatch, 99 * MIB, 10)


def test_free_memory_is_that_of_the_machine():
    psutil = pytest.importorskip("psutil", reason="psutil is the independent reader")
    free = memory.available_bytes()
    if free is None:
        pytest.skip("this system does not say")
    assert 0 < free < psutil.virtual_memory().total * 1.01
    assert free < psutil.virtual_memory().available * 1.2


def test_an_unknown_system_is_never_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "plan9")
    assert memory.available_bytes() is None


@pytest.mark.parametrize("cache_type", [KVCache, NativeCache])
def test_the_cache_is_as_large_as_was_said(tmp_path, cache_type):
    with pocketlm.load(write_model(tmp_path / "model.gguf", head_dim=48, n_kv_head=2), backend="numpy") as model:
        cache = cache_type(model.hyper, 1024)
        assert cache.memory.nbytes <= cache_type.bytes_for(model.hyper, 1024) * 1.01


@pytest.mark.skipif(sys.platform != "linux", reason="madvise and /proc are Linux'")
def test_released_pages_leave_the_process_and_can_be_read_again(tmp_path):
    size = 8 * MIB
    (tmp_path / "data").write_bytes(np.arange(size, dtype=np.uint32).astype(np.uint8).tobytes())
    with open(tmp_path / "data", "rb") as file:
        view = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)[100:-100]
    before = view.copy()
    assert _mapped(tmp_path / "data") >= size
    memory.release_pages(view)
    assert _mapped(tmp_path / "data") <= 64 * 1024
    np.testing.assert_array_equal(view, before)


def test_arrays_that_are_not_of_a_file_are_left_alone():
    array = np.arange(100_000)
    memory.release_pages(array)
    memory.release_pages(array[10:20])
    assert array[50] == 50


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_tokens_do_not_grow_the_process(tmp_path, backend):
    with pocketlm.load(write_model(tmp_path / "model.gguf", n_layer=1), backend=backend, threads=2) as model:
        ids, sizes = np.arange(100), []
        for rounds in range(12):
            for _ in range(20):
                model.executor.cache.truncate(0)
                model.executor.forward(ids)
                for id in range(20):
                    model.executor.forward(ids[id : id + 1])
            sizes.append(_resident() if rounds >= 2 else 0)
        assert max(sizes) - sizes[2] < 2 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("backend", "kv"), [("native", "q16"), ("native", "q8"), ("numpy", "q16")])
def test_a_text_takes_the_memory_that_it_fills_though_pages_have_two_megabytes(tmp_path, backend, kv):
    path = write_model(tmp_path / "model.gguf", n_layer=6, n_head=4, n_kv_head=4, head_dim=64, n_ctx=8192)
    with pocketlm.load(path, backend=backend, ctx=8192, kv=kv) as model:
        model.executor.forward(np.arange(40))
        cache, before = model.executor.new_cache(), _resident()
        assert cache.memory.nbytes > 24 * MIB  # every head of every layer with pages of its own, were it kept apart
        model.executor.step([(cache, list(range(40)), 1)])
        assert _resident() - before < 4 * MIB


def _mapped(path: Path) -> int:
    """Bytes of the file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and fields[0] == "Rss:":
            total += int(fields[1]) * 1024
    return total


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


LIMITED = """
import resource, sys
from pocketlm.cli import main
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]) << 20, resource.RLIM_INFINITY))
if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
    sys.exit(77)
sys.exit(main(["generate", sys.argv[1], "-p", "then", "-n", "2", "--threads", "2", "--ctx", "64"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v bounds nothing elsewhere")
@pytest.mark.parametrize("megabytes", [300, 350, 400, 500, 1000, 4000])
def test_under_a_limit_of_addresses_a_model_runs_or_says_in_a_line_what_is_missing(tmp_path, megabytes):
    path = write_model(tmp_path / "model.gguf", n_embd=256, rows=70_000)
    with pocketlm.load(path, ctx=64):  # compiled
        pass
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(megabytes)], capture_output=True, text=True, check=False, timeout=100
    )
    if run.returncode == 77:
        pytest.skip("qemu's user mode leaves limits of addresses unset")
    assert run.returncode in (0, 1), run.stderr
    if run.returncode:
        assert run.stderr.count("\n") == 1, run.stderr
        assert "needs" in run.stderr or "memory" in run.stderr
    assert run.returncode == 0 or megabytes < 4000
    assert run.returncode == 1 or megabytes > 300


def test_arrays_in_one_piece_are_aligned_zeroed_and_apart():
    sizes = [5, 0, 1000, 64, 3 << 20]
    arrays = memory.in_one_piece(sizes)
    assert [array.nbytes for array in arrays] == sizes
    assert all(array.ctypes.data % 64 == 0 and not array.any() for array in arrays if array.size)
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array.tolist()) for array in arrays] == [{0}, set(), {2}, {3}, {4}]
