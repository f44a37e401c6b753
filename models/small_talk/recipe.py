"""One command from PyPI packages to the GGUF that comes with pocketlm: conversations, two stages of training, export.

First everything that is said in real conversations is learnt, then, at twice the context, how Pocket answers. Both
sides of a conversation are learnt in both: answers alone cost Pocket much of what it knew about people.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pocketlm.errors import PocketlmError

MODEL = "small-talk.gguf"
PROCESSES = 2  # that share every step; a different number gives the same model but for rounding
BASE = {"learn": "all", "preset": "small-talk", "context": 256, "eval-every": 500, "log-every": 25}
TALK = {"learn": "all", "context": 512, "batch": 4, "micro-batch": 2, "steps": 450, "lr": 3e-4, "warmup": 30, "eval-every": 150}
PROMPTS = ("Hi, how are you?", "What do you like to do on weekends?", "Who are you?", "Tell me a joke.")
CARD = {
    "general.name": "Pocket",
    "general.description": "A very small model for small talk in English. It is often wrong and remembers little.",
    "general.author": "pocketlm",
    "general.license": "mit",
    "general.languages": ["en"],
    "general.tags": ["text-generation", "small-talk"],
    "general.datasets": ["chitchat-dataset 0.9.0 (PyPI, MIT)", "chatterbot-corpus 1.3.3 (PyPI, BSD)", "written by hand (MIT)"],
}


def cook(run: Path, threads: int, compile: bool) -> int:
    """Make RUN/small-talk.gguf; goes on where an interrupted call left off. Raises PocketlmError."""
    from pocketlm.models.small_talk.baselines import table
    from pocketlm.models.small_talk.conversations import make_data

    files = make_data(run / "texts")
    stages: dict[str, dict[str, Any]] = {"base": BASE, "talk": {**TALK, "from": run / "base" / "best.pt"}}
    for name, options in stages.items():
        _train([files[name], "--val", files["val"], "-o", run / name, *_flags(options), *["--compile"] * compile], threads)
    _export(run / "talk" / "last.pt", run / MODEL)
    print(*table(run / MODEL, run / "base" / "data"), sep="\n")
    return 0


def _flags(options: dict[str, Any]) -> list[Any]:
    samples = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" for prompt in PROMPTS]
    pairs = [(f"--{name}", value) for name, value in options.items()] + [("--sample", sample) for sample in samples]
    return [part for pair in pairs for part in pair]


def _train(arguments: list[Any], threads: int) -> None:
    """`pocketlm train` in a few processes of one thread each, which on few cores is faster than one of many threads."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [*start, "-m", "pocketlm", "train", *map(str, arguments), "--threads", str(threads or 1)]
    if status := subprocess.run(command, check=False).returncode:
        raise PocketlmError(f"training ended with status {status}; the same command goes on from its last checkpoint")


def _export(checkpoint: Path, out: Path) -> None:
    from pocketlm.export.dialects import read_canonical
    from pocketlm.export.export import export

    model = read_canonical(checkpoint)
    model = replace(model, metadata={**model.metadata, **CARD})
    print(*export(model, checkpoint, out, quant="q8_0").lines(), sep="\n")
