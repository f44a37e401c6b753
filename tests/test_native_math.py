"""The vector mathematics of the kernels, against NumPy in float64; errors in units of the last place of float32."""

import ctypes
import math

import numpy as np
import pytest
from native_calls import compiled, each_level

from pocketlm.runtime.native import levels
from pocketlm.runtime.native import vector_math as V
from pocketlm.runtime.native.ir import F16, F32, I64, PTR, Module
from pocketlm.runtime.native.levels import LEVELS
from pocketlm.runtime.native.linker import load

LANES = 16
FUNCTIONS = {"exp": V.exp, "tanh": V.tanh, "erf": V.erf, **V.ACTIVATIONS}


def f32(numbers):
    return np.array(numbers, np.float32)


_erf = np.vectorize(math.erf, otypes=[float])
SPECIAL = f32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-40, -1e-40, 1.2e-38, 3.4028235e38, -3.4028235e38])


def run(level, body, x, dtype):
    """body(f, level name, vector of x) for all of x, in a module of its own."""
    kinds = {np.dtype(np.float32): F32, np.dtype(np.float16): F16}
    source, target = kinds[x.dtype], kinds[np.dtype(dtype)]
    module = Module(levels.host_abi())
    with module.function("apply", {"x": PTR, "y": PTR, "n": I64}, linkage="entry") as f:
        a, b, n = f.args()
        with f.range(0, n, LANES) as i:
            f.store(body(f, level.name, f.load(source.vec(LANES), a + i * source.bytes)), b + i * target.bytes)
    code = load(compiled(module, level))
    x = np.concatenate([x, np.zeros(-len(x) % LANES, x.dtype)])
    y = np.empty(len(x), dtype)
    code.function("apply", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)(x.ctypes.data, y.ctypes.data, len(x))
    code.close()
    return y


def apply(level, name, x):
    return run(level, lambda f, _, v: FUNCTIONS[name](f, v), x, np.float32)[: len(x)]


def dense(low, high, n=60_000):
    """Evenly spaced, random, and floats of every exponent between the ends; the ends themselves."""
    random = np.random.default_rng(1)
    small = np.exp2(random.uniform(-140, np.log2(max(abs(low), abs(high))), n)) * random.choice([-1, 1], n)
    return np.concatenate([np.linspace(low, high, n), random.uniform(low, high, n), small.clip(low, high), [low, high]]).astype(
        np.float32
    )


def ulps(result, exact):
    """Distance in units of the last place of the exact value's float32; 2^-149 for subnormal ones."""
    return np.abs(result - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)


@each_level
@pytest.mark.parametrize(
    ("name", "reference", "low", "high", "limit"),
    [("exp", np.exp, V.EXP_MIN, V.EXP_MAX, 1), ("tanh", np.tanh, -12, 12, 2), ("erf", _erf, -4.5, 4.5, 6)],
)
def test_functions_are_as_exact_as_their_module_says(level, name, reference, low, high, limit):
    x = dense(low, high)
    result = apply(level, name, x).astype(np.float64)
    if name == "erf" and level.name == "sse4":
        limit = 8  # without fused multiply-add
    assert ulps(result, reference(x.astype(np.float64))).max() <= limit


@each_level
def test_ends_of_the_range_and_what_is_no_number(level):
    assert apply(level, "exp", f32([-87.4, -1000, -np.inf, 88.73, 1000, np.inf])).tolist() == [0, 0, 0, *[np.inf] * 3]
    assert np.isnan(apply(level, "exp", f32([np.nan]))).all()
    for name in ("tanh", "erf"):
        assert apply(level, name, f32([-np.inf, -3e38, -20, 20, 3e38, np.inf])).tolist() == [-1, -1, -1, 1, 1, 1]
        tiny = f32([1e-45, -1e-45, 1e-40, -1e-40, 0, -0.0])
        slope = 1 if name == "tanh" else 2 / math.sqrt(math.pi)
        np.testing.assert_allclose(apply(level, name, tiny), tiny * slope, atol=2e-45)
        assert np.isnan(apply(level, name, f32([np.nan]))).all()
    for name in V.ACTIVATIONS:
        result = apply(level, name, SPECIAL)
        assert np.isnan(result[4])
        if name == "swiglu_clamped":
            assert (abs(result[[2, 10]] - 7) < 1e-4).all()
        else:
            assert (result[2], result[10]) == (np.inf, np.inf if name == "relu_squared" else np.float32(3.4028235e38))
        assert result[11] == 0


REFERENCES = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + _erf(x * math.sqrt(0.5))),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
    "swiglu_clamped": lambda x: np.minimum(x, 7) / (1 + np.exp(-1.702 * np.minimum(x, 7))),
}


@each_level
@pytest.mark.parametrize("name", V.ACTIVATIONS)
def test_activations_are_exact_to_a_few_units_of_their_argument(level, name):
    """Left of zero GELU is a small difference of large numbers: its error is small against x, not against itself."""
    x = dense(-30, 30)
    exact = REFERENCES[name](x.astype(np.float64))
    error = np.abs(apply(level, name, x) - exact)
    assert (error <= 4 * np.finfo(np.float32).eps * np.maximum(np.abs(x), exact) + 1e-44).all()


HALVES = [pytest.param("", id="instruction"), pytest.param("sse4", id="by hand")]  # how the level of that name does it


@each_level
@pytest.mark.parametrize("method", HALVES)
def test_every_half_becomes_its_float(level, method):
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    result = run(level, lambda f, name, v: V.from_half(f, method or name, v), every, np.float32)
    same = np.isnan(every) & np.isnan(result) | (result.view(np.uint32) == every.astype(np.float32).view(np.uint32))
    assert same.all()


def test_the_level_without_half_instructions_is_the_one_tested_by_hand():
    assert set(V.NO_HALF) == {name for name, level in LEVELS.items() if level.machine == "x86_64" and "f16c" not in level.needs}
