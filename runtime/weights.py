"""Checks on a model's weights that need their values: a NaN in the file is found before it is computed with.

Knows the weight formats' blocks, not the operations. Only the scales of a block can be NaN or infinite: they are a
small part of the file, so looking at all of them takes milliseconds.
"""

from __future__ import annotations

import numpy as np

from pocketlm.errors import FileError
from pocketlm.runtime.tensor import Tensor

# where a block's half-precision scales begin, in bytes; every other byte holds integers
HALF_SCALES = {
    "F16": (0,), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "MXFP4": (),  # its scale is a power of two in the first byte
}  # fmt: skip
EXPONENTS = {"F32": (np.uint32, 0x7F800000), "BF16": (np.uint16, 0x7F80)}  # all bits set: NaN or infinite


def check_finite(tensor: Tensor, part: slice = slice(None)) -> None:
    """Raises FileError if any weight of the tensor is NaN or infinite, or if its format cannot be run.

    `part`: bytes of it, whole blocks, that are to be looked at.
    """
    if tensor.tiled:  # was checked before it was tiled
        return
    data = tensor.data[part]
    name = tensor.format.name
    if name in EXPONENTS:
        dtype, exponent = EXPONENTS[name]
        finite = not ((data.view(dtype) & exponent) == exponent).any()
    else:
        if name not in HALF_SCALES:
            tensor.to_float32()  # raises the error that names the format
        blocks = data.reshape(-1, tensor.format.block_bytes)
        finite = not any((blocks[:, at + 1] & 0x7C == 0x7C).any() for at in HALF_SCALES[name])  # bits 2 to 6: the exponent
        if name == "MXFP4":  # 2^125 times the largest step is beyond float32; 255 means NaN
            finite = not (blocks[:, 0] > 252).any()
    if not finite:
        raise FileError(
            tensor.path, f"tensor {tensor.name} holds NaN or infinite weights", "the model was damaged in training or export"
        )
