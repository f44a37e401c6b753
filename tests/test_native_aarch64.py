"""Kernels compiled for aarch64, run by an emulator: products, tables and a whole model, compared with NumPy."""

import dataclasses

import numpy as np
import pytest
from aarch64_runner import BUFFERS_AT, CPUS, IMAGE_AT, needs_qemu, run_aarch64
from native_calls import activation_records, each_format, executors, host_level, kl_divergence, random_blocks, rounded, weights

from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.native import kernels, linker, tiling
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.ir import I64, PTR, Module
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.lowering import encode
from pocketlm.runtime.native.sizes import TILE, activation_bytes

pytestmark = needs_qemu
each_level = pytest.mark.parametrize("level", [LEVELS[name] for name in CPUS], ids=CPUS)
JOB = 10  # numbers of a job: a function's address and nine arguments


class Guest:
    """The emulated program's memory and code: arrays are put in, functions called one after the other, arrays read."""

    def __init__(self, level, *modules):
        caller = Module()
        with caller.function("calls", {"memory": PTR, "jobs": I64, "n": I64}, linkage="entry") as f:
            memory, jobs, n = f.args()
            with f.range(0, n) as i:
                job = memory + (jobs + i * (8 * JOB))
                f.call_pointer(f.field(job, 0, PTR), *[f.field(job, 8 * k) for k in range(1, JOB)])
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
        self.jobs.append([self.code(symbol), *arguments, *[0] * (JOB - 1 - len(arguments))])

    def run(self) -> None:
        jobs, size = self.put(np.array(self.jobs, np.int64)), len(self.memory)
        memory = bytes(self.memory) + bytes(-size % 4096)  # whole pages begin where the runner's buffers begin
        (result,) = run_aarch64(self.image, "calls", [memory, jobs - BUFFERS_AT, len(self.jobs)], self.cpu)
        self.memory, self.jobs = bytearray(result), []

    def read(self, address: int, n: int, dtype=np.float32) -> np.ndarray:
        at = address - BUFFERS_AT
        return np.frombuffer(bytes(self.memory[at : at + n * np.dtype(dtype).itemsize]), dtype)


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
        for tokens in (1, TILE):
            n = -(-n_columns // 32) * 32
            x = np.zeros((tokens, n), np.float32)
            x[:, :n_columns] = random.standard_normal((tokens, n_columns))
            records, prepared = activation_records(x), np.zeros((tokens, activation_bytes(n)), np.uint8)
            prepared[:, : records.shape[1]] = records
            y = guest.put(np.zeros((tokens, n_groups * 16), np.float32))
            guest.call(
                f"{fmt}_product{tokens}",
                w,
                n_groups,
                0,
                n_groups,
                n_blocks,
                guest.put(prepared),
                prepared.shape[1],
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


@each_level
@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(level, name):
    """A program encoded here, its addresses replaced by those of the guest's memory: a prompt, then a token."""
    fmt, options = MODELS[name]
    native, reference = executors(host_level(), fmt, 1, **options)
    guest = Guest(level, kernels.CORE, fmt)
    assert native._storage
    storage = dataclasses.replace(native._storage, address=lambda f, kernel: guest.code(f"{f}_{kernel}"))
    program = encode(native.plan, storage, 1)
    native._record["give_way"] = 0  # one thread never waits
    arrays = [*(m.data for m in storage.matrices.values()), *native._vectors.values(), *storage.buffers.values(), storage.keys,
              storage.values, native._workers._workers]  # fmt: skip
    arrays += [array for key, array in native._arrays.items() if key != "program"]
    places = sorted((array.ctypes.data, array.nbytes, guest.put(array)) for array in arrays)
    relocate(program, places)
    places = sorted([*places, (native._program.ctypes.data, native._program.nbytes, guest.put(program))])
    for start, stop in ((0, 11), (11, 12)):
        ids = np.arange(start, stop, dtype=np.int32)
        record = native._record.copy()
        relocate(record, places)
        record["n_tokens"], record["n_logits"], record["position"], record["ids"] = len(ids), len(ids), start, guest.put(ids)
        guest.call("step", guest.put(record))
        guest.run()
        buffer = storage.buffers["logits"]
        (at,) = (to for address, _, to in places if address == buffer.ctypes.data)
        got = guest.read(at, buffer.size).reshape(buffer.shape)[: len(ids), : native.hyper.n_vocab]
        assert kl_divergence(reference.forward(ids, rows="all"), got).max() <= 1e-5
        assert np.abs(got - native.forward(ids, rows="all")).max() <= 2e-3  # a float16 in the cache may be rounded otherwise
    native.close()
    reference.close()


def relocate(records: np.ndarray, places: list[tuple[int, int, int]]) -> None:
    """Every number that is an address in one of the places (start, bytes, new start) becomes the same place's new one."""
    for field in records.dtype.names or ():
        if records.dtype[field].base == np.int64 and records.dtype[field].shape == ():
            for i, value in enumerate(records[field].tolist()):
                for start, size, to in places:
                    if start <= value < start + size:
                        records[field][i] = to + value - start
