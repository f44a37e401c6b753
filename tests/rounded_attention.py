"""transformers' attention with keys and values as the native executor's cache keeps them."""

from __future__ import annotations

import sys
from typing import Any

from rounded_numbers import keys, values
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def round_keys_and_values(model: Any) -> None:
    """From now on, for models whose attention is a function that transformers can exchange."""
    model.set_attn_implementation("rounded")


def _rounded(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    own = sys.modules[type(module).__module__].eager_attention_forward  # caps scores where the model does
    return own(module, query, keys(key), values(value), mask, **options)


ALL_ATTENTION_FUNCTIONS.register("rounded", _rounded)
ALL_MASK_ATTENTION_FUNCTIONS.register("rounded", eager_mask)
