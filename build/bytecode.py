"""Compiles Python sources to bytecode, to the same bytes on every computer.

In: files. Out: marshalled code. Knows nothing about archives. The code is for this version of Python, or for another one that
is there as a shared library for this system: a process of this Python loads that, and lets it compile. Marshalled code depends
on more than its source: on the order of sets, and on which constants are interned or referred to by other code. So it is made
in a process of its own, in which nothing of the user's is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pocketlm.errors import PocketlmError

_COMPILER = """\
import sys, marshal, _frozen_importlib_external  # no file: not from a folder of others, nor compiled for another Python
for character in map(chr, range(256)):  # one object each for the whole process, marshalled by whether anybody interned it
    sys.intern(character)
sys.intern("")
sys.stdout.buffer.write(_frozen_importlib_external.MAGIC_NUMBER)
words = iter(sys.stdin.buffer.read().decode("utf-8", "surrogatepass").split("\\0"))
for path, name in zip(words, words):
    with open(path, "rb") as file:
        source = file.read()
    code = marshal.dumps(compile(source, name, "exec", dont_inherit=True, optimize=2))
    sys.stdout.buffer.write(len(code).to_bytes(4, "little") + code)
"""


_RUN_ANOTHER = """\
import ctypes, os, sys
words = [sys.argv[0], *sys.argv[2:]]
python = ctypes.CDLL(sys.argv[1], getattr(os, "RTLD_DEEPBIND", 0))  # its own functions before those of this one
sys.exit(python.Py_BytesMain(len(words), (ctypes.c_char_p * len(words))(*map(os.fsencode, words))))
"""


def compile_all(
    files: Mapping[str, Path], python: Path | None = None, modules: Path | None = None
) -> tuple[dict[str, bytes], bytes]:  # fmt: skip
    """Marshalled code by module, without assertions and docstrings, and the magic number of its version of bytecode.

    `python`: another version of CPython, as a library for this system; `modules`: the folder with its own modules.
    Tracebacks will name the files as in the archive. PocketlmError: a file is no Python, or `python` does not run here.
    """
    wanted = "\0".join(word for module, path in files.items() for word in (str(path), _name(module, path)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"PYTHONHASHSEED": "0"}
    command = [sys.executable]
    if python and modules:
        environment["PYTHONHOME"] = str(modules.parents[1])
        command += ["-E", "-c", _RUN_ANOTHER, str(python)]
    command += ["-S", "-s", "-B", "-X", "utf8", "-c", _COMPILER]
    done = subprocess.run(command, input=wanted.encode("utf-8", "surrogatepass"), capture_output=True, env=environment)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise PocketlmError(f"a module could not be compiled: {last[-1]}")
    codes, at = {}, 4
    for module in files:
        length = int.from_bytes(done.stdout[at : at + 4], "little")
        codes[module] = done.stdout[at + 4 : at + 4 + length]
        at += 4 + length
    return codes, done.stdout[:4]


def _name(module: str, path: Path) -> str:
    return module.replace(".", "/") + ("/__init__.py" if path.stem == "__init__" else ".py")
