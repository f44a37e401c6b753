"""The few functions of BLAS that NumPy calls, compiled here, in place of the OpenBLAS in its wheels.

In: a processor, and the library that NumPy was built with. Out: a shared library of some kilobytes that replaces it. OpenBLAS
and its Fortran library would be half of what a stub holds and unpacks at every start, while a conversation needs matrix
products alone, and those only where the native executor cannot run. There are products of real numbers; any other function,
such as a singular value decomposition, ends the program. For Linux and Windows: NumPy's wheels for macOS use the system's BLAS.

Signatures: https://www.netlib.org/blas/#_cblas, with 64-bit integers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from pocketlm.build import elf, pe
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.ir import F32, F64, I32, I64, PTR, Function, Module, Type, Value
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.linker import link

LEVEL = {"x86_64": "sse4", "aarch64": "neon"}  # what NumPy itself asks of a processor
_NAME = re.compile(r"(?:scipy_)?cblas_([sd])(dot|axpy|gemv|gemm|syrk)64_")
_ROW_MAJOR, _NO_TRANSPOSE = 101, 111


def is_replaceable(library: Path, users: Iterable[Path]) -> bool:
    """Whether `library` is a BLAS with 64-bit integers, all of whose real products `library_for` knows."""
    wanted = _wanted(library, users)
    real = [name for name in wanted if re.search(r"cblas_[sd]", name)]
    return bool(real) and all(_NAME.fullmatch(name) for name in real)


def library_for(library: Path, users: Iterable[Path], machine: str) -> bytes:
    """The file that replaces `library` for the libraries `users`, which import functions from it."""
    windows = library.suffix == ".dll"
    wanted, module = _wanted(library, users), Module("win64" if windows else "sysv")
    for letter, type in (("s", F32), ("d", F64)):
        _define(module, letter, type)
    with module.function("missing", {}, linkage="entry") as f:
        f.call(Type("void"), "llvm.trap")
    image = link([compile_object(module.text(), LEVELS[LEVEL[machine]])])
    found = {name: _NAME.fullmatch(name) for name in wanted}
    symbols = {name: image.symbols["".join(match.groups()) if match else "missing"] for name, match in found.items()}
    if windows:
        return pe.shared_library(library.name, image.code, symbols)
    return elf.shared_object(library.name, machine, image.code, symbols)


def _wanted(library: Path, users: Iterable[Path]) -> list[str]:
    if library.suffix == ".dll":
        return sorted({name for user in users for name in pe.imports(user.read_bytes()).get(library.name, ())})
    defined = elf.dynamic_symbols(library.read_bytes(), defined=True)
    return sorted({name for user in users for name in elf.dynamic_symbols(user.read_bytes(), defined=False)} & defined)


def _define(module: Module, letter: str, type: Type) -> None:
    """Define sdot, saxpy, sgemv, sgemm, ssyrk, or (`letter` "d") those for doubles. `product` is common to the last three."""
    _dot(module, f"{letter}dot", type)
    _axpy(module, f"{letter}axpy", type)
    matrix = {"a": PTR, "ra": I64, "ca": I64, "b": PTR, "rb": I64, "cb": I64, "c": PTR, "rc": I64, "cc": I64}
    sizes = {"m": I64, "n": I64, "k": I64, "alpha": type, "beta": type}
    with module.function(f"{letter}product", {**sizes, **matrix}) as f:
        _product(f, letter, type)
    call = {"order": I32, "ta": I32, "tb": I32, "m": I64, "n": I64, "k": I64, "alpha": type, "a": PTR, "lda": I64,
            "b": PTR, "ldb": I64, "beta": type, "c": PTR, "ldc": I64}  # fmt: skip
    none = Type("void")
    with module.function(f"{letter}gemm", call, linkage="entry") as f:
        order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc = f.args()
        strides = (*_strides(f, order, ta, lda), *_strides(f, order, tb, ldb), *_strides(f, order, _NO_TRANSPOSE, ldc))
        ra, ca, rb, cb, rc, cc = strides
        f.call(none, f"{letter}product", m, n, k, alpha, beta, a, ra, ca, b, rb, cb, c, rc, cc)
    call = {"order": I32, "half": I32, "ta": I32, "n": I64, "k": I64, "alpha": type, "a": PTR, "lda": I64, "beta": type,
            "c": PTR, "ldc": I64}  # fmt: skip
    with module.function(f"{letter}syrk", call, linkage="entry") as f:  # both halves: who calls fills the other one anyway
        order, _, ta, n, k, alpha, a, lda, beta, c, ldc = f.args()
        ra, ca = _strides(f, order, ta, lda)
        f.call(none, f"{letter}product", n, n, k, alpha, beta, a, ra, ca, a, ca, ra, c, ldc, f.const(I64, 1))
    call = {"order": I32, "ta": I32, "m": I64, "n": I64, "alpha": type, "a": PTR, "lda": I64, "x": PTR, "incx": I64,
            "beta": type, "y": PTR, "incy": I64}  # fmt: skip
    with module.function(f"{letter}gemv", call, linkage="entry") as f:  # m and n are A's before it is transposed
        order, ta, m, n, alpha, a, lda, x, incx, beta, y, incy = f.args()
        ra, ca = _strides(f, order, ta, lda)
        plain, one = ta.equals(_NO_TRANSPOSE), f.const(I64, 1)
        rows, columns = f.select(plain, m, n), f.select(plain, n, m)
        y = _first(f, y, rows, incy, type)  # as dot does with x
        f.call(none, f"{letter}product", rows, one, columns, alpha, beta, a, ra, ca, x, incx, one, y, incy, one)


def _strides(f: Function, order: Value, transposed: Value | int, leading: Value) -> tuple[Value, Value]:
    """Elements from one row to the next, and from one column to the next."""
    by_row = order.equals(_ROW_MAJOR)
    if isinstance(transposed, Value):
        by_row = by_row ^ transposed.equals(_NO_TRANSPOSE) ^ 1
    one = f.const(I64, 1)
    return f.select(by_row, leading, one), f.select(by_row, one, leading)


def _first(f: Function, x: Value, n: Value, step: Value, type: Type) -> Value:
    """The address of element 0: a vector with a negative step begins at the end of its memory."""
    return x + f.maximum((1 - n) * step, 0) * type.bytes


def _dot(module: Module, name: str, type: Type) -> None:
    vector = type.vec(64 // type.bytes)
    call = {"n": I64, "x": PTR, "incx": I64, "y": PTR, "incy": I64}
    with module.function(name, call, returns=type, linkage="entry") as f:
        n, x, incx, y, incy = f.args()
        x, y = _first(f, x, n, incx, type), _first(f, y, n, incy, type)
        lanes, rest = f.var(vector, 0.0), f.var(type, 0.0)
        whole = f.select(incx.equals(1) & incy.equals(1), n - n % vector.lanes, 0)
        with f.range(0, whole, vector.lanes) as i:
            at = i * type.bytes
            lanes.set(f.fma(f.load(vector, x + at, type.bytes), f.load(vector, y + at, type.bytes), lanes.get()))
        with f.range(whole, n) as i:
            left, right = (f.load(type, p + i * step * type.bytes, type.bytes) for p, step in ((x, incx), (y, incy)))
            rest.set(f.fma(left, right, rest.get()))
        f.ret(f.reduce(lanes.get(), "add") + rest.get(), type)


def _axpy(module: Module, name: str, type: Type) -> None:
    vector = type.vec(64 // type.bytes)
    call = {"n": I64, "alpha": type, "x": PTR, "incx": I64, "y": PTR, "incy": I64}
    with module.function(name, call, linkage="entry") as f:
        n, alpha, x, incx, y, incy = f.args()
        x, y = _first(f, x, n, incx, type), _first(f, y, n, incy, type)
        whole, factor = f.select(incx.equals(1) & incy.equals(1), n - n % vector.lanes, 0), f.splat(alpha, vector.lanes)
        with f.range(0, whole, vector.lanes) as i:
            at = i * type.bytes
            f.store(f.fma(factor, f.load(vector, x + at, type.bytes), f.load(vector, y + at, type.bytes)), y + at, type.bytes)
        with f.range(whole, n) as i:
            to = y + i * incy * type.bytes
            f.store(f.fma(alpha, f.load(type, x + i * incx * type.bytes, type.bytes), f.load(type, to, type.bytes)), to)


def _product(f: Function, letter: str, type: Type) -> None:
    """C [m, n] = alpha A [m, k] B [k, n] + beta C: by dot products if A and B are contiguous along k, else by rows of B."""
    m, n, k, alpha, beta, a, ra, ca, b, rb, cb, c, rc, cc = f.args()
    size = type.bytes

    def place(base: Value, row: Value, row_step: Value, column: Value, column_step: Value) -> Value:
        return base + (row * row_step + column * column_step) * size

    with f.range(0, m) as i, f.range(0, n) as j:
        to, before = place(c, i, rc, j, cc), f.var(type, 0.0)
        with f.when(beta.equals(0.0) ^ 1):  # else nobody looks at what is there: it may be no number
            before.set(beta * f.load(type, to, size))
        f.store(before.get(), to, size)
    along = ca.equals(1) & rb.equals(1) | n.equals(1)
    with f.range(0, f.select(along, n, 0)) as j, f.range(0, m) as i:
        to = place(c, i, rc, j, cc)
        dot = f.call(type, f"{letter}dot", k, a + i * ra * size, ca, b + j * cb * size, rb)
        f.store(f.fma(alpha, dot, f.load(type, to, size)), to, size)
    with f.range(0, f.select(along, 0, m)) as i, f.range(0, k) as row:
        factor = alpha * f.load(type, place(a, i, ra, row, ca), size)
        f.call(Type("void"), f"{letter}axpy", n, factor, b + row * rb * size, cb, c + i * rc * size, cc)
