"""A thread whose processor somebody else takes is left out, and taken in again; the answer is the same all the while."""

import time

import pytest
from test_native_threads import IDS, logits, native

from pocketlm.runtime.native import workers as team


def slow_to_come(monkeypatch, seconds):
    """Worker threads that sleep as long as `seconds()` says after they were woken, as if the system had not let them run."""

    def live(wait, memory, tid, lock):
        address = memory[0].ctypes.data
        while wait(address, tid):
            lock.acquire()
            time.sleep(seconds())

    monkeypatch.setattr(team, "_live", live)


def fall_asleep(workers):
    while not workers._workers["state"][1]:
        time.sleep(0.001)


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(team, "monotonic", lambda: now[0])
    return now


def test_a_thread_that_comes_late_is_left_out_and_taken_in_again(monkeypatch, clock):
    pause = [0.0]
    slow_to_come(monkeypatch, lambda: pause[0])
    one = native(1)
    expected = logits(one)
    one.close()
    executor = native(2)
    workers = executor._workers
    assert logits(executor) == expected
    pause[0] = 0.05
    for _ in range(20):
        fall_asleep(workers)
        assert logits(executor) == expected
        if workers._active == 1:
            break
    assert workers._active == 1
    assert logits(executor) == expected
    assert executor._record["n_threads"][0] == 1
    pause[0] = 0.0
    clock[0] += 10
    executor.cache.truncate(0)
    executor.forward(IDS[:1])
    assert executor._record["n_threads"][0] == 2
    assert logits(executor) == expected
    executor.close()


def after_a_run(executor, clock, after, lost):
    """One run, and of the one before it this part of the time was lost by every thread but one; how many threads it has."""
    clock[0] += after
    workers = executor._workers
    workers._took.value, workers._lost.value = 1000, int(1000 * lost * (workers._active - 1))
    executor.cache.truncate(0)
    executor.forward(IDS[:1])
    workers._lost.value = 0
    return int(executor._record["n_threads"][0])


def late(executor, clock, after):
    return after_a_run(executor, clock, after, 0.5)


def undisturbed(executor, clock, after):
    return after_a_run(executor, clock, after, 0)


def test_who_waits_a_little_in_every_run_keeps_all_threads(clock):
    executor = native(3)
    assert [after_a_run(executor, clock, 0.01, 0.2) for _ in range(50)] == [3] * 50
    executor.close()


def test_being_late_once_in_a_while_changes_nothing(clock):
    executor = native(3)
    assert [late(executor, clock, 1.0) for _ in range(5)] == [3] * 5
    executor.close()


def test_the_longer_it_lasts_the_longer_a_thread_is_left_out(clock):
    executor = native(3)
    late(executor, clock, 0)
    assert late(executor, clock, 0.01) == 2
    assert late(executor, clock, 0.01) == 1
    assert late(executor, clock, 0.01) == 1, "one always runs"
    assert undisturbed(executor, clock, 0.001) == 1
    waits = []
    for _ in range(8):
        waited = 0.0
        while undisturbed(executor, clock, 0.005) == 1:
            waited += 0.005
        waits.append(waited)
        late(executor, clock, 0.0)
        while late(executor, clock, 0.0) > 1:
            pass
    assert waits == sorted(waits)
    assert waits[0] < 0.1
    assert 1.9 < waits[-1] < 2.1
    assert [undisturbed(executor, clock, 3.0) for _ in range(3)] == [2, 3, 3]
    executor.close()
