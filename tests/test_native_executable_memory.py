"""Code in memory: writable, then executable, never both; given back when closed; refused with the system's own reason."""

import ctypes
import errno
import mmap
import os
import sys
import threading
import types

import pytest
from plain_calls import plain_function

from pocketlm.runtime.native import executable_memory, levels
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.linker import Image, from_bytes, link, load, to_bytes

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

INCREMENT = 'define i64 @increment(i64 %x) nounwind "no-builtins" {\n  %r = add i64 %x, 1\n  ret i64 %r\n}'


def compiled(text: str) -> Image:
    return link([compile_object(text, levels.detect())])


@pytest.fixture(scope="module")
def increment() -> Image:
    return compiled(INCREMENT)


def rights(address: int) -> str:
    """Of the mapping that holds an address, as the kernel tells; "" if there is none."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            if start <= address < end:
                return line.split()[1]
    return ""


@linux_only
def test_memory_is_never_writable_and_executable_at_once(increment, monkeypatch):
    seen = []
    copy = ctypes.memmove
    monkeypatch.setattr(ctypes, "memmove", lambda to, *rest: (seen.append(rights(to)), copy(to, *rest)))
    loaded = load(increment)
    assert seen == ["rw-p"]
    assert rights(loaded.address("increment")) == "r-xp"
    loaded.close()


@linux_only
def test_loading_and_closing_leaves_nothing_behind(increment):
    def mappings() -> int:
        with open("/proc/self/maps") as maps:
            return sum(1 for _ in maps)

    before = mappings()
    several = [load(increment) for _ in range(200)]
    assert {plain_function(loaded.address("increment"), 1)(41) for loaded in several} == {42}
    for loaded in several:
        loaded.close()
        loaded.close()
    assert mappings() <= before + 2  # the interpreter's own memory may have grown


@linux_only
@pytest.mark.parametrize("call_name", ["mmap", "mprotect"])
def test_a_system_that_refuses_is_reported_with_its_reason(increment, monkeypatch, call_name):
    addresses = []

    class Refusing(executable_memory._Posix):
        def __init__(self):
            super().__init__()
            setattr(self, call_name, self.refuse)

        def refuse(self, address, *_):
            addresses.append(address)
            ctypes.set_errno(errno.EACCES)
            return executable_memory._MAP_FAILED if call_name == "mmap" else -1

    monkeypatch.setattr(executable_memory, "_Posix", Refusing)
    with pytest.raises(NativeUnavailable, match=f"{call_name}: Permission denied"):
        load(increment)
    assert addresses[0] is None or rights(addresses[0]) == ""  # the pages are given back


class Recorded:
    """A function of a foreign system's library: notes its name, takes ctypes' attributes, and does `body`."""

    def __init__(self, name, log, body=lambda *_: 1):
        self.name, self.log, self.body = name, log, body

    def __call__(self, *args):
        self.log.append(self.name)
        return self.body(*args)


@pytest.fixture
def foreign(monkeypatch):
    """What the code-mapping calls did, in order, with the copy among them; the memory itself is this system's."""
    log = []
    copy = ctypes.memmove
    monkeypatch.setattr(ctypes, "memmove", lambda *args: (log.append("copy"), copy(*args)))
    return log


def run_once(code: bytes) -> int:
    pages = executable_memory.map_code(code)
    try:
        return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(pages.address)(41)
    finally:
        pages.close()


@linux_only
def test_the_calls_of_windows_in_order(increment, monkeypatch, foreign):
    """VirtualAlloc and its kin over mmap: what they are asked for is what makes the code run."""
    system, log, code = executable_memory._Posix(), foreign, increment.code
    rights_of = {0x04: mmap.PROT_READ | mmap.PROT_WRITE, 0x20: mmap.PROT_READ | mmap.PROT_EXEC}
    sizes = {}

    def allocate(address, size, kind, protection):
        assert (address, kind) == (None, 0x3000)
        address = system.map(size, rights_of[protection])
        sizes[address] = size
        return address

    def protect(address, size, protection, _):
        return system.mprotect(address, size, rights_of[protection]) == 0

    def free(address, size, kind):
        assert (size, kind) == (0, 0x8000)
        return system.munmap(address, sizes.pop(address)) == 0

    kernel = types.SimpleNamespace(
        VirtualAlloc=Recorded("allocate", log, allocate),
        VirtualProtect=Recorded("protect", log, protect),
        VirtualFree=Recorded("free", log, free),
        GetCurrentProcess=Recorded("process", log),
        FlushInstructionCache=Recorded("flush", log),
    )
    monkeypatch.setattr(ctypes, "WinDLL", lambda name, use_last_error: kernel, raising=False)
    monkeypatch.setattr(executable_memory.sys, "platform", "win32")
    assert run_once(code) == 42
    assert log == ["allocate", "copy", "protect", "process", "flush", "free"]
    assert sizes == {}

    kernel.VirtualProtect.body = lambda *_: 0
    monkeypatch.setattr(ctypes, "get_last_error", lambda: 5, raising=False)
    monkeypatch.setattr(ctypes, "FormatError", lambda number: "Access is denied.\r\n", raising=False)
    with pytest.raises(NativeUnavailable, match=r"VirtualProtect: Access is denied\.\)$"):
        run_once(code)
    assert sizes == {}


@linux_only
def test_the_calls_of_macos_on_arm_in_order(increment, monkeypatch, foreign):
    """Writing is switched on for the thread, then off; a system that allows no such mapping gets the other kind."""
    log, code, map_jit = foreign, increment.code, 0x800
    flags = []

    class MacOS(executable_memory._Posix):
        def __init__(self):
            super().__init__()
            self.library = types.SimpleNamespace(
                pthread_jit_write_protect_np=lambda enabled: log.append(f"write protection {enabled}"),
                sys_icache_invalidate=Recorded("invalidate", log),
            )

        def map(self, size, protection, extra_flags=0):
            flags.append(extra_flags)
            if extra_flags == map_jit and len(flags) > 1:
                raise NativeUnavailable("one such mapping is all that a hardened program gets")
            return super().map(size, protection)

    monkeypatch.setattr(executable_memory, "_Posix", MacOS)
    monkeypatch.setattr(executable_memory.sys, "platform", "darwin")
    monkeypatch.setattr(executable_memory.platform, "machine", lambda: "arm64")
    assert run_once(code) == 42
    assert log == ["write protection 0", "copy", "write protection 1", "invalidate"]
    del log[:]
    assert run_once(code) == 42
    assert log == ["copy", "invalidate"]
    assert flags == [map_jit, map_jit, 0]


def test_an_image_for_another_machine_is_not_loaded():
    with pytest.raises(NativeUnavailable, match="for vax, this program runs on"):
        load(Image("vax", b"\0", {}))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_code_runs_in_a_forked_child(increment):
    loaded = load(increment)
    function = plain_function(loaded.address("increment"), 1)
    child = os.fork()
    if child == 0:
        os._exit(function(41))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert function(1) == 2
    loaded.close()


WAIT = """
define void @wait(ptr %flag) nounwind "no-builtins" {
entry:
  br label %again
again:
  %v = load atomic i64, ptr %flag acquire, align 8
  %set = icmp ne i64 %v, 0
  br i1 %set, label %done, label %again
done:
  ret void
}"""


def test_other_python_threads_run_during_a_call():
    flag = ctypes.c_int64(0)
    loaded = load(compiled(WAIT))
    wait = plain_function(loaded.address("wait"), 1)
    thread = threading.Thread(target=wait, args=(ctypes.addressof(flag),), daemon=True)
    thread.start()
    flag.value = 1
    thread.join(60)
    assert not thread.is_alive()
    loaded.close()


def test_the_container_and_the_loader_are_the_same_image(increment):
    loaded = load(from_bytes(to_bytes(increment)))
    assert plain_function(loaded.address("increment"), 1)(-1) == 0
    with pytest.raises(KeyError):
        loaded.address("decrement")
    loaded.close()
