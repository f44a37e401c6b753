"""How many processor cores this process may use, as each operating system tells it.

Two hyper-threads of a core share its arithmetic and gain nothing, so cores are counted, not hyper-threads; a core that the
process may not run on, or has no time on, does not count. Knows nothing about threads. What a system answers is taken as
an argument by the function that reads it, so that any system can read any other's.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pocketlm.runtime import control_groups
from pocketlm.runtime.small_files import text


def cores() -> int:
    """Physical cores that this process may use, at least 1; where the system does not tell, what Python counts."""
    counters: dict[str, Callable[[], int]] = {"linux": _linux, "win32": _windows, "darwin": _darwin}
    try:
        found = counters[sys.platform]()
    except (KeyError, OSError, ValueError, AttributeError):
        found = 0
    return found if found > 0 else os.cpu_count() or 1


def be_nice() -> None:
    """Let other programs go first: this thread, and those that it starts from now on. Where that is refused nothing changes."""
    try:
        if sys.platform == "win32":
            kernel = ctypes.WinDLL("kernel32")
            kernel.SetPriorityClass(ctypes.c_void_p(-1), 0x4000)  # this process: BELOW_NORMAL_PRIORITY_CLASS
        else:
            os.nice(10)
    except OSError:
        return


# ---- Linux ----------------------------------------------------------------------------------------------------------


def _linux() -> int:
    return within_quota(linux_cores(os.sched_getaffinity(0)), control_groups.processors())


def linux_cores(allowed: Iterable[int], root: Path = Path("/")) -> int:
    """Cores that have at least one of the `allowed` hyper-threads."""
    folder = root / "sys/devices/system/cpu"
    return len({text(folder / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed})


def within_quota(n_cores: int, quota: float | None) -> int:
    """What a container's share of time is good for: more threads would be stopped for a part of every tenth of a second."""
    return n_cores if quota is None else max(min(n_cores, int(quota + 0.5)), 1)


# ---- Windows --------------------------------------------------------------------------------------------------------

_RELATION_PROCESSOR_CORE = 0
_RECORD = struct.Struct("<II")  # SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX: relationship, size of the record
_CORE = struct.Struct("<BB20xH")  # PROCESSOR_RELATIONSHIP: flags, class of efficiency, number of masks
_MASK = struct.Struct("<QH6x")  # GROUP_AFFINITY: processors of the group, number of the group
_ALL = (1 << 64) - 1


def windows_cores(records: bytes, allowed: Mapping[int, int]) -> int:
    """How many cores have a hyper-thread that the process may use.

    `records`: what GetLogicalProcessorInformationEx(RelationProcessorCore) gives. `allowed`: a mask of processors for every
    group that the process is in. ValueError: damaged records.
    """
    found = at = 0
    while at < len(records):
        try:
            relation, size = _RECORD.unpack_from(records, at)
            if relation == _RELATION_PROCESSOR_CORE:
                _, _, count = _CORE.unpack_from(records, at + _RECORD.size)
                masks = at + _RECORD.size + _CORE.size
                core = [_MASK.unpack_from(records, masks + i * _MASK.size) for i in range(count)]
                found += any(mask & allowed.get(group, 0) for mask, group in core)
        except struct.error as error:
            raise ValueError("a record of a processor core is cut off") from error
        if not _RECORD.size <= size <= len(records) - at:
            raise ValueError(f"a record of a processor core has {size} bytes")
        at += size
    return found


def _windows() -> int:
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)  # type: ignore[attr-defined]
    ask, size = kernel.GetLogicalProcessorInformationEx, ctypes.c_uint32(0)
    ask(_RELATION_PROCESSOR_CORE, None, ctypes.byref(size))  # fails, and tells the size
    buffer = ctypes.create_string_buffer(size.value)
    if not ask(_RELATION_PROCESSOR_CORE, buffer, ctypes.byref(size)):
        raise OSError("GetLogicalProcessorInformationEx")
    return windows_cores(buffer.raw[: size.value], _windows_masks(kernel))


def _windows_masks(kernel: Any) -> dict[int, int]:
    """Group of processors -> those of them that this process may use. A mask is told only of a process in one group."""
    handle, pointer = ctypes.c_void_p(-1), ctypes.POINTER  # GetCurrentProcess() is always -1
    kernel.GetProcessAffinityMask.argtypes = [ctypes.c_void_p, pointer(ctypes.c_size_t), pointer(ctypes.c_size_t)]
    kernel.GetProcessGroupAffinity.argtypes = [ctypes.c_void_p, pointer(ctypes.c_uint16), pointer(ctypes.c_uint16)]
    count, groups = ctypes.c_uint16(64), (ctypes.c_uint16 * 64)()
    if not kernel.GetProcessGroupAffinity(handle, ctypes.byref(count), groups):
        count.value = 1  # group 0
    own, system = ctypes.c_size_t(0), ctypes.c_size_t(0)
    bound = kernel.GetProcessAffinityMask(handle, ctypes.byref(own), ctypes.byref(system)) and own.value
    return dict.fromkeys(groups[: count.value], own.value if bound and count.value == 1 else _ALL)


# ---- macOS ----------------------------------------------------------------------------------------------------------


def darwin_cores(ask: Callable[[bytes], int | None]) -> int:
    """`ask` gives a number that sysctl knows, or None. The fast cores alone: the others would hold them up at every barrier."""
    return next((n for n in map(ask, (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu")) if n), 0)


def _darwin() -> int:
    libc = ctypes.CDLL(None)

    def ask(name: bytes) -> int | None:
        value, size = ctypes.c_int(0), ctypes.c_size_t(4)
        return None if libc.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0) else value.value

    return darwin_cores(ask)
