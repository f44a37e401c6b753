"""Stores the tensors of an ONNX model: in memory, or in a data file as they come.

In: arrays. Out: TensorProtos. The data file's name ends in a checksum of its contents, so that a model of the same name that
is there already keeps its own data file until it is replaced. Knows nothing of the graph.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

ALIGNMENT = 4096  # of a tensor in the data file, so that it can be mapped
SMALL = 1024  # bytes of a tensor that always stays in the model: shapes and constants


class Store:
    """The tensors of a model: in memory, or with a `data_file` written to disk as they come."""

    def __init__(self, data_file: Path | None):
        self.tensors: list[TensorProto] = []
        self._names: set[str] = set()
        self._path = data_file
        self._file = open(data_file, "wb") if data_file else None  # noqa: SIM115  # open until `close`
        self._crc = 0

    def add(self, name: str, array: np.ndarray) -> str:
        """Store an array, unless one of that name is stored; returns the name."""
        if name in self._names:
            return name
        self._names.add(name)
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        self._move_out(tensor)
        self.tensors.append(tensor)
        return name

    def take(self, tensors: Iterable[TensorProto]) -> None:
        """Store tensors that are in a model already."""
        for tensor in tensors:
            self._move_out(tensor)
            self.tensors.append(tensor)

    def _move_out(self, tensor: TensorProto) -> None:
        if self._file is None or len(tensor.raw_data) <= SMALL:
            return
        data = tensor.raw_data
        padding = bytes(-self._file.tell() % ALIGNMENT)
        self._file.write(padding)
        set_external_data(tensor, "data", self._file.tell(), len(data))
        tensor.ClearField("raw_data")
        self._file.write(data)
        self._crc = zlib.crc32(data, zlib.crc32(padding, self._crc))

    def close(self, built: ModelProto, stem: str) -> Path | None:
        """Rename the data file to `stem` and its checksum, and write that name into the model; returns the path, None without
        one.
        """
        if self._file is None or self._path is None:
            return None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path = self._path.rename(self._path.with_name(f"{stem}{self._crc:08x}"))
        for tensor in built.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = path.name
        return path
