"""Every backend computes the same model: logits of a prompt, of single tokens and after a truncation, on tiny models."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import write_random
from tiny_models import write_model

from pocketlm.bench import convert
from pocketlm.bench.protocol import BACKENDS, Backend, Skipped
from pocketlm.bench.worker import Bench
from pocketlm.errors import PocketlmError
from pocketlm.runtime import operations as P
from pocketlm.runtime.native import levels

N_CTX = 64
VNNI = {"avx512_vnni", "avx_vnni"} & levels.cpu_flags(levels.host_machine())  # CTranslate2's sums overflow without
CLOSE = {  # the others: float32
    "native": 0.9999, "native q8": 0.999, "llama.cpp": 0.999, "llama.cpp no-flash": 0.999, "onnxruntime int8": 0.99,
    "onnxruntime-genai": 0.85, "openvino": 0.85, "ctranslate2": 0.99 if VNNI else 0.95,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"arch": "gpt2"},
    "llama": {"arch": "llama", "n_kv_head": 2, "format": "Q8_0"},
    "refact": {"arch": "refact", "n_kv_head": 1, "n_ff": 128},
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_ctx=N_CTX, **SHAPES[request.param])


def adapter(backend: Backend, path: Path) -> Any:
    for package in backend.packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    if backend.reads != "gguf":
        out = path.with_name(f"{path.stem}{convert.KINDS[backend.reads].suffix}")
        try:
            convert.KINDS[backend.reads].write(path, out)
        except Skipped as reason:
            pytest.skip(f"its library does not convert this: {reason}")
        path = out
    module, name = backend.adapter.split(":")
    return getattr(importlib.import_module(module), name)(str(path), 1, N_CTX, **{**backend.options, "compiled": False}
                                                          if "compiled" in backend.options else backend.options)  # fmt: skip


@pytest.fixture(scope="module")
def exact(model: Path) -> np.ndarray:
    """Logits of IDS by the reference executor, from one pass."""
    reference = adapter(BACKENDS["numpy"], model)
    logits = reference.forward(IDS, rows="all").copy()
    reference.close()
    return logits


IDS = np.random.default_rng(5).integers(0, 256, 24).astype(np.int32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.min((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "torch compiled"])  # the eager one's code
def test_an_adapter_computes_the_model(name: str, model: Path, exact: np.ndarray) -> None:
    one = adapter(BACKENDS[name], model)
    least = CLOSE.get(name, 0.99999)
    assert cosine(one.forward(IDS[:16], rows="all"), exact[:16]) > least
    for i in range(16, 20):
        assert cosine(one.forward(IDS[i : i + 1]), exact[i : i + 1]) > least
    one.truncate(8)
    assert cosine(one.forward(IDS[8:24]), exact[23:24]) > least  # a prompt after positions that stayed
    one.truncate(0)
    last = one.forward(IDS[:16])
    assert last.shape == (1, exact.shape[1])
    assert cosine(last, exact[15:16]) > least
    assert {"version", "build", "settings"} <= one.facts.keys()
    one.close()


def test_hyper_parameters_that_are_lists_reach_pytorch(tmp_path: Path) -> None:
    lists = {"llama.attention.head_count_kv": [2, 2]}
    path = write_model(tmp_path / "tiny.gguf", n_kv_head=2, n_ctx=N_CTX, metadata=lists)
    exact, found = (adapter(BACKENDS[name], path).forward(IDS, rows="all") for name in ("numpy", "torch"))
    assert cosine(found, exact) > 0.99999


def test_a_layer_that_the_adapter_for_pytorch_does_not_know_is_named_in_words() -> None:
    torch_adapter = pytest.importorskip("pocketlm.bench.adapter_torch", reason="torch is not installed", exc_type=ImportError)
    windowed = P.Attend("qkv", "x", 0, 2, 2, 8, 1.0, window=4)
    with pytest.raises(Skipped, match="does not know attention with windows"):
        torch_adapter._without_names([windowed])
    with pytest.raises(Skipped, match="does not know the operation Softcap"):
        torch_adapter._without_names([P.Softcap("x", "x", 30.0)])


@pytest.mark.parametrize("name", ["native", "numpy", "llama.cpp"])
def test_what_a_user_sees_counts_the_tokens_that_were_generated(name: str, tmp_path: Path) -> None:
    one = adapter(BACKENDS[name], write_model(tmp_path / "tiny.gguf", n_ctx=N_CTX))
    tokens, seconds = one.complete("in the", 5)
    assert 1 <= tokens <= 5
    assert seconds > 0
    one.close()


def test_a_library_that_makes_its_own_steps_is_timed_by_them() -> None:
    bench = Bench()
    bench._ids = IDS

    class Own:
        def decode_seconds(self, ids: np.ndarray, n: int) -> list[float]:
            assert ids.tolist() == IDS[:9].tolist()
            return [0.5] * n

    bench.adapter = Own()
    assert bench.decode(3, depth=8, at_least=2.0)["seconds"] == [0.5] * 6  # twice, until two seconds are full


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_the_ninth_conversation_is_timed_while_eight_go_on(tmp_path: Path, backend: str) -> None:
    one = adapter(BACKENDS[backend], write_model(tmp_path / "tiny.gguf", n_ctx=N_CTX))
    step = one._model.executor.step
    first, others, passes = one.ninth([1, 2, 3], 2, conversations=3)
    assert first > 0
    assert others > 0
    assert passes >= 1  # its own
    assert one._model.executor.step == step  # nothing is counted any more
    one.close()


def test_a_conversion_that_fails_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime_genai is not installed")
    path = write_model(tmp_path / "tiny.gguf", n_ctx=N_CTX, n_kv_head=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert.sys, "executable", "false")
        with pytest.raises(PocketlmError, match="failed"):
            convert.KINDS["genai-int4"].write(path, tmp_path / "out-genai")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_cache_of_a_window_is_filled_again_where_it_cannot_be_cut_back(tmp_path: Path) -> None:
    sizes = {"n_layer": 6, "n_ctx": 4096, "n_embd": 32, "n_head": 2, "n_kv_head": 1, "head_dim": 16, "n_ff": 32}
    file = write_random(tmp_path / "windows.gguf", "gemma3", sizes, {"attention.sliding_window": 20}, {})
    bench, (module, name) = Bench(), BACKENDS["native"].adapter.split(":")
    bench.load(f"{module}:{name}", str(file), 1, 2560, 256, {"backend": "native"})
    cache = bench.adapter._model.executor.cache
    for depth in (2048, 100, 2048):
        assert len(bench.decode(n=4, depth=depth, at_least=0.0)["seconds"]) == 4
        assert cache.length == bench._length == depth + 4
        assert cache.ids[: depth + 4].tolist() == bench._ids[: depth + 4].tolist()
    bench.adapter.close()
