"""What stock llama.cpp, which ignores the `pocketlm.*` keys, does differently with a file: notes for the receipt.

In: hyper-parameters and keys. Out: one line for each difference. Knows no tensors. llama.cpp's tokenizers are imitated as
version 0.3.36 of llama-cpp-python behaves; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import quoted
from pocketlm.export.hyper_keys import own_options
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper import Hyper
from pocketlm.tokenizer import Tokenizer, from_metadata
from pocketlm.tokenizer.base import BYTE, NORMAL
from pocketlm.tokenizer.byte_bpe import LETTERS
from pocketlm.tokenizer.gguf_vocabulary_reader import Keys
from pocketlm.tokenizer.sentencepiece import SPACE

OURS = "pocketlm."
ONLY_OURS = ("pocketlm", "gptneo", "nanochat")  # architectures that llama.cpp has not
NO_WINDOW = ("phi3", "starcoder2", "llama", "qwen2", "qwen3")  # those whose sliding windows it leaves out
NARROW = ("qwen2", "phi3", "olmo2")  # those whose heads have to be together as wide as the model
# tokenizer.ggml.model -> standard keys that llama.cpp does not read for it
IGNORED = {
    "llama": ("tokenizer.ggml.precompiled_charsmap", "tokenizer.ggml.remove_extra_whitespaces"),
    "gpt2": ("tokenizer.ggml.add_space_prefix",),
}
END_ID = {"llama": 2, "gpt2": 11}  # what ends a text where the file does not say it: ids of Llama 2 and of Falcon


def stock_notes(hyper: Hyper, metadata: Mapping[str, Any], path: Path) -> list[str]:
    """One line for each thing that stock llama.cpp does differently with the file."""
    if hyper.architecture in ONLY_OURS:
        return ["stock llama.cpp does not know this architecture: the file runs in pocketlm only"]
    notes = []
    window = hyper.settings.get("attention.sliding_window", hyper.n_ctx)
    if hyper.architecture in NARROW and hyper.q_width != hyper.n_embd:
        problem = f"{hyper.n_head} heads of {hyper.head_dim} in a width of {hyper.n_embd}"
        notes.append(f"stock llama.cpp does not know {hyper.architecture} with {problem}: the file runs in pocketlm only")
    if hyper.architecture in NO_WINDOW and 0 < window < hyper.n_ctx:
        notes.append(f"stock llama.cpp attends to everything where this model looks at {window} positions")
    if hyper.architecture == "gemma2" and not window:
        notes.append("stock llama.cpp knows no gemma2 without windows: the file runs in pocketlm only")
    if hyper.architecture == "olmo2" and "rope.freq_base_swa" in hyper.settings:
        notes.append("stock llama.cpp has one rotary base for layers with and without a window: the file runs in pocketlm only")
    own = own_options(hyper)
    if own.pop("activation", "") == "gelu_erf" and ARCHITECTURES[hyper.architecture].USUAL["activation"] == "gelu_tanh":
        notes.append("stock llama.cpp computes GELU by the tanh formula where this model was trained with the exact one (erf)")
    elif hyper.activation != ARCHITECTURES[hyper.architecture].USUAL["activation"]:
        own["activation"] = hyper.activation
    if own:
        options = ", ".join(f"{name} {value}" for name, value in own.items())
        notes.append(f"stock llama.cpp does not know {options} for {hyper.architecture}: the file runs in pocketlm only")
    return notes + _tokenizer_notes(metadata, path)


def stock_encoder(metadata: Mapping[str, Any], path: Path) -> tuple[Tokenizer, Callable[[str], list[int] | None]]:
    """An imitation of stock llama.cpp's tokenizer, and a function that encodes a text without markers as that does; it returns
    None for a text that crashes llama.cpp. Raises FileError if the keys are not sound.
    """
    model = Keys(metadata, path).text("tokenizer.ggml.model")
    ignored = IGNORED.get(model, ())
    keys = {key: value for key, value in metadata.items() if not key.startswith(OURS) and key not in ignored}
    typed = Keys(keys, path)
    tokens, types = typed.texts("tokenizer.ggml.tokens") or [], typed.numbers("tokenizer.ggml.token_type", "iu")
    n_vocab, known = len(tokens), set(tokens)
    if model == "gpt2":  # pieces without an id are merged like the others, and left out at the end
        pieces = (*LETTERS, *(merge.replace(" ", "") for merge in typed.texts("tokenizer.ggml.merges") or []))
        more = list(dict.fromkeys(piece for piece in pieces if piece not in known))
        keys["tokenizer.ggml.tokens"] = tokens + more
        if types is not None:
            keys["tokenizer.ggml.token_type"] = np.concatenate([types, np.full(len(more), NORMAL, types.dtype)])
    stock = from_metadata(keys, path)
    needs_all = model == "llama" and not stock.vocabulary.ids_of(BYTE)  # what is unknown becomes bytes

    def encode(text: str) -> list[int] | None:
        if needs_all and not set(text.replace(" ", SPACE)) <= known:
            return None
        return [i for i in stock.encode(text) if i < n_vocab]

    return stock, encode


def _tokenizer_notes(metadata: Mapping[str, Any], path: Path) -> list[str]:
    """Notes on the test texts that get other ids from stock llama.cpp, and on its other differences in tokenising."""
    typed = Keys(metadata, path)
    texts, ids = (typed.texts(f"pocketlm.tokenizer.test_{name}") for name in ("texts", "ids"))
    end = END_ID.get(typed.text("tokenizer.ggml.model"))
    if not texts or not ids or end is None:
        return []
    stock, encode = stock_encoder(metadata, path)
    results = {text: (encode(text), expected) for text, expected in zip(texts, ids, strict=False)}
    fatal = [_shown(text) for text, (theirs, _) in results.items() if theirs is None]
    differ = [
        _shown(text)
        for text, (theirs, expected) in results.items()
        if theirs is not None and " ".join(map(str, theirs)) != expected
    ]
    notes = []
    if fatal:
        notes.append(f"stock llama.cpp crashes on characters that the vocabulary does not hold, as in {', '.join(fatal)}")
    if differ:
        notes.append(f"stock llama.cpp tokenizes {len(differ)} of the {len(texts)} test texts differently: {', '.join(differ)}")
    if any(f"pocketlm.tokenizer.strip_{side}" in metadata for side in ("left", "right")):
        notes.append("stock llama.cpp keeps the white space beside markers that swallow it")
    if stock.eos_id is None and end < len(metadata["tokenizer.ggml.tokens"]) and not stock.is_control(end):
        text = _shown(stock.decode([end]))
        notes.append(f"the tokenizer names no end of text; stock llama.cpp takes token {end}, {text}, for it and stops there")
    return notes


def _shown(text: str) -> str:
    return repr(text) if text.isprintable() else f"'{quoted(text, 300)}'"
