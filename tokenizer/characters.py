"""Character vocabularies: every character is a token. nanoGPT's `meta.pkl` and JSON files in, a `Tokenizer` out."""

import json
import re
from collections.abc import Mapping
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
_MARKER = re.compile(r"<.+>|\[.+\]|[A-Z_]+")  # how they are written otherwise
_WORDS = 8  # longer tokens written otherwise that a vocabulary of characters may have
_HOLES = 1 << 16  # ids without a token that a file may have


class Characters(Tokenizer):
    """Tokenizer of a character vocabulary. Tokens longer than a character are markers, read with special=True."""

    def _encode_text(self, text: str, start: bool) -> list[int]:
        ids = [self._ids.get(character, self.unk_id) for character in text]
        if None in ids:
            character = text[ids.index(None)]
            raise UsageError(f"the vocabulary has no {character!r} (U+{ord(character):04X}) and no unknown token")
        return ids  # type: ignore[return-value]

    def _known(self, text: str) -> str:
        return text if self.unk_id is not None else "".join(filter(self._ids.__contains__, text))

    def _token_bytes(self, token_id: int) -> bytes:
        return self.vocabulary.tokens[token_id].encode()

    @cached_property
    def _ids(self) -> dict[str, int]:
        vocabulary = self.vocabulary
        return {token: i for token, i in vocabulary.index.pairs() if vocabulary.types[i] == NORMAL}


def from_table(path: object, ids: Mapping[str, int]) -> Tokenizer:
    """The tokenizer of a table character → id. FileError for ids that are no ids or given twice, or a table of words."""
    tokens = place_tokens(path, ids)
    words = [token for token in tokens if len(token) > 1 and not _MARKER.fullmatch(token)]
    if len(words) > _WORDS:
        problem = f"has {len(words)} tokens of several characters, {words[0][:40]!r} first, and nothing says how they merge"
        raise FileError(path, problem, "put its merges.txt beside it, or give its tokenizer.json")
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
            what, number = (str(x)[:40] if type(x) in (str, int, float, bool) else type(x).__name__ for x in (token, i))
            raise FileError(path, f"its vocabulary gives {what!r} the id {number}, which cannot be")
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
    from pocketlm.pickle_reader import read_pickle

    return from_table(path, _table(path, read_pickle(data, path, {})[0]))  # it may call nothing


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
