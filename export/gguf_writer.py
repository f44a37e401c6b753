"""Writes GGUF files (version 3): metadata, then one tensor after the other, whatever their number or size.

In: a dict of keys, tensors that are read one at a time, and the format each should have. Out: the file, the same bytes
for the same input. Knows nothing about architectures or tokenizers.

Format: the GGUF document in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from pocketlm.errors import PocketlmError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.rules import QUANTS, by_shape, by_values, head_name
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.runtime.gguf_reader import ARRAY, NUMBERS, STRING
from pocketlm.runtime.tensor import Tensor

ALIGNMENT = 32
NUMBER_TYPES = {np.dtype(code).name: number for number, code in NUMBERS.items()}  # NumPy's name → the number in the file


def write_gguf(
    file: BinaryIO, metadata: Mapping[str, Any], model: CanonicalModel, quant: str, pure: bool, encoder: Encoder,
    importance: Mapping[str, np.ndarray] | None = None,
) -> list[Encoded]:  # fmt: skip
    """Write the model to a seekable file; returns what was written for every tensor, in the file's order.

    The size of the header is known beforehand, but not every format: a tensor's values may not fit into the one it should get.
    So the header is written last.
    """
    row, head, done = QUANTS[quant], head_name(model.tensors), []
    file.seek(len(_header(metadata, [(name, tensor.shape, 0, 0) for name, tensor in model.tensors.items()])))
    for name, tensor in model.tensors.items():
        format, reason = by_shape(name, tensor.shape, row, head, pure, model.hyper)
        weights, largest = encoder.read(name, tensor)
        format, too_much = by_values(format, largest)
        encoded = Encoded(name, tuple(tensor.shape), format, too_much or reason)
        file.writelines(encoder.pieces(encoded, weights, (importance or {}).get(name)))
        file.write(bytes(-encoded.n_bytes % ALIGNMENT))
        done.append(encoded)
    file.seek(0)
    file.write(_header(metadata, [(made.name, made.shape, made.format.gguf_type, made.n_bytes) for made in done]))
    return done


def copy_gguf(file: BinaryIO, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as they are, with other keys. Nothing is quantised again."""
    metadata = {key: value for key, value in metadata.items() if key != "general.alignment"}  # from here on it is ALIGNMENT
    rows = [(name, tensor.shape, tensor.format.gguf_type, tensor.data.nbytes) for name, tensor in tensors.items()]
    file.write(_header(metadata, rows))
    for tensor in tensors.values():
        file.write(tensor.data)
        file.write(bytes(-tensor.data.nbytes % ALIGNMENT))


def _header(metadata: Mapping[str, Any], tensors: Sequence[tuple[str, Sequence[int], int, int]]) -> bytes:
    """Everything before the data, padded. `tensors`: name, shape, number of the format, bytes; the last two do not change the
    size of the header.
    """
    keys = (_string(key) + _value(key, value) for key, value in metadata.items())
    parts, offset = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata)), *keys], 0
    for name, shape, gguf_type, n_bytes in tensors:
        parts.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), gguf_type, offset))
        offset += n_bytes + -n_bytes % ALIGNMENT
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


def _string(text: str) -> bytes:
    try:
        data = text.encode()
    except UnicodeEncodeError:
        raise PocketlmError(f"{text[:40]!r} is not valid Unicode and cannot be written to a GGUF file") from None
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """A value behind its type's number. Python's numbers are written as the types that ggml's loader expects: uint32, else
    int32; float32.
    """
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    array = _as_array(value)
    type_number = NUMBER_TYPES.get(array.dtype.name)
    if type_number is None or array.ndim > 1:
        raise PocketlmError(f"the value of {key} cannot be written to a GGUF file: {type(value).__name__}")
    data = array.astype(array.dtype.newbyteorder("<")).tobytes()
    kind = struct.pack("<IIQ", ARRAY, type_number, array.size) if array.ndim else struct.pack("<I", type_number)
    return kind + data


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if isinstance(value, np.ndarray | np.generic):
        return array
    if array.dtype == np.float64:
        return array.astype(np.float32)
    if array.dtype == np.int64:
        for kind in ("int32",) if array.ndim else ("uint32", "int32"):
            if array.size and np.iinfo(kind).min <= array.min() and array.max() <= np.iinfo(kind).max:
                return array.astype(kind)
    return array
