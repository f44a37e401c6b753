"""Cycles that the kernels' inner loops take on a Raspberry Pi's cores, without a Raspberry Pi.

    python -m pocketlm.bench.arm64_cycles [--rounds 100] [--a76 neoverse-n1]

In: the kernels, compiled here for aarch64. Out: a table, cycles per 32 weights of a row, as LLVM's machine-code analyser
(llvm-mca, in Debian's package llvm) predicts them for each core, everything in the first cache; and, for decoding with all four
cores, how many bytes of weights a second that is. Where that is above what the board's memory gives, memory is the limit.

LLVM has no model of a Cortex-A76 and takes that of a Cortex-A57 (as for a Cortex-A72). A Neoverse N1, the same design made for
servers, has one in newer LLVMs: 22, not Debian 12's 14, which takes the Cortex-A57's for it, too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from typing import NamedTuple

from pocketlm.errors import PocketlmError
from pocketlm.runtime.native.compiler import compile_assembly
from pocketlm.runtime.native.dequantize import RUNS
from pocketlm.runtime.native.kernels import module_text
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.tiling import LAYOUTS


class Core(NamedTuple):
    """LLVM's name, a board that has it, its clock there in GHz, the best level for it."""

    cpu: str
    board: str
    gigahertz: float
    level: str


CORES = (
    Core("cortex-a76", "Pi 5", 2.4, "dotprod"),
    Core("cortex-a72", "Pi 4", 1.8, "neon"),
    Core("cortex-a53", "Pi 3B+", 1.4, "neon"),
)
# weights of a row that an instruction multiplies; those of integers meet two bytes of an activation
MULTIPLIED = {"sdot": 8, "smull": 4, "smull2": 4, "smlal": 4, "smlal2": 4}
FLOATS_MULTIPLIED = {"fmla": 4}


class Loop(NamedTuple):
    """The inner loop of a product: instructions and cycles per 32 weights of a row and token."""

    instructions: float
    cycles: float


def inner_loop(assembly: str, function: str) -> list[str]:
    """The instructions of the largest block that branches to itself. PocketlmError where there is none."""
    body = assembly.partition(f"\n{function}:")[2].partition(".Lfunc_end")[0]
    blocks = re.split(r"^(\.LBB\w+):", body, flags=re.MULTILINE)
    loops = []
    for label, block in zip(blocks[1::2], blocks[2::2], strict=True):
        lines = [line.partition("//")[0].strip() for line in block.splitlines()]
        lines = [line for line in lines if line and not line.startswith(".")]
        back = next((i for i, line in enumerate(lines) if re.search(rf"{re.escape(label)}$", line)), None)
        if back is not None:
            loops.append(lines[: back + 1])
    if not loops:
        raise PocketlmError(f"{function} has no loop of one block")
    return max(loops, key=len)


def analyse(lines: list[str], cpu: str, rounds: int) -> float:
    """Cycles of one turn. PocketlmError where llvm-mca is missing or does not understand the code."""
    program = shutil.which("llvm-mca")
    if program is None:
        raise PocketlmError("needs llvm-mca; install LLVM's tools: apt install llvm")
    text = "loop:\n" + "\n".join(re.sub(r"\.LBB\w+$", "loop", line) for line in lines) + "\n"
    options = [f"-iterations={rounds}", "-instruction-info=0", "-resource-pressure=0"]
    command = [program, "-mtriple=aarch64", f"-mcpu={cpu}", *options]
    found = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if match := re.search(r"Total Cycles:\s+(\d+)", found.stdout):
        return int(match[1]) / rounds
    raise PocketlmError(f"llvm-mca: {(found.stderr or found.stdout).strip().splitlines()[:1]}")


def loop_of(fmt: str, core: Core, tokens: int, rounds: int) -> Loop:
    """What a turn of a format's product with `tokens` tokens takes, per 32 weights of one row and token."""
    level = LEVELS[core.level]
    lines = inner_loop(compile_assembly(module_text(fmt, level, "sysv"), level), f"{fmt}_product{tokens}")
    multiplied = MULTIPLIED if fmt in RUNS else FLOATS_MULTIPLIED
    share = sum(multiplied.get(line.split()[0], 0) for line in lines) / 32
    return Loop(len(lines) / share, analyse(lines, core.cpu, rounds) / share)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100, help="turns of the loop that are analysed")
    parser.add_argument("--a76", default=CORES[0].cpu, metavar="NAME", help="LLVM's name of the core to take for a Cortex-A76")
    arguments = parser.parse_args()
    rounds, cores = arguments.rounds, (CORES[0]._replace(cpu=arguments.a76), *CORES[1:])
    print("| core | format | instructions, 1 token | cycles, 1 token | cycles, 8 tokens | weights a second, 4 cores |")
    print("|---|---|--:|--:|--:|--:|")
    for core in cores:
        for fmt in LAYOUTS:
            one, eight = (loop_of(fmt, core, tokens, rounds) for tokens in (1, 8))
            layout = LAYOUTS[fmt]
            speed = 4 * core.gigahertz * 32 / one.cycles * layout.block_bytes / layout.block_size
            name = f"{core.cpu} ({core.board}, {core.gigahertz} GHz), {core.level}"
            print(f"| {name} | {fmt} | {one.instructions:.1f} | {one.cycles:.1f} | {eight.cycles:.1f} | {speed:.1f} GB/s |")


if __name__ == "__main__":
    try:
        main()
    except PocketlmError as error:
        sys.exit(str(error))
