"""Sources compiled to code for another computer's Python of the same version: the same bytes whoever compiles them.

In: files. Out: marshalled code. Knows nothing about archives. What is marshalled depends on more than the source: on the
order of sets, and on which constants something else in the process refers to. Hence a process of its own, with nothing of
the user's in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from pocketlm.errors import PocketlmError

_COMPILER = """\
import sys
sys.path = list(filter(None, sys.path))  # not the root folder of a drive, in which everybody on Windows may put a json
import json, marshal
for path, name in json.load(sys.stdin):
    with open(path, "rb") as file:
        source = file.read()
    code = marshal.dumps(compile(source, name, "exec", dont_inherit=True, optimize=2))
    sys.stdout.buffer.write(len(code).to_bytes(4, "little") + code)
"""


def compile_all(files: Mapping[str, Path]) -> dict[str, bytes]:
    """Marshalled code by module, without assertions and docstrings; in tracebacks a file is called as in the archive."""
    wanted = [(str(path), _name(module, path)) for module, path in files.items()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | {"PYTHONHASHSEED": "0"}
    command = [sys.executable, "-S", "-s", "-B", "-X", "utf8", "-c", _COMPILER]
    done = subprocess.run(command, input=json.dumps(wanted).encode(), capture_output=True, env=environment, cwd=os.sep)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines() or ["no words"]
        raise PocketlmError(f"a module could not be compiled: {last[-1]}")
    codes, at = {}, 0
    for module in files:
        length = int.from_bytes(done.stdout[at : at + 4], "little")
        codes[module] = done.stdout[at + 4 : at + 4 + length]
        at += 4 + length
    return codes


def _name(module: str, path: Path) -> str:
    return module.replace(".", "/") + ("/__init__.py" if path.stem == "__init__" else ".py")
