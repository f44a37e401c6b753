"""Kernels compiled ahead of time: one file with the images of every level of a platform, made on any machine.

In: the modules' IR for a level and a calling convention. Out: a file; and, from the file, the images for the level that
was detected, without llvmlite. Knows nothing about what the modules are.

The file: magic, sha256 of the index, size of the index (4 bytes, little-endian); the index as JSON; then the images, each
in its own checksummed container (linker.to_bytes). The index: {"version", "machine", "abi", "levels": {level: {module:
[offset behind the index, size]}}}.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pocketlm.errors import FileError, UsageError
from pocketlm.runtime.native.levels import LEVELS, Abi, Level, host_abi
from pocketlm.runtime.native.linker import Image, ImageError, from_bytes, link, to_bytes


@dataclass(frozen=True)
class Platform:
    """What an operating system on a CPU asks of code. Systems that ask the same could share a file."""

    machine: str
    abi: Abi


PLATFORMS = {
    "linux-x86_64": Platform("x86_64", "sysv"),
    "linux-aarch64": Platform("aarch64", "sysv"),
    "windows-x86_64": Platform("x86_64", "win64"),
    "macos-arm64": Platform("aarch64", "sysv"),
    "macos-x86_64": Platform("x86_64", "sysv"),
}
KERNELS = "kernels.bin"  # the name of the file in a packed program
_MAGIC = b"plmahead"
_PREFIX = struct.Struct("<8s32sI")
_ADVICE = "make the file again with this version of pocketlm"


def build_images(
    path: str | os.PathLike[str], platform: str, module_texts: Callable[[Level, Abi], Mapping[str, str]], version: str
) -> None:
    """Compile all modules for every level that is used on `platform` (a name in PLATFORMS), and write them to `path`.

    `module_texts(level, abi)` gives the modules' IR by name. `version` stands for the kernels and for what calls them;
    the reader must ask for the same. UsageError: no such platform; FileError: the file cannot be written; ImageError: a
    module is not self-contained.
    """
    from pocketlm.runtime.native.compiler import compile_object

    if platform not in PLATFORMS:
        raise UsageError(f"no such platform: {platform}; known ones are {', '.join(PLATFORMS)}")
    target, images = PLATFORMS[platform], bytearray()
    levels: dict[str, dict[str, tuple[int, int]]] = {}
    for level in LEVELS.values():
        if level.is_for(target.machine, platform):
            places = levels[level.name] = {}
            for name, text in module_texts(level, target.abi).items():
                data = to_bytes(link([compile_object(text, level)]))
                places[name] = len(images), len(data)
                images += data
    index = json.dumps({"version": version, **asdict(target), "levels": levels}).encode()
    try:
        Path(path).write_bytes(_PREFIX.pack(_MAGIC, hashlib.sha256(index).digest(), len(index)) + index + images)
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from error


def read_images(path: str | os.PathLike[str], level: Level, version: str) -> dict[str, Image]:
    """The images of all modules for `level`, by module name.

    FileError: the file cannot be read, is damaged, was made by another version, or is for another platform.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FileError(path, error.strerror or str(error)) from error
    if len(data) < _PREFIX.size or data[: len(_MAGIC)] != _MAGIC:
        raise FileError(path, "not a file of compiled kernels", _ADVICE)
    _, digest, size = _PREFIX.unpack_from(data)
    start = _PREFIX.size + size
    if hashlib.sha256(data[_PREFIX.size : start]).digest() != digest:
        raise FileError(path, "the compiled kernels are damaged", _ADVICE)
    index = json.loads(data[_PREFIX.size : start])
    if index["version"] != version:
        raise FileError(path, "the compiled kernels are of another version", _ADVICE)
    if (index["machine"], index["abi"]) != (level.machine, host_abi()):
        raise FileError(path, f"the compiled kernels are for another platform ({index['machine']}, {index['abi']})", _ADVICE)
    try:
        places = index["levels"][level.name].items()
        return {name: from_bytes(data[start + offset : start + offset + length]) for name, (offset, length) in places}
    except ImageError as error:
        raise FileError(path, str(error), _ADVICE) from error
