"""Texts and conversations as token ids on disk, part by part.

In: files, as `documents` reads them. Out: for each file and split a flat array of ids, read by mmap, the end-of-text token
after every document, and a mask of the tokens to learn. `state.json` says which parts are done.
"""

from __future__ import annotations

import itertools
import json
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.chat.templates import BUILT_IN, Template
from pocketlm.errors import FileError, PocketlmError, one_of, refused
from pocketlm.runtime.atomic import replacing_file, write_file
from pocketlm.terminal_text import count
from pocketlm.tokenizer import Tokenizer
from pocketlm.train.documents import IDS, Document, Reading, dtype_of_ids, read_documents, read_ids
from pocketlm.train.vocabularies import check_markers

SPLITS = ("train", "val")
SENTENCE_END = re.compile(r"""[.!?…。！？]["'»”’)\]]*\s*$|\n""")
PART = re.compile(r"part-\d{5,9}")
SHORT = "short texts"  # the part that they are together
CHATS = ("chatml", "markers")
Block = tuple[np.ndarray, np.ndarray, np.ndarray]  # inputs, targets (int64), mask of the targets (float32): (context,)


def markers_of(chat: str) -> tuple[str, ...]:
    """The markers that a kind of conversations is written with. Raises UsageError for what is none of CHATS."""
    return BUILT_IN[one_of("--chat", chat, CHATS)].markers


class Encoder:
    """Documents to ids and masks, conversations as the chat will write them. `learn`: roles whose contents are learnt."""

    def __init__(self, tok: Tokenizer, chat: str, learn: Sequence[str], path: object):
        if tok.eos_id is None:
            raise FileError(path, "the vocabulary has no end-of-text token", "add <|endoftext|> or </s> to it")
        self.tok, self.row, self.learn, self.path, self.markers = tok, BUILT_IN[chat], tuple(learn), path, markers_of(chat)

    def encode(self, document: Document, ends: bool) -> tuple[list[int], list[int]]:
        """Ids and a mask of 0 and 1, the end-of-text token last where the document ends."""
        end = [self.tok.eos_id or 0] * ends
        if isinstance(document, str):
            ids = self.tok.encode(document) + end
            return ids, [1] * len(ids)
        check_markers(self.tok, self.markers, self.path)
        ids, mask, lead = [], [], ""
        end_id = self.tok.token_id(self.markers[-1])
        assert end_id is not None  # check_markers has seen it
        for message in document:
            before = self._behind(lead, self.row.roles[message["role"]][0])
            turn = self._turn(lead, message)
            if turn[: len(before)] != before:
                raise FileError(self.path, "the vocabulary joins chat markers with what follows", "choose others with --chat")
            n_after = turn[::-1].index(end_id)  # behind the marker that ends the turn
            learnt = len(turn) - len(before) - n_after
            ids += turn
            mask += [0] * len(before) + [int(message["role"] in self.learn)] * learnt + [0] * n_after
            lead = self.row.roles[message["role"]][1]
        return ids + end, mask + [0] * len(end)

    def _turn(self, lead: str, message: dict[str, str]) -> list[int]:
        if any(marker in message["content"] for marker in self.markers):  # typed by somebody, so no markers
            return Template(None, self.row).encode([message], self.tok, add_generation_prompt=False)[self.tok.adds_bos :]
        before, after = self.row.roles[message["role"]]
        return self._behind(lead, before + message["content"] + after)

    def _behind(self, lead: str, text: str) -> list[int]:
        """Ids of a text behind `lead`: SentencePiece may begin a text otherwise than it goes on with one."""
        return self.tok.encode(lead + text, special=True)[len(self.tok.encode(lead, special=True)) :]


# ── parts ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def prepare(
    files: Sequence[Path], val_files: Sequence[Path], folder: Path, encoder: Encoder, every: int, say: Callable[[str], Any],
    reading: Reading = Reading(),  # noqa: B008
) -> None:  # fmt: skip
    """Encode every file that state.json does not call done; one bad file stops no other.

    `every`: of so many documents (pieces of long texts), counted over all files, one goes to the validation split; 0: none.
    Raises PocketlmError after all were tried, if one could not be read; the next call tries that one again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    how: list[Any] = [encoder.tok.n_vocab, encoder.row.name, *encoder.learn, every, reading.documents, reading.shortest]
    failures, old = [], read_state(folder)
    given = [*((file, "train") for file in files), *((file, "val") for file in val_files)]
    for file, times in Counter(file.resolve() for file, _ in given).items():
        if times > 1:
            say(f"{file} is given {times} times")
    jobs = [*{(file.resolve(), split): (file, split) for file, split in given}.values()]
    known = {(part["key"][0], part["key"][3]): name for name, part in old.items() if "key" in part}  # wherever it stood
    free = (name for number in itertools.count() if (name := f"part-{number:05d}") not in old)
    parts = {name: old.get(name, {}) for name in [known.get((str(file), split)) or next(free) for file, split in jobs]}
    for name, (file, split) in zip(parts, jobs, strict=True):
        try:
            stat = file.stat()
            key = [str(file), stat.st_size, stat.st_mtime_ns, split, how]
            if parts[name].get("key") != key:
                say(f"encoding {file}")
                first = parts[name].get("first", sum(part.get("documents", 0) for part in parts.values()))
                counts = _encode_part(file, folder / name, split, encoder, every, first, reading)
                parts[name] = {"key": key, "first": first, **counts}
        except (OSError, PocketlmError) as error:
            said = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
            failures.append(said if str(file) in said else f"{file}: {said}")
            parts[name] = {"error": failures[-1]}
        write_file(folder / "state.json", json.dumps(parts, indent=1))
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise PocketlmError(f"{failures[0]}{more}; the other parts are done, the same command tries this one again")


def read_state(folder: Path) -> dict[str, dict[str, Any]]:
    """What state.json says of the parts, but for what this module would not write."""
    try:
        parts = json.loads((folder / "state.json").read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {name: part for name, part in parts if PART.fullmatch(name) and isinstance(part, dict) and _is_part(part)}


def _is_part(part: dict[str, Any]) -> bool:
    key, numbers = part.get("key"), [part.get(name, 0) for name in (*SPLITS, "documents", "first")]
    is_file = isinstance(key, list) and len(key) == 5 and isinstance(key[0], str) and key[3] in SPLITS
    whole = all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)
    return whole and (is_file or (key is None and not any(numbers)))


def _encode_part(
    file: Path, stem: Path, split: str, encoder: Encoder, every: int, first: int, reading: Reading
) -> dict[str, int]:
    """Write STEM.train, STEM.val and their .mask in constant memory; the number of tokens in each, and of documents.

    `first`: how many documents the files before it have.
    """
    counts: dict[str, int] = dict.fromkeys((*SPLITS, "documents"), 0)
    n_vocab = encoder.tok.n_vocab
    if file.suffix in IDS:
        documents = ((ids, np.ones(len(ids), np.uint8)) for ids in read_ids(file, n_vocab))
    else:
        documents = (encoder.encode(document, ends) for document, ends in read_documents(file, reading))
    with ExitStack() as stack:
        names = [f"{split}{kind}" for split in SPLITS for kind in ("", ".mask")]
        parts = {name: stack.enter_context(replacing_file(Path(f"{stem}.{name}"))) for name in names}
        sinks = {name: stack.enter_context(open(part, "wb")) for name, part in parts.items()}
        for number, (ids, mask) in enumerate(documents, first):
            where = "val" if split == "val" or (every and number % every == min(every // 2, 2)) else "train"
            sinks[where].write(np.array(ids, dtype_of_ids(n_vocab)).tobytes())
            sinks[f"{where}.mask"].write(bytes(mask))
            counts[where] += len(ids)
            counts["documents"] += 1
    return counts


# ── blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Corpus:
    """One split of all parts, one behind the other, in blocks of `context` tokens or cut at the ends of sentences."""

    ids: list[np.ndarray]  # of every part, (n,) uint16 or uint32, mapped
    masks: list[np.ndarray]  # uint8
    context: int
    files: list[str]  # where each part comes from
    sentence_ends: np.ndarray | None = None  # bool, for each id of the vocabulary; blocks are cut behind these

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.ids))

    def n_blocks(self, shift: int = 0) -> int:
        if self.sentence_ends is not None:
            return len(self._cuts) - 1
        return max(0, (self.n_tokens - 1 - shift) // self.context)

    def block(self, number: int, shift: int = 0) -> Block:
        """The block `number` of a split whose first `shift` tokens are left out.

        Cut at sentences, it begins with one, and what is learnt of it ends with one; `shift` is 0 then, whatever it says.
        """
        first, end = shift + number * self.context, shift + (number + 1) * self.context
        if self.sentence_ends is not None:
            first, end = self._cuts[number : number + 2].tolist()
        start = min(first, self.n_tokens - 1 - self.context)
        window = self._slice(self.ids, start, start + self.context + 1).astype(np.int64)
        mask = self._slice(self.masks, start + 1, start + self.context + 1).astype(np.float32)
        mask[: first - start] = mask[end - start :] = 0.0
        return window[:-1], window[1:], mask

    def _slice(self, parts: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        found, at = [], bisect_right(self._begins, start) - 1
        while start < stop:
            begin = self._begins[at]
            found.append(parts[at][start - begin : stop - begin])
            start, at = begin + len(parts[at]), at + 1
        return np.concatenate(found)

    @cached_property
    def _begins(self) -> list[int]:
        return [0, *itertools.accumulate(map(len, self.ids))]

    @cached_property
    def _cuts(self) -> np.ndarray:
        """Where blocks begin and the last one ends: behind the last sentence that still fits."""
        assert self.sentence_ends is not None
        cuts, last = [0], self.n_tokens - 1
        while last >= self.context and cuts[-1] < last:
            stop = min(cuts[-1] + self.context, last)
            ends = np.flatnonzero(self.sentence_ends[self._slice(self.ids, cuts[-1], stop)])
            cuts.append(cuts[-1] + int(ends[-1]) + 1 if len(ends) and stop < last else stop)
        return np.array(cuts)

    def parts(self) -> dict[str, Corpus]:
        """Each file's part of the split; those too short for a block at every shift are one together."""
        found: dict[str, Corpus] = {}
        for name, ids, mask in zip(self.files, self.ids, self.masks, strict=True):
            part = found.setdefault(name if len(ids) >= 2 * self.context else SHORT, replace(self, ids=[], masks=[], files=[]))
            part.ids.append(ids)
            part.masks.append(mask)
            part.files.append(name)
        return found


def sentence_ends(tok: Tokenizer) -> np.ndarray:
    """bool, for each id: whether a sentence, a line, a turn or a text may end with it."""
    texts = (tok.token_bytes(i).decode(errors="ignore") for i in range(tok.n_vocab))
    return np.array([i in tok.end_ids or SENTENCE_END.search(text) is not None for i, text in enumerate(texts)])


def open_corpus(folder: Path, split: str, context: int, n_vocab: int, sentence_ends: np.ndarray | None = None) -> Corpus:
    """A split of a prepared folder. Raises FileError where it is shorter than one block."""
    parts = {name: part for name, part in sorted(read_state(folder).items()) if part.get(split)}
    stems = [folder / f"{name}.{split}" for name in parts]
    ids, masks = [], []
    for stem, part in zip(stems, parts.values(), strict=True):
        with refused(stem, f"delete {folder}, it is made again", "is damaged", (OSError, ValueError)):
            ids.append(np.memmap(stem, dtype_of_ids(n_vocab), "r", shape=(part[split],)))
            masks.append(np.memmap(f"{stem}.mask", np.uint8, "r", shape=(part[split],)))
    corpus = Corpus([*ids], [*masks], context, [part["key"][0] for part in parts.values()], sentence_ends)
    if not corpus.n_blocks(context - 1 if split == "train" else 0):
        problem = f"its {split} split has {count(corpus.n_tokens, 'token')}, too few for a sequence of {context}"
        raise FileError(folder, problem, "give more text, a smaller --context, or a --val file")
    return corpus
