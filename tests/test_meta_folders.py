"""Folders as Meta gives them out: params.json, consolidated.00.pth, and tokenizer.model."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from home_made_checks import check

import pocketlm
from pocketlm.errors import FileError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export

torch = pytest.importorskip("torch", reason="checkpoints are made with PyTorch")
models = pytest.importorskip("torch_models")


def meta_folder(folder: Path, params: dict[str, Any], n_vocab: int = 61) -> Path:
    """A folder as Meta gives them out."""
    folder.mkdir()
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours", tied=False, n_vocab=n_vocab))
    torch.save(module.state_dict(), folder / "consolidated.00.pth")
    said = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 500000.0, **params}
    (folder / "params.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(("width", "factor"), [(2048, 32.0), (3072, 32.0), (4096, 8.0), (8192, 8.0)])
def test_metas_own_folders_of_llama_3_1_and_3_2_are_scaled_as_transformers_converts_them(
    tmp_path: Path, width: int, factor: float
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is what is compared with")
    folder = meta_folder(tmp_path / "model", {"dim": width, "use_scaled_rope": True})
    model = read_canonical(folder, tokenizer="none")
    scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = transformers.LlamaConfig(
        hidden_size=32, num_attention_heads=4, rope_parameters={"rope_type": "llama3", "rope_theta": 500000.0, **scaling},
    )  # fmt: skip
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    factors = model.tensors["rope_freqs.weight"].read()
    np.testing.assert_allclose(500000.0 ** (-np.arange(4) / 4) / factors, theirs, rtol=1e-5)
    assert factors.max() == factor
    assert model.hyper.n_ctx == 131072


def test_metas_own_folder_in_parts_is_refused(tmp_path: Path) -> None:
    folder = meta_folder(tmp_path / "model", {"dim": 32})
    (folder / "consolidated.01.pth").write_bytes((folder / "consolidated.00.pth").read_bytes())
    for path in (folder, folder / "consolidated.00.pth"):
        with pytest.raises(FileError, match="a model in parts, one for each GPU"):
            read_canonical(path, tokenizer="none")


def test_parts_for_gpus_do_not_hide_the_whole_model_beside_them(tmp_path: Path) -> None:
    """As in Mixtral's folder on Hugging Face."""
    folder = meta_folder(tmp_path / "model", {"dim": 32})
    (folder / "consolidated.01.pth").write_bytes(b"a part")
    (folder / "consolidated.00.pth").rename(folder / "pytorch_model.bin")
    assert "token_embd.weight" in read_canonical(folder, overrides={"n_ctx": "64"}, tokenizer="none").tensors


def test_metas_own_folder_has_llama_3s_template_if_it_is_called_instruct(tmp_path: Path) -> None:
    base = meta_folder(tmp_path / "Llama3.2-1B", {"dim": 2048, "use_scaled_rope": True}, n_vocab=128256)
    ranks = [bytes([byte]) for byte in range(256)] + [b"\xff%d" % i for i in range(128000 - 256)]
    (base / "tokenizer.model").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))
    assert "tokenizer.chat_template" not in read_canonical(base).metadata
    (tmp_path / "Llama3.2-1B-Instruct").mkdir()
    folder = base.rename(tmp_path / "Llama3.2-1B-Instruct/original")  # where Hugging Face has it
    model = read_canonical(folder)
    assert "its chat template is that of Llama 3, as it is called Llama3.2-1B-Instruct" in model.notes
    export(model, folder, tmp_path / "model.gguf", quant="q8_0", n_threads=1)
    with pocketlm.load(tmp_path / "model.gguf", backend="numpy") as opened:
        assert opened.tokenizer.end_ids >= {128009}
        text = "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        found = opened.template.encode([{"role": "user", "content": " Hi "}], opened.tokenizer)
        assert found == opened.tokenizer.encode(text, special=True, bos=True)


def test_mistrals_own_weights_beside_transformers_configuration(tmp_path: Path) -> None:
    """As in Mistral's folders on Hugging Face: rows of queries and keys are in another order than transformers' own."""
    module = models.initialise(models.Decoder(models.META_NAMES, "neighbours"))
    torch.save(module.state_dict(), tmp_path / "consolidated.pth")
    config = {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_attention_heads": 4, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "max_position_embeddings": 64, "hidden_act": "silu", "sliding_window": None,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, _ = check(module, tmp_path / "consolidated.pth")
    assert model.dialect == "Meta Llama"
