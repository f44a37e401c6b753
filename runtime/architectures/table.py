"""The architectures that pocketlm runs, by the name that a file gives in `general.architecture`.

A row is a module with USUAL (the options it means by itself, as in hyper.OPTIONS), SETTINGS (keys of its own that it reads)
and operations(builder), which lists what it does.
"""

from __future__ import annotations

from typing import Any, Protocol

from pocketlm.runtime.architectures import (
    bloom,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    gptneo,
    gptneox,
    granite,
    granitemoe,
    hunyuan_dense,
    lfm2,
    llama,
    mpt,
    nanochat,
    olmo2,
    olmoe,
    phi2,
    phi3,
    pocketlm,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    refact,
    smollm3,
    stablelm,
    starcoder2,
)
from pocketlm.runtime.architectures.common import Builder


class Architecture(Protocol):
    USUAL: dict[str, Any]
    SETTINGS: tuple[str, ...]

    def operations(self, m: Builder) -> None: ...


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": gpt2,
    "llama": llama,
    "refact": refact,
    "stablelm": stablelm,
    "phi2": phi2,
    "gptneo": gptneo,
    "gptneox": gptneox,
    "starcoder2": starcoder2,
    "exaone4": exaone4,
    "bloom": bloom,
    "mpt": mpt,
    "nanochat": nanochat,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "phi3": phi3,
    "smollm3": smollm3,
    "granite": granite,
    "hunyuan-dense": hunyuan_dense,
    "lfm2": lfm2,
    "olmo2": olmo2,
    "qwen2moe": qwen2moe,
    "qwen3moe": qwen3moe,
    "granitemoe": granitemoe,
    "olmoe": olmoe,
    "gpt-oss": gpt_oss,
    "pocketlm": pocketlm,
}
