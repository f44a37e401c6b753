"""What the tests of the native executor share: levels to run, random weights, activations rounded by NumPy, small models."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agreement import log_softmax
from canonical_models import make_hyper, make_model
from plain_calls import plain_function

from pocketlm.runtime.formats import FORMATS, dequantize
from pocketlm.runtime.kv_cache import ScaledCache
from pocketlm.runtime.native import levels, linker
from pocketlm.runtime.native.compiler import compile_object
from pocketlm.runtime.native.dot import WHOLE
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.native.ir import Module
from pocketlm.runtime.native.levels import LEVELS, Level
from pocketlm.runtime.native.tiling import LAYOUTS, groups
from pocketlm.runtime.native.workers import aligned
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.tensor import HALF_SCALES, Tensor

FORMAT_NAMES = tuple(LAYOUTS)
HERE = levels.host_machine()


def runs_here(level: Level) -> bool:
    return not _why_not(level)


def _why_not(level: Level) -> str:
    return levels.why_not(level, HERE, levels.cpu_flags(HERE))


def _marked(level: Level) -> Any:
    reason = f"this CPU lacks what the level takes: {_why_not(level)}"
    return pytest.param(level, id=level.name, marks=pytest.mark.skipif(not runs_here(level), reason=reason))


LEVELS_HERE = [_marked(level) for level in LEVELS.values() if level.machine == HERE]
each_level = pytest.mark.parametrize("level", LEVELS_HERE)
each_format = pytest.mark.parametrize("fmt", FORMAT_NAMES)


def compiled(module: Module, level: Level) -> linker.Image:
    return linker.link([compile_object(module.text(), level)])


def aligned_copy(array: np.ndarray) -> np.ndarray:
    """The array's bytes where kernels may read them."""
    copy = aligned(array.nbytes, np.uint8)
    copy[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return copy


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def random_blocks(fmt: str, n_rows: int, n_columns: int, random: np.random.Generator, wild: bool = False) -> np.ndarray:
    """A matrix in the file's order, uint8: every integer field random, weights of spread about 1 / sqrt(n_columns).

    `wild`: scales from the smallest half (a subnormal) to 2^10, of either sign, one row apart from the next.
    """
    size, n = FORMATS[fmt].block_size, n_rows * n_columns
    spread = n_columns**-0.5
    if fmt in ("F32", "F16", "BF16"):
        values = (random.standard_normal((n_rows, n_columns)) * spread).astype(np.float32)
        if wild:
            values *= np.exp2(random.integers(-14, 10, (n_rows, 1))).astype(np.float32)
        if fmt == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
        return values.astype({"F32": np.float32, "F16": np.float16}[fmt]).view(np.uint8).reshape(-1)
    blocks = random.integers(0, 256, (n_rows, n_columns // size, FORMATS[fmt].block_bytes), dtype=np.uint8)
    # the largest integer that a scale is multiplied with, sub-scales of K-quants included
    largest = {
        "Q8_0": 127, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q5_1": 31, "Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 127,
        "Q2_K": 3 * 15, "Q3_K": 4 * 32, "IQ4_NL": 127, "IQ4_XS": 127 * 32, "MXFP4": 12,
    }[fmt]  # fmt: skip
    scale = random.uniform(0.5, 2, (n_rows, n // size // n_rows)) * (2 * spread / largest)
    if wild:
        scale *= np.exp2(random.integers(-12, 12, (n_rows, 1))) * random.choice([-1, 1], (n_rows, 1))
    if fmt == "MXFP4":
        blocks[..., 0] = np.clip(np.rint(np.log2(np.abs(scale))) + 128, 0, 252)
        return blocks.reshape(-1)
    first, *offsets = HALF_SCALES[fmt]
    blocks[..., first : first + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    for at in offsets:  # Q4_1 and Q5_1 add it to weights above zero, K formats subtract it times a sub-scale
        offset = scale * {"Q4_K": 7.5, "Q5_K": 15, "Q2_K": 1.5}.get(fmt, -largest / 2)
        blocks[..., at : at + 2] = offset.astype(np.float16)[..., None].view(np.uint8)
    return blocks.reshape(-1)


def weights(fmt: str, blocks: np.ndarray, n_rows: int) -> np.ndarray:
    """float32 [n_rows, n_columns] of blocks in the file's order."""
    out = np.empty((n_rows, blocks.size // FORMATS[fmt].block_bytes * FORMATS[fmt].block_size // n_rows), np.float32)
    dequantize(FORMATS[fmt], blocks, out)
    return out


# ── activations ──────────────────────────────────────────────────────────────────────────────────────────────────────


def round_activations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x [tokens, n], n a multiple of 32 -> int64 [tokens, n / 32, 32] of 16 bits, float32 scales [tokens, n / 32, 1]."""
    runs = x.reshape(len(x), -1, 32)
    largest = np.abs(runs).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(32639) / largest, 0).astype(np.float32)
    return np.rint(runs * inverse).astype(np.int64), largest * np.float32(1 / 32639)


def activation_records(level: str, x: np.ndarray) -> np.ndarray:
    """What PREPARE leaves for a tile of tokens, in the order that runtime/native/matrix.py lists: uint8 [bytes]."""
    whole, scale = round_activations(x)
    low = (whole + 128) % 256 - 128
    record = [low.astype(np.int8), ((whole - low) >> 8).astype(np.int8)]
    if level in WHOLE:
        record = [whole.astype(np.int16).reshape(*whole.shape[:2], 8, 4)[..., [0, 2, 1, 3]].reshape(whole.shape)]
    record += [scale, scale * whole.sum(-1)[..., None].astype(np.float32)]
    record += [half.sum(-1)[..., None].astype(np.int32) for half in (whole[..., :16], whole[..., 16:])]
    records = np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in record], axis=-1)
    parts = (x, records.swapaxes(0, 1))
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


def products(
    code: linker.Loaded, level: str, fmt: str, w: np.ndarray, n_rows: int, n_blocks: int, x: np.ndarray
) -> np.ndarray:  # fmt: skip
    """What a format's kernel for the tokens of x makes of tiled weights: float32 [tokens, rows]."""
    tokens, n_groups = len(x), groups(n_rows)
    y = np.full((tokens, 16 * n_groups), np.nan, np.float32)
    function, records = plain_function(code.address(f"{fmt}_product{tokens}"), 8), activation_records(level, x)
    function(w.ctypes.data, n_groups, 0, n_groups, n_blocks, records.ctypes.data, y.ctypes.data, y.strides[0])
    return y[:, :n_rows]


def rounded(x: np.ndarray) -> np.ndarray:
    """The values that the rounded activations stand for, float64."""
    whole, scale = round_activations(x)
    return (whole * scale.astype(np.float64)).reshape(x.shape)


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────

WIDE = {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96}
K_WIDE = {"n_embd": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64, "n_ff": 256, "n_layer": 1}


def wide(fmt: str) -> dict[str, int]:
    """The narrowest tiny model whose rows are whole blocks."""
    return K_WIDE if FORMATS[fmt].block_size == 256 else WIDE


def tensors_of(hyper: Any, fmt: str, formats: Mapping[str, str] | None = None, **options: bool) -> dict[str, Tensor]:
    """A model's tensors: matrices in random blocks of `fmt`, or of what `formats` says for a part of the name; vectors F32."""
    random, tensors = np.random.default_rng(0), {}
    for name, tensor in make_model(hyper, **options).tensors.items():
        kind, shape = "F32", tensor.shape
        if len(shape) == 2:
            kind = next((f for part, f in (formats or {}).items() if part in name), fmt)
        data = random_blocks(kind, shape[0], shape[1], random) if len(shape) == 2 else tensor.read().view(np.uint8)
        tensors[name] = Tensor(name, shape, FORMATS[kind], data, 0, Path("model"))
    return tensors


def executors(
    level: Level, fmt: str = "F32", threads: int = 2, formats: Mapping[str, str] | None = None, n_ctx: int | None = None,
    tied: bool = True, bias: bool = False, fused: bool = False, kv: str = "q16", **hyper: Any,
) -> tuple[NativeExecutor, NumpyExecutor]:  # fmt: skip
    """The same random model in both executors; the reference rounds keys and values as it does."""
    if hyper.get("position") == "learned" and n_ctx:  # the table has a row for each position
        hyper["n_ctx"] = n_ctx
    shape = make_hyper(**{**wide(fmt), **hyper})
    tensors = tensors_of(shape, fmt, formats, tied=tied, bias=bias, fused=fused)
    plan = make_plan(shape, {name: tensor.shape for name, tensor in tensors.items()}, "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKETLM_ISA", level.name)
        native = NativeExecutor(plan, tensors, n_ctx or shape.n_ctx, threads, kv)
    reference = NumpyExecutor(plan, tensors, n_ctx or shape.n_ctx, 1, kv)
    if kv == "q16":
        round_as_native(reference)
    return native, reference


def round_as_native(reference: NumpyExecutor) -> None:
    """Keys and values in an empty cache of int16, as the native executor has them."""
    own = reference.cache
    reference.cache = reference._cache = ScaledCache(own.hyper, own.n_ctx, own._turns, own.windows, own.columns)


@functools.cache
def host_level() -> Level:
    return next(level for level in LEVELS.values() if runs_here(level))


def kl_divergence(exact: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(exact || other) of every row of logits, in nats."""
    p, q = log_softmax(exact), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)
