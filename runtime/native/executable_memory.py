"""Bytes of machine code made executable: written first, executable afterwards, never both at once.

In: position-independent code for this machine. Out: its address. Knows the memory calls of Linux, BSD, macOS and Windows,
and nothing about what the code does.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

from pocketlm.errors import PocketlmError


class NativeUnavailable(PocketlmError):
    """This computer cannot run compiled kernels; the numpy executor can take over."""


class CodePages:
    """Executable memory that holds one piece of code. `close` gives it back; nothing may run in it any more then."""

    def __init__(self, address: int, release: Callable[[], None]):
        self.address, self._release = address, release

    def close(self) -> None:
        """Unmap the code. A second call does nothing."""
        release, self._release, self.address = self._release, lambda: None, 0
        release()


def map_code(code: bytes) -> CodePages:
    """Put `code` into fresh pages and make them executable. NativeUnavailable, with the reason, if the system refuses."""
    if sys.platform == "win32":
        return _map_windows(code)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        # A signed program with the hardened runtime may have one such mapping; others may have any number of either kind.
        with contextlib.suppress(NativeUnavailable):
            return _map_macos_arm(code)
    return _map_posix(code)


def _refused(what: str, number: int) -> NativeUnavailable:
    return NativeUnavailable(f"this system does not let a program run code that it made itself ({what}: {os.strerror(number)})")


_MAP_FAILED = ctypes.c_void_p(-1).value


class _Posix:
    """The C library's calls with their types, looked up once."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None, use_errno=True)
        self.mmap: Any = library.mmap
        self.mmap.restype = ctypes.c_void_p
        self.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
        self.mprotect: Any = library.mprotect
        self.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.munmap: Any = library.munmap
        self.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library = library

    def map(self, size: int, protection: int, extra_flags: int = 0) -> int:
        address = self.mmap(None, size, protection, mmap.MAP_PRIVATE | mmap.MAP_ANON | extra_flags, -1, 0)
        if address == _MAP_FAILED:
            raise _refused("mmap", ctypes.get_errno())
        return address

    def pages(self, address: int, size: int) -> CodePages:
        return CodePages(address, lambda: self.munmap(address, size))


def _map_posix(code: bytes) -> CodePages:
    """Linux, BSD and macOS: a private mapping that is writable first and executable afterwards."""
    system = _Posix()
    address = system.map(len(code), mmap.PROT_READ | mmap.PROT_WRITE)
    pages = system.pages(address, len(code))
    ctypes.memmove(address, code, len(code))
    if system.mprotect(address, len(code), mmap.PROT_READ | mmap.PROT_EXEC):
        error = _refused("mprotect", ctypes.get_errno())
        pages.close()
        raise error
    _synchronise_instructions(system.library, address, len(code))
    return pages


def _synchronise_instructions(library: Any, address: int, size: int) -> None:
    """Make an Arm core fetch what was just written; x86 needs nothing. `library` is the C library.

    Linux cleans the data cache and invalidates the instruction cache itself when a page becomes executable for the first
    time (arch/arm64, __sync_icache_dcache, called wherever a page table entry is set), and these pages are fresh. That is
    how the kernel works, not a promise in a manual, so the compiler's own call is made as well where its library is there.
    """
    if sys.platform == "darwin" and platform.machine() == "arm64":
        library.sys_icache_invalidate(ctypes.c_void_p(address), ctypes.c_size_t(size))
    elif platform.machine() in ("aarch64", "arm64"):
        with contextlib.suppress(OSError, AttributeError):
            clear = ctypes.CDLL("libgcc_s.so.1").__clear_cache
            clear(ctypes.c_void_p(address), ctypes.c_void_p(address + size))


def _map_macos_arm(code: bytes) -> CodePages:
    """Apple silicon: the pages have both rights on paper, and each thread is switched between them."""
    MAP_JIT = 0x800
    system = _Posix()
    every_right = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
    address = system.map(len(code), every_right, MAP_JIT)
    protect = system.library.pthread_jit_write_protect_np
    protect(0)
    try:
        ctypes.memmove(address, code, len(code))
    finally:
        protect(1)
    _synchronise_instructions(system.library, address, len(code))
    return system.pages(address, len(code))


def _map_windows(code: bytes) -> CodePages:
    MEM_COMMIT_RESERVE, MEM_RELEASE, PAGE_READWRITE, PAGE_EXECUTE_READ = 0x3000, 0x8000, 0x04, 0x20
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    pointer, size, word = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32
    kernel.VirtualAlloc.restype = pointer
    kernel.VirtualAlloc.argtypes = [pointer, size, word, word]
    kernel.VirtualProtect.argtypes = [pointer, size, word, ctypes.POINTER(word)]
    kernel.VirtualFree.argtypes = [pointer, size, word]
    kernel.GetCurrentProcess.restype = pointer
    kernel.FlushInstructionCache.argtypes = [pointer, pointer, size]

    def refused(what: str) -> NativeUnavailable:
        reason = ctypes.FormatError(ctypes.get_last_error()).strip()  # type: ignore[attr-defined]
        return NativeUnavailable(f"this system does not let a program run code that it made itself ({what}: {reason})")

    address = kernel.VirtualAlloc(None, len(code), MEM_COMMIT_RESERVE, PAGE_READWRITE)
    if not address:
        raise refused("VirtualAlloc")
    pages = CodePages(address, lambda: kernel.VirtualFree(address, 0, MEM_RELEASE))
    ctypes.memmove(address, code, len(code))
    if not kernel.VirtualProtect(address, len(code), PAGE_EXECUTE_READ, ctypes.byref(word())):
        error = refused("VirtualProtect")
        pages.close()
        raise error
    kernel.FlushInstructionCache(kernel.GetCurrentProcess(), address, len(code))
    return pages
