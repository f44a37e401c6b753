"""Character vocabularies: every character is a token. nanoGPT's `meta.pkl` and JSON files in, a `Tokenizer` out.

A pickle is a program; this one is not run. Its instructions are read and only those that build dictionaries, lists,
texts and whole numbers are understood; any other, above all those that name or call something, is refused.
"""

import json
import pickletools
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from pocketlm.errors import FileError, UsageError
from pocketlm.tokenizer.base import CONTROL, NORMAL, UNKNOWN, UNUSED, Tokenizer, make_vocabulary

# how home-made vocabularies write the tokens that are no character → what they are for
_ROLES = {
    "unk_id": ("<unk>", "<UNK>", "[UNK]", "<|unk|>"),
    "bos_id": ("<bos>", "<BOS>", "[BOS]", "<s>", "<|bos|>"),
    "eos_id": ("<eos>", "<EOS>", "[EOS]", "</s>", "<|eos|>", "<|endoftext|>"),
}
_HOLES = 1 << 16  # ids without a token that a file may have


class Characters(Tokenizer):
    """Tokenizer of a character vocabulary. Tokens longer than a character are markers, read with special=True."""

    def _encode_text(self, text: str, start: bool) -> list[int]:
        ids = [self._ids.get(character, self.unk_id) for character in text]
        if None in ids:
            character = text[ids.index(None)]
            raise UsageError(f"the vocabulary has no {character!r} (U+{ord(character):04X}) and no unknown token")
        return ids  # type: ignore[return-value]

    def _token_bytes(self, token_id: int) -> bytes:
        return self.vocabulary.tokens[token_id].encode()

    @cached_property
    def _ids(self) -> dict[str, int]:
        vocabulary = self.vocabulary
        return {token: i for token, i in vocabulary.index.items() if vocabulary.types[i] == NORMAL}


def from_table(path: object, ids: Mapping[str, int]) -> Tokenizer:
    """The tokenizer of a table character → id. FileError for ids that are no ids or given twice."""
    tokens = place_tokens(path, ids)
    types = bytearray(NORMAL if len(token) == 1 else CONTROL if token else UNUSED for token in tokens)
    roles: dict[str, Any] = {role: next((ids[name] for name in names if name in ids), None) for role, names in _ROLES.items()}
    if roles["unk_id"] is not None:
        types[roles["unk_id"]] = UNKNOWN
    return Characters(make_vocabulary(path, tokens, bytes(types), **roles))


def place_tokens(path: object, ids: Mapping[Any, Any]) -> list[str]:
    """Token → id as the list of tokens by id, with "" where there is none. FileError for what is no such table."""
    if not ids:
        raise FileError(path, "its vocabulary is empty")
    for token, i in ids.items():
        if not isinstance(token, str) or type(i) is not int or not 0 <= i < len(ids) + _HOLES:
            raise FileError(path, f"its vocabulary gives {str(token)[:40]!r} the id {str(i)[:40]}, which cannot be")
    tokens = [""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        if tokens[i]:
            raise FileError(path, f"id {i} stands for {tokens[i][:40]!r} and for {token[:40]!r}")
        tokens[i] = token
    return tokens


def from_json(path: object, value: Any) -> Tokenizer:
    """A JSON list of characters, an object character → id, or an object that holds one as `stoi`, `itos` or `chars`."""
    return from_table(path, _table(path, value))


def from_pickle(path: object, data: bytes) -> Tokenizer:
    """nanoGPT's `meta.pkl`: a dictionary with `stoi` (character → id) and `itos` (id → character)."""
    return from_table(path, _table(path, read_pickle(path, data)))


def _table(path: object, value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        for name in ("stoi", "itos", "chars"):
            if isinstance(value.get(name), dict | list):
                value = value[name]
                if name == "itos" and isinstance(value, dict):
                    numbers = [int(i) if isinstance(i, str) and re.fullmatch("[0-9]{1,9}", i) else i for i in value]
                    if set(map(type, value.values())) - {str} or len(set(value.values())) != len(value):
                        raise FileError(path, "its itos is not a table from ids to different characters")
                    return dict(zip(value.values(), numbers, strict=True))
                break
    if isinstance(value, list):
        if set(map(type, value)) - {str} or len(set(value)) != len(value):
            raise FileError(path, "it is not a list of different characters")
        return {character: i for i, character in enumerate(value)}
    if not isinstance(value, dict):
        raise FileError(path, "it holds no character vocabulary (stoi, itos or a list of characters)")
    return value


def parse_json(path: object, data: bytes) -> Any:
    """JSON that may come from anybody. FileError where it is none."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise FileError(path, "is JSON nested deeper than any vocabulary") from None
    except ValueError as error:
        raise FileError(path, f"is not valid JSON ({str(error)[:120]})") from None


# ── pickles, read and not run ────────────────────────────────────────────────────────────────────────────────────────

_MARK = object()


def read_pickle(path: object, data: bytes) -> Any:
    """The value of a pickle of dictionaries, lists, texts and whole numbers. FileError for any other."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return stack.pop()
            action = _OPCODES.get(opcode.name)
            if action is None:
                raise FileError(
                    path, f"this pickle is more than a character vocabulary: it holds {opcode.name}", "it was not run"
                )
            action(stack, memo, argument)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError):
        pass
    raise FileError(path, "is a damaged pickle")


def _since_mark(stack: list[Any]) -> list[Any]:
    at = next(i for i in range(len(stack) - 1, -2, -1) if i < 0 or stack[i] is _MARK)
    items = stack[at + 1 :] if at >= 0 else stack[len(stack) :]
    del stack[at:]
    return items


def _set_items(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not dict or len(items) % 2:
        raise TypeError
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _append(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise TypeError
    stack[-1].extend(items)


def _take(stack: list[Any], n: int) -> list[Any]:
    items = stack[-n:]
    del stack[-n:]
    return items


_Action = Callable[[list[Any], dict[int, Any], Any], object]
_OPCODES: dict[str, _Action] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda stack, memo, argument: None),
    **dict.fromkeys(
        ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG1"),
        lambda stack, memo, argument: stack.append(argument),
    ),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT"), lambda stack, memo, argument: memo.__setitem__(argument, stack[-1])),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), lambda stack, memo, argument: stack.append(memo[argument])),
    "MEMOIZE": lambda stack, memo, argument: memo.__setitem__(len(memo), stack[-1]),
    "MARK": lambda stack, memo, argument: stack.append(_MARK),
    "EMPTY_DICT": lambda stack, memo, argument: stack.append({}),
    "EMPTY_LIST": lambda stack, memo, argument: stack.append([]),
    "SETITEM": lambda stack, memo, argument: _set_items(stack, _take(stack, 2)),
    "SETITEMS": lambda stack, memo, argument: _set_items(stack, _since_mark(stack)),
    "APPEND": lambda stack, memo, argument: _append(stack, _take(stack, 1)),
    "APPENDS": lambda stack, memo, argument: _append(stack, _since_mark(stack)),
}
