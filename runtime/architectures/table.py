"""The architectures that pocketlm runs, by the name that a file gives in `general.architecture`.

A row is a module of that name (_ for -) with USUAL (the options it means by itself, as in hyper.OPTIONS), operations(builder),
which lists what it does, and SETTINGS, the keys of its own that it reads, where there are any.
"""

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
    __name__: str
    USUAL: dict[str, Any]

    def operations(self, m: Builder) -> None: ...


_ROWS: tuple[Architecture, ...] = (
    gpt2, llama, refact, stablelm, phi2, gptneo, gptneox, starcoder2, exaone4, bloom, mpt, nanochat, qwen2, qwen3,
    gemma, gemma2, gemma3, phi3, smollm3, granite, hunyuan_dense, lfm2, olmo2, qwen2moe, qwen3moe, granitemoe, olmoe,
    gpt_oss, pocketlm,
)  # fmt: skip
ARCHITECTURES = {row.__name__.rpartition(".")[2].replace("_", "-"): row for row in _ROWS}
