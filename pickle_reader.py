"""Reads a pickle as data: an interpreter of its opcodes that calls nothing, imports nothing and opens nothing.

In: bytes, and a table of the few functions a pickle may ask for, each of them ours. Out: numbers, texts, lists, dicts and
`Record`s (objects of any class, of which only the name and the fields are kept). A pickle that asks for any other function
is refused by that function's name. Every opcode costs time and memory in proportion to its own bytes: sizes are checked
against what is left, whole numbers are short, and only keys whose hash is cheap may go into dicts and sets.
The standard library's pickletools, which runs nothing either, documents the opcodes and reads what follows each.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pickletools import OpcodeInfo, opcodes, stringnl_noescape_pair
from typing import Any, NoReturn

from pocketlm.errors import FileError, quoted

MAX_BYTES = 1 << 28  # of one pickle; its tensors lie elsewhere
MAX_OPCODES = 1 << 22  # each may make an object of some 200 bytes
MAX_INT_BITS = 512  # random states have 128
MAX_LINE = 4096
# what reading damaged opcodes raises in Python: an empty stack, a missing memo entry, a wrong type, a number too large
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True)
class Global:
    """The name of a function or class. Naming one is harmless; to call it, it must be in the table."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of an unknown class, as plain data."""

    name: str
    args: tuple = ()
    fields: dict[str, Any] = field(default_factory=dict)  # attributes, and items of classes derived from dict
    items: list[Any] = field(default_factory=list)  # of classes derived from list


Functions = Mapping[str, Callable[..., Any]]


def read_pickle(
    data: Any, path: object, functions: Functions, persistent: Callable[[Any], Any] | None = None, start: int = 0
) -> tuple[Any, int]:
    """The object in the pickle at `start`, and where the pickle ends.

    `functions`: "module.name" → what is called in its place; `persistent` gives the object of a persistent id (a storage).
    Raises FileError if the pickle is damaged or calls any other function, and names that.
    """
    machine = _Machine(data, path, functions, persistent, start)
    try:
        return machine.run(), machine.at
    except _DAMAGE:
        raise FileError(path, f"its pickle is damaged at byte {machine.at}", "save it again") from None


class _Machine:
    """The stack, the memo and the place in the bytes."""

    def __init__(self, data: Any, path: object, functions: Functions, persistent: Callable[[Any], Any] | None, start: int):
        self.data, self.path, self.functions, self.persistent = data, path, functions, persistent
        self.at, self.end = start, min(len(data), start + MAX_BYTES)
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = _BY_CODE[self.read(1)[0]]
            if opcode.name == "STOP":
                return self.stack.pop()
            _OPCODES[opcode.name](self, *self.arguments(opcode))
        raise FileError(self.path, f"its pickle has more than {MAX_OPCODES} instructions", "save less in it")

    def arguments(self, opcode: OpcodeInfo) -> Iterable[Any]:
        """What follows an opcode in the pickle, as pickletools reads it."""
        if opcode.arg is None:
            return ()
        if opcode.arg is stringnl_noescape_pair:  # a name, of which older versions of Python would take ASCII alone
            return [str(self.readline()[:-1], "utf-8") for _ in range(2)]
        return [opcode.arg.reader(self)]  # pyright: ignore[reportArgumentType]  # as much of a file as it needs

    # the bytes, as of a file: no more than there are
    def read(self, n_bytes: int) -> bytes:
        start, self.at = self.at, min(self.at + n_bytes, self.end)
        return bytes(self.data[start : self.at])

    def readline(self) -> bytes:
        rest = bytes(self.data[self.at : min(self.at + MAX_LINE, self.end)])
        return self.read(rest.index(b"\n") + 1)

    # the stack
    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_whole_number(self, value: int) -> None:
        if value.bit_length() > MAX_INT_BITS:
            raise ValueError
        self.push(value)

    def push_text(self, value: str) -> None:
        """Without the halves of characters that a pickle can spell, and UTF-8 cannot."""
        self.push(value.encode("utf-8", "replace").decode())

    def push_old_text(self, value: str) -> None:
        """Python 2's byte strings, which pickletools gives as Latin-1."""
        self.push(str(value.encode("latin-1"), "utf-8", "replace"))

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def memoize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def pop_tuple(self, n: int) -> None:
        items = self.stack[-n:]
        if len(items) != n:
            raise IndexError
        self.stack[-n:] = [tuple(items)]

    # containers
    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.items
        if type(target) is not list:
            raise TypeError
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Record):
            target = target.fields
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        target.update(zip(map(check_key, items[::2]), items[1::2], strict=True))

    def add(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not set:
            raise TypeError
        self.stack[-1].update(map(check_key, items))

    # names, calls and objects
    def push_global(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # as Python 2 wrote them
        self.push(Global(f"{module}.{name}"))

    def call(self, function: Any, args: Any) -> None:
        name = function.name if isinstance(function, (Global, Record)) else type(function).__name__
        if not isinstance(function, Global) or function.name not in self.functions:
            refuse(self.path, f"wants to call {quoted(name)}")
        if not isinstance(args, tuple):
            raise TypeError
        self.push(self.functions[function.name](*args))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def new(self, cls: Any, args: Any) -> None:
        """Push an object made by `cls.__new__`: by the table's function if it has one, else as plain data."""
        if isinstance(cls, Global) and cls.name not in self.functions and isinstance(args, tuple):
            self.push(Record(cls.name, args))
        else:
            self.call(cls, args)

    def new_object(self, keywords: bool) -> None:
        if keywords and self.stack.pop():
            refuse(self.path, "wants to make an object with keyword arguments")
        args, cls = self.stack.pop(), self.stack.pop()
        self.new(cls, args)

    def instance(self, module: str, name: str) -> None:
        args = tuple(self.pop_mark())
        self.push_global(module, name)
        self.call(self.stack.pop(), args)

    def object(self) -> None:
        cls, *args = self.pop_mark()
        self.call(cls, tuple(args))

    def build(self) -> None:
        """The state of an object: a dict of its fields, or a pair of them (the second: slots)."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Global) or (isinstance(target, Record) and not isinstance(state, (dict, list, tuple))):
            refuse(self.path, f"wants to call {quoted(target.name)}.__setstate__")
        if isinstance(target, Record):
            for part in state if type(state) is tuple and len(state) == 2 else (state,):
                if type(part) is dict:
                    target.fields.update(part)

    def persistent_id(self, value: Any) -> None:
        if self.persistent is None:
            refuse(self.path, "refers to an object outside of it")
        self.push(self.persistent(value))

    def extension(self, number: int) -> None:
        refuse(self.path, f"wants to call the function registered as extension {number}")


def refuse(path: object, wish: str) -> NoReturn:
    """Raises the FileError for a pickle that `wish`es to do something: "wants to call os.system"."""
    raise FileError(
        path,
        f"its pickle {wish}, which reading it never needs: it may be an attack",
        "do not trust this file; ask for one with plain data alone (of a model: a state dict, or safetensors)",
    )


def check_key(key: Any) -> Any:
    """`key`, if hashing it is cheap and cannot be made to collide, else TypeError: nested tuples may take for ever to hash."""
    if type(key) is tuple and all(type(part) in (str, bytes) for part in key):
        return key
    if not (key is None or isinstance(key, (str, bytes, bool, float, Global)) or (isinstance(key, int) and abs(key) < 1 << 63)):
        raise TypeError
    return key


_BY_CODE = {ord(opcode.code): opcode for opcode in opcodes}
_OPCODES: dict[str, Callable[..., Any]] = {  # by the names of pickletools: the machine, and the opcode's arguments
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": lambda m: m.push(m.stack[-1]),
    # numbers, texts, bytes and constants
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _Machine.push_whole_number),
    **dict.fromkeys(("FLOAT", "BINFLOAT"), _Machine.push),
    **dict.fromkeys(("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), _Machine.push_text),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.push_old_text),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), lambda m, data: m.push(bytes(data))),
    "NONE": lambda m: m.push(None),
    "NEWTRUE": lambda m: m.push(True),
    "NEWFALSE": lambda m: m.push(False),
    # containers
    "EMPTY_LIST": lambda m: m.push([]),
    "LIST": lambda m: m.push(m.pop_mark()),
    "APPEND": lambda m: m.append([m.stack.pop()]),
    "APPENDS": lambda m: m.append(m.pop_mark()),
    "EMPTY_TUPLE": lambda m: m.push(()),
    "TUPLE": lambda m: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m: m.pop_tuple(1),
    "TUPLE2": lambda m: m.pop_tuple(2),
    "TUPLE3": lambda m: m.pop_tuple(3),
    "EMPTY_DICT": lambda m: m.push({}),
    "DICT": lambda m: (items := m.pop_mark(), m.push({}), m.set_items(items)),
    "SETITEM": lambda m: (value := m.stack.pop(), m.set_items([m.stack.pop(), value])),
    "SETITEMS": lambda m: m.set_items(m.pop_mark()),
    "EMPTY_SET": lambda m: m.push(set()),
    "ADDITEMS": lambda m: m.add(m.pop_mark()),
    "FROZENSET": lambda m: m.push(frozenset(map(check_key, m.pop_mark()))),
    # the memo
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.memoize),
    "MEMOIZE": lambda m: m.memoize(len(m.memo)),
    # names, calls and objects
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": lambda m: (name := m.stack.pop(), m.push_global(m.stack.pop(), name)),
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "INST": _Machine.instance,
    "OBJ": _Machine.object,
    "NEWOBJ": lambda m: m.new_object(keywords=False),
    "NEWOBJ_EX": lambda m: m.new_object(keywords=True),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine.extension),
    "PERSID": _Machine.persistent_id,
    "BINPERSID": lambda m: m.persistent_id(m.stack.pop()),
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, number: None),
}
