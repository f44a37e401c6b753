"""Quantises: from float32 to the weight formats of `runtime/formats.py`, which dequantises.

In: float32 blocks. Out: their bytes. Knows nothing about files, models or which format suits a tensor (`gguf_writer`).

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and MXFP4 are rounded by their definition, to the same bytes as ggml's reference. The K formats
and IQ4_NL leave the choice of scales open; the best are searched for: of 21 ways to round a block, each with its least-squares
scale (and minimum), the one with the smallest error is kept. During the search blocks are columns, so that every step is one
NumPy operation over many blocks.

`importance` weighs the squared error of each weight (importance.py); with it, the scales of Q4_0, Q4_1, Q5_0 and Q5_1 are
searched for, too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pocketlm.runtime.formats import FORMATS, IQ4_STEPS, MXFP4_STEPS

Quantizer = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]  # blocks, how much each weight's error counts -> bytes
PIECE = 1 << 17  # weights quantised at a time: the search's arrays stay in a core's own cache
# Added to the number of codes that a block's range is divided into; none first, so that it wins where all are equal.
STRETCHES = np.array(sorted(np.linspace(-1, 1, 21), key=abs), np.float32)
TINY = np.float32(2.0**-126)  # smallest normal float32: reciprocals of anything smaller overflow


def quantize(format_name: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """`weights` (float32, whole blocks along the last dimension) in a format, uint8 (number of bytes,).

    Weights must be finite and their scales representable; `gguf_writer` checks both. `importance`: float32 above zero, of the
    weights' shape; None: all weights count the same.
    """
    format = FORMATS[format_name]
    blocks = np.ascontiguousarray(weights, np.float32).reshape(-1, format.block_size)
    counts = None if importance is None else np.ascontiguousarray(importance, np.float32).reshape(blocks.shape)
    out = np.empty((len(blocks), format.block_bytes), np.uint8)
    step, quantizer = max(1, PIECE // format.block_size), QUANTIZERS[format_name]
    for start in range(0, len(blocks), step):
        mine = slice(start, start + step)
        out[mine] = quantizer(blocks[mine], None if counts is None else counts[mine])
    return out.reshape(-1)


# ── parts of a block ─────────────────────────────────────────────────────────────────────────────────────────────────


def _half(values: np.ndarray) -> np.ndarray:  # float32 [n] or [n, 1] -> uint8 [n, 2]
    return values.astype("<f2").reshape(-1, 1).view(np.uint8)


def _rounded_to_half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


def _inverse(values: np.ndarray) -> np.ndarray:
    """1 / values, and 0 where that would overflow, so that a block of zeros gets codes of zero."""
    usable = np.abs(values) >= TINY
    return np.divide(1, values, out=np.zeros_like(values), where=usable)


def _pack(codes: np.ndarray, width: int, run: int) -> np.ndarray:  # uint8 [n, k] -> [n, k * width / 8]
    """Pack 8/width runs of `run` codes each into one run of bytes, the first run in the lowest `width` bits."""
    parts = codes.reshape(len(codes), -1, 8 // width, run)
    packed = parts[:, :, 0].copy()
    for i in range(1, 8 // width):
        packed |= parts[:, :, i] << np.uint8(i * width)
    return packed.reshape(len(codes), -1)


# ── searches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # [k, n], [k, n] -> [n]
    return np.einsum("ij,ij->j", a, b)


def _columns(values: np.ndarray, size: int) -> np.ndarray:  # [n, k * size] -> [size, n * k]
    return np.ascontiguousarray(values.reshape(-1, size).T)


def _both(x: np.ndarray, w: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    return _columns(x, size), None if w is None else _columns(w, size)


def _sums(codes: np.ndarray, x: np.ndarray, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Σ wc, Σ wcx, Σ wcc of every column; all [k, n] -> [n]."""
    weighted = codes if w is None else codes * w
    return weighted.sum(0), _dot(weighted, x), _dot(weighted, codes)


def _affine_search(x: np.ndarray, top: int, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Scale s and minimum m, both ≥ 0, with x ≈ s·code - m for codes 0..top; x, w [32, n] -> [n], [n].

    Every offset stretches the codes over a slightly different range; given the codes, s and m are a linear regression.
    All of it happens in units of (high - low) / top from low on, where the sums lose the fewest digits.
    """
    size, last = np.float32(len(x)) if w is None else w.sum(0), np.float32(top)
    low = np.minimum(x.min(0), 0)
    unit = (x.max(0) - low) / last
    steps = (x - low) * _inverse(unit)  # 0..top
    zero = -low * _inverse(unit)  # where the value 0 lies
    sum_x, sum_xx, _ = _sums(steps, steps, w)
    variation = sum_xx - sum_x * sum_x / size
    best_scale, best_start, best_error = np.ones_like(low), np.zeros_like(low), np.full_like(low, np.inf)
    codes = np.empty_like(x)
    for offset in STRETCHES:
        np.multiply(steps, 1 + offset / last, out=codes)
        np.rint(codes, out=codes)
        if offset > 0:
            np.minimum(codes, last, out=codes)
        sum_c, sum_cx, sum_cc = _sums(codes, steps, w)
        covariation = sum_cx - sum_c * sum_x / size
        scale = covariation * _inverse(sum_cc - sum_c * sum_c / size)
        start = (sum_x - scale * sum_c) / size
        error = variation - scale * covariation
        if (beyond := start > zero).any():  # the format knows no minimum above zero: a line through zero instead
            sum_cx -= zero * sum_c
            through = sum_cx * _inverse(sum_cc)
            np.copyto(scale, through, where=beyond)
            np.copyto(start, zero, where=beyond)
            np.copyto(error, sum_xx - zero * (2 * sum_x - zero * size) - through * sum_cx, where=beyond)
        better = (error < best_error) & (scale > 0)
        for best, new in ((best_error, error), (best_scale, scale), (best_start, start)):
            np.copyto(best, new, where=better)
    return best_scale * unit, -(low + best_start * unit)


def _symmetric_search(x: np.ndarray, half: int, w: np.ndarray | None) -> np.ndarray:
    """Scale with x ≈ scale·code for codes -half..half-1; x, w [k, n] -> [n]. Negative where the largest x is positive."""
    largest = np.take_along_axis(x, np.abs(x).argmax(0, keepdims=True), 0)[0]
    inverse = -_inverse(largest)

    def coded(stretch: np.float32, out: np.ndarray) -> None:
        np.multiply(x, (np.float32(half) + stretch) * inverse, out=out)
        np.rint(out, out=out)
        np.clip(out, np.float32(-half), np.float32(half - 1), out=out)

    return _best_scale(x, w, coded)


def _best_scale(x: np.ndarray, w: np.ndarray | None, coded: Callable[[np.float32, np.ndarray], None]) -> np.ndarray:
    """Try the codes of every stretch; the least-squares scale of those that fit x ≈ scale·code best; [k, n] -> [n]."""
    best_scale, best_gain = np.zeros(x.shape[1], np.float32), np.zeros(x.shape[1], np.float32)
    codes = np.empty_like(x)
    for stretch in STRETCHES:
        coded(stretch, codes)
        _, sum_cx, sum_cc = _sums(codes, x, w)
        scale = sum_cx * _inverse(sum_cc)
        gain = scale * sum_cx  # what the fit takes from the sum of squares
        better = gain > best_gain * np.float32(1.000001)  # by more than rounding errors
        np.copyto(best_gain, gain, where=better)
        np.copyto(best_scale, scale, where=better)
    return best_scale


# ── one scale (and minimum) for 32 weights ───────────────────────────────────────────────────────────────────────────


def _f32(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    return x.astype("<f4", copy=False).view(np.uint8)


def _f16(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    return x.astype("<f2").view(np.uint8)


def _bf16(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    bits = x.astype("<f4", copy=False).view("<u4")
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))  # to nearest, ties to even
    return ((bits + rounding) >> np.uint32(16)).astype("<u2").view(np.uint8)


def _signed_codes(x: np.ndarray, w: np.ndarray | None, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales [n, 1] and codes [n, 32]; code levels/2 stands for 0.

    Without counts the value of largest magnitude gets code 0.
    """
    if w is None:
        largest = np.take_along_axis(x, np.abs(x).argmax(1, keepdims=True), 1)
        scale = largest / np.float32(-levels / 2)
        return scale, np.minimum(x * _inverse(scale) + np.float32(levels / 2 + 0.5), levels - 1).astype(np.uint8)
    scale = _rounded_to_half(_symmetric_search(_columns(x, 32), levels // 2, _columns(w, 32)))[:, None]
    codes = np.rint(x * _inverse(scale)) + np.float32(levels // 2)
    return scale, np.clip(codes, 0, levels - 1).astype(np.uint8)


def _codes_from_minimum(x: np.ndarray, w: np.ndarray | None, levels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, minima [n, 1] and codes [n, 32]. Without counts the smallest value gets code 0, the largest the last one."""
    low = x.min(1, keepdims=True)
    if w is None:
        scale = (x.max(1, keepdims=True) - low) / np.float32(levels - 1)
        codes = (x - low) * _inverse(scale) + np.float32(0.5)
        return scale, low, np.minimum(codes, levels - 1).astype(np.uint8)
    scales, minima = _affine_search(np.ascontiguousarray((x - low).T), levels - 1, _columns(w, 32))
    scale, low = _rounded_to_half(scales)[:, None], _rounded_to_half(low - minima[:, None])
    return scale, low, np.clip(np.rint((x - low) * _inverse(scale)), 0, levels - 1).astype(np.uint8)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _q8_0(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    scale = np.abs(x).max(1, keepdims=True) / np.float32(127)
    exact = x * _inverse(scale)
    size = np.abs(exact)
    whole = np.floor(size)
    whole += size - whole >= 0.5  # halves go away from zero
    return np.concatenate([_half(scale), np.copysign(whole, exact).astype(np.int8).view(np.uint8)], axis=1)


def _blocks_of_32(coded: Callable[..., tuple[np.ndarray, ...]], levels: int) -> Quantizer:
    """A quantiser for formats with scales (and minima), then the fifth bits of the codes, if there are any, then the others."""

    def quantizer(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
        *scales, codes = coded(x, w, levels)
        fifth = [_fifth_bits(codes)] if levels > 16 else []
        return np.concatenate([*map(_half, scales), *fifth, _pack(codes & 15, 4, 16)], axis=1)

    return quantizer


def _iq4_nl(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    steps = np.array(IQ4_STEPS, np.float32)
    between = (steps[1:] + steps[:-1]) / 2
    columns, counts = _both(x, w, 32)
    largest = np.take_along_axis(columns, np.abs(columns).argmax(0, keepdims=True), 0)[0]

    def best(end: float) -> np.ndarray:  # the largest value lies near one end of the steps
        inverse = end * _inverse(largest)

        def coded(stretch: np.float32, out: np.ndarray) -> None:
            np.take(steps, np.searchsorted(between, columns * (inverse * (1 + stretch / 8))), out=out)

        return _best_scale(columns, counts, coded)

    def codes(scale: np.ndarray) -> np.ndarray:
        return np.searchsorted(between, columns * _inverse(scale))

    scales = [_rounded_to_half(best(end)) for end in IQ4_STEPS[:: len(IQ4_STEPS) - 1]]
    chosen = [codes(scale) for scale in scales]
    errors = [(scale * steps[code] - columns) ** 2 for scale, code in zip(scales, chosen, strict=True)]
    first, second = ((error if counts is None else error * counts).sum(0) for error in errors)
    scale, code = np.where(second < first, scales[1], scales[0]), np.where(second < first, chosen[1], chosen[0])
    return np.concatenate([_half(scale), _pack(np.ascontiguousarray(code.T).astype(np.uint8), 4, 16)], axis=1)


def _mxfp4(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    """The scale is the power of two that puts a block's largest weight between 4 and 8, so that MXFP4 weights stay the same.

    Like ggml, it does not search for the scale, and ignores `w`.
    """
    largest = np.abs(x).max(-1, keepdims=True)
    exponents = np.where(largest > 0, np.clip(np.frexp(largest)[1] + 124, 0, 254), 0)
    steps = np.array(MXFP4_STEPS[:8], np.float32)
    wanted = np.abs(np.ldexp(x, 128 - exponents))  # in halves, as the steps are
    codes = np.searchsorted((steps[1:] + steps[:-1]) / 2, wanted).astype(np.uint8)
    codes |= (np.signbit(x) & (codes > 0)).astype(np.uint8) << np.uint8(3)
    return np.concatenate([exponents.astype(np.uint8), _pack(codes, 4, 16)], 1)


# ── K formats: 256 weights, scales of scales ─────────────────────────────────────────────────────────────────────────


def _affine_k(x: np.ndarray, w: np.ndarray | None, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K and Q5_K: the sixteen bytes of scales [n, 16] and the codes [n, 256].

    Scales and minima get six bits each. The neighbours of each scale are tried too, with the minimum that fits it best,
    because rounding the one moves the best value of the other.
    """
    columns, counts = _both(x, w, 32)
    size = np.float32(32) if counts is None else counts.sum(0).reshape(-1, 8)
    scales, mins = (values.reshape(-1, 8) for values in _affine_search(columns, top, counts))
    scale_unit, min_unit = (_rounded_to_half(values.max(1, keepdims=True) / np.float32(63)) for values in (scales, mins))
    first_scale, first_min = best_scale, best_min = tuple(
        np.minimum(np.rint(values * _inverse(unit)), 63) for values, unit in ((scales, scale_unit), (mins, min_unit))
    )
    best_error, inverse_min_unit = np.full(best_scale.shape, np.inf, np.float32), _inverse(min_unit)
    sum_x, sum_xx, _ = (values.reshape(-1, 8) for values in _sums(columns, columns, counts))
    codes = np.empty_like(columns)
    for change in (0, -1, 1) * 2:
        if change == 0:  # from the best place so far
            first_scale, first_min = best_scale, best_min
        six = np.clip(first_scale + np.float32(change), 0, 63)
        scale = scale_unit * six
        _round_codes(columns, scale, min_unit * first_min, top, codes)
        sum_c, sum_cx, sum_cc = (values.reshape(-1, 8) for values in _sums(codes, columns, counts))
        above = scale * sum_c - sum_x
        six_min = np.clip(np.rint(above / size * inverse_min_unit), 0, 63)
        minimum = min_unit * six_min
        error = scale * (scale * sum_cc - 2 * sum_cx) + sum_xx - minimum * (2 * above - size * minimum)
        better = error < best_error
        best_error, best_scale, best_min = (
            np.where(better, new, old) for new, old in ((error, best_error), (six, best_scale), (six_min, best_min))
        )
    _round_codes(columns, scale_unit * best_scale, min_unit * best_min, top, codes)
    s, m = best_scale.astype(np.uint8), best_min.astype(np.uint8)
    packed = [s[:, :4] | (s[:, 4:] >> 4 << 6), m[:, :4] | (m[:, 4:] >> 4 << 6), (s[:, 4:] & 15) | (m[:, 4:] << 4)]
    codes = np.ascontiguousarray(codes.T.astype(np.uint8)).reshape(-1, 256)
    return np.concatenate([_half(scale_unit), _half(min_unit), *packed], axis=1), codes


def _round_codes(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray, top: int, out: np.ndarray) -> None:
    """x [32, n], scale and minimum [n / 8, 8]: the codes 0..top of x ≈ scale·code - minimum, to `out`."""
    inverse = _inverse(scale)
    np.multiply(x, inverse.reshape(-1), out=out)
    out += (minimum * inverse).reshape(-1)
    np.rint(out, out=out)
    np.clip(out, 0, np.float32(top), out=out)


def _q4_k(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    scales, codes = _affine_k(x, w, 15)
    return np.concatenate([scales, _pack(codes, 4, 32)], axis=1)


def _q5_k(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    scales, codes = _affine_k(x, w, 31)
    return np.concatenate([scales, _pack(codes >> 4, 1, 32), _pack(codes & 15, 4, 32)], axis=1)


def _symmetric_k(x: np.ndarray, w: np.ndarray | None, half: int, top: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Q3_K and Q6_K: units [n, 1], scales [n, 16] from -top to top - 1, and the codes [n, 256], 0..2·half-1."""
    columns, counts = _both(x, w, 16)
    groups = _symmetric_search(columns, half, counts).reshape(-1, 16)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1, keepdims=True), 1)
    unit = _rounded_to_half(largest / np.float32(-top))
    scales = np.clip(np.rint(groups * _inverse(unit)), -top, top - 1)
    codes = np.clip(np.rint(columns * _inverse((unit * scales).reshape(-1))), -half, half - 1).astype(np.int8) + np.int8(half)
    return unit, scales, np.ascontiguousarray(codes.T).reshape(-1, 256).view(np.uint8)


def _q6_k(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    unit, scales, codes = _symmetric_k(x, w, 32, 128)
    parts = [_pack(codes & 15, 4, 64), _pack(codes >> 4, 2, 32), scales.astype(np.int8).view(np.uint8), _half(unit)]
    return np.concatenate(parts, axis=1)


def _q3_k(x: np.ndarray, w: np.ndarray | None) -> np.ndarray:
    unit, scales, codes = _symmetric_k(x, w, 4, 32)
    six = (scales + 32).astype(np.uint8)
    parts = [_pack(codes >> 2, 1, 32), _pack(codes & 3, 2, 32), _pack(six & 15, 4, 8), _pack(six >> 4, 2, 4), _half(unit)]
    return np.concatenate(parts, axis=1)


QUANTIZERS: dict[str, Quantizer] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q8_0": _q8_0,
    "Q4_0": _blocks_of_32(_signed_codes, 16), "Q5_0": _blocks_of_32(_signed_codes, 32),
    "Q4_1": _blocks_of_32(_codes_from_minimum, 16), "Q5_1": _blocks_of_32(_codes_from_minimum, 32),
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "Q3_K": _q3_k, "IQ4_NL": _iq4_nl, "MXFP4": _mxfp4,
}  # fmt: skip
