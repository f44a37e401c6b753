"""The quantisers against the two other implementations there are: the package gguf and ggml itself."""

import llama_reference
import numpy as np
import pytest

from pocketlm.export.quantize import QUANTIZERS, quantize
from pocketlm.runtime.formats import FORMATS, dequantize

RANDOM = np.random.default_rng(7)
WEIGHTS = {
    "normal": RANDOM.normal(size=(96, 1024)) * 0.02,
    "heavy tails": RANDOM.standard_t(3, size=(96, 1024)) * 0.05,
    "all positive": np.abs(RANDOM.normal(size=(96, 1024))),
    "off centre": RANDOM.normal(size=(96, 1024)) * 0.1 - 0.3,
    "few values": RANDOM.integers(-3, 4, size=(96, 1024)) * 0.01,
    "constant": np.full((4, 1024), 0.25),
    "zeros": np.zeros((4, 1024)),
    "zeros among others": np.where(RANDOM.random((96, 1024)) < 0.02, RANDOM.normal(size=(96, 1024)), 0.0),
}
WEIGHTS = {name: weights.astype(np.float32) for name, weights in WEIGHTS.items()}
SIMPLE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"]
K = ["Q4_K", "Q5_K", "Q6_K", "Q3_K", "IQ4_NL"]  # and others whose scales are searched for


def rmse(format_name: str, data: np.ndarray, weights: np.ndarray) -> float:
    back = np.empty_like(weights)
    dequantize(FORMATS[format_name], data, back)
    return float(np.sqrt(np.mean((back - weights).astype(np.float64) ** 2)))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("format_name", SIMPLE)
def test_bytes_equal_the_gguf_packages(format_name: str, weights: np.ndarray):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[format_name])
    np.testing.assert_array_equal(quantize(format_name, weights), expected.view(np.uint8).ravel())


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("format_name", SIMPLE)
def test_bytes_equal_ggmls(format_name: str, weights: np.ndarray):
    np.testing.assert_array_equal(quantize(format_name, weights), llama_reference.quantize(format_name, weights))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("format_name", K)
def test_k_formats_lose_no_more_than_ggmls(format_name: str, weights: np.ndarray):
    ours, theirs = quantize(format_name, weights), llama_reference.quantize(format_name, weights)
    assert rmse(format_name, ours, weights) <= rmse(format_name, theirs, weights)


@pytest.mark.parametrize("format_name", [name for name in QUANTIZERS if name not in ("F32", "F16", "BF16")])
def test_a_file_in_a_format_requantised_to_it_stays_close(format_name: str):
    weights = WEIGHTS["normal"]
    once = np.empty_like(weights)
    dequantize(FORMATS[format_name], quantize(format_name, weights), once)
    loss = rmse(format_name, quantize(format_name, weights), weights)
    assert rmse(format_name, quantize(format_name, once), once) < 0.5 * loss


@pytest.mark.parametrize("format_name", QUANTIZERS)
@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-30, 1e-6, 1e4])
def test_any_magnitude_gives_finite_weights(format_name: str, scale: float):
    weights = (WEIGHTS["normal"] * np.float32(50 * scale)).astype(np.float32)
    back = np.full_like(weights, np.nan)
    dequantize(FORMATS[format_name], quantize(format_name, weights), back)
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= 2 * np.abs(weights).max() + 1e-6


@pytest.mark.parametrize("format_name", QUANTIZERS)
def test_pieces_do_not_depend_on_each_other(format_name: str):
    weights = WEIGHTS["heavy tails"]
    parts = [quantize(format_name, weights[i : i + 7]) for i in range(0, len(weights), 7)]
    np.testing.assert_array_equal(np.concatenate(parts), quantize(format_name, weights))
