"""Products with AMX: the same bits as those without, for every format, shape and number of tokens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from native_calls import aligned_copy, each_format, executors, products, random_blocks, runs_here
from test_experts import logits, native, plan_of, quantised

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import kernels
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.sizes import tiles
from pocketlm.runtime.native.tiling import tile

AMX, VNNI = LEVELS["amx"], LEVELS["avx512-vnni"]
pytestmark = pytest.mark.skipif(not runs_here(AMX), reason="this CPU lacks AMX, or its system does not give it")


def product(level, fmt: str, w: np.ndarray, n_rows: int, n_blocks: int, x: np.ndarray) -> np.ndarray:
    return products(kernels.loaded(fmt, level), level.name, fmt, w, n_rows, n_blocks, x)


@each_format
@pytest.mark.parametrize("wild", [False, True], ids=["", "wild scales"])
def test_products_have_the_same_bits(fmt, wild):
    random, size = np.random.default_rng(3), FORMATS[fmt].block_size
    for n_rows, n_blocks in [(1, 1), (16, 2), (21, 3), (40, 7), (33, 18), (64, 25), (48, 48), (16, 49)]:
        n_columns = n_blocks * size if size > 1 else n_blocks * 32
        w = aligned_copy(tile(fmt, random_blocks(fmt, n_rows, n_columns, random, wild), n_rows))
        x = random.standard_normal((16, n_columns)).astype(np.float32)
        x *= np.exp2(random.integers(-20, 20, (16, n_columns // 32))).astype(np.float32).repeat(32, 1)
        x[3], x[5, :32] = 0, 0
        expected = np.vstack([product(VNNI, fmt, w, n_rows, n_columns // size, row[None]) for row in x])
        assert np.isfinite(expected).all()
        for tokens in tiles(AMX.name):
            own = product(AMX, fmt, w, n_rows, n_columns // size, x[:tokens])
            assert own.tobytes() == expected[:tokens].tobytes(), f"{n_rows} rows, {n_blocks} blocks, {tokens} tokens"


@each_format
def test_the_largest_integers_have_the_same_bits(fmt):
    size = FORMATS[fmt].block_size
    n_rows, n_columns = 16, max(size, 32) * 3
    for weight in (0x00, 0xFF, 0x80, 0x7F, 0x88):
        blocks = np.full(n_rows * n_columns // size * FORMATS[fmt].block_bytes, weight, np.uint8)
        if fmt == "F32":
            blocks = np.full(n_rows * n_columns, 1e30, np.float32).view(np.uint8)
        w = aligned_copy(tile(fmt, blocks, n_rows))
        x = np.full((16, n_columns), 1.0, np.float32) * np.where(np.arange(16) % 2, -1, 1)[:, None].astype(np.float32)
        expected = np.vstack([product(VNNI, fmt, w, n_rows, n_columns // size, row[None]) for row in x])
        for tokens in (8, 16):
            own = product(AMX, fmt, w, n_rows, n_columns // size, x[:tokens])
            np.testing.assert_array_equal(own, expected[:tokens])  # NaN for NaN: scales are whatever the bytes say


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("fmt", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_a_token_that_is_no_number_spoils_no_other(fmt):
    random, size, n_columns = np.random.default_rng(5), FORMATS[fmt].block_size, 1024
    w = aligned_copy(tile(fmt, random_blocks(fmt, 40, n_columns, random), 40))
    x = random.standard_normal((16, n_columns)).astype(np.float32)
    x[9] *= np.float32(1e-34)  # scales are subnormal
    x[1], x[4, 700], x[11, 0], x[15, -1] = np.nan, np.inf, -np.inf, np.nan
    own = product(AMX, fmt, w, 40, n_columns // size, x)
    expected = np.vstack([product(VNNI, fmt, w, 40, n_columns // size, row[None]) for row in x])
    wrong = np.isin(np.arange(16), (1, 4, 11, 15))
    assert own[~wrong].tobytes() == expected[~wrong].tobytes()
    assert np.isfinite(own[~wrong]).all()
    assert not np.isfinite(own[wrong]).any()


@each_format
def test_a_model_has_the_same_bits(fmt):
    ids, found = np.random.default_rng(7).integers(0, 64, 60), list[bytes]()
    for level in (AMX, VNNI):
        executor, reference = executors(level, fmt, 2, n_vocab=64, n_ctx=64)
        for n in (60, 41, 25, 16, 9):
            executor.cache.truncate(0)
            found.append(executor.forward(ids[:n], rows="all").tobytes())
        assert executor.arithmetic == "native avx512-vnni"
        executor.close()
        reference.close()
    assert found[:5] == found[5:]


@pytest.mark.parametrize("free", [None, 0], ids=["in memory", "in the file"])
@pytest.mark.parametrize("fmt", ["Q4_0", "Q6_K", "MXFP4", "BF16"])
def test_experts_have_the_same_bits(fmt, free):
    """Each expert gets from none to all of a pass's tokens."""
    plan, ids, found = plan_of(n_layer=1, expert_count=3), np.random.default_rng(7).integers(0, 96, 60), list[bytes]()
    tensors = quantised(plan, fmt)
    for level in (AMX, VNNI):
        executor = native(plan, tensors, 2, level, free)
        found += [logits(executor, ids, cut).tobytes() for cut in (60, 25, 17, 11)]
        executor.close()
    assert len(set(found)) == 1


SMALL_STACK = """
import ctypes, sys, threading
import pocketlm.runtime.native.levels as levels

class Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

def live():
    stack = Stack(ctypes.addressof(memory), 0, 8192)
    assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
    ready.set()
    threading.Event().wait()

memory, ready = ctypes.create_string_buffer(8192), threading.Event()
threading.Thread(target=live, daemon=True).start()
ready.wait()
try:
    print(levels.detect().name)
except levels.PocketlmError as error:
    print(error)
"""


@pytest.mark.parametrize(("forced", "said"), [("", "avx512-vnni\n"), ("amx", "the system does not give this process AMX")])
def test_a_thread_whose_stack_for_signals_is_too_small_keeps_amx_away(forced, said):
    """Linux would have to write the tiles to it."""
    environment = os.environ | {"POCKETLM_ISA": forced}
    done = subprocess.run([sys.executable, "-c", SMALL_STACK], env=environment, capture_output=True, text=True, check=True)
    assert said in done.stdout
    assert done.stdout.count("\n") == 1


def test_signals_and_children_keep_the_bits():
    """A signal puts the tiles away in the middle of a product; a child begins without any."""
    executor, reference = executors(AMX, "Q4_0", 2, n_vocab=64, n_ctx=128)
    ids, came = np.random.default_rng(7).integers(0, 64, 120), list[int]()

    def prompt() -> bytes:
        executor.cache.truncate(0)
        return executor.forward(ids, rows="all").tobytes()

    expected, before = prompt(), signal.signal(signal.SIGALRM, lambda number, frame: came.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
        while len(came) < 100:
            assert prompt() == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    child = os.fork()
    if not child:
        os._exit(prompt() != expected)
    assert os.waitpid(child, 0)[1] == 0
    assert prompt() == expected
    executor.close()
    reference.close()


def test_small_stacks_of_threads_are_enough():
    before, found = threading.stack_size(64 << 10), list[bytes]()
    try:
        executor, reference = executors(AMX, "Q6_K", 2, n_vocab=64, n_ctx=64)  # the largest frame
        ids = np.random.default_rng(7).integers(0, 64, 60)
        thread = threading.Thread(target=lambda: found.append(executor.forward(ids, rows="all").tobytes()))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    executor.cache.truncate(0)
    assert found == [executor.forward(ids, rows="all").tobytes()]
    executor.close()
    reference.close()
