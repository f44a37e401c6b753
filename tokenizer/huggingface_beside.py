"""What Hugging Face's folders keep beside a tokenizer's file: what its tokens are for, and which were added to it later.

In: the path of the tokenizer's file, whose neighbours may be a stranger's. Out: plain data. Knows no kind of tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, refused
from pocketlm.tokenizer.characters import parse_json, place_tokens

_MAX_BYTES = 1 << 24
# classes that put the first marker in front of a text where nothing says whether
_BEGINS_WITH_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


def config_beside(path: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, each token as its text; empty where there is none."""
    config = _object(path.with_name("tokenizer_config.json"))
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return {key: value for key, value in texts.items() if isinstance(value, str | bool)}


def specials_beside(path: Path, ids: Mapping[str, int]) -> list[int]:
    """The tokens that `tokenizer_config.json` names as bos, eos or more special ones: transformers cuts them out of a text,
    whatever the file with the vocabulary calls them. Not those for padding, which may be any.
    """
    config = _object(path.with_name("tokenizer_config.json"))
    named = [config.get("bos_token"), config.get("eos_token")]
    for more in (config.get("additional_special_tokens"), config.get("extra_special_tokens")):
        named += more if isinstance(more, list) else []
    texts = [text.get("content") if isinstance(text, dict) else text for text in named]
    return [ids[text] for text in texts if isinstance(text, str) and len(text) > 1 and text in ids]


def adds_bos(config: Mapping[str, Any]) -> bool:
    """Whether a text begins with the first marker."""
    usual = str(config.get("tokenizer_class")).removesuffix("Fast") in _BEGINS_WITH_BOS
    return config.get("add_bos_token", usual) is True


def added_beside(path: Path) -> list[dict[str, Any]]:
    """The tokens that were added to the file's own, in the form that a `tokenizer.json` has for them. FileError."""
    source = path.with_name("tokenizer_config.json")
    rows = _object(source).get("added_tokens_decoder")
    if rows:
        with refused(source, kinds=(AttributeError, KeyError, TypeError, ValueError)):
            return [{**row, "content": row["content"] + "", "id": int(i)} for i, row in rows.items()]
    older = _object(path.with_name("added_tokens.json"))
    return [{"content": text, "id": i, "special": True} for text, i in older.items()]


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
