"""The forward passes of code bases that people train their own models with, in PyTorch, each in the plainest way.

Every module's parameters have the names that its code base gives them. Nothing is shared with the package.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int = 0) -> Tensor:
    """q [heads, n, d]; k, v [kv_heads, n, d] -> [n, heads * d]; `window`: positions seen, the own one among them."""
    heads, n, d = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[0], 0) for t in (k, v))
    hidden = torch.ones(n, n).triu(1).bool()
    if window:
        hidden |= torch.ones(n, n).tril(-window).bool()
    scores = (scale * q @ k.transpose(1, 2)).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, heads * d)


def split(x: Tensor, n_heads: int) -> Tensor:
    """[n, heads * d] -> [heads, n, d]."""
    return x.view(len(x), n_heads, -1).transpose(0, 1)


def halves(x: Tensor, theta: float, n_dims: int = 0, ratio: int = 1, backwards: bool = False) -> Tensor:
    """Value i of the first n_dims turns with value i + n_dims/2; `ratio`: what positions are divided by."""
    n_dims = n_dims or x.shape[-1]
    positions = torch.arange(x.shape[1]).double() / ratio
    angles = torch.outer(positions, theta ** (-torch.arange(0, n_dims, 2).double() / n_dims)).float()
    a, b, rest = x[..., : n_dims // 2], x[..., n_dims // 2 : n_dims], x[..., n_dims:]
    cos, sin = angles.cos(), -angles.sin() if backwards else angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def tree(names: dict[str, nn.Module]) -> nn.Module:
    """A module with these modules in it, at these places."""
    root = nn.Module()
    for name, module in names.items():
        *path, last = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)
    return root


class Model(nn.Module):
    """`parts`: name -> module. `self[name]` is one of them."""

    def __init__(self, parts: dict[str, nn.Module]):
        super().__init__()
        for name, child in tree(parts).named_children():
            self.add_module(name, child)

    def __getitem__(self, name: str) -> Any:
        return self.get_submodule(name)


class NanoChat(Model):
    """The generations since October 2025, each with what the ones before it had and its own (`since`):

    "lambdas" (January 2026): numbers for the residual stream and the embedding, windows by a pattern. "values" (16 January):
    embeddings of tokens for the values, gated. "capped" (3 March): logits up to 20. "tuned" (9 March): other numbers
    everywhere. "smear" (14 March): some of the token before, and a middle layer taken back.
    """

    GENERATIONS = ("", "lambdas", "values", "capped", "tuned", "smear")

    def __init__(self, since="", n_layer=3, n_head=4, n_kv_head=2, n_embd=32, vocab=61, padded=0, pattern="L", seq=48):
        self.age = self.GENERATIONS.index(since)
        parts: dict[str, nn.Module] = {"transformer.wte": nn.Embedding(padded or vocab, n_embd)}
        d, n_gate = n_embd // n_head, 12 if self.age >= 4 else 32
        for i in range(n_layer):
            at = f"transformer.h.{i}."
            sizes = {"attn.c_q": n_head * d, "attn.c_k": n_kv_head * d, "attn.c_v": n_kv_head * d, "attn.c_proj": n_embd}
            parts |= {at + name: nn.Linear(n_embd, rows, bias=False) for name, rows in sizes.items()}
            parts |= {at + "mlp.c_fc": nn.Linear(n_embd, 4 * n_embd, bias=False)}
            parts |= {at + "mlp.c_proj": nn.Linear(4 * n_embd, n_embd, bias=False)}
            if self.age >= 2 and i % 2 == (n_layer - 1) % 2:
                parts[at + "attn.ve_gate"] = nn.Linear(n_gate, n_kv_head, bias=False)
                parts[f"value_embeds.{i}"] = nn.Embedding(padded or vocab, n_kv_head * d)
        if self.age >= 5:
            parts["smear_gate"] = nn.Linear(24, 1, bias=False)
        super().__init__({**parts, "lm_head": nn.Linear(n_embd, padded or vocab, bias=False)})
        self.args = {"sequence_len": seq, "vocab_size": vocab, "n_layer": n_layer, "n_head": n_head, "n_kv_head": n_kv_head,
                     "n_embd": n_embd}  # fmt: skip
        self.windows = [0] * n_layer
        if self.age >= 1:
            self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(n_layer)), nn.Parameter(torch.zeros(n_layer))
            self.args["window_pattern"] = pattern
            short = [pattern[i % len(pattern)] == "S" for i in range(n_layer - 1)]
            part = {4: 3, 5: 4}.get(self.age, 0)
            seen = math.ceil(seq // part / 128) * 128 if part else seq // 2
            self.windows = [seen + 1 if is_short else 0 for is_short in short] + [0]
        if self.age >= 5:
            self.smear_lambda, self.backout_lambda = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        theta, sharper = (1e5, {4: 1.15, 5: 1.2}[self.age]) if self.age >= 4 else (1e4, 1.0)
        x = rms(self["transformer.wte"](ids))
        if self.age >= 5:
            gate = self.smear_lambda * torch.sigmoid(self["smear_gate"](x[1:, :24]))
            x = torch.cat([x[:1], x[1:] + gate * x[:-1]])
        x0, middle = x, x
        for i in range(self.args["n_layer"]):
            if self.age >= 1:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            attn, mlp, h = self[f"transformer.h.{i}.attn"], self[f"transformer.h.{i}.mlp"], rms(x)
            q = rms(halves(split(attn.c_q(h), self.args["n_head"]), theta, backwards=True))
            k = rms(halves(split(attn.c_k(h), self.args["n_kv_head"]), theta, backwards=True))
            v = split(attn.c_v(h), self.args["n_kv_head"])
            if hasattr(attn, "ve_gate"):
                gate = (3 if self.age >= 4 else 2) * torch.sigmoid(attn.ve_gate(h[:, : attn.ve_gate.in_features]))
                v = v + gate.T[:, :, None] * split(self[f"value_embeds.{i}"](ids), self.args["n_kv_head"])
            scale = sharper**2 * q.shape[-1] ** -0.5  # of queries and of keys there, which here are rounded to half precision
            x = x + attn.c_proj(attention(q, k, v, scale, self.windows[i]))
            x = x + mlp.c_proj(F.relu(mlp.c_fc(rms(x))).square())
            middle = x if i == self.args["n_layer"] // 2 else middle
        x = x - self.backout_lambda * middle if self.age >= 5 else x
        logits = self["lm_head"](rms(x))[:, : self.args["vocab_size"]]
        cap = 20 if self.age == 3 else 15
        return cap * torch.tanh(logits / cap)


class GPTNeo(Model):
    """EleutherAI's: no 1/√d, every second layer sees `window` positions only."""

    def __init__(self, n_layer=4, n_head=4, n_embd=32, vocab=61, n_ctx=64, window=8):
        parts: dict[str, nn.Module] = {
            "transformer.wte": nn.Embedding(vocab, n_embd), "transformer.wpe": nn.Embedding(n_ctx, n_embd),
            "transformer.ln_f": nn.LayerNorm(n_embd),
        }  # fmt: skip
        for i in range(n_layer):
            at = f"transformer.h.{i}."
            parts |= {at + "ln_1": nn.LayerNorm(n_embd), at + "ln_2": nn.LayerNorm(n_embd)}
            parts |= {
                at + f"attn.attention.{p}_proj": nn.Linear(n_embd, n_embd, bias=p == "out") for p in ("q", "k", "v", "out")
            }
            parts |= {at + "mlp.c_fc": nn.Linear(n_embd, 4 * n_embd), at + "mlp.c_proj": nn.Linear(4 * n_embd, n_embd)}
        super().__init__(parts)
        for i in range(n_layer):  # buffers of the published files
            module = self[f"transformer.h.{i}.attn.attention"]
            module.register_buffer("bias", torch.ones(n_ctx, n_ctx).tril().view(1, 1, n_ctx, n_ctx).bool())
            module.register_buffer("masked_bias", torch.tensor(-1e9))
        self.n_layer, self.n_head, self.window = n_layer, n_head, window
        self.config = {
            "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "num_heads": n_head, "num_layers": n_layer,
            "hidden_size": n_embd, "max_position_embeddings": n_ctx, "attention_types": [[["global", "local"], n_layer // 2]],
            "window_size": window, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "vocab_size": vocab,
        }  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        x = self["transformer.wte"](ids) + self["transformer.wpe"](torch.arange(len(ids)))
        for i in range(self.n_layer):
            block = self[f"transformer.h.{i}"]
            h, attn = block.ln_1(x), block.attn.attention
            q, k, v = (split(part(h), self.n_head) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
            x = x + attn.out_proj(attention(q, k, v, 1.0, self.window if i % 2 else 0))
            x = x + block.mlp.c_proj(F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh"))
        return self["transformer.ln_f"](x) @ self["transformer.wte"].weight.T


class LitGPT(Model):
    """litGPT's GPT; `mlp`: GptNeoxMLP or LLaMAMLP; `grouped`: queries, keys and values group by group, as until 2024."""

    def __init__(
        self, mlp="GptNeoxMLP", norm="LayerNorm", parallel=True, shared=False, grouped=False, n_layer=2, n_head=4, n_kv_head=2,
        n_embd=32, n_ff=48, vocab=61, part=0.25, bias=True, ratio=1,
    ):  # fmt: skip
        d, gated = n_embd // n_head, mlp == "LLaMAMLP"

        def normal() -> nn.Module:
            return nn.LayerNorm(n_embd) if norm == "LayerNorm" else nn.RMSNorm(n_embd, eps=1e-5)

        parts: dict[str, nn.Module] = {"lm_head": nn.Linear(n_embd, vocab, bias=False), "transformer.ln_f": normal()}
        parts["transformer.wte"] = nn.Embedding(vocab, n_embd)
        for i in range(n_layer):
            at = f"transformer.h.{i}."
            name = "attn.attn" if grouped else "attn.qkv"
            parts |= {at + "norm_1": normal(), at + name: nn.Linear(n_embd, (n_head + 2 * n_kv_head) * d, bias=bias)}
            parts |= {
                at + "attn.proj": nn.Linear(n_embd, n_embd, bias=bias),
                at + "mlp.proj": nn.Linear(n_ff, n_embd, bias=bias),
            }
            parts |= {at + f"mlp.{fc}": nn.Linear(n_embd, n_ff, bias=bias) for fc in (("fc_1", "fc_2") if gated else ("fc",))}
            if not shared:
                parts[at + "norm_2"] = normal()
        super().__init__(parts)
        self.sizes, self.gated, self.grouped = (n_head, n_kv_head, d), gated, grouped
        self.parallel, self.shared = parallel, shared
        self.n_layer, self.n_dims, self.ratio = n_layer, int(part * d), ratio
        self.config = {
            "name": "home-made", "n_layer": n_layer, "n_head": n_head, "n_query_groups": n_kv_head, "head_size": d,
            "block_size": 48, "padded_vocab_size": vocab, "vocab_size": vocab, "rotary_percentage": part, "rope_base": 10000,
            "parallel_residual": parallel, "shared_attention_norm": shared, "norm_class_name": norm, "mlp_class_name": mlp,
            "norm_eps": 1e-05, "gelu_approximate": "none", "bias": bias, "lm_head_bias": False, "scale_embeddings": False,
            "norm_qk": False, "rope_adjustments": None, "rope_condense_ratio": ratio,
            "n_embd": n_embd, "intermediate_size": n_ff,
        }  # fmt: skip

    def yaml(self) -> str:
        def said(value: Any) -> str:
            return json.dumps(value) if value is None or isinstance(value, bool) else str(value)

        return "".join(f"{name}: {said(value)}\n" for name, value in sorted(self.config.items()))

    def forward(self, ids: Tensor) -> Tensor:
        n_head, n_kv, d = self.sizes
        x = self["transformer.wte"](ids)
        for i in range(self.n_layer):
            block = self[f"transformer.h.{i}"]
            h = block.norm_1(x)
            if self.grouped:
                rows = block.attn.attn(h).view(len(x), n_kv, n_head // n_kv + 2, d)
                q = rows[:, :, :-2].reshape(len(x), n_head, d).transpose(0, 1)
                k, v = rows[:, :, -2].transpose(0, 1), rows[:, :, -1].transpose(0, 1)
            else:
                q, k, v = (split(p, p.shape[1] // d) for p in block.attn.qkv(h).split([n_head * d, n_kv * d, n_kv * d], -1))
            q, k = (halves(t, 10000.0, self.n_dims, self.ratio) for t in (q, k))
            mixed = block.attn.proj(attention(q, k, v, d**-0.5))
            if not self.parallel:
                x = x + mixed
            g = h if self.shared else block.norm_2(x)
            inner = F.silu(block.mlp.fc_1(g)) * block.mlp.fc_2(g) if self.gated else F.gelu(block.mlp.fc(g))
            x = x + block.mlp.proj(inner) + (mixed if self.parallel else 0)
        return self["lm_head"](self["transformer.ln_f"](x))


class MiniMind3(Model):
    """A Qwen3 with 6400 tokens: heads normalised before they are rotated; no configuration is saved.

    `n_experts`: in place of a feed-forward layer, `n_used` of them for a token. `n_shared`, and without `norms` of heads:
    minimind2.
    """

    def __init__(self, n_layer=2, n_head=4, n_kv_head=2, d=16, vocab=6400, n_experts=0, n_used=1, n_shared=0, norms=True):
        n_embd, n_ff, eps = n_head * d, 96, 1e-6 if norms else 1e-5
        parts: dict[str, nn.Module] = {"model.embed_tokens": nn.Embedding(vocab, n_embd)}
        for i in range(n_layer):
            at = f"model.layers.{i}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                parts[at + name] = nn.RMSNorm(n_embd, eps=eps)
            for name in ("q_norm", "k_norm") if norms else ():
                parts[at + f"self_attn.{name}"] = nn.RMSNorm(d, eps=eps)
            sizes = {"q": n_head * d, "k": n_kv_head * d, "v": n_kv_head * d, "o": n_embd}
            parts |= {at + f"self_attn.{name}_proj": nn.Linear(n_embd, rows, bias=False) for name, rows in sizes.items()}
            if n_experts:
                parts[at + "mlp.gate"] = nn.Linear(n_embd, n_experts, bias=False)
            layers = [f"experts.{e}." for e in range(n_experts)] + [f"shared_experts.{e}." for e in range(n_shared)]
            for layer in layers or [""]:
                parts |= {at + f"mlp.{layer}{name}_proj": nn.Linear(n_embd, n_ff, bias=False) for name in ("gate", "up")}
                parts[at + f"mlp.{layer}down_proj"] = nn.Linear(n_ff, n_embd, bias=False)
        super().__init__({**parts, "model.norm": nn.RMSNorm(n_embd, eps=eps)})
        self.n_layer, self.n_head, self.n_kv_head = n_layer, n_head, n_kv_head
        self.n_experts, self.n_used, self.n_shared = n_experts, n_used, n_shared

    def forward(self, ids: Tensor) -> Tensor:
        x = self["model.embed_tokens"](ids)
        for i in range(self.n_layer):
            block = self[f"model.layers.{i}"]
            a, h = block.self_attn, block.input_layernorm(x)
            q, k = (split(p(h), n) for p, n in ((a.q_proj, self.n_head), (a.k_proj, self.n_kv_head)))
            if hasattr(a, "q_norm"):
                q, k = a.q_norm(q), a.k_norm(k)
            q, k = halves(q, 1e6), halves(k, 1e6)
            x = x + a.o_proj(attention(q, k, split(a.v_proj(h), self.n_kv_head), q.shape[-1] ** -0.5))
            x = x + self.mixture(block.mlp, block.post_attention_layernorm(x))
        return self["model.norm"](x) @ self["model.embed_tokens"].weight.T

    def mixture(self, mlp: Any, h: Tensor) -> Tensor:
        def layer(part: Any, h: Tensor) -> Tensor:
            return part.down_proj(F.silu(part.gate_proj(h)) * part.up_proj(h))

        if not self.n_experts:
            return layer(mlp, h)
        shares, chosen = mlp.gate(h).softmax(-1).topk(self.n_used)
        shares = shares / shares.sum(-1, keepdim=True)
        out = torch.zeros_like(h)
        for t, row in enumerate(h):
            for share, number in zip(shares[t], chosen[t].tolist(), strict=True):
                out[t] += share * layer(getattr(mlp.experts, str(number)), row)
        return out + sum(layer(getattr(mlp.shared_experts, str(e)), h) for e in range(self.n_shared))


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Parameters random and none near a special value, so that a mixed-up tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            one = name.endswith("weight") or name.startswith("resid")
            p.copy_(noise / math.sqrt(p.shape[-1]) if p.ndim > 1 else 0.2 * noise + (1.0 if one else 0.0))
    return model.eval()
