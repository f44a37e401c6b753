"""The native executor computes what the numpy executor computes, at every level, with any number of threads."""

import dataclasses
import gc
import mmap
import subprocess
import sys
import weakref

import numpy as np
import pytest
from canonical_models import GPT2
from native_calls import each_format, each_level, executors, host_level, kl_divergence, make_hyper, tensors_of, wide

from pocketlm.errors import PocketlmError
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.hyper import Rope
from pocketlm.runtime.native import kernels, linker
from pocketlm.runtime.native.executable_memory import NativeUnavailable
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.plan import make_plan

IDS = np.random.default_rng(3).integers(0, 400, 60)
EXACT = dict.fromkeys(("F32", "F16", "BF16"), 4e-3)  # what rounding queries and weights of attention to integers costs at most
ARCHITECTURES = {
    "llama": {},
    "gpt2": {**GPT2, "n_kv_head": 4, "bias": True, "fused": True},
    "refact": {"position": "alibi"},
    "half-split pairs": {"rope": Rope(10000.0, 16, "half", original_ctx=64)},
    "some dims rotated, YaRN": {"rope": Rope(5000.0, 8, "half", "yarn", 4.0, 16)},
    "no positions, ReLU": {"position": "none", "activation": "relu", "gated": False, "bias": True},
    "exact GELU, gated, untied": {"activation": "gelu_erf", "tied": False, "norm": "layer"},
    "LayerNorm with biases, SiLU": {"norm": "layer", "bias": True, "gated": False, "position": "learned"},
}


def compare(pair, limit, ids=IDS):
    """A prompt, then single tokens, against the other executor; limit: of the error (exact weights), or None: KL divergence."""
    native, reference = pair
    for part in (ids[:37], ids[37:38], ids[38:39], ids[39:]):
        got, expected = native.forward(part, rows="all"), reference.forward(part, rows="all")
        assert got.shape == expected.shape
        if limit:
            assert np.abs(got - expected).max() <= limit
        else:
            assert kl_divergence(expected, got).max() <= 1e-5
    native.close()
    reference.close()


@each_level
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("fmt", ["F32", "Q4_1"])
def test_every_architecture_option(level, name, fmt):
    compare(executors(level, fmt, **ARCHITECTURES[name]), EXACT.get(fmt))


@each_level
@each_format
def test_every_format(level, fmt):
    compare(executors(level, fmt, position="alibi", bias=True), EXACT.get(fmt))


@each_level
@pytest.mark.parametrize(
    ("formats", "fmt"),
    [
        ({"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "ffn_gate": "Q5_K", "ffn_up": "F16"}, "Q8_0"),
        ({"ffn_gate": "Q4_0", "ffn_up": "Q8_0", "token_embd": "Q6_K", "attn_k": "F32"}, "Q5_1"),
        ({"attn_q": "BF16", "attn_v": "Q5_0", "token_embd": "F16"}, "Q4_1"),
    ],
)
def test_formats_may_be_mixed_within_a_stack(level, formats, fmt):
    compare(executors(level, fmt, formats=formats, n_embd=256, head_dim=64, n_ff=256), None)


@pytest.mark.parametrize(
    "shape",
    [
        {"n_head": 3, "n_kv_head": 3, "head_dim": 32, "n_embd": 96, "n_ff": 160},
        {"n_head": 5, "n_kv_head": 1, "head_dim": 64, "n_embd": 320, "n_ff": 224},
        {"n_head": 6, "n_kv_head": 2, "head_dim": 80, "n_embd": 480, "n_ff": 32},
        {"n_head": 9, "n_kv_head": 3, "head_dim": 32, "n_embd": 288, "n_ff": 96},
        {"n_head": 4, "n_kv_head": 4, "head_dim": 24, "n_embd": 32, "n_ff": 64, "n_vocab": 1},
        {"n_head": 8, "n_kv_head": 1, "head_dim": 4, "n_embd": 160, "n_ff": 352, "n_vocab": 17},
    ],
    ids=lambda s: f"{s['n_head']} heads of {s['head_dim']}",
)
@pytest.mark.parametrize("fmt", ["F32", "F16", "Q4_0", "Q8_0"])
def test_rows_and_widths_that_are_no_powers_of_two(shape, fmt):
    if shape["head_dim"] * shape["n_head"] % 32:
        fmt = "F32"
    compare(executors(host_level(), fmt, **shape), EXACT.get(fmt), IDS % shape.get("n_vocab", 400))


@pytest.mark.parametrize(
    "shape",
    [
        {"n_embd": 50, "n_head": 5, "n_kv_head": 1, "head_dim": 10, "n_ff": 37},
        {"n_embd": 7, "n_head": 1, "n_kv_head": 1, "head_dim": 6, "n_ff": 1},
    ],
    ids=["50 wide", "7 wide"],
)
@pytest.mark.parametrize("position", ["rope", "alibi", "learned"])
def test_float_weights_may_have_any_width(shape, position):
    compare(executors(host_level(), "F16", position=position, norm="layer", bias=True, **shape), EXACT["F16"])


@each_level
@pytest.mark.parametrize("fmt", ["F16", "Q4_1", "Q6_K"])
def test_results_depend_neither_on_threads_nor_on_the_run(level, fmt):
    results = []
    for threads in (1, 2, 3, 5, 2):
        native, reference = executors(level, fmt, threads, n_ctx=600)
        reference.close()
        prompt = np.resize(IDS, 530)
        outputs = [native.forward(prompt, rows="all"), *(native.forward(IDS[i : i + 1]).copy() for i in range(8))]
        results.append(b"".join(output.tobytes() for output in outputs))
        native.close()
    assert len(set(results)) == 1


@each_level
def test_keys_and_values_beyond_float16_are_limited_and_not_infinite(level, monkeypatch):
    shape = make_hyper(**wide("F32"))
    tensors = dict(tensors_of(shape, "F32"))
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        large = tensors[name].to_float32() * np.float32(1e7)
        tensors[name] = dataclasses.replace(tensors[name], data=large.reshape(-1).view(np.uint8))
    plan = make_plan(shape, {name: tensor.shape for name, tensor in tensors.items()}, "model")
    monkeypatch.setenv("POCKETLM_ISA", level.name)
    native = NativeExecutor(plan, tensors, shape.n_ctx, 2)
    assert np.isfinite(native.forward(IDS[:20], rows="all")).all()
    native.close()


def test_ids_that_are_none_are_refused_before_compiled_code_sees_them():
    native, reference = executors(host_level())
    for ids in ([-1], [native.hyper.n_vocab], [1 << 40], [], [[1]], [1.0], [1] * (native.n_ctx + 1)):
        with pytest.raises(PocketlmError):
            native.forward(np.array(ids))
    assert native.cache.length == 0
    compare((native, reference), EXACT["F32"])


@pytest.mark.parametrize("name", ["llama", "refact", "half-split pairs", "some dims rotated, YaRN", "gpt2"])
def test_positions_are_forgotten_and_taken_out_as_in_the_numpy_executor(name):
    pair = executors(host_level(), "F16", **ARCHITECTURES[name])
    removed, outputs = [], []
    for executor in pair:
        cache, result = executor.cache, []
        executor.forward(IDS[:45])
        cache.truncate(40)
        removed.append(cache.remove(3, 20))
        for part in (IDS[40:41], IDS[41:50]):
            result.append(executor.forward(part, rows="all").copy())
        cache.truncate(0)
        result.append(executor.forward(IDS[:5], rows="all"))
        outputs.append(np.concatenate(result))
        executor.close()
    assert removed == [name != "gpt2"] * 2
    assert np.abs(outputs[0] - outputs[1]).max() <= EXACT["F32"]


# ── resources ────────────────────────────────────────────────────────────────────────────────────────────────────────


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux_only
def test_ten_thousand_tokens_do_not_take_memory():
    native, reference = executors(host_level(), "Q4_0", n_layer=1)
    reference.close()

    def tokens(n):
        for i in range(n):
            if native.cache.length == native.n_ctx:
                native.cache.truncate(1)
            native.forward(IDS[i % 60 : i % 60 + 1])

    tokens(500)
    gc.collect()
    before = resident()
    tokens(10_000)
    gc.collect()
    assert resident() - before < 1 << 20
    native.close()


def test_a_closed_model_gives_its_weights_and_cache_back_at_once():
    native, reference = executors(host_level(), "F16")
    reference.close()
    assert native._storage
    arrays = [*(matrix.data for matrix in native._storage.matrices.values()), native.cache.memory]
    references = [weakref.ref(array) for array in arrays]
    del arrays
    gc.collect()
    gc.disable()
    try:
        native.close()
        assert [reference() for reference in references if reference() is not None] == []
    finally:
        gc.enable()


LOAD = """
import sys
import numpy as np, pocketlm
model = pocketlm.load(sys.argv[1], backend="native", threads=2)
model.executor.forward(np.arange(5))
cache = model.executor.cache
with open("/proc/self/status") as file:  # getrusage would count the parent's memory before exec
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(peak * 1024, cache.memory.nbytes, model.file_bytes)
"""


@linux_only
def test_loading_takes_the_file_the_cache_and_little_more(smollm2_path):
    for _ in range(2):  # where the kernels are not cached yet, the first of them is the compiler's, which takes memory
        done = subprocess.run([sys.executable, "-c", LOAD, smollm2_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    peak, cache, size = map(int, done.stdout.split())
    assert peak <= size + cache + (120 << 20)


# ── code that may not run ────────────────────────────────────────────────────────────────────────────────────────────


def test_numpy_takes_over_where_code_may_not_be_executable_and_says_so(monkeypatch, capsys):
    def refuse(code):
        raise NativeUnavailable("this system does not let a program run code that it made itself")

    native, reference = executors(host_level())
    model = native.plan, native._tensors, 64, 1, "model"
    native.close()
    reference.close()
    monkeypatch.setattr(linker, "map_code", refuse)
    monkeypatch.setattr(kernels, "loaded", kernels.loaded.__wrapped__)  # nothing is loaded yet
    executor = make_executor("auto", *model)
    assert executor.name == "numpy"
    said = capsys.readouterr().err
    assert "code that it made itself" in said
    assert said.count("\n") == 1
    executor.forward(IDS[:3])
    executor.close()
    assert capsys.readouterr().err == ""
    with pytest.raises(NativeUnavailable, match="made itself"):
        make_executor("native", *model)
