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

    def comes_late():
        clock[0] += pause[0]
        return pause[0]

    slow_to_come(monkeypatch, comes_late)
    one = native(1)
    expected = logits(one)
    one.close()
    executor = native(2)
    workers = executor._workers
    assert logits(executor) == expected
    pause[0] = 0.05
    for _ in range(100):
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


def after_a_run(executor, clock, seconds, lost, after=0.0):
    """One run, and the one before it took so many seconds, of which every thread but one lost this part; how many threads it
    has.
    """
    clock[0] += seconds + after
    workers = executor._workers
    workers._took.value, workers._lost.value = 1000, int(1000 * lost * (workers._active - 1))
    workers._seconds = seconds
    executor.cache.truncate(0)
    executor.forward(IDS[:1])
    workers._lost.value = 0
    return int(executor._record["n_threads"][0])


def late(executor, clock, seconds):
    return after_a_run(executor, clock, seconds, 0.7)


def undisturbed(executor, clock, seconds):
    return after_a_run(executor, clock, seconds, 0)


def test_who_waits_a_little_in_every_run_keeps_all_threads(clock):
    executor = native(3)
    assert [after_a_run(executor, clock, 0.01, 0.2) for _ in range(200)] == [3] * 200
    executor.close()


@pytest.mark.parametrize("between", [4, 10, 40])
def test_being_late_once_in_a_while_changes_nothing(clock, between):
    """A system that lets a thread wait now and then is not a busy one: a run without it would take far longer."""
    executor = native(2)
    for _ in range(20):
        assert late(executor, clock, 0.02) == 2
        assert [undisturbed(executor, clock, 0.008) for _ in range(between)] == [2] * between
    executor.close()


@pytest.mark.parametrize("after", [0.0, 3.0])
def test_a_thread_that_is_late_in_every_run_is_soon_left_out(clock, after):
    """Also where nothing is computed in between."""
    executor = native(2)
    assert 1 in [after_a_run(executor, clock, 0.02, 0.7, after) for _ in range(15)]
    executor.close()


def test_one_that_is_late_only_now_and_then_soon_runs_again_all_the_time(clock):
    executor, counts = native(2), list[int]()
    while late(executor, clock, 0.02) == 2:
        pass
    for _ in range(30):
        counts.append(late(executor, clock, 0.02))
        counts += [undisturbed(executor, clock, 0.008) for _ in range(30)]
    assert sum(n == 2 for n in counts) > 0.95 * len(counts)
    executor.close()


def test_the_longer_it_lasts_the_longer_a_thread_is_left_out(clock):
    executor = native(3)

    def all_late():
        while late(executor, clock, 0.01) > 1:
            pass

    all_late()
    assert late(executor, clock, 0.01) == 1, "one always runs"
    assert undisturbed(executor, clock, 0.001) == 1
    waits = []
    for _ in range(8):
        waited = 0.0
        while undisturbed(executor, clock, 0.005) == 1:
            waited += 0.005
        waits.append(waited)
        assert late(executor, clock, 0.01) == 1, "late at once"
    assert waits == sorted(waits)
    assert waits[0] < 0.25
    assert 1.9 < waits[-1] < 2.1
    assert [undisturbed(executor, clock, 3.0) for _ in range(3)] == [2, 3, 3]
    executor.close()
