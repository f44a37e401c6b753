"""Which operations of a plan are computed together, where that saves a pass over memory. None has to be.

In: operations. Out: the same with some of them joined in a `Product` or an `Attention`. Two are joined where the second reads
what the first wrote and nobody else does: the value between them is never written down. Results are the same within rounding.

    Norm, Linear                      the norm while the activations are rounded
    Attend, Linear                    the parts of attention joined there
    Linear, Activate                  the activation on the product, and gate times up
    Linear, Add                       the product added to the residual stream
    Norm, Norm, Rotate, Attend        heads normalised and rotated on their way to the cache
    Norm, Add                         the normalised row added
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pocketlm.runtime import operations as P


@dataclass(frozen=True)
class Product:
    """A product with what comes before it (a norm, or attention that is not joined yet) and after it."""

    linear: P.Linear | P.Logits
    before: P.Norm | P.Attend | None = None
    activate: P.Activate | None = None
    add: P.Add | None = None

    @property
    def x(self) -> str:
        return self.before.x if isinstance(self.before, P.Norm) else self.linear.x

    @property
    def out(self) -> str:
        return (self.activate or self.add or self.linear).out


@dataclass(frozen=True)
class Attention:
    """Attention with what is done to queries and keys before it. Not `joined`: the product that follows joins its parts."""

    attend: P.Attend
    norms: tuple[P.Norm, P.Norm] | None = None  # of the queries' heads, of the keys'
    rotate: P.Rotate | None = None
    joined: bool = True


@dataclass(frozen=True)
class AddNorm:
    """out += norm(x)."""

    norm: P.Norm
    out: str


def fuse(ops: Sequence[P.Op]) -> list[Any]:
    """The operations with their neighbours joined."""
    fused: list[Any] = []
    i = 0
    while i < len(ops):
        step, n = _first(ops, i, fused)
        fused.append(step)
        i += n
    return fused


def single(ops: Sequence[P.Op]) -> list[Any]:
    """Every operation on its own, in the same terms."""
    kinds: dict[type, Any] = {P.Linear: Product, P.Logits: Product, P.Attend: Attention}
    return [kinds[type(op)](op) if type(op) in kinds else op for op in ops]


def _first(ops: Sequence[P.Op], i: int, before: list[Any]) -> tuple[Any, int]:
    """The step that begins with operation i, and of how many it is made."""
    op = ops[i]
    if isinstance(op, P.Norm) and op.n_groups == 1 and op.column == 0:
        following = ops[i + 1] if i + 1 < len(ops) and _is_over(ops, i + 2, op.out) else None
        if isinstance(following, P.Linear | P.Logits) and (following.x, following.matrix.n_in) == (op.out, op.width):
            product, n = _product(ops, i + 1, op)
            return product, n + 1
        if isinstance(following, P.Add) and _adds(following, op.out) and following.factor == 1:
            return AddNorm(op, following.out), 2
    if isinstance(op, P.Norm | P.Rotate | P.Attend) and (attention := _attention(ops, i)):
        step, n = attention
        following = ops[i + n] if i + n < len(ops) else None
        is_next = isinstance(following, P.Linear) and following.x == step.attend.out
        return replace(step, joined=not (is_next and _is_over(ops, i + n + 1, step.attend.out))), n
    if isinstance(op, P.Linear | P.Logits):
        last = before[-1] if before else None
        return _product(ops, i, last.attend if isinstance(last, Attention) and not last.joined else None)
    return op, 1


def _product(ops: Sequence[P.Op], i: int, before: P.Norm | P.Attend | None) -> tuple[Product, int]:
    linear, following = ops[i], ops[i + 1] if i + 1 < len(ops) else None
    assert isinstance(linear, P.Linear | P.Logits)
    product = Product(linear, before)
    if isinstance(linear, P.Logits) or following is None or not _is_over(ops, i + 2, linear.out):
        return product, 1
    if isinstance(following, P.Add) and _adds(following, linear.out) and following.out != product.x:
        return replace(product, add=following), 2
    if not isinstance(following, P.Activate) or following.x != linear.out:
        return product, 1
    if following.out not in (linear.out, product.x) and _in_halves(following, linear):
        return replace(product, activate=following), 2
    return product, 1


def _in_halves(activate: P.Activate, linear: P.Linear) -> bool:
    """Whether kernels can tell the rows of gate from those of up: a matrix each, or one whose halves are whole tiles of 16."""
    return not activate.gated or len(linear.matrix.weights) == 2 or (len(linear.matrix.weights) == 1 and activate.n % 16 == 0)


def _adds(op: P.Add, x: str) -> bool:
    return op.x == x != op.out


def _attention(ops: Sequence[P.Op], i: int) -> tuple[Attention, int] | None:
    """([Norm, Norm,] [Rotate,] Attend) from operation i on, all on one buffer."""
    norms = rotate = None
    at = i
    first, second = ops[at], ops[at + 1] if at + 1 < len(ops) else None
    if isinstance(first, P.Norm) and isinstance(second, P.Norm):
        norms = (first, second)
        at += 2
    if at < len(ops) and isinstance(found := ops[at], P.Rotate):
        rotate = found
        at += 1
    if at == len(ops) or not isinstance(attend := ops[at], P.Attend):
        return None
    if rotate and (rotate.qkv, rotate.n_heads) != (attend.qkv, attend.n_head + attend.n_kv_head):
        return None
    if norms and not _are_of_heads(norms, attend):
        return None
    return Attention(attend, norms, rotate), at + 1 - i


def _are_of_heads(norms: tuple[P.Norm, P.Norm], attend: P.Attend) -> bool:
    """Whether they normalise every head of the queries and of the keys, alike but for the weights, without biases."""
    q, k = (replace(norm, weight=None, n_groups=1, column=0) for norm in norms)
    places = [(norm.n_groups, norm.column) for norm in norms]
    expected = [(attend.n_head, 0), (attend.n_kv_head, attend.n_head * attend.head_dim)]
    are_alike = q == k and q.bias is None and places == expected
    return are_alike and (q.x, q.out, q.width) == (attend.qkv, attend.qkv, attend.head_dim)


def _is_over(ops: Sequence[P.Op], i: int, buffer: str) -> bool:
    """Whether nobody reads what is in the buffer now, from operation i on."""
    for op in ops[i:]:
        if buffer in _reads(op):
            return False
        if _writes(op) == buffer:
            return True
    return buffer != "logits"


def _reads(op: P.Op) -> tuple[str, ...]:
    if isinstance(op, P.Embed):
        return ()
    if isinstance(op, P.Rotate | P.Attend):
        return (op.qkv,)
    if isinstance(op, P.Gate):
        return (op.x, op.y, op.out)
    if isinstance(op, P.Experts | P.Mix):
        return op.x, op.chosen
    return (op.x, op.out) if isinstance(op, P.Add) else (op.x,)


def _writes(op: P.Op) -> str:
    return op.qkv if isinstance(op, P.Rotate) else op.out
