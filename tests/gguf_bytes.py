"""GGUF files made byte by byte: what a library's writer refuses to write, and what the fuzzer takes apart.

A file is a list of `Field`s, each one number, text, padding or block of data of the layout, so that a test can replace
any of them. Nothing here is shared with the reader under test.
"""
import struct
from collections.abc import Sequence
from typing import NamedTuple

# name → number in the file, code of the struct module
VALUE_TYPES = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"),
    "bool": (7, "?"), "string": (8, ""), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip
# name → number in the file, weights in a block, bytes in a block
TENSOR_TYPES = {
    "F32": (0, 1, 4), "F16": (1, 1, 2), "BF16": (30, 1, 2), "Q8_0": (8, 32, 34), "Q4_0": (2, 32, 18), "Q4_1": (3, 32, 20),
    "Q5_0": (6, 32, 22), "Q5_1": (7, 32, 24), "Q4_K": (12, 256, 144), "Q5_K": (13, 256, 176), "Q6_K": (14, 256, 210),
    "IQ2_S": (22, 256, 82),
}  # fmt: skip


class Field(NamedTuple):
    """`kind`: magic, count, type, length, number, text, n_dims, dim, offset, padding or data."""

    kind: str
    data: bytes


def u32(kind: str, value: int) -> Field:
    return Field(kind, struct.pack("<I", value))


def u64(kind: str, value: int) -> Field:
    return Field(kind, struct.pack("<Q", value))


def text(value: str | bytes) -> list[Field]:
    data = value.encode() if isinstance(value, str) else value
    return [u64("length", len(data)), Field("text", data)]


def _value(type_name: str, value: object) -> list[Field]:
    if type_name == "string":
        assert isinstance(value, str | bytes)
        return text(value)
    return [Field("number", struct.pack("<" + VALUE_TYPES[type_name][1], value))]


def key(name: str | bytes, type_name: str, value: object) -> list[Field]:
    """One metadata entry; "array of u8" and the like make arrays."""
    if not type_name.startswith("array of "):
        return [*text(name), u32("type", VALUE_TYPES[type_name][0]), *_value(type_name, value)]
    item = type_name.removeprefix("array of ")
    assert isinstance(value, Sequence)
    fields = [*text(name), u32("type", 9), u32("type", VALUE_TYPES[item][0]), u64("count", len(value))]
    if item == "string":
        return fields + [field for string in value for field in text(string)]
    return [*fields, Field("number", struct.pack(f"<{len(value)}{VALUE_TYPES[item][1]}", *value))]


class Entry(NamedTuple):
    """A row of the tensor table, with numbers where a test wants other ones than those that are right."""

    name: str | bytes
    dims: Sequence[int]
    type_number: int
    offset: int
    n_dims: int | None = None

    def fields(self) -> list[Field]:
        return [
            *text(self.name),
            u32("n_dims", len(self.dims) if self.n_dims is None else self.n_dims),
            *(u64("dim", dim) for dim in self.dims),
            u32("type", self.type_number),
            u64("offset", self.offset),
        ]


def header(n_tensors: int, n_keys: int, version: int = 3) -> list[Field]:
    return [Field("magic", b"GGUF"), u32("version", version), u64("count", n_tensors), u64("count", n_keys)]


def pad(n_bytes: int, alignment: int = 32) -> Field:
    return Field("padding", bytes(-n_bytes % alignment))


def join(fields: Sequence[Field]) -> bytes:
    return b"".join(field.data for field in fields)


def file_fields(
    keys: Sequence[list[Field]], tensors: Sequence[tuple[str, str, tuple[int, ...], bytes]] = (), alignment: int = 32
) -> list[Field]:
    """A sound file: tensors are (name, format, dims in the file's order, data), laid one after the other."""
    fields = header(len(tensors), len(keys)) + [field for entry in keys for field in entry]
    offset, blocks = 0, []
    for name, format_name, dims, data in tensors:
        fields += Entry(name, dims, TENSOR_TYPES[format_name][0], offset).fields()
        blocks += [Field("data", data), pad(len(data), alignment)]
        offset += len(data) + len(blocks[-1].data)
    return [*fields, pad(len(join(fields)), alignment), *blocks]


def file_bytes(*keys: list[Field]) -> bytes:
    """A sound file of these keys and no tensors."""
    return join(file_fields(keys))


def table_bytes(*entries: Entry, keys: Sequence[list[Field]] = (), data: bytes = bytes(4096)) -> bytes:
    """A file with these rows in its tensor table, right or wrong, and `data` behind it at the default alignment."""
    fields = header(len(entries), len(keys)) + [field for row in keys for field in row]
    fields += [field for entry in entries for field in entry.fields()]
    return join([*fields, pad(len(join(fields))), Field("data", data)])


# ── the file the fuzzer begins with ──────────────────────────────────────────────────────────────────────────────────

EVERY_VALUE_TYPE = [
    key("general.architecture", "string", "llama"),
    key("test.u8", "u8", 200),
    key("test.i8", "i8", -100),
    key("test.u16", "u16", 60000),
    key("test.i16", "i16", -30000),
    key("test.u32", "u32", 4_000_000_000),
    key("test.i32", "i32", -2_000_000_000),
    key("test.f32", "f32", 0.5),
    key("test.u64", "u64", 2**63),
    key("test.i64", "i64", -(2**62)),
    key("test.f64", "f64", 1e-300),
    key("test.bool", "bool", True),
    key("test.text", "string", "Hello, Grüße, 世界 🌍"),
    key("test.empty", "string", ""),
    key("test.numbers.u8", "array of u8", [1, 2, 3]),
    key("test.numbers.f32", "array of f32", [1.5, -2.25]),
    key("test.numbers.i32", "array of i32", [-1, 0, 1]),
    key("test.numbers.i64", "array of i64", [-1, 2**40]),
    key("test.numbers.f64", "array of f64", [0.1]),
    key("test.truths", "array of bool", [True, False, True]),
    key("test.nothing", "array of u16", []),
    key("test.strings", "array of string", ["", "a", "ğ", "世界", "🌍", "with\0NUL"]),
    key("tokenizer.ggml.tokens", "array of string", [f"token {i}" for i in range(20)]),
]


def tensor(name: str, format_name: str, *dims: int) -> tuple[str, str, tuple[int, ...], bytes]:
    """A tensor with bytes that repeat no pattern of its blocks."""
    _, block_size, block_bytes = TENSOR_TYPES[format_name]
    n_weights = 1
    for dim in dims:
        n_weights *= dim
    n_bytes = n_weights // block_size * block_bytes
    return name, format_name, dims, bytes(i * i * 7 % 251 for i in range(n_bytes))


EVERY_FORMAT = [tensor(f"blk.{name}.weight", name, max(8, row[1]), 2) for name, row in TENSOR_TYPES.items()]
