"""Kernels compiled for aarch64, run by an emulator: products, tables and a whole model, compared with NumPy."""

import dataclasses

import numpy as np
import pytest
from aarch64_runner import BUFFERS_AT, CLONE_FLAGS, CPUS, GIVE_WAY_AT, IMAGE_AT, SPAWN_AT, needs_qemu, run_aarch64
from native_calls import activation_records, each_format, executors, host_level, kl_divergence, random_blocks, rounded, weights

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import kernels, linker, tiling
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.ir import I32, I64, PTR, VOID, Module
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.lowering import encode
from pocketlm.runtime.native.records import RUN, WORKER, offset
from pocketlm.runtime.native.run_loop import ASLEEP
from pocketlm.runtime.native.sizes import TILES
from pocketlm.runtime.native.workers import CLOSED

pytestmark = needs_qemu
each_level = pytest.mark.parametrize("level", [LEVELS[name] for name in CPUS], ids=CPUS)
JOB = 10  # numbers of a job: a function's address and nine arguments
CACHE_LINE = 64


class Guest:
    """The emulated program's memory and code: arrays are put in, functions called one after the other, arrays read."""

    def __init__(self, level, *modules):
        caller = Module()
        with caller.function("calls", {"memory": PTR, "jobs": I64, "n": I64}, linkage="entry") as f:
            memory, jobs, n = f.args()
            with f.range(0, n) as i:
                job = memory + (jobs + i * (8 * JOB))
                f.call_pointer(f.field(job, 0, PTR), *[f.field(job, 8 * k) for k in range(1, JOB)])
        if kernels.CORE in modules:
            define_threads(caller)
        texts = [*(kernels.module_text(name, level, "sysv") for name in modules), caller.text()]
        self.image, self.cpu = linker.link([compile_object(text, level) for text in texts]), CPUS[level.name]
        self.memory, self.jobs = bytearray(), []

    def put(self, array: np.ndarray) -> int:
        """A copy of the array; its address."""
        at = len(self.memory)
        self.memory += np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()
        self.memory += bytes(-len(self.memory) % 64)
        return BUFFERS_AT + at

    def code(self, symbol: str) -> int:
        return IMAGE_AT + self.image.symbols[symbol]

    def call(self, symbol: str, *arguments: int) -> None:
        self.call_address(self.code(symbol), *arguments)

    def call_address(self, address: int, *arguments: int) -> None:
        self.jobs.append([address, *arguments, *[0] * (JOB - 1 - len(arguments))])

    def patch(self, address: int, array: np.ndarray) -> None:
        """Other contents for what was put."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).tobytes()
        self.memory[address - BUFFERS_AT : address - BUFFERS_AT + len(data)] = data

    def run(self) -> None:
        jobs, size = self.put(np.array(self.jobs, np.int64)), len(self.memory)
        memory = bytes(self.memory) + bytes(-size % 4096)  # whole pages begin where the runner's buffers begin
        (result,) = run_aarch64(self.image, "calls", [memory, jobs - BUFFERS_AT, len(self.jobs)], self.cpu, seconds=300)
        self.memory, self.jobs = bytearray(result), []

    def read(self, address: int, n: int, dtype=np.float32) -> np.ndarray:
        at = address - BUFFERS_AT
        return np.frombuffer(bytes(self.memory[at : at + n * np.dtype(dtype).itemsize]), dtype)


def define_threads(module: Module) -> None:
    """What workers.py does in Python, for the guest: live, run, and what a job list needs around them.

    live(team, tid)       a thread's life: wait; asleep until its lock is opened; wait; …
    run(team)             one run of the program, the caller's share included
    start(team, tid, …)   a thread. close(team, n): the end of n others
    poke(to, x), copy(to, from, n bytes), rest(run), which waits until the others sleep: between runs

    A team: the record's address; threads that have ended; then a lock for each thread, a cache line each.
    """
    record, ended, locks = 0, CACHE_LINE, 2 * CACHE_LINE
    with module.function("live", {"team": PTR, "tid": I64}, linkage="kernel") as f:
        team, tid = f.args()
        run, lock = f.field(team, record, PTR), team + locks + tid * CACHE_LINE
        give_way = f.field(run, offset(RUN, "give_way"), PTR)
        asleep = f.loop_while(lambda: f.compare_exchange(lock, 1, 0).equals(0))
        with f.loop_while(lambda: f.call(I64, "wait", run, tid).equals(1)), asleep:
            f.call_pointer(give_way, returns=I64)
        f.atomic_add(team + ended, 1)
    with module.function("run", {"team": PTR}, linkage="kernel") as f:
        (team,) = f.args()
        run = f.field(team, record, PTR)
        f.call(I64, "step", run)
        with f.when(f.field(run, offset(RUN, "begun")).equals(1)):
            with f.range(1, f.field(run, offset(RUN, "n_threads"))) as tid:
                wake = f.field(run, offset(RUN, "workers"), PTR) + (tid * WORKER.itemsize + offset(WORKER, "wake"))
                with f.when(f.load(I64, wake, 8).equals(1)):
                    f.store(f.const(I64, 0), wake, 8)
                    f.atomic_store(1, team + locks + tid * CACHE_LINE)
                    woken = team + ended + 8
                    f.store(f.load(I64, woken, 8) + 1, woken, 8)
            f.call(VOID, "work", run, f.const(I64, 0))
    with module.function("close", {"team": PTR, "n": I64}, linkage="kernel") as f:
        team, n = f.args()
        run = f.field(team, record, PTR)
        f.atomic_store(CLOSED, run + offset(RUN, "epoch"))
        with f.range(1, n + 1) as tid:
            f.atomic_store(1, team + locks + tid * CACHE_LINE)
        with f.loop_while(lambda: f.atomic_load(team + ended) < n):
            f.call_pointer(f.field(run, offset(RUN, "give_way"), PTR), returns=I64)
    with module.function("poke", {"to": PTR, "x": I64}, linkage="kernel") as f:
        f.store(f.args()[1], f.args()[0], 8)
    with module.function("copy", {"to": PTR, "start": PTR, "n": I64}, linkage="kernel") as f:
        to, start, n = f.args()
        with f.range(0, n, 4) as i:
            f.store(f.load(I32, start + i, 4), to + i, 4)
    with module.function("rest", {"run": PTR}, linkage="kernel") as f:
        (run,) = f.args()
        with f.range(1, f.field(run, offset(RUN, "n_threads"))) as tid:
            state = f.field(run, offset(RUN, "workers"), PTR) + (tid * WORKER.itemsize + offset(WORKER, "state"))
            with f.loop_while(lambda: f.atomic_load(state).equals(ASLEEP).equals(0)):
                f.call_pointer(f.field(run, offset(RUN, "give_way"), PTR), returns=I64)


@each_level
@each_format
def test_products_and_tables(level, fmt):
    guest, random, checks = Guest(level, fmt), np.random.default_rng(1), []
    size = FORMATS[fmt].block_size

    def check(address: int, expected: np.ndarray, limit: float, size: float = 0.0) -> None:
        """`size`: of the terms that the result is a sum of; they may cancel."""
        checks.append((address, expected, limit, size))

    for n_rows, n_blocks, wild in (
        (1, 1, False),
        (16, 2, True),
        (21, 3, True),
        (40, 1, True),
        (33, 5 if size < 256 else 2, True),
    ):
        blocks = random_blocks(fmt, n_rows, n_blocks * size, random, wild)
        matrix, n_groups, n_columns = weights(fmt, blocks, n_rows), tiling.groups(n_rows), n_blocks * size
        source, w = guest.put(blocks), guest.put(np.full(tiling.tiled_bytes(fmt, n_rows, n_columns), 0xAA, np.uint8))
        guest.call(f"{fmt}_tile", source, w, n_rows, n_groups, n_blocks, 0, n_groups)
        for row in (0, n_rows - 1):
            out = guest.put(np.zeros(n_columns, np.float32))
            guest.call(f"{fmt}_row", w, n_groups, n_blocks, row, out)
            check(out, matrix[row], 0)
        for tokens in TILES:
            n = -(-n_columns // 32) * 32
            x = np.zeros((tokens, n), np.float32)
            x[:, :n_columns] = random.standard_normal((tokens, n_columns))
            y = guest.put(np.zeros((tokens, n_groups * 16), np.float32))
            guest.call(
                f"{fmt}_product{tokens}",
                w,
                n_groups,
                0,
                n_groups,
                n_blocks,
                guest.put(activation_records(level.name, x)),
                y,
                n_groups * 64,
            )
            used = x if fmt in ("F32", "F16", "BF16") else rounded(x)
            for t in range(tokens):
                terms = np.abs(used[t, :n_columns]) @ np.abs(matrix.astype(np.float64)).T
                check(y + t * n_groups * 64, used[t, :n_columns] @ matrix.astype(np.float64).T, 1e-6, terms.max())
    guest.run()
    for address, expected, limit, size in checks:
        np.testing.assert_allclose(guest.read(address, expected.size), expected, rtol=limit, atol=limit * size)


MODELS = {
    "Q4_1, rotated, SwiGLU": ("Q4_1", {}),
    "F16, learned, GELU, biases": (
        "F16",
        {"position": "learned", "norm": "layer", "activation": "gelu_tanh", "gated": False, "bias": True},
    ),
    "Q8_0, ALiBi, exact GELU": (
        "Q8_0",
        {"position": "alibi", "activation": "gelu_erf", "n_head": 6, "n_kv_head": 2, "n_embd": 96},
    ),
}


class Program:
    """A model's program in a guest's memory, the addresses in it replaced by those that its arrays have there."""

    def __init__(self, guest, native, n_threads):
        storage = dataclasses.replace(native._storage, address=lambda f, kernel: guest.code(f"{f}_{kernel}"), tiles=TILES)
        self.guest, self.native, self.buffer = guest, native, storage.buffers["logits"]
        program = encode(native.plan, storage, n_threads)
        arrays = [*(m.data for m in storage.matrices.values()), *native._vectors.values(), *storage.buffers.values()]
        cache = native.cache
        arrays += [cache.memory, cache.table, native._workers._workers, *native._tables.values()]
        arrays += [array for key, array in native._arrays.items() if key != "program"]
        self.places = sorted((array.ctypes.data, array.nbytes, guest.put(array)) for array in arrays if array.nbytes)
        relocate(program, self.places)
        self.places = sorted([*self.places, (native._program.ctypes.data, native._program.nbytes, guest.put(program))])
        self.logits = next(to for address, _, to in self.places if address == self.buffer.ctypes.data)

    def record(self, **fields):
        """The run's record, with these fields."""
        record = self.native._record.copy()
        relocate(record, self.places)
        for name, value in fields.items():
            record[name] = value
        return record

    def last_pass(self):
        """The fields of the native executor's last pass, its tables put into the guest's memory."""
        record, tables = self.native._record, {}
        for name in ("tokens", "rows", "entries"):
            table = self.native._arrays[name].copy()
            relocate(table, self.places)
            tables[name] = self.guest.put(table)
        return {**tables, **{name: int(record[name][0]) for name in ("n_tokens", "n_logits", "n_entries")}}


@each_level
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(level, name):
    """A program encoded here: a prompt, then a token."""
    fmt, options = MODELS[name]
    native, reference = executors(host_level(), fmt, 1, **options)
    guest = Guest(level, kernels.CORE, fmt)
    program, expected = Program(guest, native, 1), reference.forward(np.arange(12), rows="all")
    for start, stop in ((0, 11), (11, 12)):
        here = native.forward(np.arange(start, stop), rows="all").copy()
        guest.call("step", guest.put(program.record(**program.last_pass(), give_way=0)))
        guest.run()
        got = guest.read(program.logits, program.buffer.size).reshape(program.buffer.shape)
        got = got[: stop - start, : native.hyper.n_vocab]
        assert kl_divergence(expected[start:stop], got).max() <= 1e-5
        assert np.abs(got - here).max() <= 2e-3  # a float16 in the cache may be rounded otherwise
    native.close()
    reference.close()


STEPS = ((0, 7), *((i, i + 1) for i in range(7, 12)), (12, 19))  # a prompt, tokens, another prompt
SLEEPS = {8, 12}  # before these positions the others fall asleep


def generate(level, fmt, options, n_threads):
    """Logits of all steps, computed by threads of one guest, and how often one of them was woken from its sleep."""
    native, reference = executors(host_level(), fmt, n_threads, **options)
    reference.close()
    guest = Guest(level, kernels.CORE, fmt)
    program = Program(guest, native, n_threads)
    fields = {"epoch": 0, "arrived": 0, "lost": 0, "took": 0, "begun": 0, "n_threads": n_threads, "give_way": GIVE_WAY_AT}
    run = guest.put(program.record(**fields))
    workers = next(to for address, _, to in program.places if address == native._workers._workers.ctypes.data)
    guest.patch(workers, np.zeros(n_threads, WORKER))
    team = guest.put(np.zeros((2 + n_threads) * CACHE_LINE, np.uint8))
    guest.patch(team, np.array([run], np.int64))
    for tid in range(1, n_threads):
        stack = guest.put(np.zeros(1 << 18, np.uint8)) + (1 << 18)
        guest.call_address(SPAWN_AT, CLONE_FLAGS, stack, guest.code("live"), team, tid)
    outputs, expected, row = [], [], program.buffer.strides[0]
    for start, stop in STEPS:
        n = stop - start
        expected.append(native.forward(np.arange(start, stop) % native.hyper.n_vocab, rows="all").copy())
        for name, value in program.last_pass().items():
            guest.call("poke", run + offset(RUN, name), value)
        if start in SLEEPS and n_threads > 1:
            guest.call("rest", run)
        guest.call("run", team)
        outputs.append(guest.put(np.zeros(n * row, np.uint8)))
        guest.call("copy", outputs[-1], program.logits, n * row)
    guest.call("close", team, n_threads - 1)
    guest.run()
    ended, woken = guest.read(team + CACHE_LINE, 2, np.int64).tolist()
    assert ended == n_threads - 1
    logits = [guest.read(to, (stop - start) * row // 4) for to, (start, stop) in zip(outputs, STEPS, strict=True)]
    native.close()
    shaped = [each.reshape(len(e), -1)[:, : native.hyper.n_vocab] for each, e in zip(logits, expected, strict=True)]
    assert max(np.abs(a - b).max() for a, b in zip(shaped, expected, strict=True)) <= 2e-3
    return b"".join(each.tobytes() for each in shaped), woken


@each_level
@pytest.mark.parametrize("name", MODELS)
def test_two_and_four_threads_compute_what_one_does(level, name):
    """Threads of the emulated program, which run at once on this machine's cores: they share tasks by atomic counters, meet at
    barriers, spin, fall asleep and are woken, and end.
    """
    fmt, options = MODELS[name]
    one, _ = generate(level, fmt, options, 1)
    for n_threads in (2, 4):
        many, woken = generate(level, fmt, options, n_threads)
        assert many == one
        assert woken > 0


def relocate(records: np.ndarray, places: list[tuple[int, int, int]]) -> None:
    """Every number that is an address in one of the places (start, bytes, new start) becomes the same place's new one."""
    for field in records.dtype.names or ():
        if records.dtype[field].base == np.int64 and records.dtype[field].shape == ():
            for i, value in enumerate(records[field].tolist()):
                for start, size, to in places:
                    if start <= value < start + size:
                        records[field][i] = to + value - start
