"""Whoever is interrupted leaves a lock that others can have."""

import _thread
import ast
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
from fake_executor import FakeExecutor
from interrupts import needs_timer, signal_storm

from pocketlm import locks
from pocketlm.runtime.engine import Engine

KINDS = {
    "lock": locks.lock,
    "reentrant": locks.reentrant_lock,
    "lock of 3.14": lambda: locks._OneStep(threading.Lock()),
    "lock of 3.10": lambda: locks._HeldByTheStack(threading.Lock()),
    "reentrant of 3.10": lambda: locks._HeldByTheStack(threading.RLock()),
    "reentrant of 3.14": lambda: locks._OneStep(threading.RLock()),
}
OF_THIS_PYTHON = {kind: make for kind, make in KINDS.items() if not kind.endswith("3.14") or sys.version_info[:2] != (3, 10)}


@pytest.fixture
def long_turns():
    """A thread that has the interpreter's lock does several things before another one does any."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    yield
    sys.setswitchinterval(interval)


def is_free(lock):
    had = []

    def attempt():
        had.append(lock.acquire(timeout=0.5))
        if had[-1]:
            lock.release()

    another = threading.Thread(target=attempt)
    another.start()
    another.join()
    return had == [True]


def interrupted_with(lock, entered):
    """Wait for a lock and get it at the moment of an interrupt; `entered` has it and releases it."""
    taken = threading.Event()

    def hold():
        lock.acquire()
        taken.set()
        time.sleep(0.05)  # until the other one waits: if that takes longer, the interrupt only comes somewhere else
        lock.release()
        _thread.interrupt_main()

    holder = threading.Thread(target=hold)
    holder.start()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        taken.wait()
        with entered:
            for _ in range(1000):
                time.sleep(0.01)
    holder.join()


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_an_interrupt_that_comes_with_a_lock_leaves_it_free(make, long_turns):
    """Python 3.14 looks for interrupts between a lock's `__enter__` and the `with` that would release it."""
    lock = make()
    interrupted_with(lock, lock)
    assert is_free(lock)


def interrupted_with_an_exception():
    for _ in iter(_thread.interrupt_main, 0):  # Python does not look for interrupts between this step and the exception
        raise ValueError


@pytest.mark.parametrize("make", OF_THIS_PYTHON.values(), ids=OF_THIS_PYTHON.keys())
def test_an_interrupt_that_comes_with_an_exception_leaves_the_lock_free(make):
    """Python 3.10 looks for interrupts between an exception in a `with`, such as an interrupt, and `__exit__`."""
    lock = make()
    with pytest.raises(KeyboardInterrupt), suppress(ValueError), lock:
        interrupted_with_an_exception()
    assert is_free(lock)


@needs_timer
@pytest.mark.parametrize("entered", ["lock.here", "lock.within(10)"])
def test_a_storm_of_interrupts_leaves_a_lock_free(entered):
    lock, user = locks.ForkedLock(), ModuleType("user")
    user.__file__ = "where interrupts fall"
    vars(user).update(lock=lock, sleep=time.sleep)
    exec(compile(f"def use():\n    with {entered}:\n        sleep(0.001)", user.__file__, "exec"), vars(user))

    def check():
        assert is_free(lock.here)

    assert signal_storm(user.use, check, 200, 5, user) >= 200


def test_a_lock_that_another_has_is_not_had_in_time_and_stays_his():
    lock, had = locks.ForkedLock(), []

    def attempt():
        with lock.within(0.01) as got:
            had.append(got)

    with lock.here:
        for _ in range(2):
            another = threading.Thread(target=attempt)
            another.start()
            another.join()
        with lock.within(0.01) as got:  # reentrant
            assert got
        assert not is_free(lock.here)
    attempt()
    assert had == [False, False, True]
    assert is_free(lock.here)


def test_an_interrupt_that_comes_with_a_lock_that_was_not_waited_for_long_leaves_it_free(long_turns):
    lock = locks.ForkedLock()
    interrupted_with(lock.here, lock.within(10))
    assert is_free(lock.here)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_who_is_in_a_with_has_the_lock_and_then_nobody(make):
    lock, had = make(), []

    def attempt():
        had.append(lock.acquire(blocking=False))
        if had[-1]:
            lock.release()

    def use():
        with lock:
            another = threading.Thread(target=attempt)
            another.start()
            another.join()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        use()
    attempt()
    assert had == [False, True]


LOCKS = re.compile(r"(lock|_turn|_reading|changing|\.here|\.held\(.*\))$")


def loops_with_a_condition(node):
    """Those in the same function: after a condition that is not met Python jumps back, there without its table of handlers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda | ast.GeneratorExp):
            continue
        if isinstance(child, ast.For | ast.While) and any(isinstance(each, ast.If) for each in ast.walk(child)):
            yield child
        if isinstance(child, ast.ListComp | ast.SetComp | ast.DictComp) and any(part.ifs for part in child.generators):
            yield child
        yield from loops_with_a_condition(child)


def test_no_loop_with_a_condition_is_in_a_with_that_releases_a_lock():
    root = Path(locks.__file__).parent
    found, seen = [], 0
    for folder in (".", "runtime", "runtime/native", "chat", "constrain", "serve"):
        for path in (root / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.With) and any(LOCKS.search(ast.unparse(item.context_expr)) for item in node.items):
                    seen += 1
                    found += [f"{path.relative_to(root)}:{loop.lineno}" for loop in loops_with_a_condition(node)]
    assert found == []
    assert seen > 20


def test_threads_of_a_forked_process_that_ask_at_the_same_time_get_the_same_lock(monkeypatch):
    lock, together = locks.ForkedLock(), threading.Barrier(2)
    make = locks.reentrant_lock

    def make_together():
        together.wait(10)
        return make()

    monkeypatch.setattr(locks.os, "getpid", lambda: -1)
    monkeypatch.setattr(locks, "reentrant_lock", make_together)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: lock.here, range(2))
    assert first is second is lock.here


def test_threads_of_a_forked_process_that_compute_at_the_same_time_begin_once(monkeypatch):
    engine, begun = Engine(FakeExecutor()), []
    begin, caches = engine._begin, [engine.executor.new_cache() for _ in range(2)]

    def begin_slowly():
        time.sleep(0.2)  # who comes meanwhile must wait, or what the first has queued by then is lost
        begun.append(begin())

    monkeypatch.setattr(engine, "_begin", begin_slowly)
    monkeypatch.setattr(locks.os, "getpid", lambda: -1)
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(lambda cache: engine.run(cache, [1, 2], 1, len)[0], caches)] == [2, 2]
    assert len(begun) == 1
