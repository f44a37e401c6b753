"""The level fits the CPU: what Linux, the CPU itself and POCKETLM_ISA say decides, and nothing unknown runs compiled code."""

import ctypes
import platform
import subprocess
import sys
import types

import pytest
from plain_calls import ENTRY

from pocketlm.errors import PocketlmError, UsageError
from pocketlm.runtime.native import executable_memory, levels
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.levels import LEVELS, detect

NEHALEM = "fpu cmov fxsr sse sse2 ht lm pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
SANDY_BRIDGE = NEHALEM + " avx xsave aes"
HASWELL = SANDY_BRIDGE + " fma movbe f16c rdrand abm bmi1 avx2 bmi2"
ALDER_LAKE = HASWELL + " sha_ni avx_vnni gfni vaes"
SKYLAKE_X = HASWELL + " avx512f avx512dq avx512cd avx512bw avx512vl"
CASCADE_LAKE = SKYLAKE_X + " avx512_vnni"
SAPPHIRE_RAPIDS = CASCADE_LAKE + " avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
RASPBERRY_PI_4 = "fp asimd evtstrm crc32 cpuid"
RASPBERRY_PI_5 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"


@pytest.fixture
def computer(monkeypatch, tmp_path):
    """Pretend to be another one: computer(machine name, flags of each core)."""

    def pretend(machine: str, *cores: str) -> None:
        key = "Features" if machine == "aarch64" else "flags"
        text = "".join(f"processor\t: {k}\nmodel name\t: Some: CPU\n{key}\t\t: {flags}\n\n" for k, flags in enumerate(cores))
        path = tmp_path / "cpuinfo"
        path.write_text(text)
        monkeypatch.setattr(levels, "_CPUINFO", str(path))
        monkeypatch.setattr(levels.platform, "machine", lambda: machine)
        monkeypatch.setattr(levels.sys, "platform", "linux")

    monkeypatch.delenv("POCKETLM_ISA", raising=False)
    return pretend


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", NEHALEM, "sse4"),
        ("x86_64", SANDY_BRIDGE, "sse4"),
        ("x86_64", HASWELL, "avx2"),
        ("x86_64", ALDER_LAKE, "avx-vnni"),
        ("x86_64", SKYLAKE_X, "avx2"),
        ("x86_64", CASCADE_LAKE, "avx512-vnni"),
        ("x86_64", CASCADE_LAKE + " avx_vnni", "avx512-vnni"),
        ("x86_64", HASWELL.replace(" fma", ""), "sse4"),
        ("aarch64", RASPBERRY_PI_4, "neon"),
        ("aarch64", RASPBERRY_PI_5, "dotprod"),
    ],
)
def test_the_best_level_that_the_flags_allow(computer, machine, flags, expected):
    computer(machine, flags, flags)
    assert detect().name == expected


@pytest.mark.parametrize(("allows", "expected"), [(True, "amx"), (False, "avx512-vnni")])
def test_tiles_are_used_where_the_system_keeps_them(computer, monkeypatch, allows, expected):
    computer("x86_64", SAPPHIRE_RAPIDS)
    monkeypatch.setattr(levels, "_may_use_tiles", lambda: allows)
    assert detect().name == expected


def test_the_system_is_asked_for_tiles_only_where_they_are_used(computer, monkeypatch):
    """It gives them for good, and is stricter with the process's stacks for signals from then on."""
    monkeypatch.setattr(levels, "_may_use_tiles", lambda: pytest.fail("asked"))
    for flags in (CASCADE_LAKE, SKYLAKE_X + " amx_tile amx_int8"):
        computer("x86_64", flags)
        assert detect().name in ("avx512-vnni", "avx2")
    computer("x86_64", SAPPHIRE_RAPIDS)
    monkeypatch.setenv("POCKETLM_ISA", "avx512-vnni")
    assert detect().name == "avx512-vnni"


@pytest.mark.parametrize(
    ("system", "flags", "said"),
    [
        ("linux", SAPPHIRE_RAPIDS, "POCKETLM_ISA=amx: the system does not give this process AMX: that takes Linux 5.16"),
        ("linux", CASCADE_LAKE, "this CPU cannot run that level, it lacks amx_int8, amx_tile"),
        ("win32", SAPPHIRE_RAPIDS, "POCKETLM_ISA=amx: this level is for Linux"),
    ],
)
def test_amx_that_is_forced_where_it_cannot_be_had_is_an_error_that_says_why(computer, monkeypatch, system, flags, said):
    computer("x86_64", flags)
    monkeypatch.setattr(levels, "_may_use_tiles", lambda: False)
    monkeypatch.setattr(levels, "cpu_flags", lambda machine: frozenset(flags.split()))
    monkeypatch.setattr(levels, "host_machine", lambda: "x86_64")
    monkeypatch.setattr(levels.sys, "platform", system)
    monkeypatch.setenv("POCKETLM_ISA", "amx")
    with pytest.raises(PocketlmError, match=said) as error:
        detect()
    assert "\n" not in str(error.value)


def test_cores_that_differ_get_what_all_of_them_have(computer):
    computer("aarch64", RASPBERRY_PI_4, RASPBERRY_PI_5)
    assert detect().name == "neon"


@pytest.mark.parametrize(("machine", "flags"), [("x86_64", "sse2 pni ssse3"), ("riscv64", "rv64gc"), ("armv7l", "neon vfpv4")])
def test_an_unknown_or_old_cpu_is_left_to_numpy(computer, machine, flags):
    computer(machine, flags)
    with pytest.raises(NativeUnavailable):
        detect()


def test_a_32_bit_python_on_a_64_bit_kernel_is_left_to_numpy(computer, monkeypatch):
    computer("aarch64", RASPBERRY_PI_4)
    monkeypatch.setattr(levels, "struct", types.SimpleNamespace(calcsize=lambda _: 4))
    with pytest.raises(NativeUnavailable, match="32-bit"):
        detect()


def test_a_level_can_be_forced(computer, monkeypatch):
    computer("x86_64", CASCADE_LAKE)
    for name in ("avx512-vnni", "avx2", "sse4"):
        monkeypatch.setenv("POCKETLM_ISA", name)
        assert detect() is LEVELS[name]
    monkeypatch.setenv("POCKETLM_ISA", "")
    assert detect().name == "avx512-vnni"


def test_a_forced_level_that_is_unknown_or_cannot_run_is_an_error(computer, monkeypatch):
    computer("x86_64", HASWELL)
    monkeypatch.setenv("POCKETLM_ISA", "avx3")
    with pytest.raises(UsageError, match="amx, avx512-vnni, avx-vnni, avx2, sse4, dotprod, neon"):
        detect()
    monkeypatch.setenv("POCKETLM_ISA", "avx-vnni")
    with pytest.raises(PocketlmError, match="lacks avx_vnni"):
        detect()
    monkeypatch.setenv("POCKETLM_ISA", "neon")
    with pytest.raises(PocketlmError, match="for aarch64"):
        detect()


def test_every_level_of_a_machine_is_at_least_as_demanding_as_the_next_general_one():
    assert [level for level in LEVELS.values() if level.triple.split("-")[0] != level.machine] == []
    assert LEVELS["sse4"].needs < LEVELS["avx2"].needs < LEVELS["avx-vnni"].needs
    assert LEVELS["avx2"].needs < LEVELS["avx512-vnni"].needs < LEVELS["amx"].needs
    assert LEVELS["neon"].needs < LEVELS["dotprod"].needs


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="compares with /proc/cpuinfo")
def test_the_cpu_itself_says_what_linux_says():
    wanted = frozenset().union(*(level.needs for level in LEVELS.values() if level.machine == "x86_64")) - levels._AMX
    assert levels._cpuid_flags() & wanted == levels._linux_flags("x86_64") & wanted


@pytest.mark.skipif(levels.host_machine() != "x86_64", reason="runs x86-64 code")
def test_the_cpu_can_be_asked_with_either_calling_convention():
    from pocketlm.runtime.native.compiler import compile_object
    from pocketlm.runtime.native.linker import link, load

    call = "define " + ENTRY + "void @call_{0}(ptr %f, ptr %io) {{\n  call {1} void %f(ptr %io)\n  ret void\n}}\n"
    callers = load(link([compile_object(call.format("sysv", "") + call.format("win64", "win64cc"), LEVELS["sse4"])]))
    answers = []
    for abi in ("sysv", "win64"):
        pages = executable_memory.map_code(bytes.fromhex(levels._POINTER[abi] + levels._CPUID))
        registers = (ctypes.c_uint32 * 4)(0, 0)  # leaf 0: the maker's name in ebx, edx, ecx
        callers.function(f"call_{abi}", None, ctypes.c_void_p, ctypes.c_void_p)(pages.address, ctypes.addressof(registers))
        answers.append(list(registers))
        pages.close()
    callers.close()
    assert answers[0] == answers[1]
    assert bytes((ctypes.c_uint32 * 3)(*(answers[0][k] for k in (1, 3, 2)))).decode("ascii").isprintable()


@pytest.mark.parametrize(
    ("saved", "expected"), [(0b11100111, "avx512-vnni"), (0b111, "avx2"), (0b011, "sse4"), (None, "sse4")], ids=str
)
def test_registers_that_the_system_does_not_save_are_not_used(computer, monkeypatch, saved, expected):
    """A CPU with everything, as macOS on Intel and Windows see it: through cpuid; `saved` is XCR0, None: no xgetbv at all."""
    answers: dict[tuple[int, int], tuple[int, ...]] = {(0, 0): (7,), (0x80000000, 0): (0x80000008,)}
    for (leaf, register), bits in levels._CPUID_BITS.items():
        have = [bit for flag, bit in bits.items() if flag != "osxsave" or saved is not None]
        values = list(answers.get((leaf, 0), (0, 0, 0, 0)))
        values[register] = sum(1 << bit for bit in have)
        answers[leaf, 0] = tuple(values)

    def cpuid(address: int) -> None:
        registers = (ctypes.c_uint32 * 4).from_address(address)
        leaf = registers[0]
        assert saved is not None or leaf != levels._XGETBV, "the instruction would fault"
        answer = (saved or 0,) if leaf == levels._XGETBV else answers[leaf, registers[1]]
        for k, value in enumerate(answer):
            registers[k] = value

    computer("x86_64")
    monkeypatch.setattr(levels.sys, "platform", "freebsd14")
    monkeypatch.setattr(levels, "map_code", lambda code: executable_memory.CodePages(0, lambda: None))
    monkeypatch.setattr(levels.ctypes, "CFUNCTYPE", lambda *types: lambda address: cpuid)
    assert detect().name == expected


def test_detection_needs_no_llvmlite():
    program = (
        "import sys; from pocketlm.runtime.native import levels, linker, code_cache; levels.detect(); "
        "sys.exit('llvmlite' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
