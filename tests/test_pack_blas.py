"""The library that takes OpenBLAS's place in a stub gives NumPy the products it asks for."""

import ctypes
import platform
import sys
from pathlib import Path

import numpy as np
import pytest

from pocketlm.build import blas, elf
from pocketlm.runtime.native.levels import host_machine

PACKAGES = Path(np.__file__).parents[1]
LIBRARY = next(PACKAGES.glob("numpy.libs/*openblas*"), None)
USERS = [*PACKAGES.glob("numpy/_core/_multiarray_umath*.so"), *PACKAGES.glob("numpy/linalg/_umath_linalg*.so")]
ROWS, COLUMNS, PLAIN, TRANSPOSED = 101, 102, 111, 112
KINDS = {"s": (np.float32, ctypes.c_float, 1e-4), "d": (np.float64, ctypes.c_double, 1e-12)}
I, L, P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="stubs of other systems keep NumPy's library"),
    pytest.mark.skipif(LIBRARY is None, reason="this NumPy has no OpenBLAS in its wheel"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    assert LIBRARY is not None
    assert blas.is_replaceable(LIBRARY, USERS)
    path = tmp_path_factory.mktemp("blas") / LIBRARY.name
    path.write_bytes(blas.library_for(LIBRARY, USERS, host_machine()))
    return ctypes.CDLL(str(path))


@pytest.fixture(params=KINDS)
def kind(request, library):
    """A function of BLAS by its name without the letter, the types of numbers, and how near results have to be."""
    dtype, c_type, near = KINDS[request.param]

    def function(name, result, *arguments):
        found = getattr(library, f"scipy_cblas_{request.param}{name}64_")
        found.restype, found.argtypes = result, arguments
        return found

    return function, dtype, c_type, near


def laid_out(matrix, order, transposed):
    """The matrix as BLAS is given it, and its leading dimension: some more than the rows or columns it has."""
    stored = matrix.T if transposed != PLAIN else matrix
    wide = np.full((stored.shape[0] + 3, stored.shape[1] + 3), np.nan, matrix.dtype, "F" if order == COLUMNS else "C")
    wide[: stored.shape[0], : stored.shape[1]] = stored
    return wide, wide.shape[0 if order == COLUMNS else 1]


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_matrix_products_of_any_layout(kind, order):
    function, dtype, c_type, near = kind
    gemm = function("gemm", None, I, I, I, L, L, L, c_type, P, L, P, L, c_type, P, L)
    random = np.random.default_rng(order)
    for _ in range(200):
        m, n, k = map(int, random.integers(0, 40, 3))
        left, right = map(int, random.choice([PLAIN, TRANSPOSED], 2))
        alpha, beta = map(float, random.choice([0, 1, 0.5], 2))
        a, b, c = (random.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n), (m, n)))
        expected = alpha * (a.astype(float) @ b) + (beta * c if beta else 0)
        if not beta:
            c[:] = np.nan  # then nobody may look at what is there
        (a, lda), (b, ldb), (out, ldc) = laid_out(a, order, left), laid_out(b, order, right), laid_out(c, order, PLAIN)
        gemm(order, left, right, m, n, k, alpha, a.ctypes.data, lda, b.ctypes.data, ldb, beta, out.ctypes.data, ldc)
        assert np.allclose(out[:m, :n], expected, atol=near)
        assert np.isnan(out[m:]).all()
        assert np.isnan(out[:, n:]).all()


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
@pytest.mark.parametrize("transposed", [PLAIN, TRANSPOSED])
def test_vectors_of_any_step(kind, order, transposed):
    function, dtype, c_type, near = kind
    gemv = function("gemv", None, I, I, L, L, c_type, P, L, P, L, c_type, P, L)
    dot, axpy = function("dot", c_type, L, P, L, P, L), function("axpy", None, L, c_type, P, L, P, L)
    random = np.random.default_rng(order + transposed)
    for m, n, step in ((1, 1, 1), (5, 33, 1), (40, 17, 3), (16, 64, 1), (0, 4, 2), (3, 7, -2)):
        a = random.standard_normal((m, n)).astype(dtype)
        stored, leading = laid_out(a, order, PLAIN)
        a = a.T if transposed != PLAIN else a
        spread_x, spread_y = (random.standard_normal(length * abs(step)).astype(dtype) for length in a.shape[::-1])
        x, y = (v[::step] if step > 0 else v[-2::step] for v in (spread_x, spread_y))
        expected = 2 * (a.astype(float) @ x) + y
        gemv(order, transposed, m, n, 2, stored.ctypes.data, leading, spread_x.ctypes.data, step, 1, spread_y.ctypes.data, step)
        assert np.allclose(y, expected, atol=near)
        assert np.isclose(dot(len(x), spread_x.ctypes.data, step, spread_x.ctypes.data, step), x.astype(float) @ x, atol=near)
        plain, expected = x.copy(), 1.5 * x
        axpy(len(x), 0.5, plain.ctypes.data, 1, spread_x.ctypes.data, step)
        assert np.allclose(x, expected, atol=near)


@pytest.mark.parametrize("transposed", [PLAIN, TRANSPOSED])
def test_the_product_of_a_matrix_with_itself(kind, transposed):
    function, dtype, c_type, near = kind
    syrk = function("syrk", None, I, I, I, L, L, c_type, P, L, c_type, P, L)
    a = np.random.default_rng(3).standard_normal((9, 21)).astype(dtype)
    stored, leading = laid_out(a, ROWS, transposed)
    out = np.full((9, 9), np.nan, dtype)
    syrk(ROWS, 121, transposed, 9, 21, 1, stored.ctypes.data, leading, 0, out.ctypes.data, 9)
    assert np.allclose(np.triu(out), np.triu(a @ a.T), atol=10 * near)


def test_every_function_that_numpy_asks_for_is_there(tmp_path):
    assert LIBRARY is not None
    for machine in blas.LEVEL:
        made = blas.library_for(LIBRARY, USERS, machine)
        offered = elf.dynamic_symbols(LIBRARY.read_bytes(), defined=True)
        wanted = {name for user in USERS for name in elf.dynamic_symbols(user.read_bytes(), defined=False)} & offered
        assert len(wanted) > 20
        assert len(made) < 200_000
        if machine == platform.machine():
            (tmp_path / "library").write_bytes(made)
            loaded = ctypes.CDLL(str(tmp_path / "library"))
            assert all(hasattr(loaded, name) for name in wanted)
