"""Mutates GGUF files field by field and byte by byte, and checks what the reader makes of each.

    python tests/fuzz_gguf.py --count 1000000 [--seed 0]

The promises: a file either opens or raises FileError with one line; whatever opens lies wholly inside the file and can
be read to the last weight; none takes a second, and the whole run stays within 64 MB more memory than it began with.
The tests run the same with a smaller count.
"""
import argparse
import collections
import random
import re
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from gguf_bytes import EVERY_FORMAT, EVERY_VALUE_TYPE, TENSOR_TYPES, Field, file_fields, join, key, tensor

from pocketlm.errors import FileError
from pocketlm.runtime.gguf_reader import GGUF, open_gguf, parse

PATH = Path("fuzzed.gguf")
SECONDS_ALLOWED = 1.0
MEGABYTES_ALLOWED = 64
_THROUGH_A_FILE = 50  # one case in so many is written and mapped, the others are parsed in memory

_BLOCKS = {number: (block_size, block_bytes) for number, block_size, block_bytes in TENSOR_TYPES.values()}
_BOUNDARIES = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 1000, 65535, 65536]
_BOUNDARIES += [2**n + d for n in (20, 24, 31, 32, 40, 48, 56, 60, 61, 62, 63, 64) for d in (-33, -8, -1, 0, 1, 8)]

SEEDS: list[list[Field]] = [
    file_fields(EVERY_VALUE_TYPE, EVERY_FORMAT),
    file_fields([key("general.alignment", "u32", 64), key("a", "bool", False)], [tensor("t", "Q8_0", 32, 3)], alignment=64),
    file_fields([key("tokenizer.ggml.tokens", "array of string", ["<s>", "a", "b"])], []),  # a vocabulary only
    file_fields([], [tensor("a", "F32", 2, 2, 2, 2), tensor("b", "F16", 1)]),
]

# ── mutations ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _other_number(rng: random.Random, fields: list[Field]) -> None:
    """One of the layout's numbers becomes a boundary value, or a little more or less than it was."""
    places = [i for i, field in enumerate(fields) if field.kind not in ("text", "data", "padding", "magic") and field.data]
    if not places:
        return
    i = rng.choice(places)
    width = len(fields[i].data)
    value = int.from_bytes(fields[i].data, "little")
    value = rng.choice(_BOUNDARIES) if rng.random() < 0.7 else value + rng.choice((-8, -2, -1, 1, 2, 8, 32, -value * 2, value))
    fields[i] = fields[i]._replace(data=(value % (1 << 8 * width)).to_bytes(width, "little"))


def _other_text(rng: random.Random, fields: list[Field]) -> None:
    """Another text, with a length that says so or not: not UTF-8, long, empty, a duplicate of another name."""
    places = [i for i, field in enumerate(fields) if field.kind == "text"]
    if not places:
        return
    i = rng.choice(places)
    old = fields[i].data
    new = rng.choice([b"", b"\xff\xfe", b"\0", b"\xe4\xb8", b"x" * rng.randrange(200), old * 2, old[1:]])
    if rng.random() < 0.3:
        new = fields[rng.choice(places)].data
    fields[i] = Field("text", new)
    if rng.random() < 0.7:
        fields[i - 1] = Field("length", struct.pack("<Q", len(new)))


def _move_fields(rng: random.Random, fields: list[Field]) -> None:
    """A run of fields is left out, doubled, or put elsewhere."""
    start = rng.randrange(len(fields))
    run = fields[start : start + rng.choice((1, 1, 2, 3, 4, 8))]
    if rng.random() < 0.5:
        del fields[start : start + len(run)]
    if rng.random() < 0.7:
        at = rng.randrange(len(fields) + 1)
        fields[at:at] = run


def _swap_fields(rng: random.Random, fields: list[Field]) -> None:
    i, j = rng.randrange(len(fields)), rng.randrange(len(fields))
    fields[i], fields[j] = fields[j], fields[i]


def _flip_bytes(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _other_bytes(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    n = min(rng.choice((1, 4, 8, 32)), len(data) - start)
    data[start : start + n] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))


def _splice(rng: random.Random, data: bytearray) -> None:
    start, at = rng.randrange(len(data)), rng.randrange(len(data))
    part = data[start : start + rng.choice((1, 8, 40, 300))]
    data[at : at + (len(part) if rng.random() < 0.5 else 0)] = part


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _lengthen(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((bytes(1), bytes(64), rng.randbytes(100), data[:500]))


_OF_FIELDS: list[Callable[[random.Random, list[Field]], None]] = [
    *[_other_number] * 6, _other_text, _other_text, _move_fields, _swap_fields,
]  # fmt: skip
_OF_BYTES: list[Callable[[random.Random, bytearray], None]] = [_flip_bytes, _flip_bytes, _other_bytes, _splice, _cut, _lengthen]


def mutated(rng: random.Random) -> bytes:
    """A file that is wrong in one to three places."""
    fields = list(rng.choice(SEEDS if rng.random() < 0.5 else SEEDS[:1]))
    n_changes = rng.choice((1, 1, 1, 2, 3))
    n_of_fields = sum(rng.random() < 0.7 for _ in range(n_changes))
    for _ in range(n_of_fields):
        if fields:
            rng.choice(_OF_FIELDS)(rng, fields)
    data = bytearray(join(fields))
    for _ in range(n_changes - n_of_fields):
        if data:
            rng.choice(_OF_BYTES)(rng, data)
    return bytes(data)


# ── what is promised ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_everything(gguf: GGUF, size: int) -> None:
    """Check the promises an open file of `size` bytes makes and touch every value of it."""
    for name in gguf.metadata:
        try:
            value = gguf.metadata[name]
        except FileError as error:
            check_message(error)
        else:
            assert type(value) in (str, int, float, bool, list) or value.ndim == 1
    end = 0
    for table in sorted(gguf.tensors.values(), key=lambda table: table.offset):
        n_weights = 1
        for dim in table.shape:
            assert dim >= 1
            n_weights *= dim
        if table.format.gguf_type in _BLOCKS:
            block_size, block_bytes = _BLOCKS[table.format.gguf_type]
            assert len(table.data) * block_size == n_weights * block_bytes
        assert end <= table.offset <= table.offset + len(table.data) <= size
        assert table.offset % gguf.alignment == 0
        end = table.offset + len(table.data)
        try:
            weights = table.to_float32()
        except FileError as error:
            assert table.format.dequantize is None
            check_message(error)
        else:
            assert weights.shape == table.shape


def check_message(error: FileError) -> None:
    message = str(error)
    assert message.isprintable(), "an error is one printable line"
    assert len(message) < 500


def outcome(data: bytes, file: Path | None = None) -> str:
    """Open `data` (through `file` where one is given), read all of it: "opened", or the error's line."""
    try:
        if file is None:
            gguf = parse(data, PATH)
        else:
            file.write_bytes(data)
            gguf = open_gguf(file)
    except FileError as error:
        check_message(error)
        return str(error)
    read_everything(gguf, len(data))
    gguf.close()
    return "opened"


def peak_megabytes() -> float:
    """The most memory this process has held so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    rng = random.Random(args.seed)
    slowest, failed, outcomes = (0.0, 0), 0, collections.Counter()
    for seed in SEEDS:
        assert outcome(join(seed)) == "opened"
    before = peak_megabytes()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / PATH
        for i in range(args.count):
            data = mutated(rng)
            started = time.process_time()  # of the clock's seconds other programs may have some
            try:
                line = outcome(data, None if i % _THROUGH_A_FILE else file)
            except Exception:
                kept = Path(tempfile.gettempdir()) / f"failed-{args.seed}-{i}.gguf"
                kept.write_bytes(data)
                print(f"case {i} of seed {args.seed} failed, kept as {kept}:\n{traceback.format_exc()}", file=sys.stderr)
                failed, line = failed + 1, "failed"
            slowest = max(slowest, (time.process_time() - started, i))
            outcomes[re.sub(r"'.*?'|\".*?\"|\d+", "…", line.rpartition(PATH.name)[2])] += 1
    grown = peak_megabytes() - before
    for line, n in outcomes.most_common():
        print(f"{n:8}  {line[:110]}")
    print(
        f"{args.count} files, {outcomes['opened']} opened, {failed} failed; "
        f"slowest {slowest[0] * 1000:.1f} ms (case {slowest[1]}), memory + {grown:.1f} MB"
    )
    return int(bool(failed) or slowest[0] > SECONDS_ALLOWED or grown > MEGABYTES_ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
