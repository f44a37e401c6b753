"""The native executor's threads are put on other processors than the caller's when they are woken or were late (Linux)."""

import time

import pytest
from test_native_threads import IDS, native

from pocketlm.runtime.native import workers as team


def fall_asleep(executor):
    while not executor._workers._workers["state"][1]:
        time.sleep(0.001)


@pytest.fixture
def placed(monkeypatch):
    """Where threads may run, as the system is told: (thread, processors) in order; it says that every caller runs on 1."""
    told = []
    monkeypatch.setattr(team.os, "sched_getaffinity", lambda thread: dict(told).get(thread, {0, 1, 2}), raising=False)
    monkeypatch.setattr(team.os, "sched_setaffinity", lambda thread, mask: told.append((thread, set(mask))), raising=False)
    begin = team.WorkerThreads._begin

    def begun(self):
        begin(self)
        self._processor = lambda: 1

    monkeypatch.setattr(team.WorkerThreads, "_begin", begun)
    return told


def once_more(executor):
    executor.cache.truncate(0)
    executor.forward(IDS[:1])


def test_a_thread_that_is_woken_starts_elsewhere_than_on_the_processor_of_who_wakes_it(placed):
    executor = native(2)
    (thread,) = (thread.native_id for thread in executor._workers._threads)
    fall_asleep(executor)
    placed.clear()
    once_more(executor)
    assert placed[:2] == [(thread, {0, 2}), (thread, {0, 1, 2})], "and may run everywhere again"
    executor.close()


def test_threads_that_come_late_are_moved_from_the_processor_they_share_with_the_caller(placed):
    executor = native(3)
    threads = [thread.native_id for thread in executor._workers._threads]
    once_more(executor)
    placed.clear()
    executor._workers._lost.value = 1  # as a thread leaves it that has waited for another for too long
    once_more(executor)
    assert placed[:2] == [(thread, {0, 2}) for thread in threads]
    last_told = dict(placed)
    assert [last_told[thread] for thread in threads] == [{0, 1, 2}] * 2
    executor.close()


def test_an_interrupted_run_does_not_make_a_thread_forget_where_it_may_run(placed):
    executor = native(2)
    workers = executor._workers
    (thread,) = (thread.native_id for thread in workers._threads)
    workers._keep_apart([1])  # and here the run was interrupted
    workers._processor = lambda: 0
    workers._keep_apart([1])
    once_more(executor)
    assert placed[-1] == (thread, {0, 1, 2})
    assert not workers._kept_apart
    executor.close()


def test_where_the_system_refuses_to_place_threads_they_run_where_it_likes(placed, monkeypatch):
    def refused(thread, mask=None):
        raise PermissionError

    monkeypatch.setattr(team.os, "sched_setaffinity", refused)
    executor = native(2)
    fall_asleep(executor)
    once_more(executor)
    executor.close()
