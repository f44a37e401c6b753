"""A batch on the workers of a Dask cluster, each with the model open in it.

In: lines. Out: the output for each, as it is finished; the same bytes as from one machine. Dask decides which worker answers
what, and gives the work of one that dies to another. Workers need pocketlm, and the model under the same name or path.
"""

from __future__ import annotations

import json
import logging
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar

import distributed

import pocketlm
from pocketlm.batch.lines import Line, Written
from pocketlm.batch.local import Machine, Settings
from pocketlm.errors import FileError, PocketlmError, UsageError

CHUNKS = 2  # for each worker: one that it answers, and one that waits there
ROUNDS = 4  # lines of a chunk, for each slot
SECONDS = 10.0  # for the scheduler to answer
KEPT = "and give the same command: the answers so far are kept"
_LOG = logging.getLogger("distributed.client")
T = TypeVar("T")

_open_lock, _answer_lock = threading.Lock(), threading.Lock()  # Dask runs as many tasks in a worker as it has threads


@lru_cache(maxsize=1)
def _machine(opening: str) -> Machine:
    name, how, *settings = json.loads(opening)
    return Machine(pocketlm.load(name, **how), Settings(*settings))


def _opened(opening: str) -> Machine:
    """The model of this worker, one for all chunks. `opening`: its name, keywords of `pocketlm.load` and Settings, as JSON."""
    with _open_lock:
        return _machine(opening)


def _told(work: Callable[[], T]) -> T | str:
    """What `work` returns, or what is wrong. No exception: for one whose traceback is too deep for pickle, Dask's client waits
    for ever.
    """
    try:
        return work()
    except PocketlmError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()  # in the worker's terminal
        return f"{type(error).__name__}: {error}"


def describe(opening: str) -> Any:
    """What this worker's answers depend on (a tuple), or what is wrong with it (a text)."""
    return _told(lambda: _opened(opening).made_of)


def answer(opening: str, made_of: tuple[Any, ...], lines: list[Line]) -> list[Written] | str:
    """Answer a chunk, on a worker; or what is wrong, as that the worker's answers would differ from the others'."""

    def answers() -> list[Written]:
        machine = _opened(opening)
        if machine.made_of != made_of:
            raise PocketlmError(f"it is of another version, model or processor: {machine.made_of}, not {made_of}")
        with _answer_lock:
            return list(machine.answers(lines))

    return _told(answers)


class Cluster:
    """The workers of the scheduler at `address`, in a `with` statement. Raises UsageError and FileError."""

    def __init__(self, address: str, model: str, how: Mapping[str, Any], settings: Settings):
        self._opening = json.dumps([model, dict(how), settings.slots, settings.seed, dict(settings.defaults)])
        self._n_lines, self._address = ROUNDS * settings.slots, address
        self._level = _LOG.level
        _LOG.setLevel(logging.CRITICAL)  # what it logs is raised, too
        try:
            self._client: Any = distributed.Client(address, timeout=SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            _LOG.setLevel(self._level)
            problem = f"no scheduler answers there ({str(error)[:100]})"
            raise UsageError(f"--dask {address}: {problem}; dask scheduler starts one") from None

    def __enter__(self) -> Cluster:
        try:
            with self._at_hand():
                found = self._client.run(describe, self._opening, on_error="return")
            found = {worker: facts for worker, facts in found.items() if not isinstance(facts, OSError)}  # it died just now
            for worker, facts in found.items():
                if not isinstance(facts, tuple):
                    raise FileError(worker, str(facts))
            if not found:
                raise UsageError(f"--dask {self._address}: it has no workers; dask worker {self._address} starts one")
            if len({*found.values()}) > 1:
                differing = "; ".join(f"{worker}: {' '.join(map(str, facts))}" for worker, facts in sorted(found.items()))
                raise UsageError(f"--dask {self._address}: the workers have other versions, models or processors: {differing}")
            self.made_of = next(iter(found.values()))
            return self
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._client.close()
        _LOG.setLevel(self._level)

    def answers(self, lines: Iterable[Line]) -> Iterator[Written]:
        """As `Machine.answers`."""
        waiting = iter(lines)
        under_way = distributed.as_completed(loop=self._client.loop, raise_errors=False)
        asked = dict[str, set[int]]()

        def send() -> None:
            while under_way.count() < CHUNKS * len(self._client.ncores()) and (chunk := list(islice(waiting, self._n_lines))):
                under_way.add(future := self._client.submit(answer, self._opening, self.made_of, chunk, pure=False))
                asked[future.key] = {line.number for line in chunk}

        with self._at_hand():
            send()
            for future in under_way:
                written = future.result()
                if isinstance(written, str):
                    raise PocketlmError(f"--dask {self._address}: a worker cannot go on ({written}); mend that, {KEPT}")
                if {each.number for each in written} != asked.pop(future.key):
                    raise PocketlmError(f"--dask {self._address}: a worker answered, but not the lines that it was asked for")
                yield from written
                send()

    @contextmanager
    def _at_hand(self) -> Iterator[None]:
        """Turn what Dask raises into a PocketlmError."""
        try:
            yield
        except distributed.KilledWorker as error:
            raise PocketlmError(f"--dask {self._address}: workers end again and again: {error}") from None
        except (OSError, distributed.CancelledError) as error:
            problem = f"the cluster cannot go on ({' '.join(str(error).split())[:100]})"
            raise PocketlmError(f"--dask {self._address}: {problem}; start it again, {KEPT}") from None
