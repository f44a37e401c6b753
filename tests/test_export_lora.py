"""A LoRA merged before export computes what the base with the adapter computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_checks import logits_of

from pocketlm.errors import FileError
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export
from pocketlm.export.lora import read_lora
from pocketlm.runtime.model_file import open_model
from pocketlm.tokenizer import from_metadata

torch = pytest.importorskip("torch", reason="makes the checkpoint and the adapter")
models = pytest.importorskip("torch_models")

RANK, ALPHA = 3, 12


def adapter(folder: Path, module: Any, targets: list[str], transposed: bool = False, **config: Any) -> dict[str, Any]:
    """An adapter in PEFT's layout; the changed weights by name."""
    folder.mkdir()
    library = pytest.importorskip("safetensors.torch", reason="writes the adapter")
    factors, changed = {}, {}
    scale = ALPHA / RANK**0.5 if config.get("use_rslora") else ALPHA / RANK
    for name in targets:
        weight = module.get_submodule(name).weight
        n_in, n_out = weight.shape if transposed else weight.shape[::-1]
        a, b = torch.randn(RANK, n_in) * 0.1, torch.randn(n_out, RANK) * 0.1
        factors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        change = scale * (b @ a)
        changed[name] = weight.detach() + (change.T if transposed else change)
    library.save_file(factors, folder / "adapter_model.safetensors")
    plain = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "fan_in_fan_out": transposed, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    return changed


def read(folder: Path, module: Any, config: dict[str, Any], lora: Path | None = None) -> CanonicalModel:
    folder.mkdir(exist_ok=True)
    torch.save(module.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))
    return read_canonical(folder, tokenizer="none", change=read_lora(lora) if lora else None)


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_head": 4, "activation_function": "gelu_new"}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": True,
}  # fmt: skip
CASES = [
    ("llama", [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qkv"] + ["model.layers.1.mlp.down_proj"], {}),
    ("llama", ["model.layers.0.self_attn.q_proj"], {"use_rslora": True}),
    ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"], {}),
]


def made(kind: str) -> tuple[Any, dict[str, Any]]:
    module = models.GPT(conv1d=True) if kind == "gpt2" else models.Decoder(models.NAMES, "halves")
    return models.initialise(module), GPT2 if kind == "gpt2" else LLAMA


@pytest.mark.parametrize(("kind", "targets", "options"), CASES)
def test_merged_weights_are_those_of_the_changed_module(
    kind: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    module, config = made(kind)
    changed = adapter(tmp_path / "lora", module, targets, transposed=kind == "gpt2", **options)
    merged = read(tmp_path, module, config, tmp_path / "lora")
    with torch.no_grad():
        for name, weight in changed.items():
            module.get_submodule(name).weight.copy_(weight)
    expected = read(tmp_path / "changed", module, config)
    assert list(merged.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(merged.tensors[name].read(), tensor.read(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("kind", "targets", "options"), CASES)
def test_a_lora_changes_a_model_file_as_it_changes_the_checkpoint_it_was_made_of(
    kind: str, targets: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    module, config = made(kind)
    adapter(tmp_path / "lora", module, targets, transposed=kind == "gpt2", **options)
    model = read(tmp_path, module, config)
    export(model, "c", tmp_path / "m.gguf", quant="f32")
    merged = read_canonical(tmp_path / "m.gguf", change=read_lora(tmp_path / "lora"))
    expected = read(tmp_path, module, config, tmp_path / "lora")
    for name, tensor in expected.tensors.items():
        np.testing.assert_allclose(merged.tensors[name].read(), tensor.read(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("options", "said"),
    [*(({"init_lora_weights": name}, f"init_lora_weights is {name}, which changes the base")
       for name in ("pissa_niter_4", "olora", "loftq")),
     ({"use_dora": True}, "has no magnitudes"), ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
     ({"alpha_pattern": {"(a+)+b": 1}}, "alpha_pattern has other things"),
     ({"alpha_pattern": {"q": "1"}}, "alpha_pattern"),
     ({"alpha_pattern": {"[q": 1}}, "alpha_pattern"), ({"alpha_pattern": [1]}, "alpha_pattern"),
     ({"peft_type": "IA3"}, "is no LoRA"), ({"r": 0}, "lacks r"),
     ({"r": 10**400}, "lacks r"), ({"lora_alpha": 10**400}, "lacks r"), ({"lora_alpha": float("nan")}, "lacks r"),
     ({"lora_alpha": True}, "lacks r")],
)  # fmt: skip
def test_adapters_of_other_kinds_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    module, config = made("llama")
    adapter(tmp_path / "lora", module, CASES[1][1], **options)
    with pytest.raises(FileError, match=said):
        read(tmp_path, module, config, tmp_path / "lora")


TOKENS = {"modules_to_save": ["embed_tokens", "lm_head"]}  # as those do who add tokens
PATTERNS = {
    "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
    "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 32},
}


@pytest.mark.parametrize(
    ("base", "options"),
    [
        *(({}, {"init_lora_weights": begun}) for begun in (True, "gaussian", "orthogonal", "mica", "pissa", "olora")),
        *((base, {"modules_to_save": names}) for names in (["embed_tokens", "lm_head"], ["embed_tokens"], ["lm_head"])
          for base in ({}, {"tied": True}, {"rows": 70}, {"rows": 70, "tied": True})
          if len(names) == 2 or "rows" not in base),
        ({"tied": True, "rows": 70}, {}), ({"rows": 70}, {}), ({"tied": True}, TOKENS | {"ensure_weight_tying": True}),
        ({}, {"modules_to_save": ["norm", "input_layernorm"]}),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ({}, PATTERNS), ({}, PATTERNS | {"use_rslora": True}), ({}, {"use_dora": True}), ({}, {"layers_to_transform": [1]}),
        ({"kind": "gpt2"}, {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
        ({"kind": "gpt2"}, {"target_modules": ["c_attn"], "bias": "all"}),
    ],
)  # fmt: skip
def test_an_adapter_that_peft_made_is_merged_as_peft_does_or_refused(
    base: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    name = "GPT2" if base.get("kind") == "gpt2" else "Llama"
    config = getattr(transformers, f"{name}Config")(**sizes, tie_word_embeddings="kind" in base or "tied" in base)
    getattr(transformers, f"{name}LMHeadModel" if "kind" in base else "LlamaForCausalLM")(config).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if "rows" in base:
        model.resize_token_embeddings(base["rows"])
    usual = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "v_proj"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**usual, **options}))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape) * parameter.requires_grad)
    wrapped.save_pretrained(tmp_path / "lora")
    if options.get("init_lora_weights") in ("pissa", "olora"):
        with pytest.raises(FileError, match="which changes the base"):
            read_lora(tmp_path / "lora")
        return
    merged = read_canonical(tmp_path, tokenizer="none", change=read_lora(tmp_path / "lora"))
    with torch.no_grad():
        expected = wrapped.merge_and_unload()(torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits(merged, tmp_path), expected, atol=2e-4)


def test_an_adapter_that_mlx_made_is_merged(tmp_path: Path) -> None:
    """x A B times the scale, and for DoRA rows of the sum stretched to the lengths `m`: mlx_lm's tuner/lora.py and dora.py."""
    library = pytest.importorskip("safetensors.torch", reason="writes the adapter")
    module, config = made("llama")
    name, folder = "model.layers.1.self_attn.q_proj", tmp_path / "lora"
    weight = module.get_submodule(name).weight
    a, b, lengths = torch.randn(weight.shape[1], RANK), torch.randn(RANK, weight.shape[0]), torch.rand(weight.shape[0])
    changed = weight.detach() + 20.0 * (a @ b).T
    folder.mkdir()
    for kind, more, expected in (
        ("lora", {}, changed),
        ("dora", {f"{name}.m": lengths}, changed * (lengths / changed.norm(dim=1))[:, None]),
    ):
        library.save_file({f"{name}.lora_a": a, f"{name}.lora_b": b, **more}, folder / "adapters.safetensors")
        said = {"fine_tune_type": kind, "lora_parameters": {"rank": RANK, "scale": 20.0}}
        (folder / "adapter_config.json").write_text(json.dumps(said))
        for path in (folder, folder / "adapters.safetensors"):
            merged = read(tmp_path, module, config, path)
            with torch.no_grad():
                kept = weight.clone()
                weight.copy_(expected)
                plain = read(tmp_path / "changed", module, config)
                weight.copy_(kept)
            for role, tensor in plain.tensors.items():
                np.testing.assert_allclose(merged.tensors[role].read(), tensor.read(), atol=1e-5, err_msg=role)
    (folder / "adapter_config.json").write_text(json.dumps({**said, "fine_tune_type": "full"}))
    with pytest.raises(FileError, match=r"its fine_tune_type is full; fuse it with mlx_lm.fuse"):
        read_lora(folder)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    module, config = made("llama")
    other, _ = made("gpt2")
    adapter(tmp_path / "lora", other, CASES[2][1], transposed=True)
    with pytest.raises(FileError, match="which the checkpoint does not have"):
        read(tmp_path, module, config, tmp_path / "lora")
    wider = models.Decoder(models.NAMES, "halves", n_embd=64)
    adapter(tmp_path / "wide", wider, CASES[1][1])
    with pytest.raises(FileError, match="do not fit"):
        read(tmp_path, module, config, tmp_path / "wide")


# ── as textbooks write it ────────────────────────────────────────────────────────────────────────────────────────────


class WithLora(torch.nn.Module):
    """A linear layer and what is added to it: alpha · x A B."""

    def __init__(self, linear: Any, alpha: float):
        super().__init__()
        self.linear, self.lora, self.alpha = linear, torch.nn.Module(), alpha
        self.lora.A = torch.nn.Parameter(torch.randn(linear.in_features, RANK) * 0.1)
        self.lora.B = torch.nn.Parameter(torch.randn(RANK, linear.out_features) * 0.1)

    def forward(self, x: Any) -> Any:
        return self.linear(x) + self.alpha * (x @ self.lora.A @ self.lora.B)


def textbook(qkv_bias: bool = True) -> tuple[Any, dict[str, Any]]:
    """A model whose every linear layer has a LoRA, and what its checkpoint says beside."""
    module = models.initialise(models.TextbookGPT(qkv_bias=qkv_bias))

    def wrap(parent: Any) -> None:
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(parent, name, WithLora(child, ALPHA))
            else:
                wrap(child)

    wrap(module)
    return module, {"cfg": {"n_heads": 4, "context_length": 24}}


IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def logits(model: CanonicalModel, folder: Path) -> np.ndarray:
    export(model, "c", folder / "out.gguf", quant="f32")
    return logits_of(folder / "out.gguf", IDS)


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_textbooks_lora_is_merged(tmp_path: Path, alone: bool, qkv_bias: bool) -> None:
    module, config = textbook(qkv_bias)
    with torch.no_grad():
        expected = module(torch.tensor(IDS)).numpy()
    weights = module.state_dict()
    plain = {name.replace(".linear.", "."): value for name, value in weights.items() if ".lora." not in name}
    base = plain if alone else weights
    torch.save({"model_state_dict": base, **config}, tmp_path / "base.pt")
    torch.save({name: value for name, value in weights.items() if ".lora." in name}, tmp_path / "lora.pt")
    lora = read_lora(tmp_path / ("lora.pt" if alone else "base.pt"), float(ALPHA))
    model = read_canonical(tmp_path / "base.pt", tokenizer="none", change=lora)
    assert lora.note.startswith("13 tensors were changed")
    np.testing.assert_allclose(logits(model, tmp_path), expected, atol=2e-4)


def test_a_lora_in_a_checkpoint_is_never_left_out_in_silence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pocketlm import cli

    module, config = textbook()
    torch.save({"model_state_dict": module.state_dict(), **config}, tmp_path / "m.pt")
    command = ["export", str(tmp_path / "m.pt"), "-o", str(tmp_path / "m.gguf"), "--tokenizer", "none"]
    said = []
    for more in ([], ["--lora", str(tmp_path / "m.pt")], ["--lora", str(tmp_path / "m.pt"), "--lora-scale", "12"]):
        status = cli.main([*command, *more])
        out, err = capsys.readouterr()
        said.append((status, err.strip() + out))
    assert said[0][0] == 1
    assert f"holds a LoRA that is not merged; merge it with --lora {tmp_path / 'm.pt'} --lora-scale ALPHA" in said[0][1]
    assert said[1][0] == 1
    assert "give --lora-scale: alpha, or alpha / rank where its code divides by the rank" in said[1][1]
    assert said[2][0] == 0
    assert "note: 13 tensors were changed by the LoRA m.pt" in said[2][1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_state_of_a_model_that_peft_has_wrapped_is_merged(tmp_path: Path, kind: str) -> None:
    module, config = made(kind)
    targets = ("self_attn.q_proj", "mlp.down_proj", "attn.c_attn", "mlp.c_fc")
    names = [name for name, _ in module.named_modules() if name.endswith(targets)]
    state, sums = {}, {}
    for name, weight in module.state_dict().items():
        stem, _, end = name.rpartition(".")
        state[f"base_model.model.{stem}{'.base_layer' * (stem in names)}.{end}"] = sums[name] = weight
        if stem in names and end == "weight":
            n_in, n_out = weight.shape if kind == "gpt2" else weight.shape[::-1]
            a, b = torch.randn(RANK, n_in) * 0.1, torch.randn(n_out, RANK) * 0.1
            state |= {f"base_model.model.{stem}.lora_{half}.default.weight": x for half, x in (("A", a), ("B", b))}
            sums[name] = weight + 4 * ((b @ a).T if kind == "gpt2" else b @ a)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(state, tmp_path / "wrapped.pt")
    torch.save(sums, tmp_path / "merged.pt")
    with pytest.raises(FileError, match="holds a LoRA that is not merged; merge it with --lora"):
        read_canonical(tmp_path / "wrapped.pt", tokenizer="none")
    merged = read_canonical(tmp_path / "wrapped.pt", tokenizer="none", change=read_lora(tmp_path / "wrapped.pt", 4.0))
    for name, tensor in read_canonical(tmp_path / "merged.pt", tokenizer="none").tensors.items():
        np.testing.assert_allclose(merged.tensors[name].read(), tensor.read(), atol=1e-6, err_msg=name)


def test_the_tokenizer_and_template_that_an_adapter_was_trained_with_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pocketlm import cli

    def characters(first: int, folder: Path, template: str) -> None:
        (folder / "vocab.json").write_text(json.dumps([chr(first + i) for i in range(61)]))
        (folder / "chat_template.jinja").write_text(template)

    module, config = made("llama")
    lora, checkpoint, out = tmp_path / "lora", tmp_path / "base", tmp_path / "out.gguf"
    adapter(lora, module, CASES[1][1])
    read(checkpoint, module, config)
    characters(0x400, checkpoint, "base")

    def exported(source: Path, *more: object) -> tuple[str, str, str]:
        assert cli.main(["export", str(source), "-o", str(out), "--lora", str(lora), *map(str, more)]) == 0
        with open_model(out) as file:
            metadata = file.metadata
            first = from_metadata(metadata, out).decode([0])
            return first, metadata["tokenizer.chat_template"], capsys.readouterr().out

    assert exported(checkpoint)[:2] == ("\u0400", "base")
    (tmp_path / "base.gguf").write_bytes(out.read_bytes())
    characters(0x500, lora, "tuned")
    first, template, said = exported(checkpoint)
    assert (first, template) == ("\u0500", "tuned")
    assert f"note: its tokenizer is {lora / 'vocab.json'}" in said
    assert f"note: its chat template is that of {lora}" not in said  # it came with the tokenizer
    assert exported(checkpoint, "--tokenizer", checkpoint / "vocab.json")[:2] == ("\u0400", "base")
    first, template, said = exported(tmp_path / "base.gguf")
    assert (first, template) == ("\u0400", "tuned")
    assert f"note: its chat template is that of {lora}" in said
    (lora / "chat_template.jinja").unlink()
    assert exported(checkpoint)[:2] == ("\u0500", "base")


def test_an_adapter_is_no_model_and_one_beside_a_model_is_not_forgotten(tmp_path: Path) -> None:
    module, config = made("llama")
    adapter(tmp_path / "lora", module, CASES[1][1])
    with pytest.raises(FileError, match=r"is a LoRA alone; export the model it was trained on, with --lora .*lora"):
        read_canonical(tmp_path / "lora", tokenizer="none")
    model = read(tmp_path / "lora", module, config)
    assert any("the LoRA that lies in" in note and "is not in it; --lora" in note for note in model.notes)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"a.lora.A": (4, 2)}, "are not both there"), ({"a.weight": (4, 4)}, "holds no LoRA"),
        ({"a.lora.A": (4, 2), "a.lora.B": (2,)}, "are not both there"),
        ({f"a.lora_{half}.{name}.weight": (2, 2) for name in ("default", "b") for half in "AB"}, "holds several LoRAs for a"),
        ({"a.lora.A": (4, 2), "a.lora.B": (2, 4)}, "which the checkpoint does not have"),
        ({"tok_emb.lora.A": (9, 2), "tok_emb.lora.B": (2, 4)}, "do not fit"),
    ],
)  # fmt: skip
def test_a_textbooks_lora_that_does_not_fit_is_one_line(tmp_path: Path, tensors: dict[str, Any], problem: str) -> None:
    module = models.initialise(models.TextbookGPT())
    torch.save({"model_state_dict": module.state_dict(), "cfg": {"n_heads": 4, "context_length": 24}}, tmp_path / "base.pt")
    torch.save({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "lora.pt")
    with pytest.raises(FileError, match=problem):
        read_canonical(tmp_path / "base.pt", tokenizer="none", change=read_lora(tmp_path / "lora.pt", 1.0))
