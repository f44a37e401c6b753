"""A small typed builder of LLVM IR, so that a kernel reads as a short Python function of its mathematics.

In: Python calls. Out: the text of an LLVM module. Knows types, loops and vectors; knows no kernel and no processor.

    with module.function("double", {"x": PTR, "n": I64}) as (f, x, n):
        with f.range(0, n, 16) as i:
            f.store(f.load(F32.vec(16), x + i * 4) * 2.0, x + i * 4)

Values carry their type; Python numbers become constants of the other operand's type (splat for vectors). A `Var` is
memory on the stack that LLVM promotes to registers, so loops need no phi nodes here.
Language: https://llvm.org/docs/LangRef.html
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, Union


@dataclass(frozen=True)
class Type:
    """A scalar ("i32", "float", "ptr", …) or, with lanes > 1, a vector of them."""

    scalar: str
    lanes: int = 1

    def __str__(self) -> str:
        return self.scalar if self.lanes == 1 else f"<{self.lanes} x {self.scalar}>"

    def vec(self, lanes: int) -> Type:
        return Type(self.scalar, lanes)

    @property
    def is_float(self) -> bool:
        return self.scalar in ("float", "half", "double")

    @property
    def bits(self) -> int:
        return {"float": 32, "half": 16, "double": 64, "ptr": 64}.get(self.scalar) or int(self.scalar[1:])

    @property
    def bytes(self) -> int:
        return self.bits * self.lanes // 8

    @property
    def suffix(self) -> str:
        """How intrinsics spell the type: v16f32, i64."""
        name = ("f" if self.is_float else "i") + str(self.bits)
        return name if self.lanes == 1 else f"v{self.lanes}{name}"


I1, I8, I16, I32, I64 = (Type(f"i{n}") for n in (1, 8, 16, 32, 64))
Operand: TypeAlias = Union["Value", int, float]
F16, F32, F64, PTR, VOID = Type("half"), Type("float"), Type("double"), Type("ptr"), Type("void")
_CONVENTION_OF = "<convention of {}>"  # stands in a call until all functions of the module are defined
_CONVENTION = re.compile(r"<convention of (\S+)>")


def _operator(integer: str, real: str | None = None, swap: bool = False, result: Type | None = None):
    """A method of `Value`: the instruction for integers, and the one for floats where there is one; `result` of each lane."""

    def operate(self: Value, other: Operand) -> Value:
        right = self.f.coerce(other, self.type)
        op = real if self.type.is_float else integer
        if op is None or right.type != self.type:
            raise TypeError(f"{integer} of {self.type} and {right.type}")
        a, b = (right, self) if swap else (self, right)
        return self.f.emit(result.vec(self.type.lanes) if result else self.type, f"{op} {self.type} {a}, {b}")

    return operate


class Value:
    """An SSA value of a function. Arithmetic and comparisons make instructions; `ptr + bytes` moves a pointer."""

    __slots__ = ("f", "name", "type")

    def __init__(self, f: Function, type: Type, name: str):
        self.f, self.type, self.name = f, type, name

    def __str__(self) -> str:
        return self.name

    def __add__(self, other: Operand) -> Value:
        if self.type == PTR:
            return self.f.emit(PTR, f"getelementptr i8, ptr {self}, i64 {self.f.coerce(other, I64)}")
        return self._sum(other)

    _sum, __radd__ = _operator("add", "fadd contract"), __add__
    __sub__, __rsub__ = _operator("sub", "fsub contract"), _operator("sub", "fsub contract", swap=True)
    __mul__ = __rmul__ = _operator("mul", "fmul contract")
    __truediv__, __rtruediv__ = _operator("", "fdiv"), _operator("", "fdiv", swap=True)
    __floordiv__, __mod__ = _operator("udiv"), _operator("urem")
    __and__, __or__, __xor__ = _operator("and"), _operator("or"), _operator("xor")
    __lshift__, __rshift__ = _operator("shl"), _operator("lshr")  # logical: zeros come in from the left
    __lt__, __le__ = _operator("icmp slt", "fcmp olt", result=I1), _operator("icmp sle", "fcmp ole", result=I1)
    __gt__, __ge__ = _operator("icmp sgt", "fcmp ogt", result=I1), _operator("icmp sge", "fcmp oge", result=I1)
    equals, differs = _operator("icmp eq", "fcmp oeq", result=I1), _operator("icmp ne", "fcmp une", result=I1)

    def __invert__(self) -> Value:
        return self ^ -1


class Var:
    """A variable: `get` reads, `set` writes. Lives in a register after optimisation."""

    def __init__(self, f: Function, type: Type):
        self.f, self.type, self.address = f, type, f.stack(type)

    def get(self) -> Value:
        return self.f.emit(self.type, f"load {self.type}, ptr {self.address}")

    def set(self, value: Operand) -> None:
        self.f.line(f"store {self.type} {self.f.coerce(value, self.type)}, ptr {self.address}")


class Function:
    """The body of one function under construction. Made by `Module.function`."""

    def __init__(self, module: Module, arguments: Mapping[str, Type]):
        self.module = module
        self._entry: list[str] = []  # stack slots: at the top, where LLVM looks for variables to promote
        self._lines: list[str] = []
        self._count = 0
        self._arguments = {name: Value(self, type, f"%{name}") for name, type in arguments.items()}

    def args(self) -> tuple[Value, ...]:
        return tuple(self._arguments.values())

    def __iter__(self) -> Iterator[Any]:  # for `with … as (f, x, n)`
        return iter((self, *self.args()))

    def line(self, text: str) -> None:
        self._lines.append("  " + text)

    def label(self, name: str) -> str:
        """A name that nothing else in the function has."""
        self._count += 1
        return f"{name}.{self._count}"

    def emit(self, type: Type, text: str) -> Value:
        name = self.label("%v")
        self._lines.append(f"  {name} = {text}")
        return Value(self, type, name)

    def unknown(self, type: Type, number: float) -> Value:
        """A constant in a vector register of aarch64 that the optimiser does not know, made where the function begins."""
        value, name = self.const(type, number), self.label("%u")
        self._entry.append(f'  {name} = call {type} asm "", "=w,0"({type} {value})')
        return Value(self, type, name)

    def const(self, type: Type, number: float) -> Value:
        if type.scalar == "half":
            text = "0xH" + struct.pack(">e", number).hex().upper()
        elif type.is_float:  # the exact bits: decimal text that is not a float32 is an error to LLVM
            value = struct.unpack("<f", struct.pack("<f", number))[0] if type.scalar == "float" else float(number)
            text = "0x" + struct.pack(">d", value).hex().upper()
        elif type.scalar == "ptr":
            text = "null"
        else:
            text = str(int(number))
        return Value(self, type, text if type.lanes == 1 else f"splat ({type.vec(1)} {text})")

    def coerce(self, value: Operand, type: Type) -> Value:
        return value if isinstance(value, Value) else self.const(type, value)

    def vector(self, type: Type, numbers: Sequence[int]) -> Value:
        """A constant vector of integers."""
        return Value(self, type, "<" + ", ".join(f"{type.vec(1)} {n}" for n in numbers) + ">")

    def stack(self, type: Type, count: int = 1) -> Value:
        """Memory that lives as long as the call: `count` elements of `type`; more than one are 64-byte aligned."""
        name, align = self.label("%s"), min(64, max(type.bytes, 1)) if count == 1 else 64
        self._entry.append(f"  {name} = alloca {type}, i64 {count}, align {align}")
        return Value(self, PTR, name)

    def var(self, type: Type, start: Operand | None = None) -> Var:
        variable = Var(self, type)
        if start is not None:
            variable.set(start)
        return variable

    # memory

    def load(self, type: Type, address: Value, align: int = 1) -> Value:
        return self.emit(type, f"load {type}, ptr {address}, align {align}")

    def store(self, value: Value, address: Value, align: int = 1) -> None:
        self.line(f"store {value.type} {value}, ptr {address}, align {align}")

    def field(self, base: Value, offset: int, type: Type = I64) -> Value:
        """A member of a structure, `offset` bytes from its beginning."""
        return self.load(type, base + offset, min(type.bytes, 8))

    def prefetch(self, address: Value, level: int = 1) -> None:
        """Ask for the cache line at an address that will be read soon, into the cache of that level; never faults."""
        self.line(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 {4 - level}, i32 1)")
        self.module.declare("llvm.prefetch.p0", VOID, [PTR, I32, I32, I32])

    def keep_order(self) -> None:
        """What reads memory or asks for it stays before this or behind it; not an instruction."""
        self.line('call void asm sideeffect "", "~{memory}"()')

    def opaque(self, pointer: Value) -> Value:
        """The same pointer, but unknown to the optimiser, which would turn a few offsets into many induction variables."""
        return self.emit(PTR, f'call ptr asm "", "=r,0"(ptr {pointer})')

    def atomic_load(self, address: Value) -> Value:
        return self.emit(I64, f"load atomic i64, ptr {address} seq_cst, align 8")

    def atomic_store(self, value: Operand, address: Value) -> None:
        self.line(f"store atomic i64 {self.coerce(value, I64)}, ptr {address} seq_cst, align 8")

    def atomic_add(self, address: Value, amount: Operand) -> Value:
        """Adds, and gives the value from before."""
        return self.emit(I64, f"atomicrmw add ptr {address}, i64 {self.coerce(amount, I64)} seq_cst")

    def compare_exchange(self, address: Value, old: int, new: int) -> Value:
        """i1: whether *address was `old` and is `new` now."""
        pair = self.emit(VOID, f"cmpxchg ptr {address}, i64 {old}, i64 {new} seq_cst seq_cst")
        return self.emit(I1, f"extractvalue {{ i64, i1 }} {pair}, 1")

    # conversions and lanes

    def cast(self, op: str, value: Value, element: Type) -> Value:
        """One of LLVM's conversions, lane by lane: zext, sext, trunc, sitofp, fptosi, fpext, fptrunc, …"""
        to = element.vec(value.type.lanes)
        return self.emit(to, f"{op} {value.type} {value} to {to}")

    def bitcast(self, value: Value, type: Type) -> Value:
        return value if value.type == type else self.emit(type, f"bitcast {value.type} {value} to {type}")

    def splat(self, value: Value, lanes: int) -> Value:
        """The value in every lane; itself for one lane."""
        if lanes == 1:
            return value
        to = value.type.vec(lanes)
        first = self.emit(to, f"insertelement {to} poison, {value.type} {value}, i64 0")
        return self.emit(to, f"shufflevector {to} {first}, {to} poison, <{lanes} x i32> zeroinitializer")

    def shuffle(self, a: Value, lanes: Sequence[int], b: Value | None = None) -> Value:
        to, mask = a.type.vec(len(lanes)), ", ".join(f"i32 {i}" for i in lanes)
        return self.emit(to, f"shufflevector {a.type} {a}, {a.type} {b or 'poison'}, <{len(lanes)} x i32> <{mask}>")

    def join(self, parts: Sequence[Value]) -> Value:
        """Vectors side by side; their number is a power of two."""
        while len(parts) > 1:
            n = parts[0].type.lanes
            parts = [self.shuffle(a, range(2 * n), b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def split(self, value: Value, lanes: int) -> list[Value]:
        if value.type.lanes == lanes:
            return [value]
        return [self.shuffle(value, range(i, i + lanes)) for i in range(0, value.type.lanes, lanes)]

    def extract(self, vector: Value, lane: Operand) -> Value:
        return self.emit(vector.type.vec(1), f"extractelement {vector.type} {vector}, i64 {self.coerce(lane, I64)}")

    def select(self, condition: Value, yes: Operand, no: Operand) -> Value:
        type = yes.type if isinstance(yes, Value) else no.type  # type: ignore[union-attr]
        yes, no = self.coerce(yes, type), self.coerce(no, type)
        return self.emit(type, f"select {condition.type} {condition}, {type} {yes}, {type} {no}")

    # calls

    def call(self, type: Type, name: str, *arguments: Value) -> Value:
        """Call a function or an intrinsic; it is declared where it is not defined in the module."""
        self.module.declare(name, type, [a.type for a in arguments])
        return self._call(type, f"call {_CONVENTION_OF.format(name)}{type} @{name}", arguments)

    def call_pointer(self, address: Value, *arguments: Value, returns: Type = VOID, linkage: str = "kernel") -> Value:
        """Call what is at an address: a "kernel", or a function of the operating "system"."""
        return self._call(returns, f"call {self.module.convention(linkage)}{returns} {address}", arguments)

    def _call(self, type: Type, what: str, arguments: Sequence[Value]) -> Value:
        text = f"{what}({', '.join(f'{a.type} {a}' for a in arguments)})"
        if type == VOID:
            self.line(text)
            return Value(self, VOID, "")
        return self.emit(type, text)

    def intrinsic(self, name: str, *arguments: Value) -> Value:
        """An intrinsic whose operands and result are of one type: llvm.NAME.v16f32."""
        type = arguments[0].type
        return self.call(type, f"llvm.{name}.{type.suffix}", *arguments)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, in one step where the processor has one."""
        return self.intrinsic("fmuladd", a, b, c)

    def minimum(self, a: Value, b: Operand) -> Value:
        return self.select(a < b, a, b)

    def maximum(self, a: Value, b: Operand) -> Value:
        return self.select(a > b, a, b)

    def reduce(self, value: Value, op: str) -> Value:
        """All lanes folded by "add" or "max", in halves: the order is fixed, so the result is the same everywhere."""
        fold = (lambda a, b: a + b) if op == "add" else self.maximum
        while (n := value.type.lanes) > 2:
            value = fold(*self.split(value, n // 2))
        return fold(self.extract(value, 0), self.extract(value, 1))

    # control

    def branch(self, to: str) -> None:
        self.line(f"br label %{to}")

    def begin(self, label: str) -> None:
        self._lines.append(f"{label}:")

    @contextmanager
    def range(self, start: Operand, stop: Operand, step: Operand = 1) -> Iterator[Value]:
        """for (i64 i = start; i < stop; i += step)"""
        index, stop = self.var(I64, start), self.coerce(stop, I64)
        with self.loop_while(lambda: index.get() < stop):
            yield index.get()
            index.set(index.get() + step)

    @contextmanager
    def loop_while(self, condition) -> Iterator[None]:
        head, body, done = self.label("head"), self.label("body"), self.label("done")
        self.branch(head)
        self.begin(head)
        self.line(f"br i1 {condition()}, label %{body}, label %{done}")
        self.begin(body)
        yield
        self.branch(head)
        self.begin(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        body, done = self.label("then"), self.label("end")
        self.line(f"br i1 {condition}, label %{body}, label %{done}")
        self.begin(body)
        yield
        self.branch(done)
        self.begin(done)

    def ret(self, value: Operand | None = None, type: Type = I64) -> None:
        """Return from the function; what follows is a new, unreachable block."""
        self.line("ret void" if value is None else f"ret {type} {self.coerce(value, type)}")
        self.begin(self.label("after"))

    def text(self) -> str:
        return "\n".join(["entry:", *self._entry, *self._lines])


class Module:
    """A module under construction: functions, and declarations of what they call."""

    def __init__(self, abi: str = "sysv"):
        """`abi`: the calling convention of exported functions, "sysv" (everything but Windows on x86-64) or "win64"."""
        self.abi = abi
        self._declared: dict[str, str] = {}
        self._defined: dict[str, str] = {}
        self._linkages: dict[str, str] = {}

    def convention(self, linkage: str) -> str:
        """The calling convention of a linkage's functions as LLVM spells it; nothing for C's on Linux, our target."""
        return "win64cc " if self.abi == "win64" and linkage in ("entry", "system") else ""

    def declare(self, name: str, type: Type, arguments: Sequence[Type]) -> None:
        self._declared[name] = f"declare {type} @{name}({', '.join(map(str, arguments))})"

    def note_register(self, name: str) -> None:
        """Let `read_volatile_register` read the system register of this name, one in a module."""
        self._declared["llvm.read_volatile_register.i64"] = "declare i64 @llvm.read_volatile_register.i64(metadata)"
        self._defined["!0"] = f'!0 = !{{!"{name}"}}'

    @contextmanager
    def function(
        self, name: str, arguments: Mapping[str, Type], returns: Type = VOID, linkage: str = "internal"
    ) -> Iterator[Function]:
        """A function. `linkage`: "internal"; "kernel", called by address from compiled code; "entry", from Python."""
        f = Function(self, arguments)
        self._linkages[name] = linkage
        yield f
        f.line("ret void" if returns == VOID else "unreachable")
        formal = ", ".join(f"{type} %{arg}" for arg, type in arguments.items())
        visible = "" if linkage in ("kernel", "entry") else "internal "
        # probes: Windows grows a stack page by page, and a large frame must not jump over the guard page
        # a frame pointer keeps data out of rbp: an Intel Xeon with AMX does not read ahead of loads that go through it, and
        # 1.3B parameters whose weights were read there took 1.2 times as long
        attributes = 'nounwind "no-builtins" "probe-stack"="inline-asm" "frame-pointer"="all"'
        head = f"define {visible}{self.convention(linkage)}{returns} @{name}({formal}) {attributes}"
        self._defined[name] = f"{head} {{\n{f.text()}\n}}"

    def text(self) -> str:
        declared = [text for name, text in self._declared.items() if name not in self._defined]
        text = "\n".join([*declared, *self._defined.values()]) + "\n"
        # only now is every callee defined: a call takes its convention from there, and there is no other way to write one
        return _CONVENTION.sub(lambda call: self.convention(self._linkages.get(call[1], "")), text)
