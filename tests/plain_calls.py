"""Functions of plain IR, which have System V's calling convention on x86-64, called from Python: on Windows, whose ctypes
knows only its own convention, through an entry point of that."""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from pocketlm.runtime.native import levels
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.linker import link, load

# in front of the type of a function that Python calls itself
ENTRY = "win64cc " if levels.host_abi() == "win64" else ""


def plain_function(address: int, n: int) -> Callable[..., int]:
    """The function at an address: `n` integers or pointers in, an integer out."""
    if not ENTRY:
        return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * n)(address)
    enter = _entry(n).function("enter", ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * n)
    return lambda *arguments: enter(address, *arguments)


@cache
def _entry(n: int) -> Any:
    arguments = "".join(f", i64 %x{k}" for k in range(n))
    text = f"define {ENTRY}i64 @enter(ptr %f{arguments}) nounwind {{\n  %r = call i64 %f({arguments[2:]})\n  ret i64 %r\n}}"
    return load(link([compile_object(text, levels.detect())]))
