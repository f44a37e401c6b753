"""The tests as Windows runs them, on a system that is not Windows: under wine, with a Python for Windows composed here.

    python tests/windows/suite.py                          # all of them
    python tests/windows/suite.py tests/test_chat_kept.py  # pytest's own arguments

What is composed is kept in `.cache/windows`. The exit status is pytest's; a skip is a failure unless known_skips.py has a
reason for it that names Windows or wine, and the run ends with the number of tests that were skipped for each.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import python  # noqa: E402
from wine_runner import WINE, environment_for, prefix  # noqa: E402

from pocketlm.build import wheels  # noqa: E402
from pocketlm.runtime.native.aot import PLATFORMS  # noqa: E402

CACHE, CONSTRAINTS = ROOT / ".cache/windows", ROOT / ".ci/constraints.txt"
# torch, onnxruntime and so on compute the same on every system, and take minutes to start here
REQUIREMENTS = (
    "numpy", "llvmlite", "jinja2", "prompt_toolkit", "regex", "starlette", "uvicorn", "pytest", "colorama", "pytest-xdist",
    "gguf", "tokenizers", "sentencepiece", "protobuf", "tiktoken", "safetensors", "psutil", "pyte", "pefile", "lief",
    "macholib",
)  # fmt: skip


def python_exe() -> Path:
    """python.exe in the cache, composed unless it is what would be composed now; this package is in its path."""
    sources = [HERE / "python.py", HERE / "images.py", HERE / "suite.py", CONSTRAINTS]
    stamp = hashlib.sha256(sys.version.encode() + b"".join(file.read_bytes() for file in sources)).hexdigest()
    folder = CACHE / f"python-{python.VERSION[0]}.{python.VERSION[1]}"
    done = folder / "composed"
    if not done.exists() or done.read_text() != stamp:
        python.compose(folder, REQUIREMENTS, CONSTRAINTS)
        done.write_text(stamp)
    package = folder / "Lib/site-packages/pocketlm"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith("."):  # among which this folder is
            (package / entry.name).symlink_to(entry, target_is_directory=entry.is_dir())
    return folder / "python.exe"


def fetch_what_stubs_are_made_of() -> Path:
    """The folder of pytest's cache, in which tests find it: there is no pip in that Python."""
    folder, kept = CACHE / "pytest", ROOT / ".pytest_cache/d/pocketlm-stub"
    kept.mkdir(parents=True, exist_ok=True)
    os.environ["POCKETLM_CACHE"] = str(kept)
    for platform in PLATFORMS:
        wheels.fetch(wheels.pinned(platform, python.VERSION))
    own = folder / "d/pocketlm-stub/wheels"
    own.parent.mkdir(parents=True, exist_ok=True)
    if not own.exists():
        own.symlink_to(kept / "wheels", target_is_directory=True)
    return folder


def windows_path(path: Path) -> str:
    return "Z:" + str(path).replace("/", "\\")


def main(arguments: list[str]) -> int:
    if WINE is None:
        print("this needs wine (Debian packages wine and wine64)", file=sys.stderr)
        return 2
    program, home, cache = python_exe(), prefix(CACHE), fetch_what_stubs_are_made_of()
    environment = environment_for(home, PYTHONPYCACHEPREFIX=windows_path(CACHE / "bytecode"), PYTHONUNBUFFERED="1")
    # who started this waits for it: a test that hangs ends it, with the line at which it does
    hang = ["-o", "faulthandler_timeout=1800", "-o", "faulthandler_exit_on_timeout=true"]
    options = ["--known-skips-only", *hang, "-o", f"cache_dir={windows_path(cache)}"]
    command = [WINE, str(program), "-m", "pytest", *options]
    # A pipe on either side: Python under wine takes no file for its input, and wine's server keeps its outputs open
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as copy:
        with subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=copy.stdin, stderr=copy.stdin
        ) as process:
            status = process.wait()
        assert copy.stdin
        copy.stdin.close()
        try:
            copy.wait(2)
        except subprocess.TimeoutExpired:
            copy.kill()
    return status


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    sys.exit(main(sys.argv[1:]))
