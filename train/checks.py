"""Checks that catch a model which trains well and generates badly. Each raises PocketlmError with what it found."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from pocketlm.errors import PocketlmError
from pocketlm.train.decoder import Decoder


def random_ids(model: Decoder, rows: int, n: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(7)
    return torch.randint(0, model.shape.n_vocab, (rows, min(n, model.shape.n_ctx)), generator=dice)


def loss_of(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def sees_no_future(model: Decoder) -> None:
    """Another token at any position leaves the logits of all earlier ones as they were, and moves its own."""
    ids = random_ids(model.eval(), 1, 16)
    before = model(ids)
    for place in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % model.shape.n_vocab
        moved = (model(changed) - before).abs().amax(-1)[0]
        if moved[:place].max() > 1e-5:
            raise PocketlmError(f"position {int(moved[:place].argmax())} sees its future, the token at {place}")
        if moved[place] == 0:
            raise PocketlmError(f"the token at position {place} does not move its own logits")


@torch.no_grad()
def alibi_is_the_papers(model: Decoder) -> None:
    """Slopes 2^(-8 i / n), -slope · distance behind and a hard -inf ahead (arXiv:2108.12409)."""
    n, bias = model.shape.n_head, model.alibi_bias(5)[0]
    for head in range(n):
        slope = 2.0 ** (-8 * (head + 1) / n) if n & (n - 1) == 0 else float(model.alibi[head])
        for query, key in np.ndindex(5, 5):
            wanted, found = -slope * (query - key) if key <= query else -math.inf, float(bias[head, query, key])
            if not math.isclose(found, wanted, rel_tol=1e-6):
                raise PocketlmError(f"ALiBi adds {found} to head {head} at distance {query - key}, where {wanted} is right")


@torch.no_grad()
def starts_at_chance(model: Decoder) -> None:
    """The loss of a fresh model on random tokens is about ln(vocabulary): it prefers nothing."""
    loss, chance = float(loss_of(model.eval(), random_ids(model, 4, 64))), math.log(model.shape.n_vocab)
    if abs(loss - chance) > 0.1 * chance + 0.1:
        raise PocketlmError(f"a fresh model has the loss {loss:.3f}, but ln({model.shape.n_vocab}) is {chance:.3f}")


def check_fresh(model: Decoder) -> None:
    """The checks that cost nothing; before every training that starts afresh."""
    for check in (sees_no_future, alibi_is_the_papers, starts_at_chance):
        check(model)
    model.train()
