"""All the compiled code a model needs: one module for the run loop, one for every weight format it uses.

In: a level and the formats' names. Out: the modules' text, and functions ready to call, from the cache, from images made
beforehand, or compiled now. Knows where code comes from, not what it does.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from pocketlm.runtime import activations, memory, sampling
from pocketlm.runtime.native import aot, code_cache, linker
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.levels import Level, host_abi
from pocketlm.runtime.native.tiling import LAYOUTS

CORE = "core"
CORES = {"q16": CORE, "q8": "core_q8"}  # by how keys and values are kept
_aot: dict[str, str] = {}  # {"path": …, "version": …} of a file of images to use in place of a compiler


def module_text(name: str, level: Level, abi: str) -> str:
    """The IR of a core or of a weight format, for a level and a calling convention ("sysv" or "win64")."""
    from pocketlm.runtime.native import cache_numbers, draw, matrix, run_loop, stages
    from pocketlm.runtime.native.ir import Module

    module = Module(abi)
    if kept := next((kv for kv, core in CORES.items() if core == name), None):
        stages.define(module, level.name, cache_numbers.KINDS[kept])
        run_loop.define(module, level.machine)
        draw.define(module)
    else:
        matrix.define(module, level.name, name)
    return module.text()


def module_texts(level: Level, abi: str) -> dict[str, str]:
    """Every module's IR, for images made ahead of time."""
    return {name: module_text(name, level, abi) for name in (*CORES.values(), *LAYOUTS)}


def use_images(path: str, version: str) -> None:
    """Take all code from a file made by aot.build_images from now on: no llvmlite is needed, nothing is compiled."""
    _aot.update(path=path, version=version)


_images = functools.cache(aot.read_images)


@functools.cache
def loaded(name: str, level: Level) -> linker.Loaded:
    """A module's code, executable. Loaded once a process and never unloaded: other models may be running it.

    NativeUnavailable: the system refuses, or there are no images for this computer; FileError: the images are damaged.
    """
    if _aot:
        return linker.load(_images(_aot["path"], level, _aot["version"])[name])
    from pocketlm.runtime.native.compiler import compile_object

    abi = host_abi()

    def make() -> bytes:
        code = compile_object(module_text(name, level, abi), level)
        memory.release_code("llvmlite")  # 70 MB that are needed once
        return linker.to_bytes(linker.link([code]))

    key = f"{name} {level.name} {abi} {_sources()} llvmlite {_compiler()}"
    return linker.load(linker.from_bytes(code_cache.cached(key, make)))


def kernels(formats: Iterable[str], level: Level, kv: str = "q16") -> dict[str, linker.Loaded]:
    """"core", for caches of that kind, and the code of every format named."""
    return {CORE: loaded(CORES[kv], level), **{name: loaded(name, level) for name in formats}}


def _compiler() -> str:
    """llvmlite's version; asking importlib.metadata for it takes 3 MB and 20 ms. NativeUnavailable where there is none."""
    spec = importlib.util.find_spec("llvmlite")
    if spec is None or spec.origin is None:
        raise NativeUnavailable("the native kernels need llvmlite, which is not installed")
    return hashlib.sha256(Path(spec.origin).with_name("_version.py").read_bytes()).hexdigest()


@functools.cache
def _sources() -> str:
    """A hash of the Python that writes the kernels: another source, another cache entry."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(activations.__file__), Path(sampling.__file__)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
