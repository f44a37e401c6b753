"""The loop that walks the program in compiled code: tasks, barriers, and threads that wait for the next token.

In: addresses of the records (records.py). Out: three entry points. Knows which stage an operation runs, nothing of what
the stages compute. A run is one pass over the program, or several where a text's next token is drawn in the pass before.

    step(run)         a whole run; or, where threads sleep in Python, only its beginning: the number of threads to wake
    work(run, tid)    a thread's share of a run that has begun
    wait(run, tid)    a thread's life: wait, work, wait, …; returns 1 to sleep in Python until woken, 0 to end
"""

from __future__ import annotations

from collections.abc import Callable

from pocketlm.runtime.native import next_token, sizes
from pocketlm.runtime.native.ir import I1, I32, I64, PTR, VOID, Function, Module, Value, Var
from pocketlm.runtime.native.record_reader import Records, fill
from pocketlm.runtime.native.records import OPERATION, RUN, WORKER, offset
from pocketlm.runtime.native.stages import chunks, half_of, heads_apart

ASLEEP = 1
SPINS = {"x86_64": 4000, "aarch64": 40000}  # about 0.2 ms: longer than any operation, shorter than anyone notices
LATE = 4  # times the longest that a thread has worked itself: a longer wait is no work of the others, see `barrier`
PATIENCE = 2000  # time slices a waiting thread gives away before it sleeps: longer than Python is at work between two runs


def define(module: Module, machine: str) -> None:
    _define_pause(module, machine)
    _define_barrier(module, machine)
    _define_tasks(module)
    next_token.define(module)
    with module.function("work", {"run": PTR, "tid": I64}, linkage="entry") as f:
        _work(f, machine)
    with module.function("step", {"run": PTR}, returns=I64, linkage="entry") as f:
        _step(f)
    with module.function("wait", {"run": PTR, "tid": I64}, returns=I64, linkage="entry") as f:
        _wait(f, machine)


def _define_pause(module: Module, machine: str) -> None:
    with module.function("pause", {}) as f:
        if machine == "x86_64":
            f.call(VOID, "llvm.x86.sse2.pause")
        else:
            f.call(VOID, "llvm.aarch64.hint", f.const(I32, 1))


def _give_way(f: Function, run: Value) -> None:
    """Give the rest of the time slice to another thread, through the operating system."""
    f.call_pointer(f.field(run, offset(RUN, "give_way"), PTR), returns=I32, linkage="system")


def _clock(f: Function, machine: str) -> Value:
    """The processor's counter of time, which programs may read; i64, in a unit of its own."""
    if machine == "x86_64":
        return f.call(I64, "llvm.readcyclecounter")
    f.module.note_register("cntvct_el0")
    return f.emit(I64, "call i64 @llvm.read_volatile_register.i64(metadata !0)")


def _define_barrier(module: Module, machine: str) -> None:
    """barrier(run, number, times): wait until all threads have come to the number-th barrier of the run.

    A wait of more than SPINS, and of more than LATE times the longest that this thread itself has worked between two barriers
    of the run, means that another thread has lost its processor to another program: it is added to the run's `lost`. `times`:
    two int64 of this thread, when it left the last barrier and the longest that it has worked.
    """
    with module.function("barrier", {"run": PTR, "number": I64, "times": PTR}) as (f, run, number, times):
        arrived, epoch = run + offset(RUN, "arrived"), run + offset(RUN, "epoch")
        target, longest = number * f.field(run, offset(RUN, "n_threads")), times + 8
        now = _clock(f, machine)
        f.store(f.maximum(f.load(I64, longest, 8), now - f.load(I64, times, 8)), longest, 8)
        f.atomic_add(arrived, 1)
        spins = f.var(I64, 0)

        def is_missing() -> Value:
            # the others may have ended in the middle of a run: its results are garbage then, but nobody hangs
            return (f.atomic_load(arrived) < target) & (f.atomic_load(epoch) >= 0)

        with f.loop_while(is_missing):
            spins.set(spins.get() + 1)
            with f.when(spins.get() <= SPINS[machine]):
                f.call(VOID, "pause")
            with f.when(spins.get() > SPINS[machine]):
                _give_way(f, run)
        after = _clock(f, machine)
        with f.when(spins.get() > SPINS[machine]), f.when(after - now > f.load(I64, longest, 8) * LATE):
            f.atomic_add(run + offset(RUN, "lost"), after - now)
        f.store(after, times, 8)


def _define_tasks(module: Module) -> None:
    """tasks(run, op, n): how many tasks an operation has for n tokens."""
    with module.function("tasks", {"run": PTR, "op": PTR, "n": I64}, returns=I64) as (f, run, op, n):
        r = Records(f, run, op)
        kind = r.op("kind")
        with f.when(n.equals(0)):
            f.ret(0)
        with f.when(kind <= sizes.JOIN):
            f.ret(n)
        counts: dict[int, Callable[[], Value]] = {
            sizes.MATRIX: lambda: chunks(r) * f.select(half_of(f, r, n) < n, f.const(I64, 2), 1),
            sizes.CONVOLVE: lambda: chunks(r),
            sizes.EACH: lambda: n * ((r.op("n") + (sizes.COLUMNS - 1)) // sizes.COLUMNS),
            sizes.GROUP: lambda: f.const(I64, 1),
            sizes.GATHER: lambda: n * r.op("n_used"),
            sizes.EXPERTS: lambda: r.run("n_chosen") * ((r.op("n_groups") + r.op("chunk") - 1) // r.op("chunk")),
            sizes.SAMPLE: lambda: f.select(r.run("samplers").equals(0), 0, n),
            sizes.STORE: lambda: f.select(heads_apart(r, n), n * (r.run("n_head") + r.run("n_kv_head")), n),
            sizes.ATTEND: lambda: r.run("n_entries") * r.run("n_kv_head"),
        }
        for number, count in counts.items():
            with f.when(kind.equals(number)):
                f.ret(count())


def _counters(r: Records, tid: Value) -> Value:
    """Where a thread's counters are, one an operation: how many tasks of its share are taken. On cache lines of its own."""
    return r.run("counters", PTR) + tid * ((r.run("n_operations") + 7) & -8) * 8


def _reset_counters(f: Function, r: Records) -> None:
    with f.range(0, r.run("n_threads")) as tid, f.range(0, r.run("n_operations")) as i:
        f.atomic_store(0, _counters(r, tid) + i * 8)


def _work(f: Function, machine: str) -> None:
    run, tid = f.args()
    barriers, times, began = f.var(I64, 0), f.stack(I64, 2), _clock(f, machine)
    f.store(began, times, 8)
    f.store(f.const(I64, 0), times + 8, 8)
    another = f.var(I64, 1)
    with f.loop_while(lambda: another.get().equals(1)):
        _pass(f, run, tid, barriers, times)
        another.set(0)
        with f.when(f.field(run, offset(RUN, "most")) > 1):
            f.call(VOID, "barrier", run, barriers.get() + 1, times)  # all have drawn
            with f.when(tid.equals(0)):
                fill(f, RUN, run, another=f.call(I64, "follow", run, _clock(f, machine) - began))
                _reset_counters(f, Records(f, run, run))
            barriers.set(barriers.get() + 2)
            f.call(VOID, "barrier", run, barriers.get(), times)
            another.set(f.field(run, offset(RUN, "another")))
    # the run ends when no other thread reads the counters any more; those have nothing to wait for
    with f.when(tid > 0):
        f.atomic_add(run + offset(RUN, "arrived"), 1)
    with f.when(tid.equals(0)):
        f.call(VOID, "barrier", run, barriers.get() + 1, times)
        fill(f, RUN, run, took=_clock(f, machine) - began, begun=0)


def _pass(f: Function, run: Value, tid: Value, barriers: Var, times: Value) -> None:
    """A thread's share of one walk over the program; `barriers`: how many the run has had before."""
    with f.range(0, f.field(run, offset(RUN, "n_operations"))) as number:
        with f.when(f.atomic_load(run + offset(RUN, "epoch")) < 0):
            f.ret()  # the threads end: nobody looks at the results
        op = f.field(run, offset(RUN, "program"), PTR) + number * OPERATION.itemsize
        r = Records(f, run, op)
        own = r.run("scratch", PTR) + tid * r.run("scratch_stride")
        n = f.select(r.op("tail").equals(1), r.run("n_logits"), r.run("n_tokens"))
        kind = r.op("kind")

        def stage(task: Value) -> None:
            for at, name in enumerate(sizes.STAGES):
                with f.when(kind.equals(at)):
                    f.call(VOID, name, run, op, own, task, n)

        # a single token is prepared by every thread for itself: cheaper than waiting for one of them
        alone = kind.equals(sizes.PREPARE) & n.equals(1)
        with f.when(alone):
            stage(f.const(I64, 0))
        with f.when(~alone):
            # neighbouring tasks are one thread's, the same in every pass: weights are one stream for it, and what it has
            # written is in its own cache. Then it does what others have not come to
            n_tasks, n_threads = f.call(I64, "tasks", run, op, n), r.run("n_threads")
            with f.range(0, n_threads) as behind:
                whose = tid + behind
                whose = f.select(whose >= n_threads, whose - n_threads, whose)
                first = whose * n_tasks // n_threads
                count = (whose + 1) * n_tasks // n_threads - first
                counter = _counters(r, whose) + number * 8
                task = f.var(I64, count)
                with f.when(f.atomic_load(counter) < count):
                    task.set(f.atomic_add(counter, 1))
                with f.loop_while(lambda: task.get() < count):
                    stage(first + task.get())
                    task.set(f.atomic_add(counter, 1))
            with f.when(r.op("barrier").equals(1)):
                barriers.set(barriers.get() + 1)
                f.call(VOID, "barrier", run, barriers.get(), times)


def _step(f: Function) -> None:
    (run,) = f.args()
    _reset_counters(f, Records(f, run, run))
    f.atomic_store(0, run + offset(RUN, "arrived"))
    f.atomic_store(0, run + offset(RUN, "lost"))
    epoch = f.atomic_add(run + offset(RUN, "epoch"), 1) + 1
    workers, sleepers = f.field(run, offset(RUN, "workers"), PTR), f.var(I64, 0)
    with f.range(1, f.field(run, offset(RUN, "n_threads"))) as tid:
        worker = workers + tid * WORKER.itemsize
        f.atomic_store(epoch, worker + offset(WORKER, "go"))
        with f.when(f.compare_exchange(worker + offset(WORKER, "state"), ASLEEP, 0)):
            fill(f, WORKER, worker, wake=1)
            sleepers.set(sleepers.get() + 1)
    # from here until work is done the other threads wait for this one, whatever happens to it in Python
    fill(f, RUN, run, begun=1)
    with f.when(sleepers.get().equals(0)):
        f.call(VOID, "work", run, f.const(I64, 0))
    f.ret(sleepers.get())


def _wait(f: Function, machine: str) -> None:
    run, tid = f.args()
    worker = f.field(run, offset(RUN, "workers"), PTR) + tid * WORKER.itemsize
    state, seen, go = (worker + offset(WORKER, name) for name in ("state", "seen", "go"))
    epoch = run + offset(RUN, "epoch")
    with f.loop_while(lambda: f.const(I1, 1)):
        waited = f.var(I64, 0)

        def is_idle() -> Value:
            return f.atomic_load(go).equals(f.load(I64, seen, 8)) & (f.atomic_load(epoch) >= 0)

        with f.loop_while(lambda: is_idle() & (waited.get() < SPINS[machine] + PATIENCE)):
            waited.set(waited.get() + 1)
            with f.when(waited.get() <= SPINS[machine]):
                f.call(VOID, "pause")
            with f.when(waited.get() > SPINS[machine]):
                _give_way(f, run)
        with f.when(is_idle()):
            f.atomic_store(ASLEEP, state)
            # a run that began meanwhile either sees that this thread sleeps and wakes it, or is seen here
            with f.when(is_idle()):
                f.ret(1)
            with f.when(~f.compare_exchange(state, ASLEEP, 0)):
                f.ret(1)
        with f.when(f.atomic_load(epoch) < 0):
            f.ret(0)
        f.store(f.atomic_load(go), seen, 8)
        f.call(VOID, "work", run, tid)
