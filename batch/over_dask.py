"""A batch on the workers of a Dask cluster, each with the model open in it.

In: lines. Out: the output for each, as it is finished; the same bytes as from one machine. Dask decides which worker answers
what, and gives the work of one that dies to another. Workers need pocketlm, and the model under the same name or path.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any

import distributed

import pocketlm
from pocketlm.batch.lines import Line, Written
from pocketlm.batch.local import Machine, Settings
from pocketlm.errors import FileError, PocketlmError, UsageError

CHUNKS = 2  # for each worker: one that it answers, and one that waits there
ROUNDS = 4  # lines of a chunk, for each slot
SECONDS = 10.0  # for the scheduler to answer

_open_lock, _answer_lock = threading.Lock(), threading.Lock()  # Dask runs as many tasks in a worker as it has threads


@lru_cache(maxsize=1)
def _machine(opening: str) -> Machine:
    name, how, *settings = json.loads(opening)
    return Machine(pocketlm.load(name, **how), Settings(*settings))


def _opened(opening: str) -> Machine:
    """The model of this worker, one for all chunks. `opening`: its name, keywords of `pocketlm.load` and Settings, as JSON."""
    with _open_lock:
        return _machine(opening)


def describe(opening: str) -> Any:
    """What this worker's answers depend on (a tuple), or what is wrong with it (a text)."""
    try:
        return _opened(opening).made_of
    except PocketlmError as error:
        return str(error)


def answer(opening: str, made_of: tuple[Any, ...], lines: list[Line]) -> list[Written]:
    """Answer a chunk, on a worker. Raises PocketlmError if the worker's answers would differ from the others'."""
    machine = _opened(opening)
    if machine.made_of != made_of:
        raise PocketlmError(f"a worker is of another version, model or processor: {machine.made_of}, not {made_of}")
    with _answer_lock:
        return list(machine.answers(lines))


class Cluster:
    """The workers of the scheduler at `address`, in a `with` statement. Raises UsageError and FileError."""

    def __init__(self, address: str, model: str, how: Mapping[str, Any], settings: Settings):
        self._opening = json.dumps([model, dict(how), settings.slots, settings.seed, dict(settings.defaults)])
        self._n_lines, self._address = ROUNDS * settings.slots, address
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # what it logs is raised, too
        try:
            self._client: Any = distributed.Client(address, timeout=SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
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
            self._client.close()
            raise

    def __exit__(self, *_: object) -> None:
        self._client.close()

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
            advice = "start it again, and give the same command: the answers so far are kept"
            problem = " ".join(str(error).split())[:100]
            raise PocketlmError(f"--dask {self._address}: the cluster cannot go on ({problem}); {advice}") from None
