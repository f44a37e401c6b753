"""The weight formats: a table with one row for each, and the way back to float32.

In: the type number of a GGUF tensor and its bytes. Out: names, block sizes and float32 weights. Knows nothing about
files, models or matrices. Formats without `dequantize` are known by name and size only, so that a file which holds
them can be inspected and the error can name them.

A block is `block_size` neighbouring weights in `block_bytes` bytes, little-endian: float16 scales and packed integers,
laid out as in the document of the GGUF format and ggml's block structures.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Dequantizer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Format:
    """One weight format.

    `dequantize` turns uint8 (n_blocks, block_bytes), C-contiguous, into float32 (n_blocks, block_size); it is None
    where pocketlm does not run the format. Scales that are infinite or NaN give infinite or NaN weights.
    """

    name: str
    gguf_type: int
    block_size: int
    block_bytes: int
    dequantize: Dequantizer | None = None

# What a code of four bits stands for: the steps of IQ4_NL and IQ4_XS lie closer near zero, as weights do; those of MXFP4
# are the sixteen values of a float with one fraction bit (OCP Microscaling Formats), doubled so that they are whole.
IQ4_STEPS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_STEPS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


# ── parts of a block ─────────────────────────────────────────────────────────────────────────────────────────────────


def _half(blocks: np.ndarray, at: int) -> np.ndarray:  # [n, block_bytes] -> float32 [n, 1]
    return blocks[:, at : at + 2].view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:  # [n, k] -> [n, 2k]
    """4-bit codes: of every `run` bytes first the low halves, then the high ones."""
    runs = np.ascontiguousarray(packed).reshape(-1, 1, run)
    halves = np.empty((len(runs), 2, run), np.uint8)
    np.bitwise_and(runs[:, 0], 15, out=halves[:, 0])
    np.right_shift(runs[:, 0], 4, out=halves[:, 1])
    return halves.reshape(len(packed), -1)


def _bits(packed: np.ndarray, width: int, run: int) -> np.ndarray:  # [n, k] -> [n, k * 8 / width]
    """Codes of `width` bits: of every `run` bytes first the lowest bits, then the next ones, up to the highest."""
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, -1, 1)
    fields = (packed.reshape(-1, 1, run) >> shifts) & np.uint8((1 << width) - 1)
    return fields.reshape(len(packed), -1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:  # [n, block_bytes] -> [n, 32], each 0 or 16
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _scales_and_mins(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [n, block_bytes] -> 2 × float32 [n, 8]
    """Q4_K and Q5_K: two halves, then eight 6-bit scales and eight 6-bit minima in twelve bytes.

    Bytes 0-3 and 4-7 hold the first four of each in their low six bits; bytes 8-11 hold the low four bits of the
    last four, whose high two bits are the top bits of bytes 0-7.
    """
    first, second, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([first & 0x3F, (last & 0x0F) | ((first >> 2) & 0x30)], axis=1)
    mins = np.concatenate([second & 0x3F, (last >> 4) | ((second >> 2) & 0x30)], axis=1)
    return _half(blocks, 0) * scales.astype(np.float32), _half(blocks, 2) * mins.astype(np.float32)


# ── the formats ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _scaled(codes: Callable[[np.ndarray], np.ndarray], zero: float = 0, low: int | None = None) -> Dequantizer:
    """(code - zero) · scale, plus a minimum where there is one: `low` is where in the block that stands."""

    def dequantize(blocks: np.ndarray) -> np.ndarray:
        weights = codes(blocks).astype(np.float32)
        if zero:
            weights -= np.float32(zero)
        weights *= _half(blocks, 0)
        if low is not None:
            weights += _half(blocks, low)
        return weights

    return dequantize


def _five_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    return _nibbles(blocks[:, at + 4 :], 16) | _fifth_bits(blocks, at)


def _in_runs(weights: np.ndarray, scales: np.ndarray, minima: np.ndarray | None = None) -> np.ndarray:
    """float32 [n, 256] times the scales of its runs [n, runs], less their minima; in place."""
    runs = weights.reshape(*scales.shape, -1)
    runs *= scales[:, :, None]
    if minima is not None:
        runs -= minima[:, :, None]
    return weights


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    return _in_runs(_nibbles(blocks[:, 16:], 32).astype(np.float32), *_scales_and_mins(blocks))


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    high = _bits(blocks[:, 16:48], 1, 32) << np.uint8(4)
    return _in_runs((_nibbles(blocks[:, 48:], 32) | high).astype(np.float32), *_scales_and_mins(blocks))


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    high = _bits(blocks[:, 128:192], 2, 32) << np.uint8(4)
    weights = (_nibbles(blocks[:, :128], 64) | high).astype(np.float32)
    weights -= np.float32(32)
    return _in_runs(weights, _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32))


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    packed = blocks[:, :16]
    scales = _half(blocks, 80) * (packed & 15).astype(np.float32)
    minima = _half(blocks, 82) * (packed >> 4).astype(np.float32)
    return _in_runs(_bits(blocks[:, 16:80], 2, 32).astype(np.float32), scales, minima)


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    """Sixteen scales of 6 bits: eight bytes hold low halves, four bytes the top bits, two of every fourth scale each."""
    high = _bits(blocks[:, :32], 1, 32) << np.uint8(2)
    weights = (_bits(blocks[:, 32:96], 2, 32) | high).astype(np.float32)
    weights -= np.float32(4)
    scales = (_nibbles(blocks[:, 96:104], 8) | (_bits(blocks[:, 104:108], 2, 4) << np.uint8(4))).astype(np.float32)
    scales -= np.float32(32)
    return _in_runs(weights, _half(blocks, 108) * scales)


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    """Eight scales of 6 bits: two bytes hold their top bits, four bytes the low halves."""
    weights = np.array(IQ4_STEPS, np.float32)[_nibbles(blocks[:, 8:], 16)]
    high = _bits(blocks[:, 2:4], 2, 1) << np.uint8(4)
    scales = (_nibbles(blocks[:, 4:8], 1) | high).astype(np.float32) - np.float32(32)
    return _in_runs(weights, _half(blocks, 0) * scales)


def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    weights = np.array(MXFP4_STEPS, np.float32)[_nibbles(blocks[:, 1:], 16)]
    weights *= np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    return weights


_ROWS = (
    Format("F32", 0, 1, 4, _f32),
    Format("F16", 1, 1, 2, _f16),
    Format("Q4_0", 2, 32, 18, _scaled(lambda blocks: _nibbles(blocks[:, 2:], 16), 8)),
    Format("Q4_1", 3, 32, 20, _scaled(lambda blocks: _nibbles(blocks[:, 4:], 16), low=2)),
    Format("Q5_0", 6, 32, 22, _scaled(lambda blocks: _five_bits(blocks, 2), 16)),
    Format("Q5_1", 7, 32, 24, _scaled(lambda blocks: _five_bits(blocks, 4), low=2)),
    Format("Q8_0", 8, 32, 34, _scaled(lambda blocks: blocks[:, 2:].view(np.int8))),
    Format("Q8_1", 9, 32, 40),
    Format("Q2_K", 10, 256, 84, _q2_k),
    Format("Q3_K", 11, 256, 110, _q3_k),
    Format("Q4_K", 12, 256, 144, _q4_k),
    Format("Q5_K", 13, 256, 176, _q5_k),
    Format("Q6_K", 14, 256, 210, _q6_k),
    Format("Q8_K", 15, 256, 292),
    Format("IQ2_XXS", 16, 256, 66),
    Format("IQ2_XS", 17, 256, 74),
    Format("IQ3_XXS", 18, 256, 98),
    Format("IQ1_S", 19, 256, 50),
    Format("IQ4_NL", 20, 32, 18, _scaled(lambda blocks: np.array(IQ4_STEPS, np.float32)[_nibbles(blocks[:, 2:], 16)])),
    Format("IQ3_S", 21, 256, 110),
    Format("IQ2_S", 22, 256, 82),
    Format("IQ4_XS", 23, 256, 136, _iq4_xs),
    Format("I8", 24, 1, 1),
    Format("I16", 25, 1, 2),
    Format("I32", 26, 1, 4),
    Format("I64", 27, 1, 8),
    Format("F64", 28, 1, 8),
    Format("IQ1_M", 29, 256, 56),
    Format("BF16", 30, 1, 2, _bf16),
    Format("TQ1_0", 34, 256, 54),
    Format("TQ2_0", 35, 256, 66),
    Format("MXFP4", 39, 32, 17, _mxfp4),
    Format("NVFP4", 40, 64, 36),
    Format("Q1_0", 41, 128, 18),
)

FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
_BY_TYPE = {row.gguf_type: row for row in _ROWS}


def by_gguf_type(gguf_type: int) -> Format | None:
    """The format with this number in a GGUF file, or None where the number is unknown (or withdrawn by ggml)."""
    return _BY_TYPE.get(gguf_type)


def dequantize(format: Format, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` (float32, C-contiguous, any shape) from `data` (uint8, whole blocks in a C-contiguous array).

    Works through pieces of a few hundred kilobytes that stay in the CPU's cache, so the temporaries stay small however
    large the tensor is. The format must have a `dequantize`.
    """
    assert format.dequantize is not None
    assert out.flags.c_contiguous
    blocks = data.reshape(-1, format.block_bytes)
    weights = out.reshape(-1, format.block_size)
    step = max(1, 65536 // format.block_size)
    with np.errstate(all="ignore"):  # a scale may be infinite or NaN; so is the weight then
        for start in range(0, len(blocks), step):
            weights[start : start + step] = format.dequantize(blocks[start : start + step])
