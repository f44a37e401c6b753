"""Texts and conversations as token ids on disk, part by part.

In: .txt files (a document each), .jsonl of {"text": …} or {"messages": [{"role": …, "content": …}, …]}. Out: for each
file and split a flat array of ids, read by mmap, the end-of-text token after every document, and a mask of the tokens to
learn. `state.json` says which parts are done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.chat.templates import BUILT_IN, BuiltIn, Template
from pocketlm.errors import FileError, PocketlmError, UsageError, did_you_mean
from pocketlm.runtime.atomic import replacing_file
from pocketlm.tokenizer import Tokenizer
from pocketlm.train.vocabularies import ROLES, check_markers

PIECE = 1 << 12  # characters of a long text that are read, and dealt to a split, at a time
SPLITS = ("train", "val")
CHATS = ("chatml", "markers")
Document = str | list[dict[str, str]]
Block = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets (int64), mask of the targets (float32): (context,)

# ── documents ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_documents(path: Path) -> Iterator[tuple[Document, bool]]:
    """(document or a piece of one that ends with a line, whether it ends here). Raises FileError naming the line."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if path.suffix == ".jsonl":
                yield from ((_document(line, path, n), True) for n, line in enumerate(file, 1) if line.strip())
                return
            following = file.read(PIECE)
            while following:
                piece, following = following + file.readline(), file.read(PIECE)
                yield piece, not following
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror or error})", "check the path") from None
    except UnicodeDecodeError:
        raise FileError(path, "is not UTF-8 text", "convert it to UTF-8") from None


def _document(line: str, path: Path, number: int) -> Document:
    try:
        row = json.loads(line)
        if isinstance(row.get("text"), str):
            return row["text"]
        messages = [{"role": m["role"], "content": m["content"].strip()} for m in row["messages"]]
        if messages and all(m["role"] in ROLES for m in messages):
            return messages
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    expected = 'expected {"text": …} or {"messages": [{"role": "user", "content": …}, …]}'
    raise FileError(path, f"line {number} is no document", expected)


def read_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Everything that is said in the files, for a tokenizer to learn from."""
    for path in paths:
        for document, _ in read_documents(path):
            yield document if isinstance(document, str) else "\n".join(message["content"] for message in document)


def has_conversations(paths: Iterable[Path]) -> bool:
    """Whether a document of the files is a conversation; a file is looked at as far as it can be read."""
    for path in paths:
        with suppress(FileError):
            if path.suffix == ".jsonl" and any(not isinstance(document, str) for document, _ in read_documents(path)):
                return True
    return False


def markers_of(chat: str) -> tuple[str, ...]:
    """The markers that a kind of conversations is written with. Raises UsageError for an unknown kind."""
    if chat not in CHATS:
        raise UsageError(f"--chat {chat}: expected {' or '.join(CHATS)}{did_you_mean(chat, CHATS)}")
    return BUILT_IN[chat].needs


class Encoder:
    """Documents to ids and masks, conversations as the chat will write them. `learn`: roles whose contents are learnt."""

    def __init__(self, tok: Tokenizer, chat: str, learn: Sequence[str], path: object):
        if tok.eos_id is None:
            raise FileError(path, "the vocabulary has no end-of-text token", "add <|endoftext|> or </s> to it")
        self.tok, self.row, self.learn, self.path, self.markers = tok, BUILT_IN[chat], tuple(learn), path, markers_of(chat)

    @cached_property
    def _sides(self) -> dict[str, tuple[list[int], int]]:
        """Role → ids before a content, number of ids after the marker that ends it. Texts alone need no letters of roles."""
        sides = {role: [self.tok.encode(side, special=True) for side in self.row.roles[role]] for role in ROLES}
        return {role: (before, len(after) - 1) for role, (before, after) in sides.items()}

    def encode(self, document: Document, ends: bool) -> tuple[list[int], list[int]]:
        """Ids and a mask of 0 and 1, the end-of-text token last where the document ends."""
        end = [self.tok.eos_id or 0] * ends
        if isinstance(document, str):
            ids = self.tok.encode(document) + end
            return ids, [1] * len(ids)
        check_markers(self.tok, self.markers, self.path)
        ids, mask = [], []
        for message in document:
            turn, (before, n_after) = self._turn(message), self._sides[message["role"]]
            if turn[: len(before)] != before:
                raise FileError(self.path, "the vocabulary joins chat markers with what follows", "choose others with --chat")
            learnt = len(turn) - len(before) - n_after  # the content and the marker that ends it
            ids += turn
            mask += [0] * len(before) + [int(message["role"] in self.learn)] * learnt + [0] * n_after
        return ids + end, mask + [0] * len(end)

    def _turn(self, message: dict[str, str]) -> list[int]:
        if any(marker in message["content"] for marker in self.markers):  # typed by somebody, so no markers
            return Template(None, self.row).encode([message], self.tok, add_generation_prompt=False)[self.tok.adds_bos :]
        before, after = self.row.roles[message["role"]]
        return self.tok.encode(before + message["content"] + after, special=True)


def jinja(row: BuiltIn) -> str:
    """A built-in template as the Jinja that travels in a model file."""
    before, after = (side.replace("\n", "\\n") for side in row.roles["user"])
    turn = f"""{{{{- '{before.replace("user", "' + message['role'] + '")}' + message['content'] + '{after}' }}}}"""
    prompt = f"{{{{- '{before.replace('user', 'assistant')}' }}}}"
    return (
        f"{{%- for message in messages %}}{turn}{{%- endfor %}}"
        f"{{%- if add_generation_prompt %}}{prompt}{{%- endif %}}"
    )


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(
    files: Sequence[Path], val_files: Sequence[Path], folder: Path, encoder: Encoder, every: int, say: Callable[[str], Any]
) -> None:
    """Encode every file that state.json does not call done; one bad file stops no other.

    `every`: of so many documents (pieces of long texts) one goes to the validation split; 0: none does.
    Raises PocketlmError after all were tried, if one could not be read; the next call tries that one again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    how, failures, old = [encoder.tok.n_vocab, encoder.row.name, *encoder.learn, every], [], read_state(folder)
    jobs = [*dict.fromkeys([*((file, "train") for file in files), *((file, "val") for file in val_files)])]
    known = {(part["key"][0], part["key"][3]): name for name, part in old.items() if "key" in part}  # wherever it stood
    free = (name for number in count() if (name := f"part-{number:05d}") not in old)
    parts = {name: old.get(name, {}) for name in [known.get((str(file), split)) or next(free) for file, split in jobs]}
    for name, (file, split) in zip(parts, jobs, strict=True):
        try:
            stat = file.stat()
            key = [str(file), stat.st_size, stat.st_mtime_ns, split, how]
            if parts[name].get("key") != key:
                say(f"encoding {file}")
                parts[name] = {"key": key, **_encode_part(file, folder / name, split, encoder, every)}
        except (OSError, PocketlmError) as error:
            failures.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            parts[name] = {"error": failures[-1]}
        with replacing_file(folder / "state.json") as temporary:
            temporary.write_text(json.dumps(parts, indent=1), encoding="utf-8")
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise PocketlmError(f"{failures[0]}{more}; the other parts are done, the same command tries this one again")


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _encode_part(file: Path, stem: Path, split: str, encoder: Encoder, every: int) -> dict[str, int]:
    """Write STEM.train, STEM.val and their .mask in constant memory; the number of tokens in each."""
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    with ExitStack() as stack:
        names = [f"{split}{kind}" for split in SPLITS for kind in ("", ".mask")]
        parts = {name: stack.enter_context(replacing_file(Path(f"{stem}.{name}"))) for name in names}
        sinks = {name: stack.enter_context(open(part, "wb")) for name, part in parts.items()}
        for number, (document, ends) in enumerate(read_documents(file)):
            where = "val" if split == "val" or (every and number % every == every // 2) else "train"
            ids, mask = encoder.encode(document, ends)
            sinks[where].write(np.array(ids, _dtype(encoder.tok.n_vocab)).tobytes())
            sinks[f"{where}.mask"].write(bytes(mask))
            counts[where] += len(ids)
    return counts


def _dtype(n_vocab: int) -> type:
    return np.uint16 if n_vocab <= 1 << 16 else np.uint32


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Corpus:
    """One split of all parts, in blocks of `context` tokens."""

    ids: list[np.ndarray]  # of every part, (n,) uint16 or uint32, mapped
    masks: list[np.ndarray]  # uint8
    context: int
    files: list[str]  # where each part comes from

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))

    def n_blocks(self, shift: int = 0) -> int:
        return sum(self._blocks_of(part, shift) for part in self.ids)

    def _blocks_of(self, part: np.ndarray, shift: int) -> int:
        return max(0, (len(part) - 1 - shift) // self.context)

    def block(self, number: int, shift: int = 0) -> Block:
        """The block `number` of parts whose first `shift` tokens are left out."""
        for ids, mask in zip(self.ids, self.masks, strict=True):
            if number < (n := self._blocks_of(ids, shift)):
                start, stop = shift + number * self.context, shift + (number + 1) * self.context + 1
                window = ids[start:stop].astype(np.int64)
                return window[:-1], window[1:], mask[start + 1 : stop].astype(np.float32)
            number -= n
        raise IndexError(number)

    def parts(self) -> dict[str, Corpus]:
        """Each file's part of the split."""
        return {
            name: Corpus([ids], [mask], self.context, [name])
            for name, ids, mask in zip(self.files, self.ids, self.masks, strict=True)
        }


def open_corpus(folder: Path, split: str, context: int, n_vocab: int) -> Corpus:
    """A split of a prepared folder. Raises FileError where it is shorter than one block."""
    parts = {name: part for name, part in sorted(read_state(folder).items()) if part.get(split)}
    stems = [folder / f"{name}.{split}" for name in parts]
    ids = [np.memmap(stem, _dtype(n_vocab), "r") for stem in stems]
    masks = [np.memmap(f"{stem}.mask", np.uint8, "r") for stem in stems]
    corpus = Corpus([*ids], [*masks], context, [part["key"][0] for part in parts.values()])
    if not corpus.n_blocks(context - 1 if split == "train" else 0):
        problem = f"its {split} split has {corpus.n_tokens} tokens, too few for a sequence of {context}"
        raise FileError(folder, problem, "give more text, a smaller --context, or a --val file")
    return corpus
