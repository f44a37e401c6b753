"""A plan's matrices on their way into memory: which there are, and a thread's share of tiling one.

In: a plan, or a tensor as the file has it. Out: names; tiled rows. Knows neither kernels nor how threads are had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pocketlm.runtime import operations as P
from pocketlm.runtime.memory import release_pages
from pocketlm.runtime.native.tiling import ROWS, groups
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.tensor import Tensor, check_finite
from pocketlm.runtime.threads import share

PIECE = 1 << 19  # bytes of a matrix that a thread tiles at a time: fits the second-level cache


def as_one(tensor: Tensor) -> Tensor:
    """All experts' matrices below each other."""
    return replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))


def tile_rows(tensor: Tensor, data: np.ndarray, permute: Callable[..., None], part: int, parts: int) -> None:
    """A thread's share of a matrix into `data`. Raises FileError for weights that are NaN."""
    source, (n_rows, n_columns) = tensor.data, tensor.shape
    group_bytes, n_blocks = ROWS * source.nbytes // n_rows, n_columns // tensor.format.block_size
    mine, step = share(groups(n_rows), part, parts), max(1, PIECE // group_bytes)
    for first in range(mine.start, mine.stop, step):
        last = min(first + step, mine.stop)
        piece = slice(first * group_bytes, last * group_bytes)
        check_finite(tensor, piece)
        permute(source.ctypes.data, data.ctypes.data, n_rows, groups(n_rows), n_blocks, first, last)
        release_pages(source[piece])


def matrix_names(plan: Plan) -> list[str]:
    """Every tensor that is a matrix of a product or a table of an embedding, once."""
    names: dict[str, None] = {}
    for op in plan.ops:
        if isinstance(op, P.Embed):
            names |= {name: None for name in (op.table, op.positions) if name}
        elif isinstance(op, P.Linear | P.Logits):
            names |= dict.fromkeys(op.matrix.weights)
    return list(names)
