"""Reads GGUF model files (versions 2 and 3) through a read-only memory mapping.

In: a path. Out: metadata (decoded when first asked for) and tensors (views of the mapping, nothing is copied). Knows
nothing about architectures or tokenizers.

The file is not trusted. Every count, length, type, offset and size is checked against the file's real size before
anything is read, multiplied or allocated by it, in Python's unbounded integers; after `open_gguf` every tensor lies
inside the file, whole, aligned and apart from the others, so pointers into the mapping are safe. What cannot be
guarded against: a program that shortens the file in place while it is mapped (reading the lost pages then ends the
process, as with every mapping). Replacing the file by another one of the same name is harmless.

Format: the GGUF document in the ggml repository (docs/gguf.md).
"""

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from pocketlm.errors import FileError, PocketlmError, quoted
from pocketlm.runtime.file_mapping import MappedModel, map_file, unmap
from pocketlm.runtime.formats import Format, by_gguf_type
from pocketlm.runtime.gguf_strings import Buffer, decode, find_bounds
from pocketlm.runtime.tensor import Tensor

_BROKEN = "it is damaged or not complete, download it again"
_MAX_ENTRIES = 1 << 15  # keys, or tensors: the largest published models have a few thousand
_MAX_STRINGS = 1 << 21  # in all arrays together: the largest vocabularies have 800,000 with their merges
_MAX_KEY_BYTES = 65535
_MAX_TENSOR_NAME_BYTES = 64
_MAX_ALIGNMENT = 1 << 20
_MIN_KEY_BYTES = 8 + 4 + 1  # length of the name, value type, value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # length of the name, number of dimensions, one dimension, type, offset

TILED = "pocketlm.tiled"  # a key: the matrices lie in native/tiling.py's order, at multiples of 64 bytes
TILED_ALIGNMENT = 64

# value type → the code of struct and of NumPy's dtype (both with "<" in front)
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, STRING, ARRAY = 7, 8, 9
_STRUCTS = {code: struct.Struct("<" + code) for code in NUMBERS.values()}

# The first bytes of files that people take for GGUF files → what it is, what to do
_OTHER_FILES = (
    (b"PK\x03\x04", "a zip archive, perhaps a PyTorch checkpoint", "convert it with pocketlm export"),
    (b"\x80", "a pickle, perhaps an old PyTorch checkpoint", "convert it with pocketlm export"),
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself", "fetch the model with git lfs pull"),
    ((b"lmgg", b"fmgg", b"tjgg"), "a GGML model from before GGUF",
     "convert it with llama.cpp's converter or download a GGUF file"),
    (b"<", "a web page or XML", "download the model itself"),
    (b"{", "JSON", "name the GGUF file"),
    ((b"\x7fELF", b"MZ"), "a program", "name the GGUF file"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
)


class GGUF(MappedModel):
    """An opened, checked file. `header_end`: where the list of tensors ends. After `close` only keys that were read before
    can be read, lists of texts apart.
    """

    def __init__(
        self, path: Path, version: int, alignment: int, metadata: "_Metadata", tensors: dict[str, Tensor], header_end: int
    ):
        super().__init__(path, metadata, tensors, b"")
        self.version, self.alignment, self.header_end, self._keys = version, alignment, header_end, metadata
        self.parts: list[GGUF] = []  # the other files of a model that lies in several; their tensors are in `tensors`, too

    def close(self, error: BaseException | None = None) -> None:
        self._keys.close()
        super().close(error)  # first, as `tensors` looks at the parts, too
        for part in self.parts:
            part.close(error)


def open_gguf(path: str | os.PathLike[str], *, offset: int = 0, length: int | None = None) -> GGUF:
    """Open and check a GGUF file, or one that is `length` bytes of another file from `offset` on.

    Offsets in the result count from there. Raises FileError for anything that is not a whole, sound GGUF file.
    """
    path = Path(path)
    buffer = map_file(path, "name the GGUF file")
    if not len(buffer):
        raise FileError(path, "is empty", "download it again")
    try:
        gguf = parse(buffer if not offset and length is None else memoryview(buffer)[offset:][:length], path)
    except BaseException as error:
        unmap(buffer, error)
        raise
    gguf.buffer = buffer
    return gguf


def parse(buffer: Buffer, path: Path) -> GGUF:
    """Check a GGUF file that is already in memory or mapped; `path` is for error messages. Raises FileError."""
    header = _Header(buffer, path)
    version = _check_magic(header)
    n_tensors = header.count("tensors", _MIN_TENSOR_BYTES)
    n_keys = header.count("keys", _MIN_KEY_BYTES)
    metadata = _read_keys(header, n_keys)
    alignment = _alignment(header, metadata)
    tiled = TILED in metadata
    return GGUF(path, version, alignment, metadata, _read_tensors(header, n_tensors, alignment, tiled), header.at)


# ── reading the header ───────────────────────────────────────────────────────────────────────────────────────────────


class _Header:
    """A place in the file, moving forward; nothing is read before it is known to be inside the file."""

    def __init__(self, buffer: Buffer, path: Path):
        self.buffer, self.path, self.size, self.at = buffer, path, len(buffer), 0
        self.strings_left = _MAX_STRINGS

    def fail(self, problem: str, advice: str = _BROKEN) -> NoReturn:
        raise FileError(self.path, problem, advice)

    def skip(self, n_bytes: int, what: str) -> int:
        """Pass over `n_bytes`; where they begin."""
        start = self.at
        if n_bytes > self.size - start:
            self.fail(f"the file is cut short: {what} goes on beyond its end at byte {self.size}")
        self.at = start + n_bytes
        return start

    def number(self, code: str, what: str) -> Any:
        packed = _STRUCTS[code]
        return packed.unpack_from(self.buffer, self.skip(packed.size, what))[0]

    def string(self, limit: int, what: str) -> str:
        if (length := self.number("Q", what)) > limit:
            self.fail(f"{what} is {length} bytes long, more than the {limit} allowed")
        return _text(self.buffer, self.skip(length, what), length, self.path, what)

    def count(self, what: str, least_bytes: int) -> int:
        count = self.number("Q", f"the number of {what}")
        if count > (most := min(_MAX_ENTRIES, (self.size - self.at) // least_bytes)):
            self.fail(f"it claims {count} {what} where at most {most} are possible")
        return count

    def skip_strings(self, count: int, what: str) -> np.ndarray | None:
        """Pass over `count` strings; `find_bounds` of them."""
        if count > (most := min(self.strings_left, (self.size - self.at) // 8)):
            self.fail(f"{what} claims {count} strings where at most {most} are possible")
        self.strings_left -= count
        bounds = find_bounds(self.buffer, self.at, count)
        self.skip((self.size + 1 if bounds is None else int(bounds[-1])) - self.at, what)
        return bounds


def _check_magic(header: _Header) -> int:
    """The file's version."""
    start = bytes(header.buffer[:24])
    if start[:4] != b"GGUF":
        if len(start) < 4 and b"GGUF".startswith(start):
            header.fail(f"the file is cut short: it ends after {len(start)} bytes")
        kinds = [row[1:] for row in _OTHER_FILES if start.startswith(row[0])]
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < header.size:
            kinds.insert(0, ("a safetensors file", "convert it with pocketlm export"))
        kind, advice = kinds[0] if kinds else ("something else", "check the path or download it again")
        header.fail(f"is not a GGUF file but {kind}", advice)
    header.at = 4
    version = header.number("I", "the version")
    if version and version & 0xFFFF == 0:
        header.fail("is a big-endian GGUF file", "download the little-endian one")
    if version not in (2, 3):
        advice = "update pocketlm" if version > 3 else "convert the model again with a converter of today"
        header.fail(f"is GGUF version {version}; pocketlm reads versions 2 and 3", advice)
    return version


def _read_keys(header: _Header, n_keys: int) -> "_Metadata":
    metadata = _Metadata(header.buffer, header.path)
    for i in range(n_keys):
        key = header.string(_MAX_KEY_BYTES, f"the name of key {i}")
        what = f"the value of '{quoted(key)}'"
        if key in metadata.places:
            header.fail(f"key '{quoted(key)}' is there twice")
        metadata.places[key] = _skip_value(header, header.number("I", what), what)
    return metadata


def _skip_value(header: _Header, value_type: int, what: str) -> "_Place":
    is_array = value_type == ARRAY
    item_type = header.number("I", what) if is_array else value_type
    count = header.number("Q", what) if is_array or item_type == STRING else 1
    bounds = None
    if item_type == STRING and is_array:
        start = header.at
        bounds = header.skip_strings(count, what)
    elif item_type == STRING:
        start = header.skip(count, what)
    elif code := NUMBERS.get(item_type):
        start = header.skip(count * _STRUCTS[code].size, what)
        if item_type == _BOOL and count and np.frombuffer(header.buffer, np.uint8, count, start).max() > 1:
            header.fail(f"{what} is a truth value other than 0 and 1")
    else:
        kind = "an array of arrays" if item_type == ARRAY else f"of the unknown type {item_type}"
        header.fail(f"{what} is {kind}, which pocketlm does not read", "update pocketlm or download another file")
    return _Place(item_type, is_array, start, count, bounds)


def _alignment(header: _Header, metadata: "_Metadata") -> int:
    """`general.alignment`; an unchecked one makes the arithmetic of every later offset wrong."""
    place = metadata.places.get("general.alignment")
    if place is None:
        return 32
    if place.item_type != 4 or place.is_array:
        header.fail("general.alignment is not a 32-bit unsigned number")
    value = metadata["general.alignment"]
    if not 8 <= value <= _MAX_ALIGNMENT or value & (value - 1):
        header.fail(f"general.alignment is {value}, not a power of two from 8 to {_MAX_ALIGNMENT}")
    return value


def _read_tensors(header: _Header, n_tensors: int, alignment: int, tiled: bool) -> dict[str, Tensor]:
    entries: dict[str, tuple[tuple[int, ...], Format, int, int]] = {}
    for i in range(n_tensors):
        name = header.string(_MAX_TENSOR_NAME_BYTES, f"the name of tensor {i}")
        if name in entries:
            header.fail(f"tensor '{quoted(name)}' is there twice")
        shape, format, offset = _read_tensor_entry(header, f"tensor '{quoted(name)}'", alignment)
        entries[name] = shape, format, offset, stored_bytes(format, shape, tiled)

    data_start = -(-header.at // alignment) * alignment
    missing = max((data_start + offset + n_bytes for *_, offset, n_bytes in entries.values()), default=0) - header.size
    if missing > 0:
        header.fail(f"the file is cut short: {missing} bytes are missing", "download it again")
    end, last = 0, ""
    for name, (*_, offset, n_bytes) in sorted(entries.items(), key=lambda entry: entry[1][2]):
        if offset < end:
            header.fail(f"tensors '{quoted(last)}' and '{quoted(name)}' overlap")
        end, last = offset + n_bytes, name

    bytes_of_file = np.frombuffer(header.buffer, np.uint8)
    tensors = {}
    for name, (shape, format, offset, n_bytes) in entries.items():
        offset += data_start
        permuted = tiled and can_tile(format, shape)
        if permuted and offset % TILED_ALIGNMENT:
            header.fail(f"tensor '{quoted(name)}' begins at {offset}, which is not a multiple of {TILED_ALIGNMENT}")
        tensors[name] = Tensor(name, shape, format, bytes_of_file[offset : offset + n_bytes], offset, header.path, permuted)
    return tensors


def can_tile(format: Format, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that native/tiling.py has an order for."""
    from pocketlm.runtime.native.tiling import LAYOUTS

    return len(shape) == 2 and format.name in LAYOUTS


def stored_bytes(format: Format, shape: tuple[int, ...], tiled: bool) -> int:
    """Bytes of a tensor in a file; tiled matrices are filled up to groups of rows."""
    if tiled and can_tile(format, shape):
        from pocketlm.runtime.native.tiling import tiled_bytes

        return tiled_bytes(format.name, *shape)
    return math.prod(shape) // format.block_size * format.block_bytes


def _read_tensor_entry(header: _Header, what: str, alignment: int) -> tuple[tuple[int, ...], Format, int]:
    """Shape, format and offset in the data section of one tensor."""
    n_dims = header.number("I", what)
    if not 1 <= n_dims <= 4:
        header.fail(f"{what} has {n_dims} dimensions; 1 to 4 are possible")
    dims = [header.number("Q", what) for _ in range(n_dims)]
    gguf_type = header.number("I", what)
    format = by_gguf_type(gguf_type)
    if format is None:
        header.fail(f"{what} has the unknown format {gguf_type}", "update pocketlm or requantise the model to Q4_0 or Q8_0")
    n_weights = 1
    for dim in dims:
        # A file gives 63 bits to a dimension (ggml's are signed), and no tensor has more weights than that
        if not 1 <= dim < 1 << 63 or (n_weights := n_weights * dim) >= 1 << 63:
            header.fail(f"{what} has the impossible shape {' × '.join(map(str, dims))}")
    if dims[0] % format.block_size:
        header.fail(f"{what} has rows of {dims[0]} weights, not a multiple of the {format.block_size} of {format.name}")
    offset = header.number("Q", what)
    if offset % alignment:
        header.fail(f"{what} begins at {offset}, which is not a multiple of the alignment {alignment}")
    return tuple(reversed(dims)), format, offset


# ── metadata ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Place:
    """Where a value is: `count` items of `item_type` (bytes, for a single string) from byte `start`.

    `bounds`: of an array of strings, `find_bounds` of them.
    """

    item_type: int
    is_array: bool
    start: int
    count: int
    bounds: np.ndarray | None


class _Metadata(Mapping[str, Any]):
    """The keys of a file; a value is decoded when it is first asked for, and remembered unless it is a list of texts.

    Those of a vocabulary and its merges take tens of megabytes, and who needs them for long keeps them in a smaller form.
    """

    def __init__(self, buffer: Buffer, path: Path):
        self._buffer: Buffer | None = buffer
        self._path = path
        self.places: dict[str, _Place] = {}
        self._values: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            place = self.places[key]
            if self._buffer is None:
                raise PocketlmError(f"{self._path} is closed; open it again")
            value = self._decode(self._buffer, place, key)
            if isinstance(value, list):
                return value
            self._values[key] = value
        return self._values[key]

    def __contains__(self, key: object) -> bool:
        """Without decoding the value, which a mapping's own way would do."""
        return key in self.places

    def close(self) -> None:
        """Let go of the file; what was decoded before stays."""
        self._buffer = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def _decode(self, buffer: Buffer, place: _Place, key: str) -> Any:
        if place.item_type != STRING:
            code = NUMBERS[place.item_type]
            if place.is_array:
                return np.frombuffer(buffer, np.dtype("<" + code), place.count, place.start).copy()
            return _STRUCTS[code].unpack_from(buffer, place.start)[0]
        if not place.is_array:
            return _text(buffer, place.start, place.count, self._path, f"the value of '{quoted(key)}'")
        return self._strings(buffer, place, key)

    def _strings(self, buffer: Buffer, place: _Place, key: str) -> list[str]:
        bounds = place.bounds
        assert bounds is not None
        strings = decode(buffer, bounds)
        return strings if strings is not None else [
            _text(buffer, start + 8, end - start - 8, self._path, f"entry {i} of '{quoted(key)}'")
            for i, (start, end) in enumerate(pairwise(bounds.tolist()))
        ]  # fmt: skip


def _text(buffer: Buffer, start: int, length: int, path: Path, what: str) -> str:
    try:
        return str(buffer[start : start + length], "utf-8")
    except UnicodeDecodeError:
        raise FileError(path, f"{what} is not UTF-8", _BROKEN) from None
