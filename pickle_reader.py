"""Reads a pickle as data: an interpreter of its opcodes that calls nothing, imports nothing and opens nothing.

In: bytes, and a table of the few functions a pickle may ask for, each of them ours. Out: numbers, texts, lists, dicts and
`Record`s (objects of any class, of which only the name and the fields are kept). A pickle that asks for any other function
is refused by that function's name. Every opcode costs time and memory in proportion to its own bytes: sizes are checked
against what is left, whole numbers are short, and only keys whose hash is cheap may go into dicts and sets.
Opcodes: the module pickletools of the standard library documents them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pocketlm.errors import FileError, quoted

MAX_BYTES = 1 << 28  # of one pickle; its tensors lie elsewhere
MAX_OPCODES = 1 << 22  # each may make an object of some 200 bytes
MAX_INT_BYTES = 64  # random states are 16 bytes
MAX_LINE = 4096
# what reading damaged opcodes raises in Python: an empty stack, a missing memo entry, a wrong type, a number too large
_DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error)


@dataclass(frozen=True)
class Global:
    """The name of a function or class. Naming one is harmless; calling it is what the table must allow."""

    name: str


@dataclass(eq=False)
class Record:
    """An object of a class that is not known here, as plain data."""

    name: str
    args: tuple = ()
    fields: dict[str, Any] = field(default_factory=dict)  # attributes, and items of classes derived from dict
    items: list[Any] = field(default_factory=list)  # of classes derived from list


Functions = Mapping[str, Callable[..., Any]]


def read_pickle(
    data: Any, path: object, functions: Functions, persistent: Callable[[Any], Any] | None = None, start: int = 0
) -> tuple[Any, int]:
    """The object that the pickle at `start` describes, and where it ends.

    `functions` maps "module.name" to what stands in for it; `persistent` gives the object of a persistent id (a storage).
    Raises FileError where the pickle wants to call anything else (naming it) or is damaged.
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
            if (code := self.take(1)[0]) == _STOP:
                return self.stack.pop()
            _OPCODES[code](self)
        raise FileError(self.path, f"its pickle has more than {MAX_OPCODES} instructions", "save less in it")

    def refuse(self, wish: str) -> NoReturn:
        refuse(self.path, wish)

    # reading
    def take(self, n_bytes: int) -> bytes:
        if not 0 <= n_bytes <= self.end - self.at:
            raise ValueError("cut short")
        self.at += n_bytes
        return bytes(self.data[self.at - n_bytes : self.at])

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def line(self) -> bytes:
        rest = bytes(self.data[self.at : min(self.at + MAX_LINE, self.end)])
        self.at += rest.index(b"\n") + 1
        return rest[: rest.index(b"\n")]

    def text(self, size: str) -> str:
        return str(self.take(self.number(size)), "utf-8", "replace")

    # the stack
    def push(self, value: Any) -> None:
        self.stack.append(value)

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
            self.refuse(f"wants to call {quoted(name)}")
        if not isinstance(args, tuple):
            raise TypeError
        self.push(self.functions[function.name](*args))

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args)

    def new(self, cls: Any, args: Any) -> None:
        """An object by `cls.__new__`: a call where the table has one, else plain data (a class is never run)."""
        if isinstance(cls, Global) and cls.name not in self.functions and isinstance(args, tuple):
            self.push(Record(cls.name, args))
        else:
            self.call(cls, args)

    def new_object(self, keywords: bool) -> None:
        if keywords and self.stack.pop():
            self.refuse("wants to make an object with keyword arguments")
        args, cls = self.stack.pop(), self.stack.pop()
        self.new(cls, args)

    def instance(self) -> None:
        module, name = str(self.line(), "utf-8"), str(self.line(), "utf-8")
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
            self.refuse(f"wants to call {quoted(target.name)}.__setstate__")
        if isinstance(target, Record):
            for part in state if type(state) is tuple and len(state) == 2 else (state,):
                if type(part) is dict:
                    target.fields.update(part)

    def persistent_id(self, value: Any) -> None:
        if self.persistent is None:
            self.refuse("refers to an object outside of it")
        self.push(self.persistent(value))

    def extension(self, size: str) -> None:
        self.refuse(f"wants to call the function registered as extension {self.number(size)}")


def refuse(path: object, wish: str) -> NoReturn:
    """Raises the FileError for a pickle that `wish`es to do something: "wants to call os.system"."""
    raise FileError(
        path,
        f"its pickle {wish}, which reading it never needs: it may be an attack",
        "do not trust this file; ask for one with plain data alone (of a model: a state dict, or safetensors)",
    )


def check_key(key: Any) -> Any:
    """`key` where its hash is cheap and cannot be chosen to collide: a hash of nested tuples may take for ever."""
    if type(key) is tuple and all(type(part) in (str, bytes) for part in key):
        return key
    if not (key is None or isinstance(key, (str, bytes, bool, float, Global)) or (isinstance(key, int) and abs(key) < 1 << 63)):
        raise TypeError
    return key


def _integer(line: bytes) -> int:
    if len(line) > 2 * MAX_INT_BYTES:
        raise ValueError
    return int(line.rstrip(b"L"))


def _int_or_bool(line: bytes) -> int:
    return line == b"01" if line in (b"00", b"01") else _integer(line)


def _long(data: bytes) -> int:
    if len(data) > MAX_INT_BYTES:
        raise ValueError
    return int.from_bytes(data, "little", signed=True)


def _string(line: bytes) -> str:
    """Python 2's repr of a byte string; escapes are left as they are."""
    return str(line[1:-1], "utf-8", "replace")


_STOP = ord(".")
_OPCODES: dict[int, Callable[[_Machine], Any]] = {
    ord("("): _Machine.mark,
    ord("0"): _Machine.pop,
    ord("1"): _Machine.pop_mark,
    ord("2"): lambda m: m.push(m.stack[-1]),
    # numbers and constants
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("I"): lambda m: m.push(_int_or_bool(m.line())),
    ord("L"): lambda m: m.push(_integer(m.line())),
    ord("J"): lambda m: m.push(m.number("i")),
    ord("K"): lambda m: m.push(m.number("B")),
    ord("M"): lambda m: m.push(m.number("H")),
    0x8A: lambda m: m.push(_long(m.take(m.number("B")))),
    0x8B: lambda m: m.push(_long(m.take(m.number("i")))),
    ord("F"): lambda m: m.push(float(m.line())),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    # texts and bytes
    ord("S"): lambda m: m.push(_string(m.line())),
    ord("T"): lambda m: m.push(m.text("i")),
    ord("U"): lambda m: m.push(m.text("B")),
    ord("V"): lambda m: m.push(str(m.line(), "raw-unicode-escape")),
    ord("X"): lambda m: m.push(m.text("I")),
    0x8C: lambda m: m.push(m.text("B")),
    0x8D: lambda m: m.push(m.text("Q")),
    ord("B"): lambda m: m.push(m.take(m.number("I"))),
    ord("C"): lambda m: m.push(m.take(m.number("B"))),
    0x8E: lambda m: m.push(m.take(m.number("Q"))),
    0x96: lambda m: m.push(m.take(m.number("Q"))),
    # containers
    ord("]"): lambda m: m.push([]),
    ord("l"): lambda m: m.push(m.pop_mark()),
    ord("a"): lambda m: m.append([m.stack.pop()]),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    0x85: lambda m: m.pop_tuple(1),
    0x86: lambda m: m.pop_tuple(2),
    0x87: lambda m: m.pop_tuple(3),
    ord("}"): lambda m: m.push({}),
    ord("d"): lambda m: (items := m.pop_mark(), m.push({}), m.set_items(items)),
    ord("s"): lambda m: (value := m.stack.pop(), m.set_items([m.stack.pop(), value])),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    0x8F: lambda m: m.push(set()),
    0x90: lambda m: m.add(m.pop_mark()),
    0x91: lambda m: m.push(frozenset(map(check_key, m.pop_mark()))),
    # the memo
    ord("g"): lambda m: m.push(m.memo[_integer(m.line())]),
    ord("h"): lambda m: m.push(m.memo[m.number("B")]),
    ord("j"): lambda m: m.push(m.memo[m.number("I")]),
    ord("p"): lambda m: m.memoize(_integer(m.line())),
    ord("q"): lambda m: m.memoize(m.number("B")),
    ord("r"): lambda m: m.memoize(m.number("I")),
    0x94: lambda m: m.memoize(len(m.memo)),
    # names, calls and objects
    ord("c"): lambda m: m.push_global(str(m.line(), "utf-8"), str(m.line(), "utf-8")),
    0x93: lambda m: (name := m.stack.pop(), m.push_global(m.stack.pop(), name)),
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("i"): _Machine.instance,
    ord("o"): _Machine.object,
    0x81: lambda m: m.new_object(keywords=False),
    0x92: lambda m: m.new_object(keywords=True),
    0x82: lambda m: m.extension("B"),
    0x83: lambda m: m.extension("H"),
    0x84: lambda m: m.extension("i"),
    ord("P"): lambda m: m.persistent_id(str(m.line(), "utf-8")),
    ord("Q"): lambda m: m.persistent_id(m.stack.pop()),
    # framing
    0x80: lambda m: m.take(1),
    0x95: lambda m: m.take(8),
}
