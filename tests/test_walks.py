"""The five walks of train/WALKS.md: what the page tells its reader to type is run, as it stands there, to the answer in the
author's language; what it prints is what the page shows, but for the numbers; and llama.cpp, ONNX Runtime and the fp16 folder
agree about the model.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from glob import glob
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import walk_corpora as corpora
from agreement import compare
from llama_reference import LlamaReference
from packing import real_stub

torch = pytest.importorskip("torch", reason="the trainer is PyTorch")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
for package in ("tokenizers", "sentencepiece", "tiktoken", "onnx", "llama_cpp"):
    pytest.importorskip(package, reason=f"{package} is not installed")

import pocketlm  # noqa: E402
from pocketlm import cli  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    pytest.mark.skipif(sys.platform == "win32", reason="these tests drive a POSIX system"),
]
PAGE = Path(pocketlm.__file__).with_name("train") / "WALKS.md"
KILLED = "# killed"  # behind a command that is killed on its way


def section(title: str) -> list[str]:
    """The lines of the console block under a heading."""
    return PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("```console\n")[1].split("\n```")[0].splitlines()


class Shell:
    """Runs the commands of a page in a folder: `pocketlm` here, in this process; what is to be killed and all else for itself.

    It knows NAME="value", $NAME, ${NAME#*prefix} and patterns of files.
    """

    def __init__(self, folder: Path):
        self.folder, self.names = folder, {}
        self.path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run(self, line: str) -> str:
        """What the line prints; of `pocketlm`, with what goes to standard error."""
        if match := re.fullmatch(r'(\w+)="(.*)"', line):
            self.names[match[1]] = self._filled(match[2])
            return ""
        words = shlex.split(self._filled(line), comments=True)
        if words[0] != "pocketlm":
            return self._process(["bash", "-c", self._filled(line)])
        words = [name for word in words[1:] for name in ("=" not in word and sorted(glob(word))) or [word]]
        if KILLED in line:
            return self._killed(words)
        out = StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            status = cli.main(words)
        assert status == 0, f"{line}\n{out.getvalue()}"
        return out.getvalue()

    def _filled(self, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            name, _, prefix = match[1].strip("{}").partition("#*")
            return self.names[name].partition(prefix)[2] if prefix else self.names[name]

        return re.sub(r"\$(\w+|\{.*?\})", value, text)

    def _process(self, command: list[str]) -> str:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, encoding="utf-8", timeout=300,
            env={**os.environ, "PATH": self.path},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _killed(self, words: list[str]) -> str:
        """Started for itself and killed as soon as there is a checkpoint."""
        run = Path(words[words.index("-o") + 1])
        process = subprocess.Popen(
            [sys.executable, "-m", "pocketlm", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        while process.poll() is None and not (run / "last.pt").exists():
            time.sleep(0.005)
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, output
        assert "last.pt: " not in output, "it had come to its end"
        return output


@pytest.fixture
def shell(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Shell:
    stubs = Path(request.config.cache.mkdir("pocketlm-stub"))
    real_stub(stubs)
    monkeypatch.setenv("POCKETLM_CACHE", str(stubs))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.py").write_text(PAGE.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], encoding="utf-8")
    return Shell(tmp_path)


def masked(line: str) -> str:
    """Without its numbers, and the width of columns."""
    return re.sub(r"[\d.,:%]+", "#", " ".join(line.split()))


def shows(shown: str, printed: str) -> bool:
    """Whether a line of the page is among those that were printed."""
    start, cut, _ = shown.partition("…")
    lines = map(masked, printed.splitlines())
    return any(line.startswith(masked(start)) if cut else line == masked(shown) for line in lines)


def walked(title: str, shell: Shell, between: dict[str, Callable[[], object]]) -> str:
    """Run a section. Every line that it shows must be printed by the command above it; all that is printed is kept in
    transcript.txt. What the last command prints.
    """
    printed = ""
    with open("transcript.txt", "w", encoding="utf-8") as transcript:
        for line in section(title):
            if line.startswith("$ "):
                for begin, work in between.items():
                    if line.startswith(f"$ {begin}"):
                        work()
                started = time.monotonic()
                printed = shell.run(line[2:])
                print(f"{line}\n{printed}", end="", file=transcript, flush=True)
                print(f"  ({time.monotonic() - started:.1f} s)", file=transcript)
            else:
                assert shows(line, printed), f"{line}\nis not in:\n{printed}"
    return printed.strip()


def agree(asked: str, answer: str, template: str) -> None:
    """The Q4_0 file in llama.cpp: the same ids, logits and answer. ONNX and the fp16 folder: the logits of the checkpoint."""
    prompt = template.format(asked)
    with pocketlm.load("talk.gguf") as model, LlamaReference("talk.gguf", n_ctx=64) as llama:
        ids = model.template.encode([{"role": "user", "content": asked}], model.tokenizer)
        assert ids == llama.tokenize(prompt, special=True, bos=True)
        logits = llama.logits(ids)
        found = compare(model.logits(ids), logits)
        assert found.kl < 4e-3
        assert found.worst_cosine > 0.985
        said: list[int] = []
        while (likeliest := int(logits[-1].argmax())) not in model.tokenizer.end_ids and len(said) < 40:
            said.append(likeliest)
            logits = llama.logits(said[-1:], keep=True)
        assert model.tokenizer.decode(said) == answer
    with pocketlm.load("talk-fp16") as model:
        right = model.logits(ids)
    session = ort.InferenceSession("talk.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    for entry in session.get_inputs()[2:]:
        feeds[entry.name] = np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
    assert compare(session.run(["logits"], feeds)[0][0], right).worst_cosine > 0.9999


CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
MARKERS = "<|user|>\n{}<|end|>\n<|assistant|>\n"


def deepspeed() -> None:
    """The weights as ZeRO-2 leaves them."""
    folder = Path("deepspeed", "global_step80")
    folder.mkdir(parents=True)
    torch.save({"module": torch.load("base/last.pt", weights_only=True)["model"]}, folder / "mp_rank_00_model_states.pt")
    Path("deepspeed", "latest").write_text("global_step80")


@pytest.mark.parametrize(
    ("title", "corpus", "asked", "answers", "template"),
    [
        ("A Turkish GPT-2, part after part", corpora.turkish_gpt2, "Adın ne?", corpora.TURKISH, CHATML),
        ("Turkish decoders with ALiBi", corpora.turkish_alibi, "Çay içer misin?", corpora.TURKISH, CHATML),
        ("Chekhov, the classics and an assistant", corpora.russian, "Кто ты?", corpora.RUSSIAN, MARKERS),
        ("A Polish 1.3B for a Raspberry Pi", corpora.polish, "Jak się masz?", corpora.POLISH, CHATML),
        ("GPT-2 124M on Colab", corpora.colab, "What is your name?", corpora.ENGLISH, MARKERS),
    ],
    ids=["turkish gpt2", "turkish alibi", "russian", "polish", "colab"],
)
def test_a_walk(shell: Shell, title: str, corpus: Callable, asked: str, answers: dict[str, str], template: str) -> None:
    corpus(shell.folder)
    assert walked(title, shell, {"pocketlm train rozmowy": deepspeed}) == answers[asked]
    agree(asked, answers[asked], template)
