"""Whoever is interrupted leaves a lock that others can have."""

import _thread
import sys
import threading
import time

import pytest

from pocketlm import locks

KINDS = {
    "lock": locks.lock,
    "reentrant": locks.reentrant_lock,
    "lock of 3.14": lambda: locks._OneStep(threading.Lock()),
    "reentrant of 3.14": lambda: locks._OneStep(threading.RLock()),
}


@pytest.fixture
def long_turns():
    """A thread that has the interpreter's lock does several things before another one does any."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())
def test_an_interrupt_that_comes_with_a_lock_leaves_it_free(make, long_turns):
    """Python 3.14 looks for interrupts between a lock's `__enter__` and the `with` that would release it."""
    lock, taken = make(), threading.Event()

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
        with lock:
            for _ in range(1000):
                time.sleep(0.01)
    holder.join()
    had = []
    another = threading.Thread(target=lambda: had.append(lock.acquire(timeout=0.5)))
    another.start()
    another.join()
    assert had == [True]


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
