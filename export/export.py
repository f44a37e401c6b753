"""Exports a model: writes one file or folder, checks it, and gives a receipt of what was written and what it cost.

In: a `CanonicalModel`, a path, a container and a format. Out: the file, written under another name, read back, compared, and
only then renamed; a `Receipt`. Knows no dialects, and no command line.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pocketlm.errors import FileError, PocketlmError, UsageError, did_you_mean, needed, one_of
from pocketlm.export.canonical import CanonicalModel
from pocketlm.export.fp16_bin_writer import write_fp16_bin
from pocketlm.export.gguf_writer import write_gguf
from pocketlm.export.hyper_keys import file_metadata
from pocketlm.export.llama_cpp_compat import stock_notes
from pocketlm.export.rules import QUANTS, by_shape, head_name
from pocketlm.export.tensor_encoder import Encoded, Encoder, Progress
from pocketlm.export.to_huggingface import FILES, write_huggingface
from pocketlm.runtime.atomic import replacing_file, replacing_folder
from pocketlm.runtime.file_mapping import MappedModel
from pocketlm.runtime.fp16_bin_reader import CONFIG, VOCAB, WEIGHTS
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.model_file import open_model, size_of
from pocketlm.runtime.tensor import Tensor
from pocketlm.runtime.threads import default_threads


@dataclass(frozen=True)
class Receipt:
    """What was written. `weight_bytes`: without the vocabulary and other keys."""

    out: Path
    source_kind: str
    tensors: list[Encoded]
    weight_bytes: int
    file_bytes: int
    notes: list[str]
    added: frozenset[str] = frozenset()  # tensors that are no parameters

    @property
    def n_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors if tensor.name not in self.added)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.weight_bytes / self.n_parameters

    @property
    def worst(self) -> Encoded:
        """The tensor with the largest quantisation error."""
        return max(self.tensors, key=lambda tensor: tensor.error)

    def lines(self) -> list[str]:
        """The receipt as text."""
        formats = Counter(tensor.format.name for tensor in self.tensors).most_common()
        lines = [
            f"{self.out}: {self.n_parameters:,} parameters ({self.source_kind}), {self.file_bytes / 1e6:.1f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight ({', '.join(f'{name} x{count}' for name, count in formats)})"
        ]
        fall_backs: dict[tuple[str, str], Counter[str]] = {}
        for tensor in self.tensors:
            if tensor.reason:
                name = re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name)
                fall_backs.setdefault((tensor.format.name, tensor.reason), Counter())[name] += 1
        for (name, reason), tensors in fall_backs.items():
            lines.append(f"in {name}: {', '.join(f'{t} x{n}' if n > 1 else t for t, n in tensors.items())}; {reason}")
        if self.worst.error:
            lines.append(f"largest quantisation error: {self.worst.error:.3%} (relative RMSE) in {self.worst.name}")
        return lines + [f"note: {note}" for note in self.notes]


@dataclass(frozen=True)
class _Job:
    """Everything that writing a container needs."""

    model: CanonicalModel
    source: object
    out: Path
    quant: str
    pure: bool
    encoder: Encoder
    importance: Mapping[str, np.ndarray] | None

    def metadata(self, file_type: int | None) -> dict[str, Any]:
        """The file's keys. Raises PocketlmError if reading them would not give the model's hyper-parameters again."""
        metadata = file_metadata(self.model, self.out, file_type)
        if read_hyper(metadata, self.model.hyper.n_vocab, self.out) != self.model.hyper:
            raise PocketlmError(f"{self.source}: its hyper-parameters cannot be written down: {self.model.hyper}")
        return metadata

    def n_bytes(self, formats: str) -> int:
        """About how many bytes the weights will take in a format of QUANTS."""
        row, head = QUANTS[formats], head_name(self.model.tensors)
        shapes = [(name, tensor.shape) for name, tensor in self.model.tensors.items()]
        pairs = [(math.prod(shape), by_shape(name, shape, row, head, self.pure, self.model.hyper)[0]) for name, shape in shapes]
        return sum(count // format.block_size * format.block_bytes for count, format in pairs)


def _gguf(job: _Job) -> tuple[list[Encoded], list[str]]:
    with replacing_file(job.out, job.n_bytes(job.quant)) as part:
        return _write_gguf(job, part)


def _write_gguf(job: _Job, path: Path) -> tuple[list[Encoded], list[str]]:
    metadata = job.metadata(QUANTS[job.quant].file_type)
    with open(path, "wb") as file:
        done = write_gguf(file, metadata, job.model, job.quant, job.pure, job.encoder, job.importance)
    _check(path, metadata, done)
    return done, stock_notes(job.model.hyper, metadata, job.out)


def _fp16(job: _Job) -> tuple[list[Encoded], list[str]]:
    metadata = job.metadata(None)
    with replacing_folder(job.out, (CONFIG, VOCAB, WEIGHTS), job.n_bytes("f16")) as part:
        part.mkdir()
        done = write_fp16_bin(part, metadata, job.model, job.encoder)
        _check(part, metadata, done)
    return done, []


def _onnx(job: _Job) -> tuple[list[Encoded], list[str]]:
    with needed("writing ONNX", "onnx", "'pocketlm[export]'"):
        from pocketlm.export.onnx_file import SHARES, write_onnx
    stem = f"{job.out.name}_data_"
    with replacing_file(job.out, int(job.n_bytes("f32") * SHARES[job.quant])) as part:
        done, data = write_onnx(part, stem, job.metadata(None), job.model, job.quant, job.encoder)
    for old in job.out.parent.glob(escape(stem) + "[0-9a-f]" * 8):  # the data of the model that was here before
        if old != data:
            old.unlink()
    return done, [f"its weights are in {data.name}, which must stay beside it"] if data else []


def _ollama(job: _Job) -> tuple[list[Encoded], list[str]]:
    from pocketlm.export.ollama import modelfile

    names = ("model.gguf", "Modelfile")
    text, notes = modelfile(names[0], job.metadata(QUANTS[job.quant].file_type), job.model.hyper, job.out)
    with replacing_folder(job.out, names, job.n_bytes(job.quant)) as part:
        part.mkdir()
        done, more = _write_gguf(job, part / names[0])
        (part / names[1]).write_text(text, encoding="utf-8")
    return done, [*notes, *more, f"run: ollama create {job.out.name} -f {job.out}/Modelfile"]


def _huggingface(job: _Job) -> tuple[list[Encoded], list[str]]:
    metadata = job.metadata(None)
    with replacing_folder(job.out, FILES, job.n_bytes(job.quant)) as part:
        part.mkdir()
        return write_huggingface(part, metadata, job.model, job.source, job.quant, job.encoder)


class Container(NamedTuple):
    """What `--to` may ask for. `quants`: its formats, the default first."""

    write: Callable[[_Job], tuple[list[Encoded], list[str]]]
    quants: tuple[str, ...]
    is_folder: bool = False
    holds_experts: bool = True


_GGUF_QUANTS = ("f16", *(name for name in QUANTS if name != "f16"))
CONTAINERS = {
    "gguf": Container(_gguf, _GGUF_QUANTS),
    "fp16": Container(_fp16, ("f16",), is_folder=True, holds_experts=False),
    "onnx": Container(_onnx, ("f32", "f16", "int8"), holds_experts=False),  # it would compute all experts for every token
    "ollama": Container(_ollama, _GGUF_QUANTS, is_folder=True),
    "huggingface": Container(_huggingface, ("f16", "f32", "bf16"), is_folder=True),
}
CALLED_ELSEWHERE = {"half": "f16", "int8": "q8_0", "int4": "q4_0", "q8_0": "int8", "q4": "q4_0"}
ENDINGS = {".gguf": "gguf", ".onnx": "onnx"}  # of the output's name; anything else is a folder: fp16
CHECKPOINTS = (".safetensors", ".pt", ".pth", ".ckpt", ".npz")  # but for these, which nobody means to be a folder


def container_for(out: Path, asked: str | None) -> str:
    """The container that `--to` names, or the one that the output's name asks for. Raises UsageError."""
    suffix = out.suffix.lower()
    if asked is None and suffix in CHECKPOINTS:
        raise UsageError(f"-o {out}: pocketlm does not write {suffix}; name a .gguf, an .onnx or a folder")
    by_name = ENDINGS.get(suffix)
    if asked is not None and CONTAINERS[one_of("--to", asked, CONTAINERS)].is_folder and by_name:
        raise UsageError(f"--to {asked} makes a folder: name one with -o, without {out.suffix}")
    return asked or by_name or "fp16"


def export(
    model: CanonicalModel, source: object, out: Path, *, container: str = "gguf", quant: str | None = None, pure: bool = False,
    progress: Progress | None = None, n_threads: int | None = None, importance: Mapping[str, np.ndarray] | None = None,
) -> Receipt:  # fmt: skip
    """Write `model` to `out`, which appears whole or not at all. `source`: the checkpoint's path, for error messages.

    `container`: a row of CONTAINERS. `quant`: one of its formats. `pure`: every matrix in that format, the head too.
    `importance`: weighs the errors of a quantised GGUF by column (importance.py). Raises UsageError for a format that the
    container does not have, FileError for anything wrong with the model or the disk.
    """
    row = CONTAINERS[container]
    quant = (quant or row.quants[0]).lower()
    if quant not in row.quants:
        hint = did_you_mean(quant, row.quants, others=CALLED_ELSEWHERE)
        raise UsageError(f"--quant {quant}: {container} knows {', '.join(row.quants)}{hint}")
    if importance and (container not in ("gguf", "ollama") or quant in ("f32", "f16", "bf16", "q8_0")):
        raise UsageError("--imatrix is for quantised GGUFs; name one of their formats, as --quant q4_k_m")
    plan = model.plan(source)
    if plan.experts and not row.holds_experts:
        raise FileError(source, f"is a mixture of experts, which {container} does not hold", "export it to a .gguf")
    with Encoder(source, n_threads or default_threads(), progress) as encoder:
        done, notes = row.write(_Job(model, source, out, quant, pure, encoder, importance))
    file_bytes = size_of(out)
    weight_bytes = file_bytes if container == "onnx" else sum(tensor.n_bytes for tensor in done)
    return Receipt(out, model.dialect, done, weight_bytes, file_bytes, [*model.notes, *notes], model.added)


def _check(path: Path, metadata: Mapping[str, Any], done: list[Encoded]) -> None:
    """Read the file back, as pocketlm.load will, and compare it with what was to be written. Raises FileError."""
    with open_model(path) as opened:
        wrong = _differences(opened, metadata, done)
    if wrong:
        raise FileError(path, f"{wrong[0]} is not what was written", "the disk may be failing; the old file is unchanged")


def _differences(opened: MappedModel, metadata: Mapping[str, Any], done: list[Encoded]) -> list[str]:
    """Names of keys, or else of tensors, that are not what was written. (In a function of its own: when the caller raises, no
    variable may refer to the mapped file any more, or Windows could not delete it.)
    """
    keys = {key: opened.metadata[key] for key in opened.metadata}
    wrong = sorted(keys.keys() ^ metadata.keys()) or [key for key in keys if not _same(keys[key], metadata[key])]
    missing = [t.name for t in done if t.name not in opened.tensors]
    return wrong + (missing or [t.name for t in done if not _holds(opened.tensors[t.name], t)])


def _holds(found: Tensor, t: Encoded) -> bool:
    return found.shape == t.shape and found.format == t.format and zlib.crc32(found.data) == t.crc


def _same(read: Any, written: Any) -> bool:
    a, b = np.asarray(read), np.asarray(written)
    if b.dtype.kind == "f":  # numbers with a fraction are kept in 32 bits
        a, b = a.astype(np.float32), b.astype(np.float32)
    return bool(np.array_equal(a, b))
