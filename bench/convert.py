"""A model file as the other libraries want it: ONNX, PyTorch's own format, folders; in a cache keyed by the file's content.

The same weights go everywhere: the dequantised values of the file (int8 and int4 are what the libraries make of those).
Converting runs in a child process (worker.py); the parent only looks whether the result is there already.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pocketlm.bench.protocol import Skipped
from pocketlm.errors import PocketlmError
from pocketlm.runtime import container
from pocketlm.runtime.native.code_cache import kept_folder

if TYPE_CHECKING:
    from onnx import ModelProto

FIRST_ROW = "first_row"  # input of a converted ONNX model: the first position whose logits are wanted
SOURCES = (
    "bench/convert.py", "export/to_onnx.py", "export/onnx_file.py", "export/onnx_store.py", "export/to_huggingface.py",
    "tokenizer/huggingface_writer.py",
)  # fmt: skip


class Kind(NamedTuple):
    suffix: str
    write: Callable[[Path, Path], None]


def folder() -> Path:
    """Where conversions and made-up shapes are kept. Raises PocketlmError where the user has no cache folder."""
    return kept_folder("bench")


def target(path: Path, kind: str) -> Path:
    """Where the conversion of this file's content by this version of the converter is, or is to be put."""
    digest = hashlib.sha256(kind.encode())
    root = Path(__file__).resolve().parents[1]
    for source in sorted(path.iterdir()) if path.is_dir() else [path]:
        with open(source, "rb") as file:
            digest.update(container.digest(file, 0, source.stat().st_size))
    for name in SOURCES:
        digest.update((root / name).read_bytes())
    return folder() / f"{path.stem}-{digest.hexdigest()[:24]}{KINDS[kind].suffix}"


def sweep(out: Path) -> None:
    """Take away what a conversion to `out` that was ended has left."""
    for part in out.parent.glob(f"*part-{escape(out.name)}*"):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _onnx(quant: str) -> Callable[[Path, Path], None]:
    def write(path: Path, out: Path) -> None:
        import onnx

        part = _exported(path, out.with_name(f"part-{out.name}"), "onnx", quant)
        model = onnx.load(part, load_external_data=False)
        _logits_from(model)
        onnx.save(model, part)
        part.replace(out)

    return write


def _logits_from(model: ModelProto) -> None:
    """Give the graph an input FIRST_ROW and let it compute logits from that position on only.

    The file as exported computes them for the whole prompt, which nobody who generates needs: a fifth of SmolLM2's work.
    """
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    node = makers["logits"]
    while node.op_type not in ("MatMul", "MatMulInteger", "DynamicQuantizeMatMul"):
        node = next(makers[name] for name in node.input if name in makers)
    if node.op_type == "MatMulInteger":
        node = makers[node.input[0]]  # the rounding of its input
    x, rows = node.input[0], "wanted_rows"
    for name, value in (("rows_end", 1 << 62), ("rows_axis", 1)):
        graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
    graph.input.append(helper.make_tensor_value_info(FIRST_ROW, TensorProto.INT64, [1]))
    cut = helper.make_node("Slice", [x, FIRST_ROW, "rows_end", "rows_axis"], [rows], name=rows)
    for user in graph.node:
        for i, name in enumerate(user.input):
            if name == x:
                user.input[i] = rows
    place = next(i for i, made in enumerate(graph.node) if x in made.output)
    graph.node.insert(place + 1, cut)
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "rows"


def _torch(path: Path, out: Path) -> None:
    """Every tensor in float32 as PyTorch saves them, the matrices of one product stacked under joined names."""
    import torch

    from pocketlm.runtime.model_file import open_model
    from pocketlm.runtime.operations import Linear, Logits
    from pocketlm.runtime.plan import read_plan

    part = out.with_name(f"part-{out.name}")
    with open_model(path) as opened:
        shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
        plan = read_plan(opened.metadata, opened.tensors, path)
        weights = {name: torch.from_numpy(tensor.to_float32().copy()) for name, tensor in opened.tensors.items()}
        for matrix in (op.matrix for op in plan.ops if isinstance(op, Linear | Logits)):
            stacked, pairs = "+".join(matrix.weights), list(zip(matrix.weights, matrix.biases, strict=True))
            if any(matrix.biases):
                weights[f"{stacked}:bias"] = torch.cat([weights[b] if b else torch.zeros(shapes[w][0]) for w, b in pairs])
            rows = [weights[name] for name in matrix.weights]
            weights[f"{stacked}:T"] = torch.cat(rows).T.contiguous()  # [n_in, n_out]: a token's product is a quarter faster
        for name in {name for op in plan.ops if isinstance(op, Linear | Logits) for name in op.matrix.weights}:
            if name != "token_embd.weight":
                del weights[name]
        metadata = {key: opened.metadata[key] for key in opened.metadata if not key.startswith("tokenizer.")}
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in metadata.items()}
        torch.save({"weights": weights, "shapes": shapes, "metadata": plain}, part)
    part.replace(out)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what is needed on the way, under a name that `sweep` knows."""
    with tempfile.TemporaryDirectory(prefix=f"part-{out.name}-", dir=out.parent) as folder:
        yield Path(folder)


def _exported(path: Path, out: Path, container: str, quant: str) -> Path:
    """The model file's dequantised values in another container."""
    from pocketlm.export.export import export
    from pocketlm.export.from_model_file import read_model_file

    export(read_model_file(path), path, out, container=container, quant=quant)
    return out


def _only(path: Path, kinds: tuple[str, ...], library: str) -> None:
    """Raise Skipped for a model whose architecture a library does not know."""
    from pocketlm.runtime.model_file import open_model

    with open_model(path) as opened:
        architecture = opened.metadata["general.architecture"]
    if architecture not in kinds:
        raise Skipped(f"{library} converts no models of the architecture {architecture}")


def _genai(path: Path, out: Path) -> None:
    """What onnxruntime-genai's own builder makes: int4 in blocks of 32, products in 8 bits, logits of the last position."""
    _only(path, ("llama",), "onnxruntime-genai")
    with _beside(out) as folder:
        source = _exported(path, folder / "huggingface", "huggingface", "f32")
        options = ("int4_accuracy_level=4", "int4_block_size=32", "prune_lm_head=true")
        program = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", folder / "genai"]
        _run([*program, "-p", "int4", "-e", "cpu", "-c", folder / "cache", "--extra_options", *options])
        (folder / "genai").replace(out)


def _openvino(path: Path, out: Path) -> None:
    """What OpenVINO GenAI makes of a GGUF in float16, its matrices then in 4 bits in groups of 32 by NNCF."""
    _only(path, ("llama",), "OpenVINO GenAI")
    import nncf
    import openvino
    import openvino_genai

    with _beside(out) as folder:
        source = _exported(path, folder / "model.gguf", "gguf", "f16")
        openvino_genai.LLMPipeline(source, "CPU", enable_save_ov_model=True)
        model = openvino.Core().read_model(folder / "openvino_model.xml")
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=32, ratio=1.0)
        (folder / "done").mkdir()
        openvino.save_model(model, folder / "done" / "openvino_model.xml")
        (folder / "done").replace(out)


def _ctranslate2(path: Path, out: Path) -> None:
    """What CTranslate2's own converter makes of a Hugging Face folder: int8."""
    _only(path, ("llama", "gpt2"), "CTranslate2's converter")
    from ctranslate2.converters import TransformersConverter

    with _beside(out) as folder:
        source = _exported(path, folder / "huggingface", "huggingface", "f32")
        TransformersConverter(str(source)).convert(str(folder / "done"), quantization="int8")
        config = folder / "done" / "config.json"
        tokens = json.loads((folder / "done" / "vocabulary.json").read_text("utf-8"))
        said = json.loads(config.read_text("utf-8"))  # null, for a token that the model lacks, cannot be read
        filled = {k: tokens[0] if v is None and k.endswith("_token") else v for k, v in said.items()}
        config.write_text(json.dumps(filled), "utf-8")
        (folder / "done").replace(out)


def _run(program: list[str | Path]) -> None:
    """Run a program. Raises PocketlmError with the last line that it printed where it fails."""
    done = subprocess.run([*map(str, program)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["it said nothing"]
        raise PocketlmError(f"{' '.join(map(str, program[1:3]))} failed: {lines[-1]}")


KINDS = {
    "onnx-f32": Kind("-f32.onnx", _onnx("f32")),
    "onnx-int8": Kind("-int8.onnx", _onnx("int8")),
    "torch": Kind(".pt", _torch),
    "genai-int4": Kind("-genai", _genai),
    "openvino-int4": Kind("-openvino", _openvino),
    "ctranslate2-int8": Kind("-ctranslate2", _ctranslate2),
}
