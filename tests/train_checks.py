"""What training has to be able to do with any decoder. Each raises PocketlmError with what it found."""

from __future__ import annotations

import math

import numpy as np
import torch

from pocketlm.errors import PocketlmError
from pocketlm.train.checks import loss_of, random_ids
from pocketlm.train.decoder import Decoder
from pocketlm.train.loop import losses


def accumulation_is_one_large_batch(model: Decoder) -> None:
    """Gradients of micro batches with different numbers of learnt tokens add up to those of the whole batch."""
    rows, gradients = random_ids(model.eval(), 4, 12).numpy(), []
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
    ids, loss = random_ids(model.eval(), 2, 12), torch.tensor(math.inf)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        if unreached := [name for name, weight in model.named_parameters() if weight.grad is None]:
            raise PocketlmError(f"no gradient reaches {unreached[0]}")
        optimizer.step()
    if float(loss.detach()) > 0.1:
        raise PocketlmError(f"after {steps} updates on one batch its loss is still {float(loss.detach()):.3f}")
