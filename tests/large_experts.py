"""A mixture of experts that is larger than the memory it may take: runs, and reads only what it needs. Run as a program:

    python tests/large_experts.py FOLDER [LAYERS] [--llama]

Writes a GGUF of random weights with the layers of a Qwen3-30B-A3B (128 experts, 8 used; 19 layers are 6.7 GB in Q4_0) into
the folder, limits its own memory (RLIMIT_DATA) to 1.5 GB and prints a line of figures for each thing measured. `--llama`:
llama.cpp's tokens a second on the same file, and how near its logits are. The file stays, and is used again.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import resource
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llama_reference import LlamaReference
from tiny_models import vocabulary

import pocketlm
from pocketlm.export.gguf_writer import copy_gguf
from pocketlm.runtime.formats import FORMATS
from pocketlm.runtime.memory import release_pages

N_EMBD, N_HEAD, N_KV, HEAD, N_EXPERTS, N_USED, N_FF = 2048, 32, 4, 128, 128, 8, 768
N_VOCAB = len(vocabulary()["tokenizer.ggml.tokens"])
LIMIT = 1536 << 20
MB = 1 << 20


class Made:
    """A tensor whose bytes are made when they are written."""

    def __init__(self, name: str, shape: tuple[int, ...], format_name: str):
        self.name, self.shape, self.format = name, shape, FORMATS[format_name]

    @property
    def data(self) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(self.name.encode()))
        n = int(np.prod(self.shape))
        if self.format.name == "F32":
            spread = 0.02 if "gate_inp" not in self.name else 0.2
            values = np.ones(n) if "norm" in self.name else spread * random.standard_normal(n)
            return values.astype(np.float32).view(np.uint8)
        start = int(random.integers(len(_blocks())))
        blocks = np.resize(np.roll(_blocks(), start, axis=0), (n // 32, 18))
        if self.name == "token_embd.weight":  # much more than the layers add, so that tokens go to experts of their own
            blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * 40).view(np.uint8)
        return blocks.reshape(-1)


@functools.cache
def _blocks() -> np.ndarray:
    """Of Q4_0, a prime number of them: no two rows are alike."""
    random = np.random.default_rng(0)
    blocks = np.frombuffer(random.bytes(1000003 * 18), np.uint8).reshape(-1, 18).copy()
    scales = random.uniform(0.5, 1.5, len(blocks)) * random.choice([-1, 1], len(blocks))  # codes lie around -0.5
    blocks[:, :2] = (scales * 0.003).astype(np.float16)[:, None].view(np.uint8)
    return blocks


def write(path: Path, n_layer: int) -> None:
    arch = "qwen3moe"
    keys = {
        "context_length": 4096, "embedding_length": N_EMBD, "block_count": n_layer, "feed_forward_length": 6144,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_KV, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6,
        "expert_count": N_EXPERTS, "expert_used_count": N_USED, "expert_feed_forward_length": N_FF,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (N_VOCAB, N_EMBD), "output_norm.weight": (N_EMBD,)}
    for i in range(n_layer):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (N_EMBD,), "attn_q": (N_HEAD * HEAD, N_EMBD), "attn_k": (N_KV * HEAD, N_EMBD),
            "attn_v": (N_KV * HEAD, N_EMBD), "attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,),
            "attn_output": (N_EMBD, N_HEAD * HEAD), "ffn_norm": (N_EMBD,), "ffn_gate_inp": (N_EXPERTS, N_EMBD),
            "ffn_gate_exps": (N_EXPERTS, N_FF, N_EMBD), "ffn_up_exps": (N_EXPERTS, N_FF, N_EMBD),
            "ffn_down_exps": (N_EXPERTS, N_EMBD, N_FF),
        }  # fmt: skip
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in parts.items()}
    kept = {n for n, shape in shapes.items() if len(shape) == 1 or "gate_inp" in n}
    tensors = {name: Made(name, shape, "F32" if name in kept else "Q4_0") for name, shape in shapes.items()}
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": value for key, value in keys.items()}, **vocabulary()}
    with open(path, "wb") as file:
        copy_gguf(file, metadata, tensors)  # type: ignore[arg-type]


def status(name: str) -> int:
    """A figure of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def from_disk() -> int:
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "read_bytes" in line).split()[1])


def in_core(path: Path) -> int:
    """Bytes of the file that the system holds in memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = np.frombuffer(mapped, np.uint8)
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        size = ctypes.c_size_t(len(mapped))
        ctypes.CDLL(None).mincore(ctypes.c_void_p(view.ctypes.data), size, ctypes.c_void_p(pages.ctypes.data))
        del view
        return int((pages & 1).sum()) * mmap.PAGESIZE


def forget(path: Path, model: Any = None) -> None:
    """Take the file out of the system's memory, and out of the model's."""
    for tensor in model.tensors.values() if model else ():
        release_pages(tensor.data)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def speed(step: Callable[[int], Any], n: int) -> float:
    start = time.perf_counter()
    for i in range(n):
        step(i % N_VOCAB)
    return n / (time.perf_counter() - start)


def main(folder: Path, n_layer: int, with_llama: bool) -> None:
    path = folder / f"a3b-{n_layer}.gguf"
    if not path.exists():
        write(path.with_suffix(".part"), n_layer)
        path.with_suffix(".part").replace(path)
    size = path.stat().st_size
    print(f"file: {size / 1e9:.2f} GB, {n_layer} layers; memory limited to {LIMIT / 1e9:.2f} GB", flush=True)
    ids = np.random.default_rng(0).integers(0, N_VOCAB, 64)
    expected = None
    if with_llama:
        with LlamaReference(path, n_ctx=512) as llama:
            expected = llama.logits(ids[:16])
            rate = speed(lambda i: llama.logits([i], keep=True), 12)
        print(f"llama.cpp: {rate:.2f} tokens/s, its file in the system's memory", flush=True)
    forget(path)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    before, start = in_core(path), time.perf_counter()
    with pocketlm.load(path, backend="native", threads=2, ctx=512) as model:
        executor = model.executor
        print(f"loaded in {time.perf_counter() - start:.1f} s; {(in_core(path) - before) / MB:.0f} MB of the file were read")
        token = sum(model.tensors[name].data.nbytes * share for name, share in executor.plan.experts.items())
        for i in range(3):
            forget(path, model)
            at, held = from_disk(), in_core(path)
            start = time.perf_counter()
            executor.forward(ids[i : i + 1])
            took = time.perf_counter() - start
            print(
                f"a token with nothing in memory: its experts are {token / MB:.0f} MB, {(from_disk() - at) / MB:.0f} MB came "
                f"from the disk, {(in_core(path) - held) / MB:.0f} MB more of the file in memory, {took:.2f} s", flush=True,
            )  # fmt: skip
        executor.cache.truncate(0)
        found = executor.forward(ids[:16], rows="all").copy()
        executor.cache.truncate(0)
        one = np.concatenate([executor.forward(ids[i : i + 1]).copy() for i in range(16)])
        print(f"a prompt and its tokens one by one: {'the same bits' if (one == found).all() else 'DIFFERENT'}")
        if expected is not None:
            lengths = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
            cosines = (expected * found).sum(1) / lengths
            print(f"beside llama.cpp's logits: cosine {np.median(cosines):.6f} in the middle, {cosines.min():.6f} at worst")
        executor.cache.truncate(0)
        for _ in range(2):
            start = time.perf_counter()
            executor.forward(np.resize(ids, 128))
            print(f"128 tokens of a prompt: {128 / (time.perf_counter() - start):.1f} tokens/s", flush=True)
        print(f"token by token: {speed(lambda i: executor.forward(np.array([i])), 24):.2f} tokens/s", flush=True)
        print(
            f"of its own the process took {status('RssAnon') / MB:.0f} MB, at most {status('VmHWM') / MB:.0f} MB with pages of "
            f"the file; {in_core(path) / MB:.0f} of {size / MB:.0f} MB of the file are in memory"
        )


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    main(Path(words[0]), int(words[1]) if len(words) > 1 else 20, "--llama" in sys.argv)
