"""The Modelfile that makes a GGUF usable in Ollama: the chat template in Go's syntax, stop texts, parameters.

In: a model file's keys. Out: the text of the file. Format: the Modelfile document in the ollama repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pocketlm.chat.templates import BuiltIn, choose
from pocketlm.runtime.hyper import Hyper
from pocketlm.tokenizer import from_metadata


def modelfile(gguf_name: str, metadata: Mapping[str, Any], hyper: Hyper, path: Path) -> tuple[str, list[str]]:
    """The text of the Modelfile, and notes for the receipt. FileError: the tokenizer's keys are not sound."""
    tokenizer = from_metadata(metadata, path)
    source = metadata.get("tokenizer.chat_template")
    template = choose(source, tokenizer)
    built_in = template.built_in
    lines, notes = [f"FROM ./{gguf_name}"], []
    if template.source and built_in.name == "plain":
        notes.append("the chat template is none of the built-in ones: the Modelfile has no TEMPLATE, Ollama guesses it")
    else:
        lines.append(f'TEMPLATE """{_go_template(built_in)}"""')
    ends = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in sorted(tokenizer.end_ids)]
    for stop in dict.fromkeys([*built_in.stop, *filter(None, ends)]):
        lines.append(f"PARAMETER stop {_quoted(stop)}")
    lines.append(f"PARAMETER num_ctx {hyper.n_ctx}")
    return "\n".join(lines) + "\n", notes


def _go_template(built_in: BuiltIn) -> str:
    """A built-in template as a Go template over .Messages."""
    if built_in.name == "plain":
        return "{{ .Prompt }}"
    default = "".join((built_in.roles["system"][0], built_in.default_system, built_in.roles["system"][1]))
    default = f"{{{{ if not .System }}}}{default}{{{{ end }}}}" if built_in.default_system else ""
    turns = "".join(
        f'{{{{ if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{ end }}}}'
        for role, (before, after) in built_in.roles.items()
    )
    loop = f"{{{{ range .Messages }}}}{turns}{{{{ end }}}}"
    return f"{default}{loop}{built_in.roles['assistant'][0]}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
