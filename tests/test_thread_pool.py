"""The pool of threads: every part of a job is done when `run` returns, whatever came between; no thread outlives its pool."""

import gc
import os
import threading
import time

import numpy as np
import pytest
from canonical_models import make_hyper
from interrupts import interrupt_everywhere, needs_timer, signal_storm
from native_calls import tensors_of

from pocketlm.errors import FileError, PocketlmError
from pocketlm.runtime import executors, numpy_executor, threads
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.threads import ThreadPool, share

IDS = np.arange(12)


def fill(pool, value):
    """All elements are written by the parts, the other threads' later than the caller's."""
    out = np.zeros(50)

    def job(part, parts):
        time.sleep(0.0004 * part)
        out[share(len(out), part, parts)] = value

    pool.run(job)
    return out


def ours():
    return [thread for thread in threading.enumerate() if thread.name.startswith("pocketlm-")]


def gone():
    """Whether all threads end by themselves."""
    for _ in range(1000):
        if not ours():
            return True
        time.sleep(0.01)
    return False


def model(n_threads=2, kind=NumpyExecutor, **options):
    """An executor of a model whose products are large enough for the threads, and what it must compute."""
    hyper = make_hyper(n_embd=96, n_head=4, n_kv_head=2, head_dim=24, n_ff=128, **options)
    tensors = tensors_of(hyper, "F32")
    plan = make_plan(hyper, {name: tensor.shape for name, tensor in tensors.items()}, "model")
    return kind(plan, tensors, hyper.n_ctx, n_threads)


@pytest.fixture
def shared_products(monkeypatch):
    """The threads are used for small products, too."""
    monkeypatch.setattr(numpy_executor, "SMALL", 1)
    monkeypatch.setattr(numpy_executor, "HEAD_START", 0)


def logits(executor):
    executor.cache.truncate(0)
    return b"".join(executor.forward(part, rows="all").tobytes() for part in (IDS[:9], IDS[9:10], IDS[10:]))


def test_an_interrupt_at_any_instruction_leaves_later_runs_whole():
    with ThreadPool(3) as pool:

        def check():
            for value in (2, 3):
                assert (fill(pool, value) == value).all()

        assert interrupt_everywhere(lambda: fill(pool, 1), check, threads) > 50


@needs_timer
def test_many_interrupts_leave_later_runs_whole():
    with ThreadPool(3) as pool:
        assert (fill(pool, 1) == 1).all()

        def check():
            assert (fill(pool, 2) == 2).all()

        assert signal_storm(lambda: fill(pool, 1), check, 100, 1, threads) >= 100


@needs_timer
def test_interrupted_products_leave_the_numpy_executor_right(shared_products):
    executor, one = model(3), model(1)
    expected = logits(executor)
    np.testing.assert_allclose(*(np.frombuffer(each, np.float32) for each in (expected, logits(one))), rtol=1e-4, atol=1e-5)

    def check():
        assert logits(executor) == expected

    assert signal_storm(lambda: logits(executor), check, 60, 2, threads, numpy_executor) >= 60
    executor.close()
    one.close()
    assert ours() == []


def test_an_error_belongs_to_its_run():
    def broken(part, parts):
        raise ValueError(part)

    with ThreadPool(4) as pool:
        for _ in range(3):
            with pytest.raises(ValueError):
                pool.run(broken)
            assert (fill(pool, 5) == 5).all()

        def half(part, parts):
            if part:
                raise KeyError(part)

        with pytest.raises(KeyError):
            pool.run(half)
        assert (fill(pool, 6) == 6).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", [NumpyExecutor, NativeExecutor])
def test_a_forked_child_computes_the_same(kind, shared_products):
    executor = model(3, kind)
    expected, stop = logits(executor), threading.Event()

    def busy():
        while not stop.is_set():
            executor.forward(IDS[:1]) if executor.cache.length < 20 else executor.cache.truncate(0)

    for thread in (None, threading.Thread(target=busy)):  # alone, and while another thread computes
        if thread:
            thread.start()
        for _ in range(5):
            child = os.fork()
            if not child:
                status = 1
                try:
                    status = 0 if logits(executor) == expected else 2
                    executor.close()
                finally:
                    os._exit(status)
            assert waited(child) == 0
    stop.set()
    thread.join()
    assert logits(executor) == expected
    executor.close()


def waited(child):
    """The child's exit status; one that hangs is ended."""
    for _ in range(3000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "it hangs"


def test_a_pool_that_is_dropped_ends_its_threads():
    pool = ThreadPool(3)
    fill(pool, 1)
    del pool
    gc.collect()
    assert gone()


class Circle:
    """Garbage that only the collector finds, with a pool in it."""

    def __init__(self, pool):
        self.pool, self.self = pool, self


def test_the_collector_may_find_a_pool_in_its_own_thread():
    circle = Circle(ThreadPool(2))
    found, go = [], threading.Event()

    def job(part, parts):
        if part:
            go.wait(10)
            gc.collect()  # nobody else has the pool any more
            found.append(part)

    worker = circle.pool._workers[0]
    run = threads._Run(job)
    worker.run = run
    threads.open_lock(worker.go)
    del circle, worker
    go.set()
    assert gone()
    assert found == [1]


def failing_start(monkeypatch, after, error):
    """Thread.start fails once `after` threads have been started."""
    start, count = threading.Thread.start, 0

    def limited(thread):
        nonlocal count
        count += 1
        if count > after:
            raise error
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("kind", ["pool", NumpyExecutor, NativeExecutor])
def test_threads_that_cannot_be_started_are_one_line_and_leave_none_behind(monkeypatch, kind, after):
    make = ThreadPool if kind == "pool" else lambda n: model(n, kind)
    with pytest.MonkeyPatch.context() as patch:
        failing_start(patch, after, RuntimeError("can't start new thread"))
        with pytest.raises(PocketlmError, match=r"cannot start 4 threads .*--threads"):
            make(4)
    assert gone()
    made = make(4)
    made.close()


@pytest.mark.parametrize("kind", ["pool", NumpyExecutor, NativeExecutor])
def test_an_interrupt_between_two_starts_leaves_no_thread_behind(monkeypatch, kind):
    make = ThreadPool if kind == "pool" else lambda n: model(n, kind)
    with pytest.MonkeyPatch.context() as patch:
        failing_start(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            make(4)
    assert gone()


@pytest.mark.parametrize("kind", [NumpyExecutor, NativeExecutor])
def test_loading_that_fails_half_way_leaves_no_thread_behind(kind):
    hyper = make_hyper(n_layer=2)
    tensors = tensors_of(hyper, "F32")
    last = "blk.1.ffn_down.weight"
    tensors[last].data.view(np.float32)[-1] = np.nan
    plan = make_plan(hyper, {name: tensor.shape for name, tensor in tensors.items()}, "model")
    gc.disable()  # the error holds the frames: nothing may depend on the collector
    try:
        with pytest.raises(FileError, match="NaN"):
            kind(plan, tensors, hyper.n_ctx, 3)
        assert ours() == []
    finally:
        gc.enable()


def test_a_loaded_executor_that_is_not_kept_leaves_no_thread_behind():
    executors.make_executor("auto", *_parts(), 64, 3, "model")
    gc.collect()
    assert gone()


def _parts():
    hyper = make_hyper()
    tensors = tensors_of(hyper, "F32")
    return make_plan(hyper, {name: tensor.shape for name, tensor in tensors.items()}, "model"), tensors


@pytest.mark.parametrize("kind", [NumpyExecutor, NativeExecutor])
def test_closing_in_the_middle_of_a_run_never_gives_wrong_logits(kind, shared_products):
    ids = np.arange(40) % 16
    first = model(3, kind)
    expected = first.forward(ids, rows="all").tobytes()
    first.close()
    outcomes = set()
    for i in range(40):
        executor, started = model(3, kind), threading.Event()
        seen = []

        def compute(executor=executor, seen=seen, started=started):
            try:
                while True:
                    executor.cache.truncate(0)
                    started.set()
                    seen.append(executor.forward(ids, rows="all").tobytes() == expected)
            except PocketlmError as error:
                seen.append(str(error))

        thread = threading.Thread(target=compute)
        thread.start()
        started.wait()
        time.sleep(0.0005 * (i % 9))
        executor.close()
        thread.join(30)
        assert not thread.is_alive()
        outcomes |= set(seen)
    assert outcomes <= {True, "this model is closed; load it again"}
    assert "this model is closed; load it again" in outcomes
    assert ours() == []
