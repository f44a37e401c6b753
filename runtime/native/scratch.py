"""How much memory a run computes in, and where a thread's parts lie in its own.

In: a plan, its tensors, the context and the number of threads. Out: sizes. Allocates nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pocketlm.runtime import operations as P
from pocketlm.runtime.memory import round_up
from pocketlm.runtime.native import sizes
from pocketlm.runtime.native.records import GROUP, PAIR, QUERY
from pocketlm.runtime.native.sizes import BLOCK
from pocketlm.runtime.native.tiling import ROWS
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.tensor import Tensor


class Scratch:
    """How large the working arrays of a run are: known before anything is allocated."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor], n_ctx: int, n_threads: int):
        hyper, n_spans = plan.hyper, -(-n_ctx // sizes.SPAN)
        self.dim = round_up(hyper.head_dim, ROWS)
        products = [op for op in plan.ops if isinstance(op, P.Linear | P.Logits)]
        experts = [op for op in plan.ops if isinstance(op, P.Experts)]
        self.activation = sizes.activation_bytes(max(op.matrix.n_in for op in products))
        self.n_pairs = BLOCK * max((op.n_used for op in experts), default=0)  # of a token and an expert, in a pass
        self.n_experts = max((op.n_experts for op in experts), default=0)
        widest = sizes.activation_bytes(max((op.matrix.n_in for op in experts), default=0))
        self.activations = max(BLOCK * self.activation, 8 * self.n_pairs // 5 * widest)  # 5 pairs of an expert take a tile of 8
        row = max((tensors[name].data.nbytes // math.prod(plan.weights[name][:2]) for name in plan.experts), default=0)
        self.places, end = {}, self.activation  # of each thread's parts in its own memory
        for name, n_bytes in (
            ("products_at", 2 * sizes.ALL_TILES[-1] * sizes.MAX_CHUNK * ROWS * 4), ("rows_at", sizes.QUERIES * QUERY.itemsize),
            ("queries_at", sizes.QUERIES * self.dim * 4), ("scores_at", sizes.QUERIES * sizes.SPAN * 4),
            ("mixed_at", sizes.QUERIES * (self.dim + sizes.LANES) * 4), ("tiled_at", sizes.EXPERT_CHUNK * ROWS * row),
        ):  # fmt: skip
            self.places[name], end = end, end + round_up(n_bytes, 64)
        self.stride = round_up(end, 4096)  # from thread to thread
        self.n_slots = BLOCK + max(n_spans, min(8 * n_spans, 1024))  # more than one a token where spans are shared out
        partials = 4 * self.n_slots * hyper.n_head * (self.dim + sizes.LANES)
        self.n_bytes = self.activations + n_threads * self.stride + partials
        self.n_bytes += self.n_pairs * (PAIR.itemsize + GROUP.itemsize) + 8 * self.n_experts
