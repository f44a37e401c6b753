"""What the bench measures: a backend behind three methods, and the table of backends.

An adapter is a class in a module of its own (`adapter_*.py`), made and used in a child process only. The table here knows
names, packages and memory, and imports none of them. Positions are appended to the adapter's KV cache; ids are int32 [n].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from pocketlm.errors import PocketlmError, UsageError, did_you_mean


class Skipped(PocketlmError):
    """A backend that is installed and cannot be measured here, for the reason given."""


class Adapter(Protocol):
    """Made as `Adapter(path, n_threads, n_ctx, **options)`, which loads the model. PocketlmError: it cannot run it.

    What some have beside this: `decode_seconds(ids, n)`, the seconds of each of the n tokens that a library makes by itself
    after ids [n_ids], where it takes none from outside; `complete(text, n_tokens)`, the tokens that a library's own call
    generated greedily, and its seconds: what a user sees; `together(prompt, n_tokens, conversations)`, the seconds from
    everybody's first logits to the last, while each makes n_tokens after prompt and an id of its own.
    """

    facts: dict[str, str]  # version, build flags, settings: what a reader needs to do the same

    def truncate(self, length: int) -> int | None:
        """Keep the first `length` positions of the cache, which holds at least that many; how many are left (None: these)."""
        ...

    def forward(self, ids: np.ndarray, rows: str = "last") -> np.ndarray:
        """Append ids [n]; logits float32 [1, n_vocab], or of every position with rows="all": [n, n_vocab].

        The array may be the backend's own memory, valid until the next call.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Backend:
    """A row of the table of backends."""

    name: str
    adapter: str  # "module:class"
    packages: tuple[str, ...] = ()  # import names of what must be installed
    get: str = ""  # the command that installs them
    reads: str = "gguf"  # "gguf", or a kind of conversion: a row of convert.KINDS
    bytes_per_weight: float = 0.0  # memory for the weights, 0 where the backend checks the memory itself
    bytes_per_file_byte: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [package for package in self.packages if importlib.util.find_spec(package) is None]


_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
_LLAMA = "pip install --no-binary llama-cpp-python llama-cpp-python"  # built here, so that it uses all of this CPU
_ONNX = "pip install onnxruntime onnx"
_GENAI = "pip install onnxruntime-genai onnx_ir transformers torch"
_OPENVINO = "pip install openvino-genai nncf"
_CT2 = "pip install ctranslate2 transformers torch"
_POCKETLM, _LLAMACPP, _ONNXRUNTIME, _PYTORCH = (
    f"pocketlm.bench.adapter_{name}" for name in ("pocketlm:Pocketlm", "llama:Llama", "onnxruntime:OnnxRuntime", "torch:Torch")
)

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("native", _POCKETLM, ("llvmlite",), "pip install llvmlite", options={"backend": "native"}),
        Backend("native q8", _POCKETLM, ("llvmlite",), "pip install llvmlite", options={"backend": "native", "kv": "q8"}),
        Backend("numpy", _POCKETLM, options={"backend": "numpy"}),
        Backend("llama.cpp", _LLAMACPP, ("llama_cpp",), _LLAMA, bytes_per_file_byte=2.0),
        Backend("llama.cpp no-flash", _LLAMACPP, ("llama_cpp",), _LLAMA, bytes_per_file_byte=2.0, options={"flash": False}),
        # onnxruntime packs float32 matrices again for its own products
        Backend("onnxruntime", _ONNXRUNTIME, ("onnxruntime", "onnx"), _ONNX, "onnx-f32", bytes_per_weight=8.0),
        Backend("onnxruntime int8", _ONNXRUNTIME, ("onnxruntime", "onnx"), _ONNX, "onnx-int8", bytes_per_weight=4.0),
        Backend(
            "onnxruntime-genai", "pocketlm.bench.adapter_genai:Genai",
            ("onnxruntime_genai", "onnx_ir", "transformers", "torch"), _GENAI, "genai-int4", bytes_per_weight=8.0,
        ),
        Backend(
            "openvino", "pocketlm.bench.adapter_openvino:OpenVino", ("openvino", "openvino_genai", "nncf"), _OPENVINO,
            "openvino-int4", bytes_per_weight=4.0,
        ),
        Backend(
            "ctranslate2", "pocketlm.bench.adapter_ctranslate2:CTranslate2", ("ctranslate2", "transformers", "torch"), _CT2,
            "ctranslate2-int8", bytes_per_weight=8.0,
        ),
        Backend("torch", _PYTORCH, ("torch",), _TORCH, "torch", bytes_per_weight=4.0),
        Backend("torch compiled", _PYTORCH, ("torch",), _TORCH, "torch", bytes_per_weight=4.0, options={"compiled": True}),
    )
}  # fmt: skip


def choose(names: str | None, backends: Mapping[str, Backend] = BACKENDS) -> list[Backend]:
    """The rows that a comma-separated list names, in the table's order; None: all. Raises UsageError."""
    asked = list(backends) if names is None else [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in backends:
            near = did_you_mean(name, backends)
            raise UsageError(f"--backends: {name!r} is unknown; expected some of {', '.join(backends)}{near}")
    return [backend for name, backend in backends.items() if name in asked]
