"""Finds calls in a module's IR whose calling convention is not the callee's: undefined behaviour, which LLVM does not report.

In: a module's text, as anybody wrote it. Out: what is wrong in it. Reads what LLVM prints, and shares nothing with the builder.
"""

from __future__ import annotations

import re

import llvmlite.binding as llvm

_NAME = r'[\w.$-]+|"[^"]+"'
_CONVENTION = r"(?P<convention>win64cc|x86_64_sysvcc|fastcc|coldcc|cc ?\d+) "
_DEFINED = re.compile(rf"^(?:define|declare) [^@]*?(?:{_CONVENTION})?[^@]*@(?P<name>{_NAME})\(", re.MULTILINE)
_CALL = re.compile(rf"^\s*(?:%\S+ = )?(?:tail |musttail |notail )?call (?P<head>[^@%(]*?)(?P<callee>@(?:{_NAME})|%[\w.]+)\(")
_BODY = re.compile(rf"^define [^@]*@({_NAME})\(.*?^}}", re.MULTILINE | re.DOTALL)


def printed(text: str) -> str:
    """The module as LLVM prints it. RuntimeError: it is not valid."""
    with llvm.parse_assembly(text, llvm.create_context()) as module:
        module.verify()
        return str(module)


def conventions(text: str) -> dict[str, str]:
    """Function -> its convention; "" is the C convention."""
    return {match["name"]: _of(match[0]) for match in _DEFINED.finditer(text)}


def calls(text: str) -> list[tuple[str, str, str]]:
    """(function, what it calls: a name or "a pointer", with which convention), calls of intrinsics and assembly left out."""
    found = []
    for body in _BODY.finditer(text):
        for line in body[0].splitlines():
            if (match := _CALL.match(line)) and not match["callee"].startswith("@llvm."):
                name = match["callee"][1:] if match["callee"].startswith("@") else "a pointer"
                found.append((body[1], name, _of(match["head"])))
    return found


def wrong_calls(text: str) -> list[str]:
    """Calls by name that do not fit."""
    own = conventions(text)
    return [
        f"{caller} calls {callee} as {used or 'C'}, which is {own[callee] or 'C'}"
        for caller, callee, used in calls(text)
        if callee != "a pointer" and used != own[callee]
    ]


def _of(head: str) -> str:
    match = re.search(_CONVENTION, head)
    return match["convention"] if match else ""
