"""Writes ONNX files: float32, float16, and int8 by onnxruntime's dynamic quantisation; and checks them.

In: a `CanonicalModel` and its keys, which become the file's properties. Knows nothing of the graph, which is
`to_onnx.py`'s. A protobuf ends at 2 GB, so weights of more than INLINE_BYTES go to a data file beside the model.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from pocketlm.errors import FileError, needed
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.onnx_store import Store
from pocketlm.export.tensor_encoder import Encoded, Encoder
from pocketlm.export.to_onnx import Graph
from pocketlm.runtime.formats import FORMATS

INLINE_BYTES = 1 << 30
SHARES = {"f32": 1.0, "f16": 0.5, "int8": 1.0}  # the share of float32's size; int8 starts from float32


def write_onnx(
    path: Path, data_stem: str, metadata: Mapping[str, Any], model: CanonicalModel, quant: str, encoder: Encoder
) -> tuple[list[Encoded], Path | None]:
    """Write a model to `path` in a format of SHARES; returns what was written for every tensor, and the data file, if any.

    Raises PocketlmError if int8 is asked for and onnxruntime is missing.
    """
    if quant == "int8":  # which is made last, of a float model of perhaps gigabytes
        with needed("ONNX in int8", "onnxruntime"):
            import onnxruntime  # noqa: F401
    plan = model.plan(path)
    is_large = 4 * sum(math.prod(tensor.shape) for tensor in model.tensors.values()) * SHARES[quant] > INLINE_BYTES
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{path.name}.", suffix=".part") as folder:
        store = Store(Path(folder) / "data" if is_large else None)
        graph = Graph(plan, model, encoder, store, half=quant == "f16", int8=quant == "int8")
        built = graph.build()
        if quant == "int8":
            float_path = Path(folder) / "float.onnx"
            store.close(built, "float.")
            onnx.save(built, float_path)
            built = _quantize(float_path, is_large)
            store = Store(Path(folder) / "data" if is_large else None)
            store.take(built.graph.initializer)
        data_path = store.close(built, data_stem)
        del built.metadata_props[:]
        onnx.helper.set_model_props(built, {key: _text(value) for key, value in metadata.items()})
        written = Path(folder) / "written.onnx"
        written.write_bytes(built.SerializeToString(deterministic=True))
        _check(written, metadata)
        data_path = data_path and data_path.replace(path.parent / data_path.name)
        written.replace(path)
    if quant == "int8":
        for encoded in graph.done:
            encoded.format = FORMATS["I8" if len(encoded.shape) > 1 else "F32"]
    return graph.done, data_path


def _quantize(float_path: Path, is_large: bool) -> ModelProto:
    """The model after onnxruntime's dynamic quantisation to 8 bits."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    int8_path = float_path.with_name("int8.onnx")
    logging.disable(logging.WARNING)  # it recommends steps that make no difference here
    try:
        # unsigned: onnxruntime adds products with signed weights in 16 bits where a processor has no VNNI, and these overflow
        quantize_dynamic(
            float_path, int8_path, weight_type=QuantType.QUInt8, per_channel=True, use_external_data_format=is_large
        )
    finally:
        logging.disable(logging.NOTSET)
    return onnx.load(int8_path)


def _check(path: Path, metadata: Mapping[str, Any]) -> None:
    """Check a written file with ONNX's own checker, and compare its keys. Raises FileError."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
        properties = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    except Exception as error:  # the checker's errors have no common class
        raise FileError(path, f"does not pass the check of onnx ({str(error).splitlines()[0]})") from None
    if properties != {key: _text(value) for key, value in metadata.items()}:
        raise FileError(path, "does not hold the keys that were written", "is the disk sound?")


def _text(value: Any) -> str:
    """The value of a key as text, which is all that ONNX can hold."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
