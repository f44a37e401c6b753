"""Every call in the kernels is made as its callee expects it, on Linux and on Windows: looked up in the IR, not run."""

import functools

import pytest
from native_conventions import calls, conventions, printed, wrong_calls

from pocketlm.runtime.native.ir import I64, PTR, VOID, Module
from pocketlm.runtime.native.kernels import CORES, module_text
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.sizes import tiles
from pocketlm.runtime.native.tiling import LAYOUTS

# Windows on x86-64 is the one platform with a convention of its own
TARGETS = [(level, abi) for level in LEVELS.values() for abi in ("sysv", "win64") if abi == "sysv" or level.machine == "x86_64"]
each_target = pytest.mark.parametrize(("level", "abi"), TARGETS, ids=[f"{level.name}-{abi}" for level, abi in TARGETS])
OF_PYTHON = {"step", "work", "wait", "top_k", "sum_exp", "draw", *(f"{fmt}_tile" for fmt in LAYOUTS)}


@functools.cache
def texts(level, abi):
    return {name: printed(module_text(name, level, abi)) for name in (*CORES.values(), *LAYOUTS)}


@each_target
def test_a_call_by_name_has_the_convention_of_the_function(level, abi):
    for name, text in texts(level, abi).items():
        assert wrong_calls(text) == [], name


@each_target
def test_what_python_calls_has_the_systems_convention_and_nothing_else_has(level, abi):
    for name, text in texts(level, abi).items():
        defined = {function: own for function, own in conventions(text).items() if not function.startswith("llvm.")}
        system = "win64cc" if abi == "win64" else ""
        assert defined == {function: system if function in OF_PYTHON else "" for function in defined}, name


@each_target
def test_through_a_pointer_kernels_are_called_as_kernels_and_the_system_as_the_system(level, abi):
    for name, text in texts(level, abi).items():
        used = {(caller, convention) for caller, callee, convention in calls(text) if callee == "a pointer"}
        system = "win64cc" if abi == "win64" else ""
        # they give their time slice away; experts are tiled by what Python calls, too, and the system is told of them
        others = {("barrier", system), ("wait", system), ("experts", system)}
        if name not in CORES.values():
            assert used == set(), name
            continue
        assert others <= used
        assert {convention for _, convention in used - others} == {""}  # products and rows, which are kernels


def test_what_is_called_through_a_pointer_is_a_kernel():
    """Every address that a program holds is of a function with the C convention, on Windows too."""
    largest = tiles("avx2")[-1]
    for fmt in LAYOUTS:
        own = conventions(texts(LEVELS["avx2"], "win64")[fmt])
        assert {own[f"{fmt}_{kernel}"] for kernel in ("row", "product1", f"product{largest}")} == {""}
        assert own[f"{fmt}_tile"] == "win64cc"  # as `experts` calls it


def test_the_finder_finds_a_call_with_the_wrong_convention():
    """What a Windows build once did: `wait` and `step` called `work`, a function for Python, as if it were one of theirs."""
    good = texts(LEVELS["avx2"], "win64")[CORES["q16"]]
    assert sum(callee == "work" for _, callee, _ in calls(good)) == 2
    bad = good.replace("call win64cc void @work", "call void @work")
    assert wrong_calls(bad) == [f"{caller} calls work as C, which is win64cc" for caller in ("step", "wait")]
    bad = good.replace("call void @barrier", "call win64cc void @barrier")
    assert set(wrong_calls(bad)) == {"work calls barrier as win64cc, which is C"}


@pytest.mark.parametrize("first", ["callee", "caller"])
def test_the_order_of_definitions_does_not_matter(first):
    module = Module("win64")

    def callee():
        with module.function("callee", {"x": I64}, returns=I64, linkage="entry") as f:
            f.ret(f.args()[0] + 1)

    def caller():
        with module.function("caller", {"p": PTR}, linkage="kernel") as f:
            f.store(f.call(I64, "callee", f.const(I64, 1)), f.args()[0], 8)
            f.call(VOID, "caller", f.args()[0])  # itself, while it is being defined

    for define in (callee, caller) if first == "callee" else (caller, callee):
        define()
    text = printed(module.text())
    assert wrong_calls(text) == []
    assert sorted(calls(text)) == [("caller", "callee", "win64cc"), ("caller", "caller", "")]
