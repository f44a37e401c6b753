"""Which part of the package may import which: one table, read from the sources without importing anything.

An import inside a function counts like any other, and so does one that only types need (`TYPE_CHECKING`): naming another
part's type is knowing it. Modules import each other in no circle, whatever the place of the import.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A part is a folder or a file of the root; what it may import is a part, or one module of a part. Top to bottom: nothing
# flows backwards. `tokenizer` knows no model, `runtime` no chat, `export` no executor but to verify, `chat` no weights, and
# nobody but the command knows `train`.
ALLOWED = {
    "__main__": "cli",
    "cli": (
        "cli_options errors model pocketlm tokenizer runtime.model_summary chat.repl chat.command"
        " export.command export.dialects export.from_model_file build.command bench.command bench.evaluate"
        " train.command doctor.command doctor.health doctor.portrait serve.command batch.command pull.command terminal_text"
    ),
    # the engine with another face: it asks a model, and knows no kernels
    "serve": (
        "errors asynchronous pocketlm model conversation runtime.sampling_options runtime.generator chat.saved"
        " chat.states chat.thinking chat.transcript constrain cli_options signals terminal_text"
    ),
    # … and with a third
    "batch": (
        "cancel errors pocketlm model conversation runtime.generator runtime.atomic serve.fields serve.asking serve.errors"
        " serve.guard serve.left_out serve.shapes cli_options terminal_text"
    ),
    "doctor": "errors model pull.catalogue runtime runtime.native terminal_text",
    # of the cache where it is: a fetched model lies beside it
    "pull": "errors runtime.atomic runtime.native.code_cache terminal_text",
    "bench": (
        "errors pocketlm model tokenizer runtime runtime.native export batch.local conversation serve.asking cli_options"
        " doctor.board doctor.resources signals terminal_text"
    ),
    "build": (
        "errors pocketlm model tokenizer runtime runtime.native chat.opening chat.templates export export.command cli"
        " cli_options terminal_text"
    ),
    "train": (
        "errors tokenizer runtime.atomic runtime.file_mapping runtime.hyper runtime.positions runtime.sampling chat.templates"
        " export signals terminal_text models.small_talk"
    ),
    "models.small_talk": "errors pocketlm runtime.atomic runtime.evaluation export train.data",
    "pocketlm": "errors model tokenizer",  # the face
    "model": "conversation errors locks pull.catalogue tokenizer runtime chat.templates constrain constrain.guides",
    "conversation": "asynchronous constrain errors tokenizer runtime chat.templates",
    "constrain": "errors locks runtime.sampling",  # what it changes: logits; it knows no model
    "asynchronous": "cancel",
    "cancel": "",
    "signals": "",
    "cli_options": "errors pocketlm constrain.guides runtime.sampling_options runtime.memory runtime.processors terminal_text",
    # a model by its short name
    "export.command": (
        "chat.templates errors export model tokenizer.readers cli_options runtime.atomic runtime.model_file terminal_text"
    ),
    "export": "errors pickle_reader tokenizer runtime chat.templates",
    # of sampling the names and bounds of its options, of constrain the options' names
    "chat": "errors locks tokenizer runtime.sampling_options runtime.atomic constrain signals terminal_text",
    "runtime": "cancel errors locks runtime.native.executor signals terminal_text",
    "runtime.native": "errors locks runtime",
    "tokenizer": "errors pickle_reader",
    "pickle_reader": "errors",
    "models": "",
    "terminal_text": "",
    "errors": "",
    "locks": "",
}
# What runs a model is imported by these alone, wherever ALLOWED names their folder.
ONLY_FOR = {
    "runtime.executors": "doctor.models doctor.portrait model export.verify build.selftest runtime.session runtime.engine "
    "bench.decoding",
    "runtime.numpy_executor": "runtime.executors export.importance",
    "runtime.native.executor": "runtime.executors",
    "runtime.session": "model conversation runtime.generator",
}
# Imports that run backwards, each with why it is still there: the table may only shrink.
BACKWARDS = {
    ("tokenizer.readers", "runtime.model_file"): "tokenizer.load opens GGUFs; the reader of a container is no model",
    ("runtime.gguf_reader", "runtime.native.tiling"): "a packed file's weights lie in the order that the kernels read",
    ("runtime.tensor", "runtime.native.tiling"): "and are turned back for whoever wants them as rows",
}


class Import(NamedTuple):
    """`importer` and `imported` are modules, named without the package's own name; "pocketlm" is the root's."""

    importer: str
    imported: str
    for_types: bool


def _modules() -> dict[str, Path]:
    found = {}
    folders = [entry for entry in ROOT.iterdir() if entry.is_dir() and not entry.name.startswith(".") and entry.name != "tests"]
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not any(part.startswith(".") for part in parts):
            found[".".join(parts).removesuffix("__init__").rstrip(".") or "pocketlm"] = path
    return found


MODULES = _modules()
_FOLDERS = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def _module(dotted: str) -> str | None:
    """The module that an import of `dotted` runs; None where it is not ours."""
    if dotted.split(".")[0] != "pocketlm":
        return None
    name = dotted.removeprefix("pocketlm").lstrip(".") or "pocketlm"
    while name not in MODULES:  # pocketlm.errors.FileError is a name in pocketlm.errors
        name = name.rpartition(".")[0] or "pocketlm"
    return name


def _names(node: ast.AST) -> list[str]:
    """What a statement or call imports, dotted; also `importlib.import_module("…")`, and a row of the command's table."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__", "_folder")):
        return [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
    return []


def imports_of(importer: str, source: str) -> Iterator[Import]:
    def walk(node: ast.AST, for_types: bool) -> Iterator[Import]:
        for dotted in _names(node):
            if (imported := _module(dotted)) not in (None, importer):
                yield Import(importer, str(imported), for_types)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        body = node.body if guarded and isinstance(node, ast.If) else []
        for child in ast.iter_child_nodes(node):
            yield from walk(child, for_types or child in body)

    return walk(ast.parse(source), False)


def part_of(module: str) -> str:
    """The innermost folder that has a row of its own, or the file itself where it lies in the root."""
    while module not in ALLOWED and "." in module:
        module = module.rpartition(".")[0]
    return module


IMPORTS = sorted({one for name, path in MODULES.items() for one in imports_of(name, path.read_text("utf-8"))})


def test_every_import_between_two_parts_is_in_the_table():
    used, new = set(), set()
    for importer, imported, _ in IMPORTS:
        part, other = part_of(importer), part_of(imported)
        allowed = {target for target in (imported, other) if target in ALLOWED.get(part, "").split()}
        used |= {(part, target) for target in allowed}
        if part != other and not allowed and (importer, imported) not in BACKWARDS:
            new.add(f"{importer} imports {imported}")
    assert not new, "not in the table ALLOWED"
    stale = {(part, target) for part, targets in ALLOWED.items() for target in targets.split()} - used
    assert not stale, "in the table ALLOWED, but nobody imports it any more"


def test_every_part_has_a_row():
    assert {part_of(module) for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("module", ONLY_FOR)
def test_what_runs_a_model_is_imported_by_few(module):
    assert {importer for importer, imported, _ in IMPORTS if imported == module} == set(ONLY_FOR[module].split())


def test_imports_that_run_backwards_become_fewer():
    assert set(BACKWARDS) <= {(importer, imported) for importer, imported, _ in IMPORTS}, "take it out of BACKWARDS"


def circles(pairs: set[tuple[str, str]]) -> list[list[str]]:
    """The strongly connected components of more than one module (Tarjan 1972)."""
    after: dict[str, list[str]] = {}
    for importer, imported in sorted(pairs):
        after.setdefault(importer, []).append(imported)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in after.get(module, []):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in sorted(after):
        if module not in number:
            visit(module)
    return found


def _executed(types_too: bool) -> set[tuple[str, str]]:
    """(importer, imported), with the `__init__` of every folder that an import from outside it runs first."""
    pairs = set()
    for importer, imported, for_types in IMPORTS:
        if for_types and not types_too:
            continue
        folders = [folder for folder in _FOLDERS if f"{imported}.".startswith(f"{folder}.")]
        pairs |= {(importer, folder) for folder in folders if not f"{importer}.".startswith(f"{folder}.")}
        pairs.add((importer, imported))
    return pairs


def test_no_modules_import_each_other_in_a_circle():
    """Imports for types count, too."""
    assert circles(_executed(types_too=True)) == []


def test_the_reader_of_imports_misses_none():
    source = """
import pocketlm, numpy
from pocketlm.runtime import sampling, session as other
from pocketlm.runtime.plan import make_plan
if TYPE_CHECKING:
    from pocketlm.chat.templates import Template
else:
    from pocketlm.chat import repl
def late():
    import importlib
    importlib.import_module("pocketlm.model")
    with open("x"): from pocketlm.tokenizer.base import *
"""
    assert set(imports_of("cli", source)) == {
        *(Import("cli", f"runtime.{name}", False) for name in ("sampling", "session", "plan")),
        Import("cli", "pocketlm", False),
        Import("cli", "chat.templates", True),
        Import("cli", "chat.repl", False),
        Import("cli", "model", False),
        Import("cli", "tokenizer.base", False),
    }
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e")}) == [["a", "b", "c"]]
