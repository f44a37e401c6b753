"""Mixtures of experts: the same bits from the file as from memory, only the chosen experts are read, whoever shares a pass."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_reference
import numpy as np
import pytest
from agreement import compare
from families import N_VOCAB, write_random
from native_calls import each_format, each_level, host_level, random_blocks
from native_guard import _forbid
from operation_lists import make, tensors_of

import pocketlm
from pocketlm.errors import FileError, PocketlmError
from pocketlm.export.dialects import read_canonical
from pocketlm.export.export import export
from pocketlm.export.gguf_writer import copy_gguf
from pocketlm.export.rules import QUANTS, by_shape, head_name
from pocketlm.runtime.architectures import qwen3moe
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.gguf_reader import open_gguf
from pocketlm.runtime.native import executor as native_executor
from pocketlm.runtime.native import workers
from pocketlm.runtime.native.executor import NativeExecutor
from pocketlm.runtime.numpy_executor import NumpyExecutor
from pocketlm.runtime.plan import Plan
from pocketlm.runtime.tensor import Tensor

SETTINGS = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 256}
IDS = np.random.default_rng(5).integers(0, 96, 45)


def plan_of(extra: dict[str, tuple[int, ...]] | None = None, n_layer: int = 2, **settings: int) -> Plan:
    sizes = {"n_embd": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 32, "n_layer": n_layer}
    return make(qwen3moe.operations, extra, settings={**SETTINGS, **settings}, **sizes)


def quantised(plan: Plan, fmt: str) -> dict[str, Tensor]:
    """Random weights, those of experts in a format."""
    random, tensors = np.random.default_rng(0), tensors_of(plan)
    for name in plan.experts:
        n, rows, columns = plan.weights[name]
        data = random_blocks(fmt, n * rows, columns, random)
        tensors[name] = Tensor(name, (n, rows, columns), FORMATS[fmt], data, 0, Path("model"))
    return tensors


def native(plan: Plan, tensors: dict[str, Tensor], threads: int = 2, level: Any = None, free: int | None = None):
    """An executor that finds `free` bytes of memory: with 0 the experts stay in the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCKETLM_ISA", (level or host_level()).name)
        patch.setattr(native_executor, "available_bytes", lambda: free)
        return NativeExecutor(plan, tensors, 64, threads)


def logits(executor: Any, ids: np.ndarray, cut: int) -> np.ndarray:
    executor.cache.truncate(0)
    return np.concatenate([executor.forward(ids[at : at + cut], rows="all").copy() for at in range(0, len(ids), cut)])


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


@each_level
@each_format
def test_experts_in_every_format_from_memory_and_from_the_file(level: Any, fmt: str) -> None:
    plan, first = plan_of(n_layer=1), None
    tensors = quantised(plan, fmt)
    for threads, free, cuts in ((1, None, (45, 1)), (2, 0, (7, 1)), (3, 0, (45,))):
        executor = native(plan, tensors, threads, level, free)
        for cut in cuts:
            found = logits(executor, IDS, cut)
            first = found if first is None else first
            assert same_bits(found, first), f"{threads} threads, passes of {cut}, {free} bytes free"
        executor.close()
    reference = NumpyExecutor(plan, tensors, 64, 1)
    expected = logits(reference, IDS, 45)
    reference.close()
    assert first is not None
    far = np.abs(first - expected).max(1) > 1e-2 * np.abs(expected).max()  # scores near each other choose otherwise
    assert far.sum() <= 2, far


@pytest.mark.parametrize("n_ff", [48, 250, 36])
def test_rows_that_fill_no_group(n_ff: int) -> None:
    plan = plan_of(expert_feed_forward_length=n_ff)
    tensors, first = tensors_of(plan), None
    for free in (None, 0):
        executor = native(plan, tensors, free=free)
        for cut in (45, 1):
            found = logits(executor, IDS, cut)
            first = found if first is None else first
            assert same_bits(found, first)
        executor.close()


def test_whatever_other_texts_share_the_passes() -> None:
    plan = plan_of()
    executor, random = native(plan, quantised(plan, "Q4_0")), np.random.default_rng(4)
    texts = [random.integers(0, 96, n) for n in (1, 9, 30, 45)]
    alone = [logits(executor, ids, 45) for ids in texts]
    caches, found = [executor.new_cache(64) for _ in texts], [[] for _ in texts]
    while going := [i for i, cache in enumerate(caches) if cache.length < len(texts[i])]:
        work = [(caches[i], texts[i][caches[i].length :][: 1 + 5 * i], 99) for i in going]
        for i, rows in zip(going, executor.step(work)[0], strict=True):
            found[i].append(rows.copy())
    assert all(same_bits(np.concatenate(rows), whole) for rows, whole in zip(found, alone, strict=True))
    executor.close()


@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_only_the_chosen_experts_are_read(backend: str) -> None:
    """The others lie in memory that nobody may touch: reading a byte of it would end the process."""
    biases = [f"blk.{i}.ffn_gate_inp.bias" for i in range(2)]
    plan = plan_of(dict.fromkeys(biases, (6,)), expert_feed_forward_length=64)
    tensors, kept = tensors_of(plan), []
    for name in biases:
        tensors[name] = replace(tensors[name], data=np.array([0, 900, 0, 800, 0, 0], np.float32).view(np.uint8))
    for name in plan.experts:
        data = tensors[name].data
        memory = mmap.mmap(-1, data.nbytes)
        view = np.frombuffer(memory, np.uint8)
        view[:] = data
        size = data.nbytes // 6
        assert size % mmap.PAGESIZE == 0
        for expert in (0, 2, 4, 5):
            _forbid(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + expert * size, size)
        tensors[name] = replace(tensors[name], data=view)
        kept.append(memory)
    executor = native(plan, tensors, free=0) if backend == "native" else NumpyExecutor(plan, tensors, 64, 2)
    assert np.isfinite(logits(executor, IDS, 20)).all()
    executor.close()


def test_experts_take_no_memory_where_there_is_none() -> None:
    plan = plan_of()
    tensors = quantised(plan, "Q8_0")
    experts = sum(tensors[name].data.nbytes for name in plan.experts)
    weights, cache, scratch = NativeExecutor.memory(plan, tensors, 64, 2)
    assert weights == sum(t.data.nbytes for name, t in tensors.items() if name not in plan.experts)
    needed = weights + cache + scratch + experts
    for free, held in ((needed, True), (needed - 1, False)):
        executor = native(plan, tensors, free=free)
        assert executor._storage is not None
        for name in plan.experts:
            place = executor._storage.matrices[name]
            assert place.mapped != held
            assert np.shares_memory(place.data, tensors[name].data) != held
        executor.close()


def test_scores_that_are_no_numbers_choose_experts_that_exist() -> None:
    plan = plan_of()
    tensors = quantised(plan, "Q4_0")
    for i in range(2):
        name = f"blk.{i}.ffn_gate_inp.weight"
        data = np.full(6 * 256, 3e38, np.float32).view(np.uint8)
        tensors[name] = replace(tensors[name], data=data)
    for executor in (native(plan, tensors), native(plan, tensors, free=0), NumpyExecutor(plan, tensors, 64, 1)):
        with np.errstate(all="ignore"):
            found = logits(executor, IDS, 45)
        assert np.isnan(found).any()
        executor.close()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"expert_used_count": 9}, "qwen3moe.expert_used_count is 9, more than the 8 experts"),
        ({"expert_used_count": 0}, "qwen3moe.expert_used_count is 0"),
        ({"expert_count": 1 << 30}, "qwen3moe.expert_count is 1073741824"),
        ({"expert_count": 7}, "blk.0.ffn_gate_inp.weight is 8x64, expected 7x64"),
        ({"expert_feed_forward_length": 32}, "blk.0.ffn_gate_exps.weight is 8x48x64, expected 8x32x64"),
    ],
)
def test_files_whose_experts_make_no_sense_are_refused_in_a_line(tmp_path: Path, keys: dict[str, int], said: str) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96, "n_layer": 1, "n_ctx": 32}
    sound = {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 48}
    path = write_random(tmp_path / "m.gguf", "qwen3moe", sizes, sound, {})
    with open_gguf(path) as file:
        metadata = {key: file.metadata[key] for key in file.metadata}
        with open(tmp_path / "wrong.gguf", "wb") as out:
            copy_gguf(out, metadata | {f"qwen3moe.{key}": value for key, value in keys.items()}, file.tensors)
    with pytest.raises(FileError, match=said) as error:
        pocketlm.load(tmp_path / "wrong.gguf")
    assert "\n" not in str(error.value)


def test_a_file_with_a_tensor_for_every_expert_is_refused_in_a_line(tmp_path: Path) -> None:
    """As llama.cpp wrote Mixtral before April 2024."""
    sizes = {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96, "n_layer": 1, "n_ctx": 32}
    path = write_random(tmp_path / "m.gguf", "llama", sizes, {"expert_count": 4, "expert_used_count": 2}, {})
    with open_gguf(path) as file:
        metadata, tensors = {key: file.metadata[key] for key in file.metadata}, {}
        for name, tensor in file.tensors.items():
            if "_exps" in name:
                parts = {name.replace("_exps", f".{i}"): tensor.part(i) for i in range(4)}
                tensors |= {part: replace(found, name=part) for part, found in parts.items()}
            else:
                tensors[name] = tensor
        with open(tmp_path / "old.gguf", "wb") as out:
            copy_gguf(out, metadata, tensors)
    with pytest.raises(FileError, match=r"a tensor for every expert.*get a newer file") as error:
        pocketlm.load(tmp_path / "old.gguf")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("quant", ["q3_k_m", "q4_k_m", "mxfp4"])
def test_every_tensor_gets_the_format_that_llama_cpp_gives_it(tmp_path: Path, quant: str) -> None:
    sizes = {"n_embd": 256, "n_head": 4, "n_kv_head": 1, "head_dim": 64, "n_ff": 256, "n_layer": 9, "n_ctx": 8}
    keys = {"expert_count": 2, "expert_used_count": 2, "expert_feed_forward_length": 256}
    path = write_random(tmp_path / "f32.gguf", "qwen3moe", sizes, keys, {})
    export(read_canonical(path), path, tmp_path / "ours.gguf", quant=quant)
    llama_reference.quantize_file(path, tmp_path / "theirs.gguf", QUANTS[quant].file_type)
    formats = []
    for name in ("ours", "theirs"):
        with open_gguf(tmp_path / f"{name}.gguf") as file:
            formats.append({tensor.name: tensor.format.name for tensor in file.tensors.values()})
    assert formats[0] == formats[1]


@pytest.mark.parametrize("quant", ["q3_k_m", "q4_k_m", "q5_k_m", "iq4_nl", "mxfp4"])
@pytest.mark.parametrize("arch", ["llama", "qwen2moe"])
def test_attention_beside_eight_experts_gets_the_bits_that_llama_cpp_gives_it(tmp_path: Path, arch: str, quant: str) -> None:
    """As Mixtral's; and the shared expert's, which every token goes to."""
    sizes = {"n_embd": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64, "n_ff": 256, "n_layer": 8, "n_ctx": 8}
    path = write_random(tmp_path / "f32.gguf", arch, sizes, {"expert_count": 8, "expert_used_count": 1}, {})
    llama_reference.quantize_file(path, tmp_path / "theirs.gguf", QUANTS[quant].file_type)
    model = read_canonical(path)
    head = head_name(model.tensors)
    ours = {name: by_shape(name, t.shape, QUANTS[quant], head, False, model.hyper)[0] for name, t in model.tensors.items()}
    with open_gguf(tmp_path / "theirs.gguf") as file:
        assert {name: format.name for name, format in ours.items()} == {t.name: t.format.name for t in file.tensors.values()}


@pytest.mark.parametrize("fmt", ["MXFP4", "Q4_0", "Q6_K", "F16"])
def test_a_gpt_oss_with_quantised_experts_computes_as_llama_cpp(tmp_path: Path, fmt: str) -> None:
    sizes = {"n_embd": 256, "n_head": 4, "n_kv_head": 2, "head_dim": 64, "n_ff": 256, "n_layer": 2, "n_ctx": 64}
    keys = {"expert_count": 5, "expert_used_count": 5, "expert_feed_forward_length": 256, "attention.sliding_window": 8}
    # all of them are used: none is chosen by the last bits
    head = {"output.weight": (N_VOCAB, 256)}
    parts = {"attn_q": (256,), "attn_k": (128,), "attn_v": (128,), "attn_output": (256,), "ffn_gate_inp": (5,)}
    parts |= {"ffn_gate_exps": (5, 256), "ffn_up_exps": (5, 256), "ffn_down_exps": (5, 256)}
    biases = {f"blk.{i}.{part}.bias": shape for i in range(2) for part, shape in parts.items()}
    path = write_random(tmp_path / "f32.gguf", "gpt-oss", sizes, keys, head | biases)
    random = np.random.default_rng(0)
    with open_gguf(path) as file:
        metadata, tensors = {key: file.metadata[key] for key in file.metadata}, dict(file.tensors)
        for name, tensor in tensors.items():
            if name.endswith("exps.weight"):
                n, rows, columns = tensor.shape
                data = random_blocks(fmt, n * rows, columns, random)
                tensors[name] = replace(tensor, format=FORMATS[fmt], data=data)
        with open(tmp_path / "m.gguf", "wb") as out:
            copy_gguf(out, metadata, tensors)
    ids = np.random.default_rng(1).integers(0, 256, 40)
    with llama_reference.LlamaReference(tmp_path / "m.gguf", n_ctx=64) as llama:
        expected = llama.logits(ids)
    for backend in ("numpy", "native"):
        with pocketlm.load(tmp_path / "m.gguf", backend=backend, threads=2) as model:
            assert compare(expected, model.logits(ids)).worst_cosine > 0.999, backend  # llama.cpp rounds activations to 8 bits


@pytest.mark.skipif(not hasattr(mmap, "MADV_WILLNEED"), reason="there is no madvise here")
def test_the_system_is_told_which_experts_of_the_file_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it reads these at once, and nothing around them."""
    told = []
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    listen = kind(lambda *call: told.append(call) or 0)
    monkeypatch.setattr(workers, "_advise", lambda: ctypes.cast(listen, ctypes.c_void_p).value)
    plan = plan_of(n_layer=1)
    tensors = quantised(plan, "Q4_0")
    executor = native(plan, tensors, threads=1, free=0)
    logits(executor, IDS[:1], 1)
    chosen = executor._buffers["chosen"][0, :2].astype(int)
    executor.close()
    wanted = []
    for name in plan.experts:
        data = tensors[name].data
        for expert in sorted(chosen):
            first = data.ctypes.data + expert * data.nbytes // 6
            wanted.append((first - first % 65536, data.nbytes // 6 + first % 65536, mmap.MADV_WILLNEED))
    assert told == wanted
    executor = native(plan, tensors, threads=1)
    told.clear()
    logits(executor, IDS[:1], 1)
    assert not told  # in memory
    executor.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists what a process has mapped")
@pytest.mark.parametrize("backend", ["native", "numpy"])
def test_a_closed_model_has_let_go_of_the_file_that_its_experts_are_in(
    tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "head_dim": 16, "n_ff": 96, "n_layer": 1, "n_ctx": 32}
    path = write_random(tmp_path / "m.gguf", "olmoe", sizes, {"expert_count": 4, "expert_used_count": 2}, {})
    monkeypatch.setattr(native_executor, "available_bytes", lambda: 0)
    model = pocketlm.load(path, backend=backend, threads=2)
    executor = model.executor
    model.logits([5, 6, 7])
    model.close()
    assert str(path) not in Path("/proc/self/maps").read_text()
    with pytest.raises(PocketlmError, match="closed"):
        executor.forward(np.array([5]))
