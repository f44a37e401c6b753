"""The form of a result, version 1: what `--json` prints and `--compare` and `--from` read. README.md says what it means.

A form is a type, a tuple of types, a list of one form, a dict of names to forms, or `Each(form)` for a dict whose keys
are data. A name that ends in "?" may be missing. Names that are not here are allowed: later versions may add some.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pocketlm.errors import FileError, refused
from pocketlm.terminal_text import without_controls

NAME, VERSION = "pocketlm-bench", 1
STOPPED = "stopped by Ctrl-C"  # how the first warning of a run begins that was ended so
MOST = 1 << 26  # bytes that a result has: another file may be a large model
NUMBER = (int, float)
MAYBE = (*NUMBER, type(None))


class Each(NamedTuple):
    form: Any
    numbered: bool = False  # the keys are whole numbers, written out


MEASURE = {"median": NUMBER, "low": NUMBER, "high": NUMBER, "uncertainty": MAYBE, "rounds": [NUMBER]}
SPEED = {**MEASURE, "joules_per_token": MAYBE}
TEST = {**SPEED, "mean": NUMBER, "deviation": MAYBE}
LATENCY = {"latency_ms": {"p50": NUMBER, "p95": NUMBER, "p99": NUMBER}}
BACKEND = {
    "name": str,
    "status": str,
    "reason": str,
    "facts?": Each(str),
    "file_bytes?": int,
    "converted?": {"kind": str, "seconds": MAYBE},
    "load_seconds?": NUMBER,
    "first_token_seconds?": NUMBER,
    "prefill?": Each(SPEED, numbered=True),
    "decode?": Each({**SPEED, **LATENCY}, numbered=True),
    "pp?": Each(TEST, numbered=True),
    "tg?": Each({**TEST, **LATENCY}, numbered=True),
    "user?": MEASURE,
    "peak_bytes?": (int, type(None)),
    "agreement?": {
        "agrees": (bool, type(None)), "reason": str, "n_tokens?": int, "cosine?": NUMBER, "worst_cosine?": NUMBER,
        "same_first?": NUMBER, "perplexity?": NUMBER, "perplexity_off?": NUMBER,
    },
}  # fmt: skip
MODEL = {
    "name": str, "architecture": str, "parameters": int, "file_bytes": int, "tensor_bytes?": int, "bytes_per_token": int,
    "bound": NUMBER, "n_ctx": int, "backends": [BACKEND],
}  # fmt: skip
RESULT = {
    "schema": str,
    "version": int,
    "time": str,
    "machine": {
        "cpu": str, "cores": int, "threads": int, "memory_free_bytes": (int, type(None)), "bandwidth": NUMBER, "system": str,
        "python": str, "packages": Each(str), "load_average": [NUMBER], "energy": bool,
    },
    "settings": {
        "rounds": int, "tokens": int, "prompts": [int], "depths": [int], "threads": int, "time_limit": NUMBER,
        "pass_seconds": NUMBER, "user_rounds": int, "user_tokens": int, "pp?": [int], "tg?": [int],
    },
    "reference_loop": {"drift": NUMBER, "medians": Each(NUMBER)},
    "warnings": [str],
    "models": [MODEL],
}  # fmt: skip


def problem(value: Any, form: Any = RESULT, at: str = "") -> str | None:
    """What is wrong with a value, None where it has the form."""
    if isinstance(form, list):
        parts = [(f"{at}[{i}]", part, form[0]) for i, part in enumerate(value)] if isinstance(value, list) else None
    elif isinstance(form, Each):
        named = isinstance(value, dict) and not (form.numbered and any(not key.isdecimal() or len(key) > 9 for key in value))
        parts = [(f"{at}.{key}", part, form.form) for key, part in value.items()] if named else None
    elif isinstance(form, dict):
        if isinstance(value, dict):
            missing = [name for name in form if not name.endswith("?") and name not in value]
            if missing:
                return f"{at}.{missing[0]} is missing".lstrip(".")
            names = {name: name.removesuffix("?") for name in form}
            parts = [(f"{at}.{plain}", value[plain], form[name]) for name, plain in names.items() if plain in value]
        else:
            parts = None
    else:
        types = form if isinstance(form, tuple) else (form,)
        right = isinstance(value, types) and (not isinstance(value, bool) or bool in types)
        parts = [] if right and not (isinstance(value, int) and abs(value) >= 1 << 63) else None
    if parts is None:
        return f"{at.lstrip('.') or 'the file'} is not what it should be"
    return next((found for where, part, wanted in parts if (found := problem(part, wanted, where))), None)


def read(path: Path) -> dict[str, Any]:
    """A result that was saved. Raises FileError."""
    advice = "name a file that `pocketlm bench --json` or `--save` has made"
    with refused(path), path.open("rb") as file:
        data = file.read(MOST)
    try:
        result = json.loads(data)
    except (ValueError, RecursionError):  # JSON and UTF-8
        raise FileError(path, "is not JSON", advice) from None
    if not isinstance(result, dict) or result.get("schema") != NAME:
        raise FileError(path, "is not a result of pocketlm bench", advice)
    if result.get("version") != VERSION:
        raise FileError(path, f"has version {result.get('version')!r:.20}; this pocketlm knows {VERSION}", "measure again")
    if found := problem(result):
        raise FileError(path, found, advice)
    return showable(result)


def showable(value: Any) -> Any:
    """A result whose texts a terminal and a picture may get: names of files, and whatever else a stranger's result says."""
    if isinstance(value, dict):
        return {showable(name): showable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [showable(part) for part in value]
    return without_controls(value).encode("utf-8", "replace").decode() if isinstance(value, str) else value
