"""Good small models that `pocketlm pull` knows by name, and where they lie once fetched.

Out: a table, and paths in the cache folder. Knows no network. A row says of a model what is known here for certain: the
repository on huggingface.co. Its licence, its files, their sizes and their SHA-256 are what that server says of them at the
time of the download; a row that states a SHA-256 itself, for one of the files, is believed above the server.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pocketlm.runtime.native.code_cache import cache_folder, kept_folder

QUANT = "Q4_K_M"  # the one of a repository's files that is fetched unless another is asked for
FOLDER = "models"  # in the cache folder


@dataclass(frozen=True)
class Known:
    """`sha256`: of a file by its quantisation, {"Q4_K_M": "09af…"}, where it is known here."""

    repository: str
    parameters: str  # in the name that its makers gave it
    about: str
    sha256: tuple[tuple[str, str], ...] = ()


CATALOGUE = {
    "smollm2-360m": Known("bartowski/SmolLM2-360M-Instruct-GGUF", "360 M", "English, small enough for every Pi"),
    "smollm2-1.7b": Known("bartowski/SmolLM2-1.7B-Instruct-GGUF", "1.7 B", "English"),
    "qwen2.5-0.5b": Known("bartowski/Qwen2.5-0.5B-Instruct-GGUF", "0.5 B", "many languages"),
    "qwen2.5-1.5b": Known("bartowski/Qwen2.5-1.5B-Instruct-GGUF", "1.5 B", "many languages"),
    "qwen2.5-coder-1.5b": Known("bartowski/Qwen2.5-Coder-1.5B-Instruct-GGUF", "1.5 B", "programs"),
    "qwen2.5-3b": Known("bartowski/Qwen2.5-3B-Instruct-GGUF", "3 B", "many languages"),
    "qwen3-0.6b": Known("bartowski/Qwen_Qwen3-0.6B-GGUF", "0.6 B", "many languages; thinks before it answers"),
    "qwen3-1.7b": Known("bartowski/Qwen_Qwen3-1.7B-GGUF", "1.7 B", "many languages; thinks before it answers"),
    "qwen3-4b": Known("bartowski/Qwen_Qwen3-4B-GGUF", "4 B", "many languages; thinks before it answers"),
    "gemma3-1b": Known("ggml-org/gemma-3-1b-it-GGUF", "1 B", "many languages"),
    "gemma2-2b": Known("bartowski/gemma-2-2b-it-GGUF", "2 B", "English"),
    "llama3.2-1b": Known("bartowski/Llama-3.2-1B-Instruct-GGUF", "1 B", "several languages"),
    "llama3.2-3b": Known("bartowski/Llama-3.2-3B-Instruct-GGUF", "3 B", "several languages"),
    "granite3.3-2b": Known("bartowski/ibm-granite_granite-3.3-2b-instruct-GGUF", "2 B", "several languages, businesslike"),
    "tinyllama": Known("TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF", "1.1 B", "English"),
}


def fetched(name: str) -> Path | None:
    """The file of a model of the table; None where it was not fetched, or there is no cache folder."""
    folder = cache_folder()
    path = folder / FOLDER / f"{name}.gguf" if folder else None
    return path if path and path.is_file() else None


def place(name: str) -> Path:
    """Where the file of a model belongs; its folder is made. Raises PocketlmError."""
    return kept_folder(FOLDER) / f"{name}.gguf"
