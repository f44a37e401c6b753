"""The activation functions of the feed-forward layer, float32 in NumPy. The native kernels use the same formulas.

Knows no model. GELU: arXiv:1606.08415, exact (erf) and in the tanh form; SiLU: x · sigmoid(x);
squared ReLU: arXiv:2109.08668.
"""

from __future__ import annotations

import math

import numpy as np

CLAMP, CLAMPED_SCALE = 7.0, 1.702
GELU_TANH_SCALE, GELU_TANH_CUBE = math.sqrt(2 / math.pi), 0.044715
# erf(x) = x · P(x²) / Q(x²) on |x| < ERF_LIMIT, beyond which it is ±1 in float32; highest power first. The rational
# approximation of XLA's and Eigen's float32 erf, checked in the tests against math.erf.
ERF_LIMIT = 3.832506856900711
ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
ERF_Q = (-1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667, 0.11098505178285362,
         0.49746925110067538, 1.0)  # fmt: skip


def erf(x: np.ndarray) -> np.ndarray:
    """The error function, float32 in and out; NumPy has none of its own."""
    x = np.clip(x, -ERF_LIMIT, ERF_LIMIT)
    square = x * x
    return x * np.polyval(np.array(ERF_P, np.float32), square) / np.polyval(np.array(ERF_Q, np.float32), square)


def silu(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-x) = inf gives the right limit, 0
        return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(GELU_TANH_SCALE) * (x + np.float32(GELU_TANH_CUBE) * x * x * x)))


def gelu_erf(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x * np.float32(math.sqrt(0.5))))


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def relu_squared(x: np.ndarray) -> np.ndarray:
    y = np.maximum(x, 0)
    return y * y


def swiglu_clamped(x: np.ndarray) -> np.ndarray:
    """gpt-oss's gate: x · sigmoid(1.702 x) of x up to 7. What it is multiplied with is `beside`."""
    x = np.minimum(x, np.float32(CLAMP))
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(np.float32(-CLAMPED_SCALE) * x))


def beside(kind: str, up: np.ndarray) -> np.ndarray:
    """What an activated gate is multiplied with: itself, but for gpt-oss, which adds one to it between -7 and 7."""
    return np.clip(up, np.float32(-CLAMP), np.float32(CLAMP)) + np.float32(1) if kind == "swiglu_clamped" else up


ACTIVATIONS = {f.__name__: f for f in (silu, gelu_tanh, gelu_erf, relu, relu_squared, swiglu_clamped)}
