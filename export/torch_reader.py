"""Reads what `torch.save` wrote, without PyTorch: the zip format and the older one of several pickles in a row.

In: a mapped file. Out: the saved object with a `LazyTensor` for every tensor and a `Record` for every other object.
Layouts: torch.serialization. `_Tensors.functions` are all that such a pickle may call.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import Buffer, LazyTensor, Storage, bytes_each, view
from pocketlm.export.zip_reader import read_zip
from pocketlm.pickle_reader import MAX_BYTES, Functions, Global, Record, check_key, read_pickle, refuse

MAX_COPIES = 1 << 22  # items, in all lists that the functions a pickle may call have to copy
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "UntypedStorage": "uint8",
}  # fmt: skip
_SCALARS = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h", "i1": "b", "u8": "Q", "u4": "I", "u2": "H",
            "u1": "B", "b1": "?"}  # fmt: skip


def read_torch_zip(buffer: Buffer, path: Path) -> Any:
    """The object in a checkpoint of PyTorch 1.6 or later. Raises FileError."""
    entries = read_zip(buffer, path)
    found = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if any(name.endswith("/archive_format") for name in entries):
        raise FileError(path, "is a program of torch.export", "save the model's state_dict() with torch.save")
    if len(found) != 1:
        raise FileError(
            path, "is a zip archive, but not a PyTorch checkpoint: it has no data.pkl", "name the checkpoint itself"
        )
    root = found[0].removesuffix("data.pkl")
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in entries):
        raise FileError(path, "is a TorchScript program, not a checkpoint", "save the model's state_dict() with torch.save")
    order = entries[f"{root}byteorder"].data(64) if f"{root}byteorder" in entries else b"little"
    storages: dict[str, Storage] = {}

    def storage(kind: str, key: str, n_items: int) -> Storage:
        name = f"{root}data/{key}"
        if name not in entries:
            raise FileError(path, f"the tensor data {quoted(name)} is missing", "the file is damaged or cut short")
        found = storages.setdefault(key, entries[name].storage())
        if n_items * _item_bytes(kind) > found.n_bytes:
            raise FileError(path, f"the tensor data {quoted(name)} is too short", "the file is damaged or cut short")
        return found

    tensors = _Tensors(path, storage, order.strip() == b"big")
    tree, _ = read_pickle(entries[found[0]].data(MAX_BYTES), path, tensors.functions, tensors.persistent)
    return tree


def read_torch_legacy(buffer: Buffer, path: Path) -> Any:
    """The object in a checkpoint of PyTorch before 1.6: magic, version, system, object, keys, then the data in that order."""
    sizes: dict[str, tuple[int, int]] = {}  # key → items, bytes an item
    places: dict[str, Storage] = {}  # where each begins is known last

    def storage(kind: str, key: str, n_items: int) -> Storage:
        if sizes.setdefault(key, (n_items, _item_bytes(kind))) != (n_items, _item_bytes(kind)):
            raise FileError(path, f"the tensor data {quoted(key)} has two sizes", "the file is damaged")
        return places.setdefault(key, Storage(buffer, len(buffer), n_items * _item_bytes(kind)))

    at, parts = 0, []
    tensors = _Tensors(path, storage, False)
    for _ in range(5):
        part, at = read_pickle(buffer, path, tensors.functions, tensors.persistent, at)
        parts.append(part)
        if parts[0] != LEGACY_MAGIC:
            raise FileError(
                path, "is a pickle, but not a PyTorch checkpoint", "save the weights with torch.save or as safetensors"
            )
    _, _, system, tree, keys = parts
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise FileError(path, "was saved on a big-endian machine in an old format", "save it again with a newer PyTorch")
    are_texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not are_texts or len({*keys} & sizes.keys()) != len(keys):  # some are unknown, or there twice
        raise FileError(path, "its list of tensor data is damaged", "save the checkpoint again")
    for key in keys:
        n_items, item_bytes = sizes[key]
        if at + 8 + n_items * item_bytes > len(buffer):
            raise FileError(path, "the file is cut short: tensor data is missing", "copy or save it again")
        if struct.unpack_from("<q", buffer, at)[0] != n_items:
            raise FileError(path, f"the tensor data {quoted(key)} has two sizes", "the file is damaged")
        places[key].start = at + 8
        at += 8 + n_items * item_bytes
    if len(keys) != len(places):
        raise FileError(path, "tensor data is missing", "the file is damaged or cut short")
    return tree


def _item_bytes(kind: str) -> int:
    return bytes_each(STORAGES[kind])


@dataclass(frozen=True)
class _TypedStorage:
    storage: Storage
    dtype: str


class _Tensors:
    """The functions that a checkpoint's pickle may call: for tensors, and for containers and scalars of Python and NumPy."""

    def __init__(self, path: Path, storage: Callable[[str, str, int], Storage], big_endian: bool):
        self.path, self.storage, self.big_endian = path, storage, big_endian
        self.left = MAX_COPIES  # a pickle can name one large list many times
        self.functions: Functions = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": lambda storage, offset, shape, strides, _, __, dtype, *___: self._tensor(
                storage, offset, shape, strides, dtype=dtype.name.removeprefix("torch.")
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
            "torch._tensor._rebuild_from_type_v2": self._subclass,
            "torch.Size": lambda sizes=(): tuple(self._copy(sizes)),
            "torch.device": lambda *parts: ":".join(map(_text, parts)),
            "collections.OrderedDict": lambda pairs=(): {check_key(key): value for key, value in self._copy(pairs)},
            "collections.defaultdict": lambda *_: {},
            "builtins.set": lambda items=(): set(map(check_key, self._copy(items))),
            "builtins.frozenset": lambda items=(): frozenset(map(check_key, self._copy(items))),
            "types.SimpleNamespace": lambda: Record("types.SimpleNamespace"),
            "copyreg._reconstructor": lambda cls, _, __: Record(cls.name),
            "_codecs.encode": lambda text, _: self._copy(text).encode("latin-1"),
            "numpy.dtype": lambda code, *_: Record("numpy.dtype", (code,)),
            **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
            **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Record("numpy.ndarray") for core in ("core", "_core")},
            **{f"pathlib.{kind}Path": _path for kind in ("Posix", "Windows", "PurePosix")},
        }

    def persistent(self, reference: Any) -> _TypedStorage:
        """The storage for the persistent id ("storage", type, key, device, number of items)."""
        kind, storage_type, key, _, n_items, *rest = reference
        name = storage_type.name.rpartition(".")[2] if isinstance(storage_type, Global) else ""
        if kind != "storage" or name not in STORAGES or not isinstance(key, str) or not isinstance(n_items, int) or n_items < 0:
            raise FileError(
                self.path, f"refers to tensor data of type {quoted(name)}, which pocketlm does not read", "save it as float32"
            )
        if any(part is not None for part in rest):
            raise FileError(
                self.path, "shares tensor data in a way only old versions of PyTorch read", "save it again with a newer one"
            )
        return _TypedStorage(self.storage(name, key, n_items), STORAGES[name])

    def _tensor(self, typed: Any, offset: Any, shape: Any, strides: Any, *_: Any, dtype: str = "") -> LazyTensor:
        if not (isinstance(typed, _TypedStorage) and isinstance(shape, tuple) and isinstance(strides, tuple)):
            raise TypeError
        return view(self.path, typed.storage, dtype or typed.dtype, shape, strides, offset, self.big_endian)

    def _subclass(self, function: Any, _: Any, args: Any, __: Any) -> LazyTensor:
        """A tensor of a subclass of Tensor: what `function` makes of `args`."""
        name = function.name if isinstance(function, Global) else type(function).__name__
        if not name.startswith("torch._utils._rebuild_") or name not in self.functions:
            refuse(self.path, f"wants to call {quoted(name)}")
        return self.functions[name](*args)

    def _copy(self, items: Any) -> Any:
        self.left -= len(items)
        if self.left < 0:
            raise ValueError("copies too much")
        return items


def _text(part: Any) -> str:
    if not isinstance(part, (str, int)):
        raise TypeError
    return str(part)


def _path(*parts: Any) -> str:
    return "/".join(map(_text, parts)).replace("//", "/", 1)


def _scalar(dtype: Any, data: Any) -> Any:
    """A NumPy scalar as a Python number."""
    return struct.unpack("<" + _SCALARS[dtype.args[0]], data)[0]
