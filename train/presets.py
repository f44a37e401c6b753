"""What can be trained: the shape of a decoder, the settings of a run, and presets of both. Plain data; knows no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from pocketlm.errors import UsageError, one_of

CHOICES = {
    "norm": ("rms", "layer"),
    "position": ("rope", "alibi", "learned", "none"),
    "activation": ("silu", "gelu_erf", "gelu_tanh"),
    "dtype": ("fp32", "bf16", "fp16"),
    "optimizer": ("adamw", "adamw8bit"),
}


def _check_choices(value: Any) -> None:
    for name in (name for name in CHOICES if hasattr(value, name)):
        one_of(name, getattr(value, name), CHOICES[name])


def option(default: Any, help: str) -> Any:
    """A field that is a flag of `pocketlm train`, too; the name with dashes."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Shape:
    """One decoder, in the terms of the runtime's hyper-parameters. Raises UsageError for one that cannot be."""

    n_layer: int
    n_head: int
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_kv_head: int = 0  # 0: as many as heads
    n_ff: int = 0  # 0: four times the width
    norm: str = "rms"
    norm_eps: float = 1e-5
    position: str = "rope"
    rope_theta: float = 10000.0
    activation: str = "silu"
    gated: bool = True  # SwiGLU, where the activation is silu
    bias: bool = False  # of the matrices, and of LayerNorm
    tied: bool = True  # the output matrix is the token table

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_kv_head", self.n_kv_head or self.n_head)
        object.__setattr__(self, "n_ff", self.n_ff or 4 * self.n_embd)
        _check_choices(self)
        if min(self.n_layer, self.n_head, self.n_embd, self.n_vocab, self.n_ctx, self.n_kv_head, self.n_ff) < 1:
            raise UsageError("a model's layers, heads, widths, vocabulary and positions are 1 or more")
        if self.n_embd % self.n_head or self.n_head % self.n_kv_head:
            problem = "each must divide the one before"
            raise UsageError(f"width {self.n_embd}, {self.n_head} heads, {self.n_kv_head} kv heads: {problem}")
        if self.position == "rope" and self.n_embd // self.n_head % 2:
            raise UsageError(f"rotary positions turn pairs, but a head has {self.n_embd // self.n_head} values")


@dataclass(frozen=True)
class Settings:
    """How a model is trained; the same settings, data and number of threads give the same model."""

    steps: int = option(1000, "number of steps")
    batch: int = option(32, "sequences per step, over all processes")
    micro_batch: int = option(8, "sequences computed at once; divides the batch, and changes nothing but rounding")
    context: int = option(0, "tokens per sequence; 0: as many as the model takes")
    lr: float = option(1e-3, "peak learning rate")
    min_lr: float = option(-1.0, "learning rate of the last step; -1: a tenth of the peak")
    warmup: int = option(50, "steps until the peak")
    weight_decay: float = option(0.1, "weight decay of the matrices")
    beta2: float = option(0.95, "AdamW's second decay rate")
    clip: float = option(1.0, "largest norm of the gradient")
    dropout: float = option(0.0, "share of values set to 0")
    dtype: str = option("fp32", "fp32, bf16 or fp16")
    compile: bool = option(False, "torch.compile the model, or not")
    checkpointing: bool = option(False, "compute every layer twice: less memory, a third more time, the same result")
    optimizer: str = option("adamw", "adamw, or adamw8bit: less memory, by the package bitsandbytes")
    seed: int = option(1, "decides everything that is drawn at random")

    def __post_init__(self) -> None:
        _check_choices(self)
        if min(self.steps, self.batch, self.micro_batch) < 1:
            raise UsageError("expected steps, batch and micro batch of 1 or more")
        if self.batch % self.micro_batch:
            raise UsageError(f"a batch of {self.batch} is no whole number of micro batches of {self.micro_batch}")
        if not (0 < self.lr < 10 and 0 <= self.dropout < 1 and self.clip > 0 and min(self.context, self.warmup) >= 0):
            raise UsageError("expected 0 < lr < 10, 0 <= dropout < 1, clip > 0, context and warmup 0 or more")
        if not (0 <= self.beta2 < 1 and self.min_lr <= self.lr):
            raise UsageError(f"expected 0 <= beta2 < 1 and a min lr of at most the lr, {self.lr:g}")
        if not (0 <= self.seed < 1 << 63 and 0 <= self.weight_decay < 10):
            raise UsageError("expected a seed of 0 or more and 0 <= weight decay < 10")


@dataclass(frozen=True)
class Cadence:
    """How often a run logs, validates and is saved. What is learnt does not depend on it, but for when `patience` ends it."""

    log_every: int = option(10, "a line of progress every N steps")
    eval_every: int = option(100, "validation every N steps")
    eval_blocks: int = 64  # sequences that are looked at each time
    save_seconds: float = option(60.0, "seconds between checkpoints")
    keep: int = option(0, "keep the last N checkpoints, one at every validation")
    keep_every: int = option(0, "keep the checkpoint of every N-th step for good; 0: of none")
    patience: int = option(0, "stop after N validations without a better one; 0: never")

    def __post_init__(self) -> None:
        if min(self.log_every, self.eval_every) < 1 or min(self.keep, self.keep_every, self.patience) < 0:
            raise UsageError("--log-every and --eval-every are 1 or more, --keep, --keep-every and --patience 0 or more")
        if not self.save_seconds >= 0:
            raise UsageError("--save-seconds is 0 or more")


@dataclass(frozen=True)
class Preset:
    shape: Shape
    tokenizer: str  # a row of vocabularies.KINDS
    settings: Settings = field(default_factory=Settings)


_GPT2: dict[str, Any] = {"norm": "layer", "position": "learned", "activation": "gelu_erf", "gated": False}
_OPENAI: dict[str, Any] = {**_GPT2, "activation": "gelu_tanh", "bias": True}
_ALIBI: dict[str, Any] = {"position": "alibi", "norm_eps": 1e-6}
_GPU: dict[str, Any] = {"dtype": "bf16", "compile": True}
PRESETS = {  # layers, heads, width, vocabulary, context, kv heads, feed-forward; README.md says what of it is published
    "tiny": Preset(Shape(4, 4, 128, 2048, 256, 4, 384), "bytes", Settings(200, 16, lr=3e-3, warmup=20)),
    "small-talk": Preset(Shape(4, 8, 256, 1024, 512, 4, 768), "bytes", Settings(7500, 16, 4, lr=3e-3, warmup=200)),
    "chekhov-10m": Preset(Shape(6, 6, 384, 201, 256, **_GPT2), "characters",
        Settings(5000, 64, lr=1e-3, warmup=100, beta2=0.99, dropout=0.2, dtype="bf16")),
    "classics-46m": Preset(Shape(12, 8, 512, 16000, 512, **_GPT2), "sentencepiece",
        Settings(30000, 66, 6, lr=6e-4, warmup=200, dropout=0.1, dtype="bf16")),
    "mini-tron-48m": Preset(Shape(10, 8, 512, 32000, 1024, **_GPT2), "sentencepiece",
        Settings(16000, 64, 2, lr=3e-4, warmup=200, dropout=0.1, **_GPU)),
    "turkish-25m": Preset(Shape(12, 8, 256, 64000, 512, 2, 688, **_ALIBI), "sentencepiece",
        Settings(50000, 128, lr=3e-4, warmup=500, **_GPU)),
    "turkish-68m": Preset(Shape(12, 8, 512, 64000, 2048, 4, 1376, **_ALIBI), "sentencepiece",
        Settings(50000, 32, lr=3e-4, warmup=500, dropout=0.02, **_GPU)),
    "polish-1.3b": Preset(Shape(28, 16, 1920, 32000, 1024, **_GPT2), "sentencepiece",
        Settings(100000, 480, 1, lr=2e-4, warmup=2000, dtype="fp16", checkpointing=True)),
    "gpt2-124m": Preset(Shape(12, 12, 768, 50257, 1024, **_OPENAI), "bytes",
        Settings(15000, 126, 6, lr=1e-4, warmup=1750, dtype="fp16", compile=True)),
}  # fmt: skip


def changed(shape: Shape, pairs: dict[str, str]) -> Shape:
    """A shape with the fields `pairs` (name → text). Raises UsageError for an unknown name or a bad value."""
    kinds = {f.name: type(getattr(shape, f.name)) for f in fields(shape)}
    given: dict[str, Any] = {}
    for name, text in pairs.items():
        kind = kinds[one_of("--set", name, kinds)]
        try:
            given[name] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise UsageError(f"--set {name}={text}: expected {kind.__name__}") from None
    if "n_head" in given and "n_kv_head" not in given and shape.n_kv_head == shape.n_head:
        given["n_kv_head"] = 0
    if "n_embd" in given and "n_ff" not in given and shape.n_ff == 4 * shape.n_embd:
        given["n_ff"] = 0
    return replace(shape, **given)
