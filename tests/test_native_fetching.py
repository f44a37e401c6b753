"""How compiled code asks for weights, read in its assembly: it changes no answer, and a tenth to a third of the speed."""

from __future__ import annotations

import re
from functools import cache

import pytest

from pocketlm.runtime.native.compiler import compile_assembly
from pocketlm.runtime.native.kernels import module_text
from pocketlm.runtime.native.levels import LEVELS

X86 = [name for name, level in LEVELS.items() if level.machine == "x86_64"]


@pytest.fixture(scope="module", params=X86)
def level(request):
    return LEVELS[request.param]


@cache
def assembly(level, module: str) -> str:
    return compile_assembly(module_text(module, level, "sysv"), level)


def code(level, module: str, function: str = "") -> list[str]:
    """The instructions of a function, or of a whole module."""
    text = assembly(level, module)
    if function:
        text = text.split(f"\n{function}:\n", 1)[1].split(f"\t.size\t{function},", 1)[0]
    return [line.strip() for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")]


@pytest.mark.parametrize("module", ["core", "Q4_0", "Q4_K"])
def test_rbp_is_a_frame_pointer_and_nothing_else(level, module):
    written = {line for line in code(level, module) if re.search(r", %[re]bp$", line)}
    assert written == {"movq\t%rsp, %rbp"}


@pytest.mark.parametrize("fmt", ["Q4_K", "Q6_K", "Q8_0", "IQ4_XS"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_line_is_asked_for_as_one_is_unpacked(level, fmt, tokens):
    asked, most = 0, 0
    for line in code(level, fmt, f"{fmt}_product{tokens}"):
        if re.search(r"\bv?p(dpbusd|maddwd)\b", line):
            asked = 0
        asked += line.startswith("prefetcht0")
        most = max(most, asked)
    assert 0 < most <= 4  # of a dozen in a row some wait for the others
