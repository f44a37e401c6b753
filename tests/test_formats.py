"""The weight formats: sizes and dequantisation against the `gguf` package, bit for bit."""
import numpy as np
import pytest

from pocketlm.runtime.formats import FORMATS, by_gguf_type, dequantize

RUN = [format for format in FORMATS.values() if format.dequantize]
SCALES = {  # where the float16 scales of a block are
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,), "F16": (0,),
}  # fmt: skip
ODD_HALVES = [0.0, -0.0, 6e-8, -6e-8, 6.1e-5, 1.0, -1.0, 65504.0, -65504.0, np.inf, -np.inf, np.nan, -np.nan]


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Equal bit for bit, NaN for NaN (whatever is inside of those)."""
    numbers = ~np.isnan(theirs)
    bits, their_bits = ours.view(np.uint32)[numbers], theirs.view(np.uint32)[numbers]
    return bool(np.array_equal(np.isnan(ours), ~numbers) and np.array_equal(bits, their_bits))


def theirs(format_name: str, data: np.ndarray) -> np.ndarray:
    gguf = pytest.importorskip("gguf", reason="the independent implementation")
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[format_name]).reshape(-1)


def ours(format, data: np.ndarray) -> np.ndarray:
    out = np.empty(data.size // format.block_bytes * format.block_size, np.float32)
    dequantize(format, data.reshape(-1), out)
    return out


def test_names_numbers_and_block_sizes_are_those_of_ggml():
    gguf = pytest.importorskip("gguf", reason="the independent table")
    for number, (block_size, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        format = by_gguf_type(number)
        assert format is not None, number.name
        assert (format.name, format.block_size, format.block_bytes) == (number.name, block_size, block_bytes)


def test_the_promised_formats_run():
    assert {format.name for format in RUN} == {
        "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K",
        "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4",
    }  # fmt: skip


@pytest.mark.parametrize("format", RUN, ids=lambda format: format.name)
def test_random_bytes_dequantize_as_in_the_gguf_package(format):
    data = np.random.default_rng(7).integers(0, 256, (300, 32 * format.block_bytes), dtype=np.uint8)
    assert same(ours(format, data), theirs(format.name, data))


@pytest.mark.parametrize("format", [FORMATS[name] for name in SCALES], ids=lambda format: format.name)
def test_zero_subnormal_infinite_and_nan_scales_dequantize_as_in_the_gguf_package(format):
    rng = np.random.default_rng(8)
    data = rng.integers(0, 256, (len(ODD_HALVES) ** 2, format.block_bytes), dtype=np.uint8)
    halves = np.array(ODD_HALVES, np.float16)
    for at, values in zip(SCALES[format.name], (np.tile(halves, len(halves)), np.repeat(halves, len(halves))), strict=False):
        data[:, at : at + 2] = values[:, None].view(np.uint8)
    assert same(ours(format, data), theirs(format.name, data))


def test_every_half_and_bfloat16_is_converted_as_in_the_gguf_package():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 64)
    for name in ("F16", "BF16"):
        assert same(ours(FORMATS[name], every), theirs(name, every))


@pytest.mark.parametrize("format", RUN, ids=lambda format: format.name)
def test_the_pieces_a_large_tensor_is_done_in_leave_no_seam(format):
    n_blocks = 2 * 65536 // format.block_size + 3
    data = np.random.default_rng(9).integers(0, 256, (n_blocks, format.block_bytes), dtype=np.uint8)
    whole = ours(format, data)
    single = np.concatenate([ours(format, data[i : i + 1]) for i in range(0, n_blocks, max(1, n_blocks // 50))])
    assert same(whole.reshape(n_blocks, -1)[:: max(1, n_blocks // 50)].ravel(), single)


def test_withdrawn_and_future_type_numbers_are_unknown():
    assert [by_gguf_type(number) for number in (4, 5, 31, 36, 42, 999, 2**32 - 1)] == [None] * 7
