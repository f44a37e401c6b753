"""PyTorch's keys and values as the native executor's cache keeps them, [..., head_dim]: what both compute is compared then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pocketlm.runtime.kv_cache import keys_to_words, values_to_words

NATIVE = 5e-3  # of a logit: what it costs, in small random models, that queries and weights are rounded to integers, too


def keys(x: Any) -> Any:
    return _kept(x, keys_to_words)


def values(x: Any) -> Any:
    return _kept(x, values_to_words)


def _kept(x: Any, keep: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> Any:
    words, scales = keep(x.detach().float().numpy())
    return torch.from_numpy(words * scales[..., None])
