"""What stands in files: texts, conversations, ids. Knows no vocabulary.

In: .txt, cut into documents as `Reading` says; .jsonl (a row a line) and .json (a list of rows) of {"text": …},
{"messages": [{"role": …, "content": …}, …]} or {"instruction": …, "input": …, "output": …}; .npy and nanoGPT's .bin of ids.
Out: one document after the other, long ones in pieces.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import FileError, refused
from pocketlm.train.vocabularies import ROLES

PIECE = 1 << 12  # characters of a long text, or ids, that are read, and dealt to a split, at a time
LONGEST_LINE = 1 << 16  # characters of one that are read at a time
IDS, ROWS = (".npy", ".bin"), (".jsonl", ".json")  # ends of names; every other file is a text
Document = str | list[dict[str, str]]


@dataclass(frozen=True)
class Reading:
    """What a document of a text is: the whole file, what stands between blank lines, a line; those shorter are left out."""

    documents: str = "file"
    shortest: int = 0  # characters


def read_documents(path: Path, reading: Reading = Reading()) -> Iterator[tuple[Document, bool]]:
    """(document or a piece of one that ends with a line, whether it ends here). Raises FileError naming the line."""
    hint = f"name the files in it, as in {path / '*.txt'}" if path.is_dir() else "check the path"
    with refused(path, hint), _line_named(path), open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix in ROWS:
            for n, row in enumerate(_list(file.read(), path) if path.suffix == ".json" else file, 1):
                document = _document(row, path, n) if not isinstance(row, str) or row.strip() else ""
                if not isinstance(document, str) or len(document) >= max(reading.shortest, 1):
                    yield document, True
        else:
            yield from _texts(iter(lambda: file.readline(LONGEST_LINE), ""), reading)


@contextmanager
def _line_named(path: Path) -> Iterator[None]:
    """Say in which line the first bytes are that are no UTF-8: a file that is read as a stream does not know where they are."""
    try:
        yield
    except UnicodeDecodeError:
        with open(path, "rb") as file:
            number = next((n for n, line in enumerate(file, 1) if line.decode(errors="ignore").encode() != line), 1)
        raise FileError(path, f"line {number} is not UTF-8", "convert the text to UTF-8") from None


def _texts(lines: Iterator[str], reading: Reading) -> Iterator[tuple[str, bool]]:
    text, begun = "", False  # what is not given yet, whether a piece before it was
    for line in lines:
        blank = reading.documents == "blank" and not line.strip()
        if len(text) >= PIECE and not blank:
            yield text, False
            text, begun = "", True
        text += "" if blank else line
        if blank or (reading.documents == "line" and line.endswith(("\n", "\r"))):
            yield from _last(text.rstrip("\r\n"), begun, reading.shortest)
            text, begun = "", False
    yield from _last(text if reading.documents == "file" else text.rstrip("\r\n"), begun, reading.shortest)


def _last(text: str, begun: bool, shortest: int) -> Iterator[tuple[str, bool]]:
    if begun or len(text.strip()) >= max(shortest, 1):
        yield text, True


def _list(text: str, path: Path) -> list[Any]:
    with suppress(ValueError, RecursionError):
        if isinstance(rows := json.loads(text), list):
            return [row if isinstance(row, dict) else {} for row in rows]
    raise FileError(path, "is no list of documents", "write a JSON list, or a document a line in a .jsonl")


def _whole(text: str) -> str:
    """`text` with a sign in place of each lone surrogate: JSON can hold half a character, and no tokenizer takes it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _document(row: Any, path: Path, number: int) -> Document:
    """The text or the conversation of a row, which may still be JSON."""
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        row = json.loads(row) if isinstance(row, str) else row
        if isinstance(row.get("text"), str):
            return _whole(row["text"])
        if "instruction" in row:
            asked = "\n\n".join(part for part in (row["instruction"].strip(), (row.get("input") or "").strip()) if part)
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            row = {"messages": [{"role": "system", "content": row.get("system")}] * bool(row.get("system")) + turns}
        messages = [{"role": m["role"], "content": _whole(m["content"].strip())} for m in row["messages"]]
        if messages and all(m["role"] in ROLES for m in messages):
            return messages
    expected = 'expected {"text": …}, {"messages": [{"role": "user", "content": …}, …]} or {"instruction": …, "output": …}'
    raise FileError(path, f"{'line' if path.suffix == '.jsonl' else 'row'} {number} is no document", expected)


def read_texts(paths: Iterable[Path], reading: Reading, n_bytes: int = 0) -> Iterator[str]:
    """What is said in the files, for a tokenizer to learn from; of more than `n_bytes` an even share of about so much."""
    paths = [path for path in paths if path.suffix not in IDS]
    total = sum(path.stat().st_size for path in paths if path.is_file())
    every = -(-total // n_bytes) if n_bytes else 1
    texts = (document for path in paths for document, _ in read_documents(path, reading))
    for number, document in enumerate(texts):
        if number % max(every, 1) == 0:
            yield document if isinstance(document, str) else "\n".join(message["content"] for message in document)


def dtype_of_ids(n_vocab: int) -> type:
    """In which the ids of a vocabulary are kept."""
    return np.uint16 if n_vocab <= 1 << 16 else np.uint32


def read_ids(path: Path, n_vocab: int) -> Iterator[np.ndarray]:
    """The ids of a file, PIECE at a time. Raises FileError if it holds no ids, or one that is not below `n_vocab`."""
    try:
        with refused(path, "check the path"):
            if path.suffix == ".npy":
                ids = np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
            else:
                ids = np.memmap(path, dtype_of_ids(n_vocab), "r")
    except FileError:
        raise
    except Exception:  # whatever an archive, or the header of a damaged file, makes NumPy raise
        raise FileError(path, "holds no array of ids", "save it with numpy.save, or with tofile() of uint16 ids") from None
    if ids.dtype.kind not in "iu":
        raise FileError(path, f"holds numbers of type {ids.dtype}, which are no ids", "save whole numbers")
    for start in range(0, len(ids), PIECE):
        piece = np.asarray(ids[start : start + PIECE])
        if int(piece.min()) < 0 or int(piece.max()) >= n_vocab:
            problem = f"holds the ids {piece.min()} to {piece.max()}, the vocabulary has {n_vocab}"
            raise FileError(path, problem, "give the tokenizer that made them with --tokenizer")
        yield piece


def has_conversations(paths: Iterable[Path]) -> bool:
    """Whether a document of the files is a conversation; a file is looked at as far as it can be read."""
    for path in paths:
        with suppress(FileError):
            if path.suffix in ROWS and any(not isinstance(document, str) for document, _ in read_documents(path)):
                return True
    return False
