"""The trainer's decoder: published sizes, the way through export, and the checks that each must catch its mistake."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")

import train_checks  # noqa: E402

from pocketlm.errors import PocketlmError, UsageError  # noqa: E402
from pocketlm.export.dialects import read_canonical  # noqa: E402
from pocketlm.export.export import export  # noqa: E402
from pocketlm.runtime.hyper import read_hyper  # noqa: E402
from pocketlm.runtime.model_file import open_model  # noqa: E402
from pocketlm.runtime.numpy_executor import NumpyExecutor  # noqa: E402
from pocketlm.runtime.plan import make_plan  # noqa: E402
from pocketlm.train import checks, decoder  # noqa: E402
from pocketlm.train.loop import learning_rate, losses, optimiser  # noqa: E402
from pocketlm.train.presets import PRESETS, Settings, Shape, changed  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")  # two take longer over sums as small as these

PUBLISHED = {  # parameters; nanoGPT's way of counting leaves learned positions out
    "chekhov-10m": (10_699_008, False),  # 10.7M
    "mini-tron-48m": (47_852_032, False),  # 47.85M
    "turkish-25m": (24_697_088, True),
    "turkish-68m": (67_580_416, True),  # 67.6M
    "gpt2-124m": (124_439_808, True),
}


def parameters(shape: Shape, positions: bool = True) -> int:
    with torch.device("meta"):
        module = decoder.Decoder(shape)
    table = 0 if positions or module.pos_emb is None else module.pos_emb.weight.numel()
    return sum(weight.numel() for weight in module.parameters()) - table


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    count, positions = PUBLISHED[name]
    assert parameters(PRESETS[name].shape, positions) == count


def test_presets_named_for_a_size_have_it() -> None:
    assert 45.5e6 < parameters(PRESETS["classics-46m"].shape, False) < 46.5e6
    assert 1.25e9 < parameters(PRESETS["polish-1.3b"].shape, False) < 1.35e9


def small(shape: Shape) -> Shape:
    """The same with a width of 8 values a head, two layers and 61 words."""
    return replace(shape, n_layer=2, n_embd=8 * shape.n_head, n_ff=48, n_vocab=61, n_ctx=24)


def randomised(module: Any) -> Any:
    """Every weight away from what a fresh model has, so that no part of it is without effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return module.eval()


def runtime_logits(path: Path, ids: list[int]) -> np.ndarray:
    with open_model(path) as file:
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        plan = make_plan(read_hyper(file.metadata, shapes["token_embd.weight"][0], path), shapes, path)
        executor = NumpyExecutor(plan, file.tensors, len(ids), 1)
        logits = executor.forward(np.array(ids), rows="all")
        executor.close()
    return logits


OTHER_SHAPES = {
    "no positions, untied": Shape(2, 4, 32, 61, 24, position="none", tied=False),
    "RoPE with LayerNorm, biases and GELU": Shape(
        2, 4, 32, 61, 24, 2, norm="layer", bias=True, gated=False, activation="gelu_erf"
    ),
    "ALiBi with six heads": Shape(2, 6, 48, 61, 24, 3, position="alibi"),
}


@pytest.mark.parametrize("name", [*PRESETS, *OTHER_SHAPES])
def test_a_compiled_checkpoint_goes_through_export_and_runs_the_same(tmp_path: Path, name: str) -> None:
    shape = small(PRESETS[name].shape) if name in PRESETS else OTHER_SHAPES[name]
    module = decoder.Decoder(shape)
    wrapped = torch.compile(module, backend="eager")  # its state dict has the real prefix
    optimizer = optimiser(module, Settings())
    rows = torch.randint(0, 61, (2, 9)).numpy()
    losses(wrapped, [(row[:-1], row[1:], np.ones(8, np.float32)) for row in rows], torch.device("cpu")).backward()
    optimizer.step()
    randomised(module)
    state = wrapped.state_dict()
    assert all(name.startswith("_orig_mod.") for name in state)
    torch.save({"model": state, "model_config": asdict(shape), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    canonical = read_canonical(tmp_path / "last.pt", tokenizer="none")
    assert canonical.dialect == "pocketlm's trainer"
    export(canonical, "test", tmp_path / "out.gguf", quant="f32", n_threads=1)
    ids = [3, 14, 15, 9, 26, 5, 35, 58, 0, 60, 7, 7]
    with torch.no_grad():
        expected = module(torch.tensor([ids]))[0].numpy()
    assert np.abs(runtime_logits(tmp_path / "out.gguf", ids) - expected).max() < 1e-4


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_every_check(name: str) -> None:
    torch.manual_seed(0)
    module = decoder.Decoder(small(PRESETS[name].shape))
    checks.check_fresh(module)
    train_checks.accumulation_is_one_large_batch(module)
    if name in ("tiny", "turkish-25m", "gpt2-124m"):  # RoPE, ALiBi, learned positions
        train_checks.overfits_one_batch(module)


ALIBI = Shape(2, 4, 32, 61, 24, position="alibi")


def test_a_view_of_the_future_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = decoder.F.scaled_dot_product_attention
    monkeypatch.setattr(decoder.F, "scaled_dot_product_attention", lambda q, k, v, bias, is_causal: attend(q, k, v, bias))
    with pytest.raises(PocketlmError, match="position 0 sees its future, the token at 1"):
        checks.sees_no_future(decoder.Decoder(Shape(2, 4, 32, 61, 24)))


@pytest.mark.parametrize("mistake", [lambda m: m.alibi.mul_(2), lambda m: m.alibi.neg_()])
def test_wrong_alibi_slopes_are_caught(mistake: Any) -> None:
    module = decoder.Decoder(ALIBI)
    mistake(module)
    with pytest.raises(PocketlmError, match="ALiBi adds"):
        checks.alibi_is_the_papers(module)


def test_a_soft_alibi_mask_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decoder.Decoder.alibi_bias
    monkeypatch.setattr(decoder.Decoder, "alibi_bias", lambda self, n: right(self, n).clamp(min=-1e4))
    with pytest.raises(PocketlmError, match=r"distance -1, where -inf is right"):
        checks.alibi_is_the_papers(decoder.Decoder(ALIBI))


def test_an_opinionated_fresh_model_is_caught() -> None:
    module = decoder.Decoder(ALIBI)
    with torch.no_grad():
        module.tok_emb.weight.mul_(50)
    with pytest.raises(PocketlmError, match=r"ln\(61\) is 4.111"):
        checks.starts_at_chance(module)


def test_a_weight_without_gradient_is_caught() -> None:
    module = decoder.Decoder(ALIBI)
    module.layers[1].ffn.up_proj.weight.requires_grad_(False)
    with pytest.raises(PocketlmError, match=r"no gradient reaches layers.1.ffn.up_proj.weight"):
        train_checks.overfits_one_batch(module)


def test_means_of_micro_batches_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(*arguments: Any) -> Any:
        return losses(*arguments) / max(1.0, float(sum(mask.sum() for _, _, mask in arguments[1])))

    monkeypatch.setattr(train_checks, "losses", mean)
    with pytest.raises(PocketlmError, match="differ from those of one large batch"):
        train_checks.accumulation_is_one_large_batch(decoder.Decoder(ALIBI))


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_only_matrices_decay() -> None:
    module = decoder.Decoder(replace(ALIBI, norm="layer", bias=True))
    decayed, rest = optimiser(module, Settings(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.3, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2}
    assert {p.dim() for p in rest["params"]} == {1}


def test_the_learning_rate_warms_up_and_falls_by_half_a_cosine() -> None:
    settings = Settings(steps=110, warmup=10, lr=0.5)
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[9] == rates[10] == pytest.approx(0.5)
    assert rates[60] == pytest.approx(0.275)  # the middle of 0.5 and 0.05
    assert rates[110] == pytest.approx(0.05)
    assert max(map(abs, np.diff(rates[10:]))) < 0.5 * math.pi / 200


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ({"n_heads": "3"}, "--set n_heads: expected one of n_layer, n_head"),
        ({"n_layer": "many"}, "--set n_layer=many: expected int"),
        ({"position": "absolute"}, "position absolute: expected one of rope, alibi, learned, none"),
        ({"n_head": "3"}, "width 128, 3 heads"),
        ({"n_head": "128"}, "a head has 1 values"),
        ({"n_embd": "-1"}, "1 or more"),
    ],
)
def test_shapes_that_cannot_be_are_usage_errors(pairs: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        changed(PRESETS["tiny"].shape, pairs)
