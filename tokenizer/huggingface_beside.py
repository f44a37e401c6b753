"""What Hugging Face's folders keep beside a tokenizer's file: what its tokens are for, and which were added to it later.

In: the path of the tokenizer's file, whose neighbours may be a stranger's and are read once. Out: plain data. Knows no kind of
tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, refused
from pocketlm.tokenizer.characters import parse_json, place_tokens

_MAX_BYTES = 1 << 24
# classes that put the first marker in front of a text where nothing says whether
_BEGINS_WITH_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


class Beside:
    """What is beside one file. `tokenizer_config.json` is empty where there is none; FileError where it cannot be read."""

    def __init__(self, path: Path):
        self._path = path.with_name("tokenizer_config.json")
        self._config = _object(self._path)

    def said(self, key: str) -> Any:
        """A text or a flag, a token as its text; None where there is none."""
        found = _text(self._config.get(key))
        return found if isinstance(found, str | bool) else None

    def kind(self) -> str:
        """The tokenizer's class in transformers."""
        return str(self.said("tokenizer_class")).removesuffix("Fast")

    def adds_bos(self) -> bool:
        """Whether a text begins with the first marker."""
        said = self.said("add_bos_token")
        return self.kind() in _BEGINS_WITH_BOS if said is None else said is True

    def specials(self, ids: Mapping[str, int]) -> list[int]:
        """The tokens that it names as bos, eos or more special ones: transformers cuts them out of a text, whatever the file
        with the vocabulary calls them. Not those for padding, which may be any.
        """
        named = [self._config.get("bos_token"), self._config.get("eos_token")]
        for more in (self._config.get("additional_special_tokens"), self._config.get("extra_special_tokens")):
            named += more if isinstance(more, list) else []
        return [ids[text] for text in map(_text, named) if isinstance(text, str) and len(text) > 1 and text in ids]

    def added(self) -> list[dict[str, Any]]:
        """The tokens that were added to the file's own, in the form that a `tokenizer.json` has for them. FileError."""
        if rows := self._config.get("added_tokens_decoder"):
            with refused(self._path, kinds=(AttributeError, KeyError, TypeError, ValueError)):
                return [{**row, "content": row["content"] + "", "id": int(i)} for i, row in rows.items()]
        older = _object(self._path.with_name("added_tokens.json"))
        return [{"content": text, "id": i, "special": True} for text, i in older.items()]


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def with_added(path: Path, ids: dict[str, int], added: list[dict[str, Any]]) -> list[str]:
    """Put the added tokens among token → id; all of them as a list by id. FileError where they do not fit together."""
    for token in added:
        if ids.setdefault(token["content"], token["id"]) != token["id"]:
            raise FileError(path, f"its token {token['content'][:40]!r} has two ids")
        if token.get("single_word"):
            raise FileError(path, f"its token {token['content'][:40]!r} that stands as a single word only is not supported")
    return place_tokens(path, ids)


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        value = parse_json(path, file.read(_MAX_BYTES))
    if not isinstance(value, dict):
        raise FileError(path, "is not a JSON object")
    return value
