"""LLVM IR to machine code: the only module that imports llvmlite.

In: the text of a module and the level to compile it for, whatever machine this is. Out: the bytes of an ELF relocatable
object. Knows nothing about what the code computes, nor about linking.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from pocketlm.errors import PocketlmError
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.levels import Level

LLVM = 22  # the first whose vpdpbusd takes bytes, as dot.py has them; llvmlite 0.48 brings it
Emitted = TypeVar("Emitted", bytes, str)


def compile_object(ir_text: str, level: Level) -> bytes:
    """The object file of a module, for `level`; code and constants only, nothing may be left to a C library.

    Every symbol gets hidden visibility, so that references within the image are direct (there is no global offset table),
    and functions keep off the red zone, which Windows does not have. NativeUnavailable: there is no llvmlite, or an old one;
    PocketlmError: the text is not valid IR (a defect of the kernels).
    """
    return _compile(ir_text, level, lambda machine, module: machine.emit_object(module))


def compile_assembly(ir_text: str, level: Level) -> str:
    """The same code as text for an assembler, for whoever counts instructions. Raises what `compile_object` raises."""
    return _compile(ir_text, level, lambda machine, module: machine.emit_assembly(module))


def _compile(ir_text: str, level: Level, emit: Callable[[Any, Any], Emitted]) -> Emitted:
    llvm, machine = _target_machine(level)
    try:
        module = llvm.parse_assembly(ir_text, llvm.create_context())
        module.verify()
    except RuntimeError as error:
        raise PocketlmError(f"LLVM does not accept the kernels for {level.name}: {' '.join(str(error).split())}") from error
    with module:
        module.triple = level.triple
        module.data_layout = str(machine.target_data)
        for value in (*module.functions, *module.global_variables):
            if value.linkage.name == "external" and not value.name.startswith("llvm."):
                value.visibility = "hidden"
            if value.is_function and not value.is_declaration:
                value.add_function_attribute("noredzone")
        # The kernels' vectors, loops and inlining are explicit: what is left to do is promoting variables to registers and
        # removing what is computed twice. The standard pipeline takes ten times as long and its code is no faster.
        passes = llvm.create_new_module_pass_manager()
        passes.add_sroa_pass()
        passes.add_instruction_combine_pass()
        passes.add_simplify_cfg_pass()
        passes.add_new_gvn_pass()
        passes.add_loop_rotate_pass()
        passes.add_instruction_combine_pass()
        passes.run(module, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
        return emit(machine, module)


@cache
def _target_machine(level: Level) -> tuple[Any, Any]:
    """llvmlite.binding, and the target machine of a level."""
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        raise NativeUnavailable(f"the native kernels need llvmlite, which cannot be imported ({error})") from error
    if llvm.llvm_version_info < (LLVM,):
        raise NativeUnavailable("the native kernels need a newer llvmlite; get it with: pip install --upgrade llvmlite")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple(level.triple)
    return llvm, target.create_target_machine(level.cpu, level.features, opt=3, reloc="pic", codemodel="small")
