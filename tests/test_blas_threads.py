"""NumPy's other users in a process find its number of threads as they left it: between forwards, after close, after errors."""

import ctypes
import gc
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from interrupts import needs_timer, signal_storm
from test_thread_pool import IDS, logits, model

from pocketlm.errors import PocketlmError
from pocketlm.runtime import blas_threads, numpy_executor

OTHERS = 3  # what somebody else has chosen


def _openblas():
    """NumPy's OpenBLAS, found by its file among what is mapped, and how its functions are called."""
    mapped = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    library = ctypes.CDLL(next(path for path in mapped if "openblas" in path and "numpy" in path))
    names = ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads")
    return library, next(name for name in names if hasattr(library, name.format("get")))


def now():
    """The number, as OpenBLAS itself tells it."""
    library, name = _openblas()
    return getattr(library, name.format("get"))()


def choose(n):
    library, name = _openblas()
    getattr(library, name.format("set"))(n)


@pytest.fixture(autouse=True)
def others():
    if sys.platform != "linux" or blas_threads._library() is None:
        pytest.skip("looks for OpenBLAS in /proc/self/maps")
    before = now()
    choose(OTHERS)
    yield
    choose(before)
    assert blas_threads._shared.before is None


def test_both_read_the_same_number():
    assert blas_threads._library().get() == now() == OTHERS


def test_products_use_one_thread_and_give_the_others_back(monkeypatch):
    executor, seen = model(2), []
    monkeypatch.setattr(executor._pool, "run", lambda job: (seen.append(now()), job(0, 1)))
    monkeypatch.setattr(numpy_executor, "SMALL", 1)
    assert now() == OTHERS  # loading changes nothing
    executor.forward(IDS)
    assert set(seen) == {1}
    assert now() == OTHERS
    executor.close()
    assert now() == OTHERS


def test_two_executors_at_once_share_the_change(monkeypatch):
    monkeypatch.setattr(numpy_executor, "SMALL", 1)
    first, second = model(2), model(2)
    inside, go = threading.Event(), threading.Event()
    seen = []

    def slow(job):
        inside.set()
        go.wait(10)
        seen.append(now())
        job(0, 1)

    monkeypatch.setattr(first._pool, "run", slow)
    thread = threading.Thread(target=first.forward, args=(IDS,))
    thread.start()
    inside.wait(10)
    second.forward(IDS)
    second.close()
    assert now() == 1  # the other one still computes
    go.set()
    thread.join()
    assert set(seen) == {1}
    assert now() == OTHERS
    first.close()
    assert now() == OTHERS


def test_errors_give_the_threads_back():
    executor = model(2)
    with pytest.raises(PocketlmError):
        executor.forward(np.array([10**6]))
    assert now() == OTHERS
    executor.close()
    with pytest.raises(PocketlmError, match="closed"):
        executor.forward(IDS)
    assert now() == OTHERS


def test_a_number_that_somebody_chooses_meanwhile_stays():
    with blas_threads.one_thread(object_ := model(1)):
        choose(2)
    assert now() == 2
    object_.close()


@needs_timer
def test_interrupted_forwards_give_the_threads_back():
    executor = model(2)

    def check():
        logits(executor)
        assert now() == OTHERS

    assert signal_storm(lambda: logits(executor), check, 40, 4, blas_threads, numpy_executor) >= 40
    executor.close()


def test_a_user_that_is_gone_does_not_keep_the_number_down():
    class User:
        pass

    first, second = User(), User()
    visit = blas_threads.one_thread(first)
    visit.__enter__()  # and never leaves
    blas_threads._shared.users.discard(first)
    del first, visit
    gc.collect()
    with blas_threads.one_thread(second):
        assert now() == 1
    assert now() == OTHERS


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_while_another_thread_changes_the_number_does_not_hang():
    with blas_threads._shared.lock.here:
        child = os.fork()
        if not child:
            with blas_threads.one_thread(model(1)):
                os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_bench_gives_the_threads_back():
    from pocketlm.bench.machine import Steady

    steady = Steady()
    steady.check()
    assert now() == OTHERS
    assert steady.times["compute"]
