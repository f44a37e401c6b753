"""Tests whether the exported file still computes what the checkpoint does: both run over a text, side by side.

In: a `CanonicalModel` and the file made of it. Out: how alike their logits are, and how well each predicts the text.
The float32 weights run on the NumPy executor, the reference; pocketlm's files on the executor that users get, which is the
native one if it can run; ONNX files on onnxruntime. With importance.py the only module here that runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pocketlm.errors import FileError, PocketlmError, needed
from pocketlm.export.canonical import CanonicalModel, Float32Tensors
from pocketlm.export.dialects import read_canonical
from pocketlm.export.to_huggingface import WEIGHTS
from pocketlm.export.tokenizer_data import NONE
from pocketlm.runtime.evaluation import TEXT, cosines, cross_entropy
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.model_file import open_model
from pocketlm.runtime.plan import Plan, make_plan
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import default_threads
from pocketlm.tokenizer import Tokenizer, from_metadata

# what a chat model is asked and answers, in turns, where nobody gives a text
CONVERSATION = (
    "Hello! How are you today?", "I'm doing well, thank you! How about you?",
    "A little tired. I worked all day, and then I made dinner.", "That sounds like a long day. What did you make?",
    "Soup with carrots and potatoes. It was easy, and it tasted good.",
    "That sounds lovely! Soup is just right when it is cold outside. Do you like to cook?",
    "Yes, I do. On weekends I bake bread, too.", "I love the smell of fresh bread! What is your favorite kind?",
    "The dark one with nuts. My sister likes white bread better.",
    "Then you need two of them! Do you have any plans for tomorrow?",
    "I want to go for a walk by the lake and read a book.", "Nice! What kind of books do you like?",
    "Old stories about the sea. Can you tell me a short one?",
    "Sure! A boy found a bottle on the beach. There was a letter in it, and it said: turn around. He did, and there was his "
    "father, who had come home from the sea.",
    "Thank you, that was a good one. Good night!", "You're welcome! Sleep well, and talk to you soon.",
)  # fmt: skip
RANDOM = " drawn at random"
ENOUGH = 0.8  # share of a text's characters that a vocabulary has to have, or what is left is no text
WINDOW = 512  # tokens that are looked at together: bounds the logits in memory to 100 MB for 50,000 words
Runner = Callable[[np.ndarray], np.ndarray]  # ids int64 [n], from an empty cache -> logits float32 [n, n_vocab]


@dataclass(frozen=True)
class Comparison:
    """The cosines compare the logits of one position; both perplexities are of the same text in the same windows."""

    n_tokens: int
    cosine: float  # mean
    worst_cosine: float
    agreement: float  # share of positions where both think the same token likeliest
    perplexity: float  # of the exported file
    exact_perplexity: float  # of the float32 weights
    n_vocab: int  # what guessing would have as its perplexity
    sample: str = ""  # what the tokens are, where they are not those of the whole text

    def line(self) -> str:
        """The comparison as text."""
        is_text = RANDOM not in self.sample
        foreign = "; the text is foreign to the model, which a guess beats"
        return (
            f"verified on {self.n_tokens} tokens{self.sample}: cosine {self.cosine:.6f} (worst {self.worst_cosine:.6f}), "
            f"same first choice {self.agreement:.1%}, "
            f"perplexity {self.perplexity:.3f} (float32 weights: {self.exact_perplexity:.3f})"
            f"{foreign if is_text and self.exact_perplexity > self.n_vocab else ''}"
        )


def verify(model: CanonicalModel, out: Path, text: str | None = None) -> Comparison:
    """Compare the file `out` with the float32 weights of `model` on `text`. None: on a built-in text, a conversation for chat
    models, without the characters that the tokenizer lacks; or on random tokens if it lacks too many.

    Raises FileError if the model has no tokenizer or does not fit into memory, PocketlmError for a text of fewer than two
    tokens, or with characters that the tokenizer lacks.
    """
    if "tokenizer.ggml.tokens" not in model.metadata:
        raise FileError(out, "cannot be verified without a tokenizer", "name one with --tokenizer")
    tokenizer = from_metadata(model.metadata, out)
    template = model.metadata.get("tokenizer.chat_template")
    own = _own_ids(tokenizer, template if isinstance(template, str) else None) if text is None else None
    found, sample = own or (tokenizer.encode(text or "", bos=tokenizer.adds_bos), "")
    ids = np.array(found, np.int64)
    if len(ids) < 2:
        raise PocketlmError("the text is too short: verifying needs at least two tokens")
    found_cosines, same, nats, n_predicted = [], 0, np.zeros(2), 0
    window = min(WINDOW, model.hyper.n_ctx)
    with _exact_runner(model, out) as exact, _exported_runner(model, out) as exported:
        for start in range(0, len(ids), window):
            block = ids[start : start + window]
            a, b = (run(block).astype(np.float64) for run in (exact, exported))
            found_cosines += cosines(a, b).tolist()
            same += int((a.argmax(1) == b.argmax(1)).sum())
            nats += [cross_entropy(logits[:-1], block[1:]) for logits in (a, b)]
            n_predicted += len(block) - 1
    exact_perplexity, perplexity = (math.exp(min(total / max(n_predicted, 1), 700)) for total in nats)
    agreement = same / len(ids)
    return Comparison(
        len(ids), float(np.mean(found_cosines)), float(np.min(found_cosines)), agreement, perplexity, exact_perplexity,
        tokenizer.n_vocab, sample,
    )  # fmt: skip


def _own_ids(tokenizer: Tokenizer, template: str | None) -> tuple[list[int], str]:
    """Ids of the built-in text, and a clause about them for the report. `template`: the model's chat template, Jinja."""
    from pocketlm.chat.templates import choose

    chat = choose(template, tokenizer)
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": tokenizer.encodable(turn)} for i, turn in enumerate(CONVERSATION)]
    talks = chat.name != "plain" and not tokenizer.unknown(chat.render(messages, False), special=True)
    text, name = ("".join(CONVERSATION), "a conversation in its template") if talks else (TEXT, "the usual text")
    usable = tokenizer.encodable(text)
    if len(usable) < ENOUGH * len(text):
        ids = np.random.default_rng(0).integers(0, tokenizer.n_vocab, WINDOW).tolist()
        return ids, f"{RANDOM}, since the tokenizer takes too few of the characters of {name}"
    left_out = "".join(sorted(tokenizer.unknown(text)))
    without = f" without {left_out!r}, which the tokenizer does not take" if left_out else ""
    if not talks:
        return tokenizer.encode(usable, bos=tokenizer.adds_bos), f" of {name}{without}" if without else ""
    return chat.encode(messages, tokenizer, add_generation_prompt=False), f" of {name}{without}"


def _exact_runner(model: CanonicalModel, out: Path) -> AbstractContextManager[Runner]:
    return _runner("numpy", model.plan(out), Float32Tensors(model, out), out)


@contextmanager
def _exported_runner(model: CanonicalModel, out: Path) -> Iterator[Runner]:
    path = out / "model.gguf" if (out / "model.gguf").is_file() else out  # in the folder for Ollama
    if path.suffix.lower() == ".onnx":
        yield _onnx_runner(model, path)
        return
    if (path / WEIGHTS).is_file():  # a Hugging Face folder: what pocketlm makes of it when it is exported again
        with _exact_runner(read_canonical(path, tokenizer=NONE), path) as run:
            yield run
        return
    with open_model(path) as opened:
        plan = make_plan(model.hyper, {name: tensor.shape for name, tensor in opened.tensors.items()}, path)
        with _runner("auto", plan, opened.tensors, path) as run:
            yield run


@contextmanager
def _runner(backend: str, plan: Plan, tensors: Mapping[str, Tensor], out: Path) -> Iterator[Runner]:
    with closing(make_executor(backend, plan, tensors, min(WINDOW, plan.hyper.n_ctx), default_threads(), out)) as executor:

        def run(ids: np.ndarray) -> np.ndarray:
            executor.cache.truncate(0)
            return executor.forward(ids, rows="all")

        yield run


def _onnx_runner(model: CanonicalModel, path: Path) -> Runner:
    with needed("verifying ONNX", "onnxruntime"):
        import onnxruntime
    session, hyper = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), model.hyper
    empty = np.zeros((1, hyper.n_kv_head, 0, hyper.head_dim), np.float32)
    past = {
        entry.name: empty.astype(np.float16 if "float16" in entry.type else np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }

    def run(ids: np.ndarray) -> np.ndarray:
        feed = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64), **past}
        return np.asarray(session.run(["logits"], feed)[0])[0]

    return run
