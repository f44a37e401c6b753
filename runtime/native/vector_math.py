"""exp, tanh, erf and the activations on vectors of float32, and half-precision conversions, as IR.

Measured against float64 in tests/test_native_math.py: exp within 1 ulp, tanh within 2, erf within 6, or 8 on a
processor without fused multiply-add (the rational approximation that runtime/activations.py documents). Knows nothing
about models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pocketlm.runtime import activations as A
from pocketlm.runtime.native.ir import F32, I1, I8, I16, I32, Function, Value

AVX512 = ("avx512-vnni", "amx")
NO_HALF = ("sse4",)  # levels whose processors may lack half-precision conversions
# coefficients of the Cephes library (expf, tanhf), highest power first
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP_MIN, EXP_MAX = -87.33, 88.72283


def polynomial(f: Function, x: Value, coefficients: tuple[float, ...]) -> Value:
    total = f.const(x.type, coefficients[0])
    for c in coefficients[1:]:
        total = f.fma(total, x, f.const(x.type, c))
    return total


def nearest(f: Function, x: Value) -> Value:
    """The nearest integers, ties to even; some integers for NaN and for what does not fit."""
    type = I32.vec(x.type.lanes)
    return f.emit(type, f"freeze {type} {f.call(type, f'llvm.lrint.{type.suffix}.{x.type.suffix}', x)}")


def _exp_parts(f: Function, x: Value) -> tuple[Value, Value]:
    """e^x as y · 2^n, for x between EXP_MIN and EXP_MAX."""
    n = f.intrinsic("rint", x * math.log2(math.e))
    r = f.fma(n, f.const(x.type, -LN2_LOW), f.fma(n, f.const(x.type, -LN2_HIGH), x))
    return f.fma(polynomial(f, r, EXP), r * r, r) + 1.0, n


def exp(f: Function, x: Value) -> Value:
    """e^x; 0 below -87.33 (where the result is no normal number), infinite above 88.72, NaN for NaN."""
    y, n = _exp_parts(f, f.minimum(f.maximum(x, EXP_MIN), EXP_MAX))
    # 2^n in two steps: n is up to 128, one more than an exponent holds
    k = f.cast("fptosi", n, I32)
    half = f.emit(k.type, f"ashr {k.type} {k}, {f.const(k.type, 1)}")
    for part in (half, k - half):
        y = y * f.bitcast((part + 127) << 23, x.type)
    y = f.select(x < EXP_MIN, 0.0, f.select(x > EXP_MAX, f.const(x.type, math.inf), y))
    return f.select(x.equals(x), y, x)


def exp_of_negative(f: Function, x: Value, level: str = "") -> Value:
    """e^x for x up to 0; 0 below -87.33, NaN for NaN. The same bits at every level."""
    if level in AVX512:
        y, n = _exp_parts(f, x)  # whatever they are below: that is masked out
        counts = f.bitcast(f.emit(I1.vec(x.type.lanes), f"fcmp uge {x.type} {x}, {f.const(x.type, EXP_MIN)}"), I16)
        nothing, nearest = f.const(x.type, 0.0), f.const(I32, 4)
        return f.call(x.type, "llvm.x86.avx512.mask.scalef.ps.512", y, n, nothing, counts, nearest)
    y, n = _exp_parts(f, f.select(x < EXP_MIN, EXP_MIN, x))
    k = f.emit(I32.vec(x.type.lanes), f"freeze {I32.vec(x.type.lanes)} {f.cast('fptosi', n, I32)}")
    return f.select(x < EXP_MIN, 0.0, y * f.bitcast((k + 127) << 23, x.type))


def tanh(f: Function, x: Value) -> Value:
    magnitude = f.intrinsic("fabs", x)
    square = x * x
    small = f.fma(polynomial(f, square, TANH) * square, x, x)
    large = 1.0 - 2.0 / (exp(f, magnitude * 2.0) + 1.0)
    large = f.intrinsic("copysign", large, x)
    return f.select(magnitude < 0.625, small, large)


def erf(f: Function, x: Value) -> Value:
    square = x * x
    inside = x * polynomial(f, square, A.ERF_P) / polynomial(f, square, A.ERF_Q)
    return f.select(x < -A.ERF_LIMIT, -1.0, f.select(x > A.ERF_LIMIT, 1.0, inside))


def silu(f: Function, x: Value) -> Value:
    return x / (exp(f, 0.0 - x) + 1.0)


def gelu_tanh(f: Function, x: Value) -> Value:
    inner = (x + x * x * x * A.GELU_TANH_CUBE) * A.GELU_TANH_SCALE
    return x * 0.5 * (tanh(f, inner) + 1.0)


def gelu_erf(f: Function, x: Value) -> Value:
    return x * 0.5 * (erf(f, x * math.sqrt(0.5)) + 1.0)


def relu(f: Function, x: Value) -> Value:
    return f.select(x < 0.0, 0.0, x)


def relu_squared(f: Function, x: Value) -> Value:
    y = relu(f, x)
    return y * y


def swiglu_clamped(f: Function, x: Value) -> Value:
    x = f.select(x > A.CLAMP, A.CLAMP, x)
    return x / (exp(f, x * -A.CLAMPED_SCALE) + 1.0)


def clamped_beside(f: Function, up: Value) -> Value:
    """What swiglu_clamped is multiplied with."""
    up = f.select(up > A.CLAMP, A.CLAMP, up)
    return f.select(up < -A.CLAMP, -A.CLAMP, up) + 1.0


ACTIVATIONS = {f.__name__: f for f in (silu, gelu_tanh, gelu_erf, relu, relu_squared, swiglu_clamped)}


_SHUFFLES = {  # bytes at a time, and the instruction that looks sixteen bytes up
    "avx512-vnni": (64, "llvm.x86.avx512.pshuf.b.512"),
    "amx": (64, "llvm.x86.avx512.pshuf.b.512"),
    "avx-vnni": (32, "llvm.x86.avx2.pshuf.b"),
    "avx2": (32, "llvm.x86.avx2.pshuf.b"),
    "sse4": (16, "llvm.x86.ssse3.pshuf.b.128"),
    "dotprod": (16, "llvm.aarch64.neon.tbl1.v16i8"),
    "neon": (16, "llvm.aarch64.neon.tbl1.v16i8"),
}


def look_up(f: Function, level: str, table: Sequence[int], codes: Value) -> Value:
    """table[code] for every byte of `codes`, 0..15; the table has sixteen bytes."""
    width, intrinsic = _SHUFFLES[level]
    bytes_ = f.vector(I8.vec(width), [*table] * (width // 16))
    return f.join([f.call(part.type, intrinsic, bytes_, part) for part in f.split(codes, width)])


def from_half(f: Function, level: str, x: Value) -> Value:
    """half (scalar or vector) to float, exactly."""
    if level not in NO_HALF:
        return f.cast("fpext", x, F32)
    bits = f.cast("zext", f.bitcast(x, I16.vec(x.type.lanes)), I32)
    # exponent and fraction moved into place are the number times 2^-112; subnormals come out right by the multiplication
    value = f.bitcast((bits & 0x7FFF) << 13, F32.vec(x.type.lanes)) * 2.0**112
    special = f.bitcast(((bits & 0x7FFF) << 13) | 0x7F800000, F32.vec(x.type.lanes))
    value = f.select((bits & 0x7C00).equals(0x7C00), special, value)
    sign = (bits & 0x8000) << 16
    return f.bitcast(f.bitcast(value, bits.type) | sign, F32.vec(x.type.lanes))
