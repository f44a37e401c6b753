"""Numbers that compiled code and those who call it agree on: kinds of operations, and how much is done at a time.

Knows nothing of what stands behind them. Programs with code made beforehand need these and not the builders of the code.
"""

from __future__ import annotations

STAGES = (  # kinds of operations, by number
    "embed", "prepare", "norm", "rotate", "gate", "route", "mix", "join", "matrix", "store", "attend", "each", "group",
    "gather", "experts", "convolve", "sample",
)  # fmt: skip
(
    EMBED, PREPARE, NORM, ROTATE, GATE, ROUTE, MIX, JOIN, MATRIX, STORE, ATTEND, EACH, GROUP, GATHER, EXPERTS, CONVOLVE, SAMPLE,
) = range(len(STAGES))  # fmt: skip
# up to JOIN: a task a token
AS_IT_IS, RMS_NORM, LAYER_NORM, PARTIALS = range(4)  # where PREPARE takes its values from; NORM, STORE: which norm
SCALE, ADD, SOFTCAP, ACTIVATE = range(4)  # what EACH does
# MATRIX, EACH: 1 for the first, 0 for none
ACTIVATIONS = ("silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared", "swiglu_clamped")
COLUMNS = 2048  # of EACH in a task
TILES = (1, 2, 4, 8)  # numbers of tokens that share a block's unpacked weights; a kernel of its own for each
ALL_TILES = (*TILES, 16)  # of a level that has more, too
# by how many sums registers hold
MORE_OR_FEWER = {"amx": ALL_TILES, "avx-vnni": TILES[:3], "avx2": TILES[:3], "sse4": TILES[:3]}
RECORD = 80  # bytes of 32 columns' rounded activations
LANES = 16
BLOCK = 128  # tokens of a pass at most: their activations stay in the second-level cache
TWO_PARTS = 64  # tokens of a pass whose products are computed for one half of them and then for the other
SPAN = 256  # positions whose softmax has one maximum; fixed, so that sums do not depend on how a text is cut into passes
POSITIONS = 32  # neighbours whose weights are rounded to integers together
QUERIES = 24  # at most so many queries of a key-value head are taken through its spans together by an attention task
MAX_CHUNK = 16  # groups of rows in a task
PAGES = 1 << 16  # a multiple of every system's page size
WILL_NEED = 3  # what madvise is told, on Linux and macOS
EXPERT_CHUNK = 4  # the same of an expert: tiled on the way, they stay in the second-level cache
CHUNK = 128  # logits whose largest stands for them: the k-th largest of these is a bound on the k-th largest of all
ALL, FORBIDDEN = -1, -2  # in place of how many tokens may be drawn: all; all that a mask leaves
MAX_PASSES = 32  # of a run: tokens that are drawn in it
BROKEN, NO_CHOICE, UNKNOWN_ID = -1, -2, -3  # why `draw` has no token: NaN or infinite logits, all -inf, no such ids


def tiles(level: str) -> tuple[int, ...]:
    """The numbers of tokens that a level has kernels for."""
    return MORE_OR_FEWER.get(level, TILES)


def activation_bytes(n: int) -> int:
    """Bytes of one token's activations, for n columns rounded up to 32: matrix.py says what they are."""
    n = -(-n // 32) * 32
    return -(-(4 * n + RECORD * n // 32) // 64) * 64
