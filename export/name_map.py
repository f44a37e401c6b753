"""The file of `--map`: names for a dialect nobody foresaw. A small part of TOML, documented in the README of this folder.

    drop = ["net.stack.{i}.mask"]                     # tensors that are no weights
    [set]                                             # as --set does
    n_head = 12
    [names]                                           # the checkpoint's name = what it is; {i}: the layer's number
    "net.words.weight" = "token_embd.weight"
    "net.stack.{i}.query.weight" = "blk.{i}.attn_q.weight"

Values are texts in double quotes, numbers, true, false or lists of these on one line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, quoted, refused
from pocketlm.runtime.file_mapping import map_file

MAX_BYTES = 1 << 24
PARTS = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down",
    "ffn_gate_up",
)  # fmt: skip
ROLES = {
    *(f"{name}.{end}" for name in ("token_embd", "output_norm", "output") for end in ("weight", "bias")),
    "position_embd.weight",
    *(f"blk.{{i}}.{part}.{end}" for part in PARTS for end in ("weight", "bias")),
}  # fmt: skip
_COMMENTED = re.compile(r"""((?:"(?:[^"\\]|\\.)*"|[^"#])*)(?:#.*)?""")  # a `#` in quotes begins no comment
_LINE = re.compile(r"""(?:\[(?P<section>\w+)\]|(?P<key>"[^"]*"|[\w.{}-]+)\s*=\s*(?P<value>.+))?""")


@dataclass(frozen=True)
class NameMap:
    names: list[tuple[re.Pattern[str], str]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    dropped: list[re.Pattern[str]] = field(default_factory=list)

    def role_of(self, name: str) -> str | None:
        """The role that the file gives to a tensor."""
        for expression, role in self.names:
            if match := expression.fullmatch(name):
                return role.replace("{i}", str(int(match["i"]))) if "{i}" in role else role
        return None

    def drops(self, name: str) -> bool:
        return any(expression.fullmatch(name) for expression in self.dropped)


def read_name_map(path: Path) -> NameMap:
    """Read the file. Raises FileError, with the line's number, for anything that is not understood."""
    with refused(path):
        text = map_file(path)[:MAX_BYTES].decode("utf-8-sig")
    result, section = NameMap(), ""
    for number, line in enumerate(text.splitlines(), 1):
        code = _COMMENTED.fullmatch(line)
        match = _LINE.fullmatch(code[1].strip()) if code else None
        if match is None:
            raise FileError(path, f"line {number} is not NAME = VALUE", "see the README of export/")
        if match["section"] is not None:
            section = match["section"]
        elif match["key"] is not None:
            _add(result, section, match["key"].strip('"'), match["value"], path, number)
    return result


def _add(result: NameMap, section: str, key: str, text: str, path: Path, number: int) -> None:
    def fail(problem: str) -> FileError:
        return FileError(path, f"line {number}: {problem}", "see the README of export/")

    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        raise fail(f"{quoted(text)} is no text in double quotes, number, true or false") from None
    if section == "names" and isinstance(value, str) and value in ROLES and key.count("{i}") == value.count("{i}"):
        result.names.append((_expression(key), value))
    elif section == "names":
        raise fail(f"{quoted(value)} is no role; roles are token_embd.weight, blk.{{i}}.attn_q.weight and the like")
    elif section == "set" and isinstance(value, (str, int, float)):
        result.settings[key] = str(value).lower() if isinstance(value, bool) else str(value)
    elif section == "" and key == "drop" and isinstance(value, list):
        result.dropped.extend(_expression(str(name)) for name in value)
    else:
        raise fail(f"{quoted(key)} is not known here")


def _expression(name: str) -> re.Pattern[str]:
    return re.compile(r"(?P<i>\d+)".join(map(re.escape, name.split("{i}", 1))))
