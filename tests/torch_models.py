"""Decoders in PyTorch, written apart from the package, one for each code base whose checkpoints are exported.

Each is a module whose parameters have the names that code base gives them; `forward(ids [n])` gives logits [n, n_vocab].
Nothing is shared with the package: positions, attention and norms are computed here once more, in the plainest way.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def causal_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None, divisor: int = 0) -> Tensor:
    """q [heads, n, d]; k, v [kv_heads, n, d] -> [n, heads * d]. `divisor`: scores are divided by its root; 0: d."""
    heads, n, d = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(divisor or d)
    if slopes is not None:
        places = torch.arange(n)
        scores = scores - slopes.view(-1, 1, 1) * (places.view(-1, 1) - places).clamp(min=0)
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, heads * d)


def heads_of(x: Tensor, n_heads: int) -> Tensor:
    """[n, heads * d] -> [heads, n, d]."""
    return x.view(len(x), n_heads, -1).transpose(0, 1)


def initialise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random and none near a special value, so that a mixed-up tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.copy_(0.2 * noise + (1.0 if parameter.flatten()[0] == 1 else 0.0))
    return model.eval()


# ── GPT-2 and its kin ────────────────────────────────────────────────────────────────────────────────────────────────


class BareLayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class InOutLinear(nn.Module):
    """A matrix kept as (in, out), as OpenAI's code did."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class GPT(nn.Module):
    """nanoGPT's names; with `conv1d` Hugging Face's GPT-2: transposed matrices and GELU's tanh form."""

    def __init__(
        self, n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=61, bias=True, conv1d=False, masks=True,
        tanh=False, tied=True,
    ):  # fmt: skip
        super().__init__()
        self.n_head, self.tanh = n_head, conv1d or tanh

        def linear(n_in: int, n_out: int) -> nn.Module:
            return InOutLinear(n_in, n_out) if conv1d else nn.Linear(n_in, n_out, bias=bias)

        def block() -> nn.ModuleDict:
            attn = nn.ModuleDict({"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd)})
            if masks:
                attn.register_buffer("bias", torch.ones(block_size, block_size).tril().view(1, 1, block_size, block_size))
                attn.register_buffer("masked_bias", torch.tensor(-1e4))
            mlp = nn.ModuleDict({"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd)})
            norms = {name: BareLayerNorm(n_embd, bias) for name in ("ln_1", "ln_2")}
            return nn.ModuleDict({"ln_1": norms["ln_1"], "attn": attn, "ln_2": norms["ln_2"], "mlp": mlp})

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": BareLayerNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        t = self.transformer
        x = t["wte"](ids) + t["wpe"](torch.arange(len(ids)))
        for block in t["h"]:  # type: ignore[union-attr]
            q, k, v = (heads_of(part, self.n_head) for part in block["attn"]["c_attn"](block["ln_1"](x)).chunk(3, -1))
            x = x + block["attn"]["c_proj"](causal_attention(q, k, v))
            hidden = F.gelu(block["mlp"]["c_fc"](block["ln_2"](x)), approximate="tanh" if self.tanh else "none")
            x = x + block["mlp"]["c_proj"](hidden)
        return self.lm_head(t["ln_f"](x))


class ScaleShift(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.scale + self.shift


class TanhGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class TextbookGPT(nn.Module):
    """The "from scratch" book's names: separate query, key and value, scale and shift, an untied head."""

    def __init__(self, n_layers=2, n_heads=4, emb_dim=32, context_length=24, vocab_size=61, qkv_bias=False):
        super().__init__()
        self.n_heads = n_heads
        self.tok_emb, self.pos_emb = nn.Embedding(vocab_size, emb_dim), nn.Embedding(context_length, emb_dim)
        self.trf_blocks: Any = nn.Sequential()
        for _ in range(n_layers):
            block, att, ff = nn.Module(), nn.Module(), nn.Module()
            att.W_query, att.W_key, att.W_value = (nn.Linear(emb_dim, emb_dim, bias=qkv_bias) for _ in range(3))
            att.out_proj = nn.Linear(emb_dim, emb_dim)
            att.register_buffer("mask", torch.ones(context_length, context_length).triu(1))
            ff.layers = nn.Sequential(nn.Linear(emb_dim, 4 * emb_dim), TanhGELU(), nn.Linear(4 * emb_dim, emb_dim))
            block.att, block.ff, block.norm1, block.norm2 = att, ff, ScaleShift(emb_dim), ScaleShift(emb_dim)
            self.trf_blocks.append(block)
        self.final_norm, self.out_head = ScaleShift(emb_dim), nn.Linear(emb_dim, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(len(ids)))
        for block in self.trf_blocks:
            h, att = block.norm1(x), block.att
            q, k, v = (heads_of(part(h), self.n_heads) for part in (att.W_query, att.W_key, att.W_value))
            x = x + att.out_proj(causal_attention(q, k, v))
            x = x + block.ff.layers(block.norm2(x))
        return self.out_head(self.final_norm(x))


class LectureGPT(nn.Module):
    """A module for each head, ReLU, biases in the output matrix: the model of a well-known video lecture."""

    def __init__(self, n_layer=2, n_head=4, n_embd=32, block_size=24, vocab_size=61, divisor=0):
        super().__init__()
        self.divisor = divisor  # by whose root scores are divided
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks: Any = nn.Sequential()
        for _ in range(n_layer):
            block, sa, ffwd = nn.Module(), nn.Module(), nn.Module()
            sa.heads = nn.ModuleList()
            for _ in range(n_head):
                head = nn.Module()
                head.key, head.query, head.value = (nn.Linear(n_embd, n_embd // n_head, bias=False) for _ in range(3))
                head.register_buffer("tril", torch.ones(block_size, block_size).tril())
                sa.heads.append(head)
            sa.proj = nn.Linear(n_embd, n_embd)
            ffwd.net = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(0.1))
            block.sa, block.ffwd, block.ln1, block.ln2 = sa, ffwd, nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
            self.blocks.append(block)
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token_embedding_table(ids) + self.position_embedding_table(torch.arange(len(ids)))
        for block in self.blocks:
            h = block.ln1(x)
            mixes = [
                causal_attention(*(part(h)[None] for part in (head.query, head.key, head.value)), divisor=self.divisor)
                for head in block.sa.heads
            ]
            x = x + block.sa.proj(torch.cat(mixes, -1))
            x = x + block.ffwd.net(block.ln2(x))
        return self.lm_head(self.ln_f(x))


# ── Llama and its kin ────────────────────────────────────────────────────────────────────────────────────────────────


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def rotate_halves(x: Tensor, frequencies: Tensor, magnitude: float = 1.0) -> Tensor:
    """Rotary positions as Hugging Face computes them: value i turns with value i + d/2. x [heads, n, d]."""
    angles = torch.arange(x.shape[1], dtype=torch.float64).view(-1, 1) * frequencies.double()
    cos, sin = ((f(torch.cat([angles, angles], -1)) * magnitude).float() for f in (torch.cos, torch.sin))
    n = cos.shape[-1]
    first, second = x[..., : n // 2], x[..., n // 2 : n]
    turned = x[..., :n] * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([turned, x[..., n:]], -1)


def rotate_neighbours(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as the paper and Meta's code compute them: complex numbers of neighbouring values."""
    d = x.shape[-1]
    angles = torch.outer(torch.arange(x.shape[1]).float(), theta ** (-torch.arange(0, d, 2).float() / d))
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


NAMES = {  # part → Hugging Face's name; other code bases give a table of their own
    "embed": "model.embed_tokens", "layers": "model.layers", "attn_norm": "input_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj", "norm": "model.norm", "head": "lm_head",
}  # fmt: skip
META_NAMES = {
    "embed": "tok_embeddings", "layers": "layers", "attn_norm": "attention_norm", "q": "attention.wq", "k": "attention.wk",
    "v": "attention.wv", "o": "attention.wo", "ffn_norm": "ffn_norm", "gate": "feed_forward.w1", "up": "feed_forward.w3",
    "down": "feed_forward.w2", "norm": "norm", "head": "output",
}  # fmt: skip


def spelled(
    embed: str, layers: str, attention: str, ffn: str, norms: tuple[str, str, str] = ("norm1", "norm2", "norm")
) -> dict[str, str]:
    """Names with the containers spelled in one of the usual ways."""
    return {
        **NAMES, "embed": embed, "layers": layers, "attn_norm": norms[0], "ffn_norm": norms[1], "norm": norms[2],
        "head": "lm_head",
        **{part: f"{attention}.{part}_proj" for part in "qkvo"}, **{part: f"{ffn}.{part}_proj" for part in ("gate", "up",
        "down")},
    }  # fmt: skip


class Decoder(nn.Module):
    """RMSNorm, grouped heads, a gated feed-forward; `position`: "halves", "neighbours", "alibi" or "none"."""

    def __init__(
        self, names: dict[str, str], position: str, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_ff=48, n_vocab=61,
        head_dim=0,
        eps=1e-5, theta=10000.0, tied=True, qkv_bias=False, frequencies: Tensor | None = None, magnitude=1.0, max_bias=8.0,
    ):  # fmt: skip
        super().__init__()
        head_dim = head_dim or n_embd // n_head
        self.names, self.position, self.n_layer, self.n_head, self.n_kv_head = names, position, n_layer, n_head, n_kv_head
        self.theta, self.tied, self.magnitude = theta, tied, magnitude
        self.frequencies = theta ** (-torch.arange(0, head_dim, 2).double() / head_dim) if frequencies is None else frequencies
        power = 2 ** math.floor(math.log2(n_head))
        slopes = [2 ** (-max_bias * (i + 1) / power) for i in range(power)]
        slopes += [2 ** (-max_bias * (2 * i + 1) / (2 * power)) for i in range(n_head - power)]
        self.slopes = torch.tensor(slopes) if position == "alibi" else None

        def put(name: str, module: nn.Module) -> None:
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, module)

        def linear(n_in: int, n_out: int, bias: bool = False) -> nn.Module:
            return nn.Linear(n_in, n_out, bias=bias)

        put(names["embed"], nn.Embedding(n_vocab, n_embd))
        for i in range(n_layer):
            at = f"{names['layers']}.{i}."
            put(at + names["attn_norm"], RMSNorm(n_embd, eps))
            put(at + names["q"], linear(n_embd, n_head * head_dim, qkv_bias))
            put(at + names["k"], linear(n_embd, n_kv_head * head_dim, qkv_bias))
            put(at + names["v"], linear(n_embd, n_kv_head * head_dim, qkv_bias))
            put(at + names["o"], linear(n_head * head_dim, n_embd))
            put(at + names["ffn_norm"], RMSNorm(n_embd, eps))
            put(at + names["gate"], linear(n_embd, n_ff))
            put(at + names["up"], linear(n_embd, n_ff))
            put(at + names["down"], linear(n_ff, n_embd))
        put(names["norm"], RMSNorm(n_embd, eps))
        if not tied:
            put(names["head"], linear(n_embd, n_vocab))

    def part(self, name: str, layer: int | None = None) -> nn.Module:
        return self.get_submodule(self.names[name] if layer is None else f"{self.names['layers']}.{layer}.{self.names[name]}")

    def forward(self, ids: Tensor) -> Tensor:
        x = self.part("embed")(ids)
        for i in range(self.n_layer):
            h = self.part("attn_norm", i)(x)
            q = heads_of(self.part("q", i)(h), self.n_head)
            k, v = (heads_of(self.part(name, i)(h), self.n_kv_head) for name in "kv")
            if self.position == "halves":
                q, k = (rotate_halves(t, self.frequencies, self.magnitude) for t in (q, k))
            elif self.position == "neighbours":
                q, k = (rotate_neighbours(t, self.theta) for t in (q, k))
            x = x + self.part("o", i)(causal_attention(q, k, v, self.slopes))
            h = self.part("ffn_norm", i)(x)
            x = x + self.part("down", i)(F.silu(self.part("gate", i)(h)) * self.part("up", i)(h))
        x = self.part("norm")(x)
        return F.linear(x, self.part("embed").weight) if self.tied else self.part("head")(x)  # type: ignore[arg-type]
