"""Instructions that a token takes on a Raspberry Pi's processors, ours beside llama.cpp's, counted in an emulator.

    python tests/arm64/instructions.py [--work FOLDER] [--formats q4_0 q8_0 q4_k f16]

Linux with debootstrap, qemu-user, gcc, cmake, ninja and g++-aarch64-linux-gnu. What it makes is kept in FOLDER: a Debian for
arm64 to take Python from, wheels, and llama.cpp from the source distribution of llama-cpp-python, compiled once for a Pi 5
(dotprod, float16 arithmetic) and once for a Pi 4. Both libraries run the same file on one thread in the same Python; what is
counted is the difference between a few tokens and a few more, so that loading is left out. Beside it stands how far the
logits of these tokens are from exact ones of the same file: fewer bits for what is multiplied with the weights make fewer
instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from run import PLATFORMS, PYTHON, SOURCE, make_root

LLAMA = "0.3.36"  # of llama-cpp-python
CORES = {"cortex-a76": "armv8.2-a+dotprod+fp16", "cortex-a72": "armv8-a"}  # qemu's name → how llama.cpp is compiled for it
LEFT_OUT = ("CURL", "BUILD_COMMON", "BUILD_TESTS", "BUILD_TOOLS", "BUILD_EXAMPLES")  # of llama.cpp
CROSS = {
    "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64",
    "CMAKE_C_COMPILER": "aarch64-linux-gnu-gcc", "CMAKE_CXX_COMPILER": "aarch64-linux-gnu-g++",
}  # fmt: skip
SHAPE = "48M-F16"  # of bench.shapes: 47.9 million weights, all of which a token reads
FEW, MORE = 3, 9  # tokens
# qemu's interface for plugins, of which this is all that is needed: for every block that it translates, how many
# instructions; for every run of a block, a call
PLUGIN = r"""
#include <stdint.h>
#include <stdio.h>
int qemu_plugin_version = 1;
struct qemu_plugin_tb;
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), int, void *);
void qemu_plugin_register_atexit_cb(uint64_t, void (*)(uint64_t, void *), void *);
static uint64_t count;
static void run(unsigned cpu, void *n) { count += (uintptr_t)n; }
static void translated(uint64_t id, struct qemu_plugin_tb *tb) {
    qemu_plugin_register_vcpu_tb_exec_cb(tb, run, 0, (void *)(uintptr_t)qemu_plugin_tb_n_insns(tb));
}
static void end(uint64_t id, void *nothing) { fprintf(stderr, "instructions: %llu\n", (unsigned long long)count); }
int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv) {
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_atexit_cb(id, end, 0);
    return 0;
}
"""
# Runs there: adapter, model, tokens, where the logits go
TOKENS = """
import importlib, sys
import numpy as np
module, name, *options = sys.argv[1].split(":")
adapter = getattr(importlib.import_module(f"pocketlm.bench.{module}"), name)(sys.argv[2], 1, 64, *options)
rows = [adapter.forward(np.array([7 * i + 5], np.int32)).copy() for i in range(int(sys.argv[3]))]
np.save(sys.argv[4], np.concatenate(rows))
"""
ADAPTERS = {"ours": "adapter_pocketlm:Pocketlm:native", "llama.cpp": "adapter_llama:Llama"}


def call(*command: object, **options: object) -> None:
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def make_plugin(work: Path) -> Path:
    if not (plugin := work / "count.so").exists():
        call("gcc", "-shared", "-fPIC", "-O2", "-x", "c", "-", "-o", plugin, input=PLUGIN, text=True)
    return plugin


def make_llama(work: Path) -> Path:
    """The folder of llama-cpp-python's sources, with a folder of libraries for each of CORES beside it."""
    source = work / f"llama_cpp_python-{LLAMA}"
    if not source.exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
        call(*pip, "-d", work, f"llama-cpp-python=={LLAMA}")
        with tarfile.open(work / f"{source.name}.tar.gz") as archive:
            archive.extractall(work, filter="data")
    for arch in CORES.values():
        if (build := work / f"b-{arch}").joinpath("bin/libllama.so").exists():
            continue
        off = ["GGML_NATIVE", "GGML_OPENMP", *(f"LLAMA_{part}" for part in LEFT_OUT)]
        options = {"CMAKE_BUILD_TYPE": "Release", "BUILD_SHARED_LIBS": "ON", **dict.fromkeys(off, "OFF"), **CROSS}
        words = [f"-D{name}={value}" for name, value in {**options, "GGML_CPU_ARM_ARCH": arch}.items()]
        call("cmake", "-S", source / "vendor/llama.cpp", "-B", build, "-G", "Ninja", *words)
        call("ninja", "-C", build, "llama")
    return source


def make_site(work: Path, llama: Path) -> Path:
    """Both packages, and for arm64 what they need."""
    if not (site := work / "site").exists():
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--only-binary", ":all:", "--python-version", PYTHON]
        needed = ["numpy", "llvmlite>=0.48", "jinja2", "prompt_toolkit", "regex", "typing_extensions", "diskcache"]
        call(*pip, "--implementation", "cp", *platforms, "--target", site, *needed)
    for name, path in (("pocketlm", SOURCE), ("llama_cpp", llama / "llama_cpp")):
        (site / name).unlink(missing_ok=True)
        (site / name).symlink_to(path)
    return site


def make_model(work: Path, fmt: str) -> Path:
    if not (path := work / f"{SHAPE}-{fmt}.gguf").exists():
        from pocketlm.bench import shapes

        call(sys.executable, "-m", "pocketlm", "export", shapes.find(SHAPE, work), "-o", path, "--quant", fmt, "--pure")
    return path


def count(work: Path, core: str, who: str, model: Path, n_tokens: int) -> tuple[int, np.ndarray]:
    """Instructions of a whole program, and the logits it computed."""
    logits = work / "logits.npy"
    command = ["qemu-aarch64", "-cpu", core, "-L", work / "root", "-plugin", work / "count.so", work / "root/usr/bin/python3"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        "PYTHONPATH": work / "site", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1",
        "OPENBLAS_NUM_THREADS": "1",  # the threads that NumPy brings wait in a loop, which would be counted
        "POCKETLM_CACHE": work / "cache", "LLAMA_CPP_LIB_PATH": work / f"b-{CORES[core]}/bin",
    }  # fmt: skip
    words = [*command, "-c", TOKENS, ADAPTERS[who], model, n_tokens, logits]
    said = subprocess.run(
        [str(word) for word in words], env={name: str(value) for name, value in environment.items()},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"^instructions: (\d+)$", said.stderr, re.MULTILINE)
    if said.returncode or not found:
        sys.exit(f"{who} on {core}: {said.stderr[-2000:]}")
    return int(found[1]), np.load(logits)


def divergence(exact: np.ndarray, logits: np.ndarray) -> float:
    """Mean KL divergence from the exact distributions, in nats."""
    p, q = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), 1, keepdims=True) for x in (exact, logits))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=SOURCE / ".cache/arm64-instructions", help="where all it makes is kept")
    parser.add_argument("--formats", nargs="+", default=["q4_0", "q8_0", "q4_k", "f16"], metavar="FORMAT")
    parser.add_argument("--cores", nargs="+", default=[*CORES], choices=CORES)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    make_root(work / "root")
    make_plugin(work)
    make_site(work, make_llama(work))
    import pocketlm

    print("| | format | ours, M a token | llama.cpp, M a token | ours / llama.cpp | KL, ours | KL, llama.cpp |")
    print("|---|---|--:|--:|--:|--:|--:|", flush=True)
    for core in arguments.cores:
        for fmt in arguments.formats:
            model = make_model(work, fmt)
            with pocketlm.load(model, backend="numpy", ctx=64) as reference:
                exact = reference.session().logits([7 * i + 5 for i in range(MORE)])
            rows = {}
            for who in ADAPTERS:
                count(work, core, who, model, 1)  # the first start compiles the kernels, once
                (few, _), (more, logits) = (count(work, core, who, model, n) for n in (FEW, MORE))
                rows[who] = ((more - few) / (MORE - FEW) / 1e6, divergence(exact, logits))
            (ours, own), (theirs, other) = rows.values()
            print(f"| {core} | {fmt} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {own:.1e} | {other:.1e} |", flush=True)


if __name__ == "__main__":
    main()
