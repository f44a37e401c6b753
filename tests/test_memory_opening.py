"""What opening a model takes at its worst moment: the tiled weights and a piece of the file, never the file twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tiny_models import write_model

MB = 1 << 20
CHILD = """
import json, sys, threading, pocketlm
def now(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) << 10
def of_file(path):
    inside = total = 0
    for line in open("/proc/self/smaps"):
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = line.rstrip().endswith(path)
        elif inside and fields[0] == "Rss:":
            total += int(fields[1]) << 10
    return total
small, large = sys.argv[1:]
with pocketlm.load(small, backend="native", threads=2, ctx=64) as model:
    model.logits([1, 2, 3])
before = now("VmHWM")
with pocketlm.load(large, backend="native", threads=2, ctx=64) as model:
    after = of_file(large)
    model.logits([1, 2, 3])
    print(json.dumps([now("VmHWM") - before, after]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads /proc")
def test_opening_takes_the_weights_and_a_piece_of_the_file(tmp_path):
    """One matrix is most of the model, as a table of tokens is of a small one."""
    small, large = write_model(tmp_path / "small.gguf"), write_model(tmp_path / "large.gguf", n_embd=256, rows=70_000)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(large)], capture_output=True, text=True, check=True, timeout=300
    )
    grew, mapped = json.loads(run.stdout)
    assert large.stat().st_size > 60 * MB
    assert grew < large.stat().st_size + 8 * MB
    assert mapped < 2 * MB
