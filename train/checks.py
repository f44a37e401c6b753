"""Checks that catch a model which trains well and generates badly. Each raises PocketlmError with what it found."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from pocketlm.errors import PocketlmError
from pocketlm.train.decoder import Decoder
from pocketlm.train.loop import losses


def _ids(model: Decoder, rows: int, n: int) -> torch.Tensor:
    dice = torch.Generator().manual_seed(7)
    return torch.randint(0, model.shape.n_vocab, (rows, min(n, model.shape.n_ctx)), generator=dice)


def _loss(model: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def sees_no_future(model: Decoder) -> None:
    """Another token at any position leaves the logits of all earlier ones as they were, and moves its own."""
    ids = _ids(model.eval(), 1, 16)
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
    loss, chance = float(_loss(model.eval(), _ids(model, 4, 64))), math.log(model.shape.n_vocab)
    if abs(loss - chance) > 0.1 * chance + 0.1:
        raise PocketlmError(f"a fresh model has the loss {loss:.3f}, but ln({model.shape.n_vocab}) is {chance:.3f}")


def accumulation_is_one_large_batch(model: Decoder) -> None:
    """Gradients of micro batches with different numbers of learnt tokens add up to those of the whole batch."""
    rows, gradients = _ids(model.eval(), 4, 12).numpy(), []
    blocks = [(row[:-1], row[1:], (row[1:] % (2 + i) == 0).astype(np.float32)) for i, row in enumerate(rows)]
    for size in (4, 1):
        model.zero_grad()
        for i in range(0, 4, size):
            losses(model, blocks[i : i + size], torch.device("cpu")).backward()
        gradients.append(torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]))
    difference = float((gradients[0] - gradients[1]).abs().max())
    if difference > 1e-4 * float(gradients[0].abs().max()):
        raise PocketlmError(f"accumulated gradients differ from those of one large batch by {difference:.2g}")


def overfits_one_batch(model: Decoder, steps: int = 60) -> None:
    """Updates on one batch bring its loss near zero, with a gradient for every weight. Changes the model."""
    ids, loss = _ids(model.eval(), 2, 12), torch.tensor(math.inf)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, ids)
        loss.backward()
        if unreached := [name for name, weight in model.named_parameters() if weight.grad is None]:
            raise PocketlmError(f"no gradient reaches {unreached[0]}")
        optimizer.step()
    if float(loss.detach()) > 0.1:
        raise PocketlmError(f"after {steps} updates on one batch its loss is still {float(loss.detach()):.3f}")


def check_fresh(model: Decoder) -> None:
    """The checks that cost nothing; before every training that starts afresh."""
    for check in (sees_no_future, alibi_is_the_papers, starts_at_chance):
        check(model)
    model.train()
