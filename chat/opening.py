"""A model that opens in another thread while the user reads the first lines and types.

In: how to open it, and the messages that the conversation begins with. Out: the model, with those messages computed already.
Knows no terminal and no files.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pocketlm.errors import PocketlmError


class OpeningFailed(Exception):
    """The model cannot be opened; `error` is what was raised."""

    def __init__(self, error: BaseException):
        self.error = error
        super().__init__(str(error))


class Opening:
    """Opens a model after `start`, or at the first `wait`. `close` it, or use it in a `with` statement."""

    def __init__(self, load: Callable[[], Any], name: str):
        self.name = name
        self._load = load
        self._thread: threading.Thread | None = None
        self._model: Any = None
        self._error: BaseException | None = None
        self._cancel, self._done = threading.Event(), threading.Event()
        self._closing = False

    def start(
        self, messages: list[dict[str, str]], failed: Callable[[OpeningFailed], object],
        opened: Callable[[Any], object] = lambda model: None,
    ) -> None:  # fmt: skip
        """Begin, unless it has begun. `messages`: those before the first question. In the opening thread, `opened` is called
        with the model before anything is computed, or `failed` with the error.
        """
        if self._thread is None:
            first = [*messages, {"role": "user", "content": "."}]
            todo = first, failed, opened
            self._thread = threading.Thread(target=self._open, args=todo, daemon=True, name="pocketlm-opening")
            self._thread.start()

    def _open(
        self, first: list[dict[str, str]], failed: Callable[[OpeningFailed], object], opened: Callable[[Any], object]
    ) -> None:
        try:
            self._model = self._load()
            opened(self._model)
            with suppress(PocketlmError):  # whoever asks a question is told; this brings the imports, the template, the
                list(self._model.chat(first, max_tokens=0, cancel=self._cancel))  # weights, the keys of the first lines
        except BaseException as error:
            self._error = error
            failed(OpeningFailed(error))
        finally:
            self._done.set()
            if self._closing and self._model is not None:
                self._model.close()

    @property
    def is_busy(self) -> bool:
        """Whether the thread is still opening the model or computing the first messages."""
        return self._thread is not None and not self._done.is_set()

    @property
    def is_open(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done.is_set() and self._error is None

    def wait(self) -> Any:
        """The model. Raises OpeningFailed."""
        self.start([], lambda error: None)
        self._cancel.set()  # who has a question does not need the first lines computed alone
        self._done.wait()  # not `join`: one that Ctrl-C interrupts takes the thread for ended
        if self._error is not None:
            raise OpeningFailed(self._error)
        return self._model

    def close(self) -> None:
        """Stop computing, and close the model. Does not wait: one that is still being opened is closed by its thread later."""
        self._closing = True
        self._cancel.set()
        if self._model is not None and not self.is_busy:
            self._model.close()

    def __enter__(self) -> "Opening":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
