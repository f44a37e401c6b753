"""Reference results that are stored with a packed model, and the test that another computer gets the same.

In: a GGUF, when it is packed. Out: some kilobytes of JSON; later, a line for everything that was tested. Knows no executables.

Tested are the tokenizer (texts to ids and back), the chat template, every executor at every instruction-set level, and whether
the whole model gives a short answer. The reference logits are NumPy's, in float32, from the GGUF before it was tiled: of its
first N_LAYER layers and the head, for the first rows of the vocabulary. That uses every kernel of the whole model, and little
memory. Whether the other layers are undamaged is what `--check` tells.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pocketlm
from pocketlm.errors import PocketlmError
from pocketlm.runtime.executors import make_executor
from pocketlm.runtime.gguf_reader import GGUF
from pocketlm.runtime.hyper import Hyper, read_hyper
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import default_threads
from pocketlm.terminal_text import count
from pocketlm.tokenizer import Tokenizer, from_metadata

N_LAYER, N_ROWS, N_IDS, N_LOGITS, CTX, N_ANSWER = 2, 2048, 24, 512, 64, 8
# The backends differ by rounding, up to 0.003 of the logits' spread over SmolLM2; a wrong kernel is off by about 1
TOLERANCE = 0.02
_TABLES = ("token_embd.weight", "output.weight")  # a row each for every token
_TEMPLATE = "tokenizer.chat_template"
_CLOCK = "strftime_now"  # a template that calls this writes something else tomorrow


class Result(NamedTuple):
    """What was tested, a text about it, and whether it was right; None: that cannot be told on this computer."""

    name: str
    text: str
    right: bool | None


def reference(file: GGUF, texts: Sequence[str] = ()) -> bytes:
    """The reference results as JSON. `texts`: for the tokenizer; it must know all their characters."""
    tokenizer = from_metadata(file.metadata, file.path)
    ids = [tokenizer.encode(text) for text in texts]
    stored: dict[str, Any] = {"texts": [[*row, tokenizer.decode(row[1])] for row in zip(texts, ids, strict=True)]}
    stored["turn"] = next((text for text in texts if text), "")
    stored["chat"] = None if _CLOCK in str(file.metadata.get(_TEMPLATE)) else _conversation(file, tokenizer, stored["turn"])
    return json.dumps({**stored, **_first_logits(file)}, ensure_ascii=False, separators=(",", ":")).encode()


def _first_logits(file: GGUF) -> dict[str, Any]:
    hyper = _hyper(file)
    n_rows = min(N_ROWS, hyper.n_vocab)
    tables = {name: _first_rows(file.tensors[name], n_rows) for name in _TABLES if name in file.tensors}
    ids = np.linspace(0, n_rows - 1, min(N_IDS, hyper.n_ctx)).astype(int).tolist()
    logits = _logits("numpy", replace(hyper, n_vocab=n_rows), {**file.tensors, **tables}, ids, file.path)
    picked = np.linspace(0, n_rows - 1, min(N_LOGITS, n_rows)).astype(int)
    return {"ids": ids, "picked": picked.tolist(), "logits": [round(float(x), 5) for x in logits[picked]]}


def _hyper(file: GGUF) -> Hyper:
    return read_hyper(file.metadata, file.tensors["token_embd.weight"].shape[0], file.path)


def _first_rows(tensor: Tensor, n: int) -> Tensor:
    row_bytes = tensor.data.nbytes // tensor.shape[0]
    return replace(tensor, shape=(n, *tensor.shape[1:]), data=tensor.data[: n * row_bytes])


def _conversation(file: GGUF, tokenizer: Tokenizer, turn: str) -> list[int] | None:
    """The ids of a question in the model's chat template; None if that cannot be rendered."""
    from pocketlm.chat.templates import choose

    try:
        return choose(file.metadata.get(_TEMPLATE), tokenizer).encode([{"role": "user", "content": turn}], tokenizer)
    except PocketlmError:
        return None


def _logits(backend: str, hyper: Hyper, tensors: Mapping[str, Tensor], ids: list[int], path: object) -> np.ndarray:
    """float64 [n_vocab], after the first layers."""
    hyper = replace(hyper, n_layer=min(N_LAYER, hyper.n_layer))
    layers = tuple(f"blk.{i}." for i in range(hyper.n_layer))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blk.") or name.startswith(layers)}
    plan = make_plan(hyper, {name: tensor.shape for name, tensor in tensors.items()}, path)
    executor = make_executor(backend, plan, tensors, min(CTX, hyper.n_ctx), default_threads(), path)
    try:
        return executor.forward(np.asarray(ids, np.int32))[0].astype(np.float64)
    finally:
        executor.close()


def distance(stored: Mapping[str, Any], logits: np.ndarray) -> float:
    """Root mean square difference from the reference, in units of the reference's standard deviation."""
    expected = np.asarray(stored["logits"])
    return float(np.sqrt(np.mean((logits[stored["picked"]] - expected) ** 2)) / max(expected.std(), 1e-9))


# ── at the other computer ──────────────────────────────────────────────────────────────────────────────────────────────


def results(stored: Mapping[str, Any], file: GGUF, executable: Path) -> Iterator[Result]:
    """Run every test again. `file`: the model in `executable`."""
    yield _tried("tokenizer", lambda: _texts_again(stored["texts"], from_metadata(file.metadata, file.path)))
    yield _tried("template", lambda: _chat_again(stored, file))
    for name, logits in backends(stored, file):
        if isinstance(logits, str):
            yield Result(name, logits, None)
        else:
            off = distance(stored, logits)
            yield Result(name, f"off by {off:.6f} of the spread", off <= TOLERANCE)
    yield _tried("answer", lambda: _answer(stored["turn"], executable))


def _tried(name: str, trial: Callable[[], tuple[str, bool | None]]) -> Result:
    try:
        return Result(name, *trial())
    except Exception as error:  # whatever it is, it would be what the friend sees
        return Result(name, f"{type(error).__name__}: {error}", False)


def _texts_again(rows: Sequence[tuple[str, list[int], str]], tokenizer: Tokenizer) -> tuple[str, bool | None]:
    for text, ids, decoded in rows:
        if tokenizer.encode(text) != ids or tokenizer.decode(ids) != decoded:
            return f"other ids, or another text, for {text[:40]!a}", False
    return f"the same ids for {len(rows)} texts, and the same texts for the ids", True


def _chat_again(stored: Mapping[str, Any], file: GGUF) -> tuple[str, bool | None]:
    again = _conversation(file, from_metadata(file.metadata, file.path), stored["turn"])
    if stored["chat"] is None:
        return "cannot be compared: it has none that can be rendered, or one with today's date", None
    same = again == stored["chat"]
    return f"{'the same' if same else 'other'} ids for a question", same


def backends(stored: Mapping[str, Any], file: GGUF) -> Iterator[tuple[str, np.ndarray | str]]:
    """For every executor and level: its name, and its logits, or why it does not run here."""
    from pocketlm.runtime.native import levels

    here = [level for level in levels.LEVELS.values() if level.is_for(levels.host_machine(), sys.platform)]
    for name in (*(level.name for level in here), "numpy"):
        forced = os.environ.get("POCKETLM_ISA")
        try:
            if name != "numpy":
                os.environ["POCKETLM_ISA"] = name
            backend = "numpy" if name == "numpy" else "native"
            yield name, _logits(backend, _hyper(file), file.tensors, stored["ids"], file.path)
        except PocketlmError as error:
            yield name, str(error).removeprefix(f"POCKETLM_ISA={name}: ")  # which is ours, not the friend's
        finally:
            if forced is None:
                os.environ.pop("POCKETLM_ISA", None)
            else:
                os.environ["POCKETLM_ISA"] = forced


def _answer(turn: str, executable: Path) -> tuple[str, bool | None]:
    try:
        model = pocketlm.load(executable)
    except PocketlmError as error:  # too little memory here says nothing about elsewhere
        return f"cannot be had here ({error})", None
    with model:
        pieces = list(model.chat([{"role": "user", "content": turn}], max_tokens=N_ANSWER, temperature=0))
    return count(pieces[-1].generated_tokens, "token"), True
