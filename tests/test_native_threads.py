"""Threads come and go with their model, sleep when there is nothing to do, survive Ctrl-C, fork and the program's end."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from interrupts import interrupt_everywhere, needs_timer, signal_storm
from native_calls import executors, host_level

from pocketlm.errors import PocketlmError
from pocketlm.runtime import numpy_executor  # noqa: F401  for the programs
from pocketlm.runtime import threads as pools  # noqa: F401
from pocketlm.runtime.native import executor as native_executor
from pocketlm.runtime.native import workers as team
from pocketlm.runtime.native.executor import NativeExecutor

IDS = np.arange(40)


def native(threads, fmt="Q4_0", **options):
    executor, reference = executors(host_level(), fmt, threads, **options)
    reference.close()
    return executor


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("pocketlm-")]


def logits(executor):
    """The same calls every time: a prompt and three tokens."""
    executor.cache.truncate(0)
    return b"".join(executor.forward(part, rows="all").tobytes() for part in (IDS[:9], IDS[9:10], IDS[10:11], IDS[11:40]))


def program(text, *arguments, seconds=300):
    """Run a program that has this module's helpers; its stdout and stderr."""
    start = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_native_threads import *\n"
    done = subprocess.run([sys.executable, "-c", start + text, os.path.dirname(__file__), *arguments],
                          capture_output=True, text=True, timeout=seconds)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_two_hundred_teams_start_work_and_end():
    first = native(1)
    expected = logits(first)
    plan, tensors = first.plan, first._tensors
    first.close()
    for i in range(200):
        executor = NativeExecutor(plan, tensors, 64, 1 + i % 5)
        if i % 4:
            assert logits(executor) == expected
        executor.close()
        executor.close()
    assert workers() == []


def test_a_closed_model_says_so():
    executor = native(2)
    executor.close()
    with pytest.raises(PocketlmError, match="closed"):
        executor.forward(IDS)


def test_more_threads_than_cores_still_work():
    one, many = native(1), native(2 * (os.cpu_count() or 1) + 3)
    assert logits(one) == logits(many)
    one.close()
    many.close()


def test_waiting_threads_use_no_cpu():
    executor = native(3)
    logits(executor)
    time.sleep(0.3)  # they look for work a little longer before they sleep
    before = time.process_time()
    time.sleep(1)
    assert time.process_time() - before < 0.1
    assert logits(executor)
    executor.close()


def test_threads_that_sleep_are_woken_again_and_again():
    executor = native(3)
    expected = logits(executor)
    for pause in (0, 0.0001, 0.001, 0.003, 0.01, 0.02) * 8:  # about the time after which they go to sleep
        time.sleep(pause)
        assert logits(executor) == expected
    executor.close()


def test_two_models_take_turns_and_run_at_once():
    a, b = native(2), native(3, "Q8_0")
    expected = logits(a), logits(b)
    for _ in range(20):
        assert (logits(a), logits(b)) == expected
    results = {}

    def run(name, executor):
        results[name] = {logits(executor) for _ in range(30)}

    threads = [threading.Thread(target=run, args=item) for item in (("a", a), ("b", b))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"a": {expected[0]}, "b": {expected[1]}}
    a.close()
    b.close()


def test_no_thread_outlives_its_model():
    executor = native(3)
    logits(executor)
    assert len(workers()) == 2
    executor.close()
    assert workers() == []
    executor = native(3)
    logits(executor)
    del executor
    gc.collect()
    assert gone()


def gone():
    """Whether all threads end by themselves."""
    for _ in range(1000):
        if not workers():
            return True
        time.sleep(0.01)
    return False


class Circle:
    """Garbage that only the collector finds, with a model in it."""

    def __init__(self, executor):
        self.executor, self.self = executor, self


def test_a_model_may_be_collected_by_one_of_its_own_threads(monkeypatch):
    """The collector runs in whatever thread happens to allocate, the workers included: nobody may wait for itself then."""
    found, go, live = [], threading.Event(), team._live

    def collecting(*arguments):
        live(*arguments)
        go.wait(10)
        gc.collect()
        found.append(threading.current_thread())

    monkeypatch.setattr(team, "_live", collecting)
    circle = Circle(native(3))
    logits(circle.executor)
    circle.executor._record["epoch"] = team.CLOSED  # they leave the compiled code, and nobody has closed the model
    for lock in circle.executor._workers._locks:
        team.open_lock(lock)
    del circle
    go.set()
    assert gone()
    assert len(found) == 2


def test_threads_hold_the_memory_in_which_they_compute(monkeypatch):
    """A model that is dropped while a worker is on its way leaves it the arrays; they go when it goes."""
    on_its_way, go, live = threading.Event(), threading.Event(), team._live

    def late(wait, memory, tid, lock):
        on_its_way.set()
        go.wait(10)
        live(wait, memory, tid, lock)

    monkeypatch.setattr(team, "_live", late)
    executor = native(2)
    on_its_way.wait(10)
    arrays = [executor._record, executor._workers._workers, executor.cache.memory, *executor._arrays.values()]
    held = [weakref.ref(array) for array in arrays]
    del executor, arrays
    gc.collect()
    assert all(ref() is not None for ref in held)
    go.set()
    assert gone()
    gc.collect()
    assert all(ref() is None for ref in held)


def test_an_interrupt_at_any_instruction_leaves_the_model_right():
    executor = native(3)
    expected = logits(executor)

    def check():
        assert logits(executor) == expected

    def action():
        executor.cache.truncate(0)
        executor.forward(IDS[:1])

    assert interrupt_everywhere(action, check, team) > 40
    executor.close()
    assert workers() == []


@needs_timer
def test_a_storm_of_interrupts_leaves_the_model_right():
    executor = native(3)
    expected = logits(executor)

    def check():
        assert logits(executor) == expected

    assert signal_storm(lambda: logits(executor), check, 60, 3, team, native_executor) >= 60
    executor.close()
    assert workers() == []


def test_closing_in_the_middle_of_a_run_ends_every_thread():
    def forever(executor):
        with contextlib.suppress(PocketlmError):
            while True:
                logits(executor)

    for i in range(12):
        executor = native(2 + i % 3)
        thread = threading.Thread(target=forever, args=(executor,), daemon=True)
        thread.start()
        time.sleep(0.003 * i)
        executor.close()
        thread.join(30)
        assert not thread.is_alive()
    assert workers() == []


INTERRUPT = """
import random, signal
executor = native(3)
expected = logits(executor)
random.seed(int(sys.argv[2]))
caught = 0
for _ in range(40):
    timer = threading.Timer(random.uniform(0, 0.004), os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        while True:
            logits(executor)
    except KeyboardInterrupt:
        caught += 1
    timer.join()
    if random.random() < 0.3:
        time.sleep(0.02)
    assert logits(executor) == expected
executor.close()
print(caught, len(workers()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself a signal")
@pytest.mark.parametrize("seed", ["1", "2"])
def test_an_interrupted_forward_leaves_the_model_usable(seed):
    assert program(INTERRUPT, seed)[0].split() == ["40", "0"]


FORK = """
executor = native(3)
expected = logits(executor)
for _ in range(5):
    child = os.fork()
    if not child:
        same = logits(executor) == expected
        executor.close()
        os._exit(0 if same and not workers() else 1)
    assert logits(executor) == expected
    assert os.waitpid(child, 0)[1] == 0
executor.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_computes_the_same():
    program(FORK)


EXITS = {
    "with a live model": "executor = native(3); logits(executor)",
    "in the middle of a generation": """
executor = native(3)
def forever():
    while True:
        logits(executor)
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.2)
""",
    "in the middle of a generation on NumPy": """
native(1).close()
numpy_executor.SMALL = 1
executor = executors(host_level(), "Q4_0", 3)[1]
executor._pool = pools.ThreadPool(3)
def forever():
    while True:
        logits(executor)
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.2)
""",
}


@pytest.mark.parametrize("name", EXITS)
def test_the_program_ends_without_a_word(name):
    """A thread that computes when the interpreter ends is stopped where it is: it gets no error to print, and nobody waits
    for it. The tiny switch interval brings it into every moment of the interpreter's end.
    """
    for interval in ("1e-6", "1e-6", "5e-3"):
        assert program(f"sys.setswitchinterval({interval})\n{EXITS[name]}") == ("", "")


def test_an_interrupt_between_a_pass_and_its_records_mixes_up_no_texts(monkeypatch):
    executor = native(1)
    mine, other = executor.new_cache(), executor.new_cache()
    expected = [executor.step([(executor.cache, IDS[at : at + 1], 1)])[0][0].tobytes() for at in range(8)]
    seen = [executor.step([(mine, IDS[at : at + 1], 1)])[0][0].tobytes() for at in range(7)]
    record = executor._record

    class Interrupted:
        def __setitem__(self, name, number):
            record[name] = number
            if name == "n_entries":
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor, "_record", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            executor.step([(other, IDS[20:30], 1)])
    seen.append(executor.step([(mine, IDS[7:8], 1)])[0][0].tobytes())
    executor.close()
    assert seen == expected
