"""Instruction-set levels: which one the kernels are compiled for, and which one this computer can run.

In: the CPU's flags as the operating system (or the CPU itself) reports them, and POCKETLM_ISA. Out: a `Level`, which is
all that the kernels and the compiler know about a CPU. Knows nothing about kernels, LLVM's library or files; imports no
llvmlite, so that a packed program can choose among images that were compiled beforehand.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import struct
import sys
import sysconfig
from dataclasses import dataclass
from typing import Literal

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.native.executable_memory import NativeUnavailable, map_code

Abi = Literal["sysv", "win64"]

# The flags of the x86-64 psABI's levels v2, v3 and v4 (without cmov, fxsr and the like, which every 64-bit CPU has),
# spelt as /proc/cpuinfo does: pni is SSE3, abm is LZCNT.
_V2 = frozenset({"cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"})
_V3 = _V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


@dataclass(frozen=True)
class Level:
    """What code is compiled for: LLVM's triple, cpu and features; and what a CPU must have to run it."""

    name: str
    machine: str  # "x86_64" or "aarch64"
    cpu: str  # LLVM's name: chooses the scheduling model, and brings features along
    features: str  # LLVM's feature string, on top of the cpu's own
    needs: frozenset[str]  # flags as /proc/cpuinfo spells them
    same_bits_as: str = ""  # the level whose results its own are, bit for bit
    system: str = ""  # the only one that it is used on, as PLATFORMS of aot.py begins

    def is_for(self, machine: str, system: str) -> bool:
        """Whether it is used on such a machine; `system` as sys.platform or a name in aot.PLATFORMS."""
        return self.machine == machine and system.startswith(self.system)

    @property
    def triple(self) -> str:
        """Always ELF, whatever the operating system: one object format to link."""
        return f"{self.machine}-unknown-linux-gnu"


_AMX = frozenset({"amx_tile", "amx_int8"})

# Best first. aarch64: macOS and Windows keep x18 for themselves; the crypto and half-precision extensions that LLVM
# takes for granted in a Cortex are missing in the Raspberry Pi's, or need not come with dot products.
_X18 = "+reserve-x18,-aes,-sha2,-crc"
_LEVELS = (
    Level("amx", "x86_64", "x86-64-v4", "+avx512vnni,+amx-tile,+amx-int8,-prefer-256-bit", _V4 | {"avx512_vnni"} | _AMX,
          same_bits_as="avx512-vnni", system="linux"),
    Level("avx512-vnni", "x86_64", "x86-64-v4", "+avx512vnni,-prefer-256-bit", _V4 | {"avx512_vnni"}),
    Level("avx-vnni", "x86_64", "x86-64-v3", "+avxvnni", _V3 | {"avx_vnni"}),
    Level("avx2", "x86_64", "x86-64-v3", "", _V3),
    Level("sse4", "x86_64", "x86-64-v2", "", _V2),
    Level("dotprod", "aarch64", "cortex-a76", f"+dotprod,+lse,-fullfp16,-rcpc,-ssbs,{_X18}",
          frozenset({"asimd", "asimddp", "atomics"})),
    Level("neon", "aarch64", "cortex-a72", _X18, frozenset({"asimd"})),
)  # fmt: skip
LEVELS = {level.name: level for level in _LEVELS}


def detect() -> Level:
    """The best level that this CPU and this operating system can run, or the one that POCKETLM_ISA names.

    UsageError: POCKETLM_ISA names no level; PocketlmError: it names one that cannot run here; NativeUnavailable: none can.
    """
    forced = os.environ.get("POCKETLM_ISA")
    if forced and forced not in LEVELS:
        raise UsageError(f"POCKETLM_ISA={forced}: no such instruction-set level; known ones are {', '.join(LEVELS)}")
    machine = host_machine()
    flags = cpu_flags(machine)
    if forced:
        if problem := why_not(LEVELS[forced], machine, flags):
            raise PocketlmError(f"POCKETLM_ISA={forced}: {problem}")
        return LEVELS[forced]
    for level in LEVELS.values():
        if not why_not(level, machine, flags):
            return level
    raise NativeUnavailable(f"this CPU ({machine}) has none of the instruction sets that the native kernels are written for")


def why_not(level: Level, machine: str, flags: frozenset[str]) -> str:
    """What keeps a CPU with these flags from running a level here; "" if nothing does. Asks the system for AMX if all else is
    there: it is given for good, and then refuses the process's threads small stacks for signals.
    """
    if level.machine != machine:
        return f"this level is for {level.machine}, this program runs on {machine}"
    if not sys.platform.startswith(level.system):
        return f"this level is for {level.system.capitalize()}"
    if not level.needs <= flags:
        return f"this CPU cannot run that level, it lacks {', '.join(sorted(level.needs - flags))}"
    if level.needs & _AMX and not _may_use_tiles():
        return "the system does not give this process AMX: that takes Linux 5.16, and no thread with a small stack for signals"
    return ""


def host_machine() -> str:
    """What this *process* runs as, "x86_64" or "aarch64". NativeUnavailable for anything else, 32-bit Pythons included."""
    # A 32-bit Python on a 64-bit kernel (Raspberry Pi OS) and an emulated one on Windows both see the wrong machine name.
    name = sysconfig.get_platform().removeprefix("win-") if sys.platform == "win32" else platform.machine()
    machine = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}.get(name.lower())
    if machine is None or struct.calcsize("P") != 8 or sys.byteorder != "little":
        pointers = f"{8 * struct.calcsize('P')}-bit pointers"
        wide = "; it takes a 64-bit system: Raspberry Pi OS (64-bit) runs on a Pi 3, 4, 5 and Zero 2 W"
        advice = wide if name.startswith(("arm", "aarch64")) and struct.calcsize("P") == 4 else ""
        raise NativeUnavailable(f"no native kernels for {name} with {pointers}{advice}")
    return machine


def host_abi() -> Abi:
    """The calling convention of entry points here: Windows on x86-64 has its own."""
    return "win64" if sys.platform == "win32" and host_machine() == "x86_64" else "sysv"


def cpu_flags(machine: str) -> frozenset[str]:
    """The CPU's flags that some level needs (Linux: all), as /proc/cpuinfo spells them."""
    if sys.platform == "linux":
        flags = _linux_flags(machine)
        if flags:
            return flags
    return _cpuid_flags() if machine == "x86_64" else _arm_flags()


@functools.cache
def _may_use_tiles() -> bool:
    """Ask Linux (5.16 and later) to keep the 8 kB of AMX's tiles for this process's threads."""
    ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0


_CPUINFO = "/proc/cpuinfo"


def _linux_flags(machine: str) -> frozenset[str]:
    """Flags that every core has: cores may differ (big.LITTLE). Empty if the file is unreadable."""
    key = "flags" if machine == "x86_64" else "Features"
    try:
        with open(_CPUINFO, encoding="utf-8", errors="replace") as file:
            lines = [line.partition(":") for line in file]
    except OSError:
        return frozenset()
    sets = [frozenset(value.split()) for name, _, value in lines if name.strip() == key]
    return frozenset.intersection(*sets) if sets else frozenset()


def _arm_flags() -> frozenset[str]:
    """aarch64 where there is no /proc/cpuinfo. SIMD is part of the base architecture, dot products came with Armv8.2."""
    has_dot = False
    if sys.platform == "darwin":
        value, size = ctypes.c_int(), ctypes.c_size_t(4)
        name = b"hw.optional.arm.FEAT_DotProd"
        failed = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0)
        has_dot = not failed and value.value == 1
    elif sys.platform == "linux":  # no /proc, or one that tells of another processor, as an emulator's may
        HWCAP_ATOMICS, HWCAP_ASIMDDP, AT_HWCAP = 1 << 8, 1 << 20, 16
        getauxval = ctypes.CDLL(None).getauxval
        getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        has_dot = getauxval(AT_HWCAP) & (HWCAP_ATOMICS | HWCAP_ASIMDDP) == HWCAP_ATOMICS | HWCAP_ASIMDDP
    elif sys.platform == "win32":
        PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE = 43
        has_dot = bool(ctypes.windll.kernel32.IsProcessorFeaturePresent(PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE))
    return frozenset({"asimd", "asimddp", "atomics"} if has_dot else {"asimd"})


# void f(uint32 *io): leaf io[0] and subleaf io[1] in; eax, ebx, ecx, edx out. Leaf 0xffffffff: xgetbv(io[1]) instead.
# The pointer comes in rdi (System V) or rcx (Windows): the first bytes put it into r8.
_POINTER = {"sysv": "4989f8", "win64": "4989c8"}  # mov r8, rdi | mov r8, rcx
_CPUID = (
    "53"  #            push rbx
    "418b00"  #        mov eax, [r8]
    "418b4804"  #      mov ecx, [r8+4]
    "83f8ff"  #        cmp eax, -1
    "7404"  #          je +4
    "0fa2"  #          cpuid
    "eb03"  #          jmp +3
    "0f01d0"  #        xgetbv
    "418900"  #        mov [r8], eax
    "41895804"  #      mov [r8+4], ebx
    "41894808"  #      mov [r8+8], ecx
    "4189500c"  #      mov [r8+12], edx
    "5b"  #            pop rbx
    "c3"  #            ret
)
_XGETBV = 0xFFFFFFFF

# (leaf, register 0-3 = eax, ebx, ecx, edx) -> the bit of each flag: Intel's manual, volume 2A, CPUID
_CPUID_BITS = {
    (1, 2): {"pni": 0, "ssse3": 9, "fma": 12, "cx16": 13, "sse4_1": 19, "sse4_2": 20, "movbe": 22, "popcnt": 23,
             "osxsave": 27, "avx": 28, "f16c": 29},
    (7, 1): {"bmi1": 3, "avx2": 5, "bmi2": 8, "avx512f": 16, "avx512dq": 17, "avx512cd": 28, "avx512bw": 30, "avx512vl": 31},
    (7, 2): {"avx512_vnni": 11},
    (0x80000001, 2): {"lahf_lm": 0, "abm": 5},
}  # fmt: skip
_YMM_STATE, _ZMM_STATE = 0b110, 0b11100110  # bits of XCR0: the registers that the operating system saves


def _cpuid_flags() -> frozenset[str]:
    """Ask the CPU itself: no system but Linux tells everything. Without the flags whose registers the system does not save."""
    pages = map_code(bytes.fromhex(_POINTER[host_abi()] + _CPUID))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(pages.address)

    def ask(leaf: int, subleaf: int = 0) -> list[int]:
        registers = (ctypes.c_uint32 * 4)(leaf, subleaf)
        function(ctypes.addressof(registers))
        return list(registers)

    try:
        last = {0: ask(0)[0], 0x80000000: ask(0x80000000)[0]}
        flags = set()
        for (leaf, register), bits in _CPUID_BITS.items():
            if leaf <= last[leaf & 0x80000000]:
                value = ask(leaf)[register]
                flags |= {flag for flag, bit in bits.items() if value >> bit & 1}
        if last[0] >= 7 and ask(7)[0] >= 1 and ask(7, 1)[0] >> 4 & 1:
            flags.add("avx_vnni")
        saved = ask(_XGETBV)[0] if "osxsave" in flags else 0
    finally:
        pages.close()
    if saved & _YMM_STATE != _YMM_STATE:
        flags -= (_V3 - _V2 - {"bmi1", "bmi2", "abm", "movbe"}) | {"avx_vnni"}
    # macOS begins to save the 512-bit registers of a thread when it first uses them: the bits say nothing there
    if (sys.platform != "darwin" and saved & _ZMM_STATE != _ZMM_STATE) or "avx2" not in flags:
        flags = {flag for flag in flags if not flag.startswith("avx512")}
    return frozenset(flags)
