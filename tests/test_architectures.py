"""Every architecture option gives the logits of a decoder written from the papers in PyTorch, however the prompt is fed."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
from tiny_models import ARCHITECTURES, load_weights, write_model

import pocketlm
from pocketlm.runtime.hyper import Rope
from pocketlm.runtime.positions import alibi_slopes, rope_frequencies

torch = pytest.importorskip("torch", reason="PyTorch is the independent implementation")
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

LIMIT = 1e-4  # largest difference of a logit between float32 here and float64 there
ACTIVATIONS = {"gelu_tanh": nn.GELU("tanh"), "gelu_erf": nn.GELU(), "silu": nn.SiLU(), "relu": nn.ReLU()}

# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────────


def parameter(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values).double(), requires_grad=False)


def linear(weights: dict[str, np.ndarray], *names: str) -> nn.Linear:
    matrix = np.concatenate([weights[f"{name}.weight"] for name in names])
    biases = [weights.get(f"{name}.bias") for name in names]
    module = nn.Linear(matrix.shape[1], matrix.shape[0], bias=biases[0] is not None)
    module.weight = parameter(matrix)
    if biases[0] is not None:
        module.bias = parameter(np.concatenate([bias for bias in biases if bias is not None]))
    return module


def norm(weights: dict[str, np.ndarray], name: str, kind: str, eps: float) -> nn.Module:
    weight = parameter(weights[f"{name}.weight"])
    if kind == "rms":
        module: Any = nn.RMSNorm(len(weight), eps)
    else:
        module = nn.LayerNorm(len(weight), eps, bias=f"{name}.bias" in weights)
        if f"{name}.bias" in weights:
            module.bias = parameter(weights[f"{name}.bias"])
    module.weight = weight
    return module


def slopes_of(n_head: int, max_bias: float) -> Tensor:
    """ALiBi's own recipe: geometric for powers of two, else the next lower power's and every other one of the next higher's."""

    def geometric(n: int) -> list[float]:
        ratio = 2.0 ** -(max_bias / n)
        return [ratio ** (i + 1) for i in range(n)]

    lower = 2 ** math.floor(math.log2(n_head))
    return torch.tensor(geometric(lower) + geometric(2 * lower)[0::2][: n_head - lower], dtype=torch.float64)


class Rotary(nn.Module):
    """RoFormer's rotation as a product of complex numbers, its frequencies scaled as Position Interpolation or YaRN say."""

    def __init__(self, options: dict[str, Any], head_dim: int, n_ctx: int):
        super().__init__()
        self.dims = options.get("rope_dims") or head_dim
        self.interleaved = options.get("rope_pairs", "interleaved") == "interleaved"
        scaling, theta = options.get("rope", {}), options.get("rope_theta", 10000.0)
        frequencies = theta ** -(torch.arange(0, self.dims, 2, dtype=torch.float64) / self.dims)
        if (factors := options.get("rope_factors")) is not None:
            frequencies = frequencies / torch.tensor(factors, dtype=torch.float32).double()
        self.magnitude, kind, factor = scaling.get("attn_factor", 1.0), scaling.get("type", "none"), scaling.get("factor", 1.0)
        if kind == "linear":
            frequencies = frequencies / factor
        if kind == "yarn":
            context = scaling.get("original_context_length", n_ctx)
            first, last = (
                self.dims * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))
                for turns in (scaling.get("yarn_beta_fast", 32.0), scaling.get("yarn_beta_slow", 1.0))
            )
            first, last = max(math.floor(first), 0), min(math.ceil(last), self.dims - 1)
            interpolated = ((torch.arange(self.dims // 2) - first) / max(last - first, 0.001)).clamp(0, 1).double()
            frequencies = frequencies * (1 - interpolated) + frequencies / factor * interpolated
            self.magnitude *= 0.1 * math.log(factor) + 1
        self.frequencies = frequencies

    def forward(self, x: Tensor) -> Tensor:  # [heads, n, head_dim]
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.frequencies
        turn = torch.polar(torch.full_like(angles, self.magnitude), angles)
        rotated, rest = x[..., : self.dims], x[..., self.dims :]
        if self.interleaved:
            pairs = torch.view_as_complex(rotated.reshape(*rotated.shape[:-1], -1, 2).contiguous())
            return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), rest], -1)
        real, imaginary = rotated.chunk(2, -1)
        pairs = torch.complex(real, imaginary) * turn
        return torch.cat([pairs.real, pairs.imag, rest], -1)


class Block(nn.Module):
    def __init__(
        self, weights: dict[str, np.ndarray], at: str, options: dict[str, Any], positions: nn.Module, bias: Tensor | None
    ):
        super().__init__()
        kind, eps = options["norm"], options.get("eps", 1e-5)
        self.n_head, self.n_kv_head = options.get("n_head", 4), options.get("n_kv_head") or options.get("n_head", 4)
        self.before_attention, self.before_ff = (norm(weights, f"{at}{name}_norm", kind, eps) for name in ("attn", "ffn"))
        names = ["attn_qkv"] if f"{at}attn_qkv.weight" in weights else ["attn_q", "attn_k", "attn_v"]
        self.qkv = linear(weights, *(at + name for name in names))
        self.mix, self.up, self.down = (linear(weights, at + name) for name in ("attn_output", "ffn_up", "ffn_down"))
        self.gate = linear(weights, f"{at}ffn_gate") if options["gated"] else None
        self.activation, self.positions, self.bias = ACTIVATIONS[options["activation"]], positions, bias

    def forward(self, x: Tensor) -> Tensor:  # [n, width]
        n = len(x)
        heads = self.qkv(self.before_attention(x)).view(n, self.n_head + 2 * self.n_kv_head, -1).transpose(0, 1)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head])
        mask = torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)
        if self.bias is not None:
            places = torch.arange(n, dtype=torch.float64)
            mask = mask - self.bias[:, None, None] * (places[:, None] - places).clamp(min=0)
        mixed = F.scaled_dot_product_attention(
            self.positions(q)[None], self.positions(k)[None], v[None], mask.expand(1, self.n_head, n, n), enable_gqa=True
        )
        x = x + self.mix(mixed[0].transpose(0, 1).reshape(n, -1))
        h = self.before_ff(x)
        return x + self.down(self.activation(self.up(h)) if self.gate is None else self.activation(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """`options` are those of `tiny_models.write_model`."""

    def __init__(self, weights: dict[str, np.ndarray], options: dict[str, Any]):
        super().__init__()
        options = ARCHITECTURES[options.get("arch", "llama")] | options
        n_head, width = options.get("n_head", 4), weights["token_embd.weight"].shape[1]
        head_dim = options.get("head_dim") or width // n_head
        kind = options["position"]
        positions = Rotary(options, head_dim, options.get("n_ctx", 128)) if kind == "rope" else nn.Identity()
        bias = slopes_of(n_head, options.get("max_bias", 8.0)) if kind == "alibi" else None
        self.tokens = parameter(weights["token_embd.weight"])
        self.places = parameter(weights["position_embd.weight"]) if kind == "learned" else None
        n_layer = sum(name.endswith("attn_norm.weight") for name in weights)
        self.blocks = nn.Sequential(*(Block(weights, f"blk.{i}.", options, positions, bias) for i in range(n_layer)))
        self.last = norm(weights, "output_norm", options["norm"], options.get("eps", 1e-5))
        self.head = linear(weights, "output" if "output.weight" in weights else "token_embd")

    def forward(self, ids: np.ndarray) -> np.ndarray:  # [n] -> [n, n_vocab]
        x = F.embedding(torch.from_numpy(ids), self.tokens)
        if self.places is not None:
            x = x + self.places[: len(ids)]
        return self.head(self.last(self.blocks(x))).numpy()


# ── the options ──────────────────────────────────────────────────────────────────────────────────────────────────────

OWN = {"arch": "pocketlm"}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"arch": "gpt2"},
    "gpt2 without biases": {"arch": "gpt2", "biases": False},
    "gpt2, three tensors for q, k, v": {"arch": "gpt2", "fused": False},
    "gpt2, own head": {"arch": "gpt2", "tied": False},
    "llama": {"arch": "llama"},
    "llama, own head": {"arch": "llama", "tied": False},
    "llama, grouped heads": {"arch": "llama", "n_head": 8, "n_kv_head": 2},
    "llama, one key head": {"arch": "llama", "n_head": 6, "n_kv_head": 1, "n_embd": 48},
    "llama, odd widths": {"arch": "llama", "n_embd": 66, "n_head": 3, "n_ff": 77},
    "llama, wide heads": {"arch": "llama", "head_dim": 40, "n_kv_head": 2},
    "llama, narrow heads": {"arch": "llama", "head_dim": 6},
    "llama, fused q, k, v and biases": {"arch": "llama", "fused": True, "biases": True, "n_kv_head": 2},
    "llama, a larger epsilon": {"arch": "llama", "eps": 0.1},
    "llama, half-split pairs": {"arch": "llama", "rope_pairs": "half"},
    "rope on a part of the head": {"arch": "llama", "rope_dims": 6},
    "rope on a part of the head, half-split": {"arch": "llama", "rope_dims": 6, "rope_pairs": "half"},
    "another rope base": {"arch": "llama", "rope_theta": 500.0},
    "linear rope scaling": {"arch": "llama", "rope": {"type": "linear", "factor": 2.5}},
    "yarn": {"arch": "llama", "head_dim": 32, "rope": YARN},
    "yarn, half-split": {"arch": "llama", "head_dim": 32, "rope": YARN, "rope_pairs": "half"},
    "yarn with its knobs": {
        "arch": "llama", "head_dim": 32, "n_kv_head": 2,
        "rope": {**YARN, "attn_factor": 0.9, "yarn_beta_fast": 8.0, "yarn_beta_slow": 0.5},
    },
    "frequency factors": {"arch": "llama", "rope_factors": np.linspace(1, 8, 8)},
    "refact": {"arch": "refact"},
    "refact, 6 heads in 3 groups": {"arch": "refact", "n_head": 6, "n_kv_head": 3, "n_embd": 48},
    "refact, 12 heads": {"arch": "refact", "n_head": 12, "n_embd": 96},
    "refact, a steeper slope": {"arch": "refact", "max_bias": 16.0},
    "layer norm, rope, gelu": {**OWN, "norm": "layer", "activation": "gelu_erf", "gated": False, "biases": True},
    "layer norm without biases, alibi, relu": {
        **OWN, "norm": "layer", "position": "alibi", "activation": "relu", "gated": False,
    },
    "rms, learned, gated gelu": {**OWN, "position": "learned", "activation": "gelu_tanh"},
    "no positions, exact gelu, gated": {**OWN, "position": "none", "activation": "gelu_erf", "biases": True},
    "gated relu, fused": {**OWN, "activation": "relu", "fused": True, "n_kv_head": 2},
    "nanoGPT: exact gelu": {"arch": "gpt2", "activation": "gelu_erf", "biases": False},
    "one layer, one head": {**OWN, "n_layer": 1, "n_head": 1, "n_embd": 16},
}  # fmt: skip
QUANTIZED = {
    f"{arch}, {kind}": {"arch": arch, "format": kind, "n_kv_head": 2 if arch != "gpt2" else None}
    for arch in ("gpt2", "llama", "refact")
    for kind in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
}


@pytest.mark.parametrize("options", [*CASES.values(), *QUANTIZED.values()], ids=[*CASES, *QUANTIZED])
def test_logits_are_the_references_in_one_block_and_token_by_token(tmp_path, options):
    path = write_model(tmp_path / "model.gguf", **options)
    random = np.random.default_rng(len(str(options)))
    with pocketlm.load(path, backend="numpy", threads=2) as model, torch.no_grad():
        ids = random.integers(0, model.hyper.n_vocab, 90)
        expected = Decoder(load_weights(path), options)(ids)
        executor, cache = model.executor, model.executor.cache
        assert np.abs(executor.forward(ids, rows="all") - expected).max() < LIMIT

        cache.truncate(0)
        one_by_one = np.concatenate([executor.forward(ids[i : i + 1]) for i in range(len(ids))])
        assert np.abs(one_by_one - expected).max() < LIMIT

        cache.truncate(0)
        parts = np.split(ids, np.sort(random.choice(np.arange(1, len(ids)), 5, replace=False)))
        assert np.abs(np.concatenate([executor.forward(part, rows="all") for part in parts]) - expected).max() < LIMIT

        cache.truncate(31)  # what was there before is still right, what came after is gone
        assert np.abs(executor.forward(ids[31:], rows="last")[0] - expected[-1]).max() < LIMIT


def test_one_prompt_may_be_longer_than_a_block(tmp_path):
    options = {"arch": "llama", "n_ctx": 700, "n_kv_head": 2}
    path = write_model(tmp_path / "model.gguf", **options)
    ids = np.random.default_rng(0).integers(0, 256, 650)
    with pocketlm.load(path, backend="numpy", threads=2) as model, torch.no_grad():
        expected = Decoder(load_weights(path), options)(ids)
        assert np.abs(model.logits(ids) - expected).max() < LIMIT
        model.executor.cache.truncate(0)
        assert np.abs(model.executor.forward(ids)[0] - expected[-1]).max() < LIMIT


@pytest.mark.parametrize("options", [{"arch": "llama"}, {"arch": "llama", "rope_pairs": "half"}, {"arch": "refact"}], ids=str)
def test_a_removed_stretch_leaves_one_layer_exact(tmp_path, options):
    """In the first layer keys depend on their token and place alone, so moving them is no approximation there."""
    options = {**options, "n_layer": 1, "n_kv_head": 2}
    path = write_model(tmp_path / "model.gguf", **options)
    ids = np.random.default_rng(1).integers(0, 256, 60)
    with pocketlm.load(path, backend="numpy", threads=1) as model, torch.no_grad():
        model.executor.forward(ids[:50])
        assert model.executor.cache.remove(7, 23)
        kept = np.concatenate([ids[:7], ids[23:]])
        expected = Decoder(load_weights(path), options)(kept)[-10:]
        assert np.abs(model.executor.forward(ids[50:], rows="all") - expected).max() < LIMIT


def test_learned_positions_cannot_be_moved(tmp_path):
    with pocketlm.load(write_model(tmp_path / "model.gguf", arch="gpt2"), backend="numpy") as model:
        model.executor.forward(np.arange(20))
        assert not model.executor.cache.remove(3, 9)
        assert model.executor.cache.length == 20


@pytest.mark.parametrize("n_head", [1, 2, 3, 5, 6, 7, 8, 9, 12, 20, 31, 64])
def test_alibi_slopes_are_the_papers(n_head):
    np.testing.assert_allclose(alibi_slopes(n_head, 8.0), slopes_of(n_head, 8.0), rtol=1e-6)


# ── rope scaling beside transformers ─────────────────────────────────────────────────────────────────────────────────


def transformers_frequencies(kind: str, theta: float, head_dim: int, **parameters: float) -> tuple[np.ndarray, float]:
    utilities = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is not installed")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=8192,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )  # fmt: skip
    frequencies, magnitude = utilities.ROPE_INIT_FUNCTIONS[kind](cast(Any, config), torch.device("cpu"))
    return frequencies.double().numpy(), magnitude


@pytest.mark.parametrize("factor", [1.5, 4.0, 32.0])
@pytest.mark.parametrize(("theta", "head_dim", "context"), [(10000.0, 64, 2048), (500000.0, 128, 8192), (1e6, 96, 32768)])
def test_yarn_is_transformers_yarn(theta, head_dim, context, factor):
    expected = transformers_frequencies("yarn", theta, head_dim, factor=factor, original_max_position_embeddings=context)
    frequencies, magnitude = rope_frequencies(Rope(theta, head_dim, "half", "yarn", factor, context))
    np.testing.assert_allclose(frequencies, expected[0], rtol=2e-6)
    assert magnitude == pytest.approx(expected[1])


def test_linear_scaling_is_transformers_linear_scaling():
    expected, magnitude = transformers_frequencies("linear", 10000.0, 64, factor=3.0)
    frequencies, own_magnitude = rope_frequencies(Rope(10000.0, 64, "half", "linear", 3.0))
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
    assert magnitude == own_magnitude == 1.0


def test_llama_3_frequencies_come_as_a_tensor_of_factors():
    """A converter writes plain frequency / scaled frequency for every pair into `rope_freqs.weight`."""
    parameters = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    expected, magnitude = transformers_frequencies("llama3", 500000.0, 128, **parameters)
    lowest, highest, factors = 8192 / 1.0, 8192 / 4.0, []
    for i in range(0, 128, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / 128)
        smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if wavelength < highest else 8.0 if wavelength > lowest else between)
    frequencies, own_magnitude = rope_frequencies(Rope(500000.0, 128, "half"), np.array(factors, np.float32))
    np.testing.assert_allclose(frequencies, expected, rtol=2e-6)
    assert magnitude == own_magnitude == 1.0
