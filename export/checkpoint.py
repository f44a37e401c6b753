"""Opens a checkpoint of any container: PyTorch (zip, old), safetensors (sharded too), .npz, a Hugging Face folder.

In: a path. Out: a `Checkpoint`: named tensors that are not read yet, and everything else in it as plain data. Wrappers'
prefixes are gone from the names, optimiser state is left out. Knows no dialect: what a name means is dialects.py's.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pocketlm.errors import FileError, quoted, refused
from pocketlm.export.arrays import Buffer, LazyTensor
from pocketlm.export.llama2c_reader import looks_like_llama2c, read_llama2c
from pocketlm.export.llm_c_reader import looks_like_llm_c, read_llm_c
from pocketlm.export.npz_reader import read_npz
from pocketlm.export.other_files import other_bytes, other_file, other_folder
from pocketlm.export.safetensors_reader import looks_like_safetensors, parse_json, read_safetensors
from pocketlm.export.torch_reader import read_torch_legacy, read_torch_zip
from pocketlm.export.zip_reader import read_zip
from pocketlm.pickle_reader import Global, Record
from pocketlm.runtime.file_mapping import map_file, unmap
from pocketlm.runtime.model_file import PART

# entries that may hold the weights, best first; anything else is tried after them
WEIGHTS = (
    "model", "model_state_dict", "state_dict", "model_state", "module", "net", "weights", "params",
    "ema", "ema_state_dict", "model_ema",
)  # fmt: skip
NOT_WEIGHTS = ("optim", "sched", "scaler", "rng", "random", "loss", "callbacks")  # parts of names of training state
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
DEEPSPEED = "mp_rank_00_model_states.pt"  # beside it lie the optimiser's parts
META_PART = "consolidated.01.pth"  # of a model that Meta's code spreads over GPUs
FOLDER_FILES = (
    "model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin",
    DEEPSPEED, "pytorch_model_fsdp.bin",
    "best.pt", "last.pt",  # our trainer's
    META_PART,  # to be refused; Mixtral's folder has such files beside the first of these
)  # fmt: skip
LATEST = "latest"  # DeepSpeed's file that names the folder of the last step
ENDINGS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz")
# words of names that a checkpoint, or its folder, gets from a program or everybody
SAYS_NOTHING = (
    "ckpt ckpts checkpoint checkpoints model models pytorch torch lit pt pth bin safetensors index npz weight weights params"
    " state states dict last latest best final epoch step steps iter global mp rank consolidated of out output outputs run runs"
    " original save saves saved result results train trained training tmp temp data mnt home desktop downloads documents"
)
CONFIGS = ("config.json", "model_config.json", "params.json", "model_config.yaml")  # beside the weights
OLD_PICKLE = re.compile(rb"\(*[ci][\w.]+\n[\w.]+\n|\([dlt]p?\d*\n")  # protocol 0, all printable
MAX_JSON = 1 << 25
MAX_NODES, MAX_DEPTH, MAX_NAME = 1 << 21, 64, 512  # of the object in a checkpoint
MAX_VISITS = 1 << 12  # of one part of it that is there again and again


@dataclass(frozen=True)
class Checkpoint:
    """`tensors`: by their names without wrappers. `config`: everything else in the checkpoint, and the configuration files
    beside it, as plain data (dict, list, str, int, float, bool, None). `files`: those that were read. `folder`: where they
    lie; of DeepSpeed's, the folder above that of the step.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    config: dict[str, Any]
    files: tuple[Path, ...]
    sets: tuple[str, ...] = ()  # entries that could be the weights, where there are several; first the one that was taken

    @property
    def folder(self) -> Path:
        return home(self.files[0])


def open_checkpoint(path: str | Path, chosen: str = "") -> Checkpoint:
    """Open and check a checkpoint file or folder. Raises FileError; no code of the checkpoint ever runs.

    `chosen`: which entry to take if several could be the weights, such as "ema". A file that is refused is unmapped before the
    error leaves here.
    """
    mapped: list[Buffer] = []
    try:
        return _open(Path(path), mapped, chosen)
    except BaseException as error:
        for buffer in mapped:
            unmap(buffer, error)
        raise


def _open(path: Path, mapped: list[Buffer], chosen: str) -> Checkpoint:
    """The checkpoint; the mappings that it needs are added to `mapped`."""
    weights = _file_of_folder(path) if path.is_dir() else path
    if weights.match("consolidated.*.pth") and weights.with_name(META_PART).is_file():
        raise FileError(path, "holds a model in parts, one for each GPU", "save it whole")
    if (part := PART.fullmatch(weights.stem)) and int(part[3]) > 1:
        raise FileError(path, f"is one of the {int(part[3])} files of a model", "name the folder they lie in")
    is_index = weights.name.endswith(".index.json")
    tree, files = _read_index(weights, mapped) if is_index else (_read_file(weights, mapped), (weights,))
    search = _Search(path)
    found = search.find_weights(tree)
    if found is None:
        raise FileError(path, "holds no weights", "name a checkpoint that has a state dict in it")
    sets = search.sets(tree, found)
    if chosen:
        if chosen not in sets:
            problem = f"has {', '.join(map(quoted, sets)) or 'one set of weights'}, nothing that is called {quoted(chosen)}"
            raise FileError(path, problem, "choose one of these" if sets else "leave --set weights out")
        found = search.find_weights(_fields(tree)[chosen])
        sets.sort(key=lambda name: name != chosen)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in search.leaves(found):
        short = ".".join(part for part in name.split(".") if part not in WRAPPERS).removeprefix("base_model.model.")  # PEFT's
        if short in tensors and tensors[short].source != tensor.source:
            raise FileError(
                path, f"two tensors are called {quoted(short)} once the wrappers' prefixes are gone", "save the bare model"
            )
        tensors[short] = replace(tensor, name=short)
    config = {name: value for name, value in _fields(tree).items() if value is not found}
    if tensors and not any(math.prod(tensor.shape) for tensor in tensors.values()):
        problem = "holds tensors without values, as DeepSpeed's stage 3 does, which keeps them in other files"
        raise FileError(path, problem, "make one checkpoint of them with the zero_to_fp32.py beside it")
    beside = [home(weights) / name for name in CONFIGS if (home(weights) / name).is_file()]
    meta = weights.with_name(weights.name.replace("model_", "meta_", 1)).with_suffix(".json")  # nanochat's
    if meta not in beside and meta.is_file():
        beside.append(meta)
    said = {file.name: read_yaml(file) if file.suffix == ".yaml" else read_json(file) for file in beside}
    return Checkpoint(path, tensors, {**plain(config), **said}, (*files, *beside), tuple(sets))


def home(weights: Path) -> Path:
    """The folder in which a checkpoint's configuration and tokenizer are looked for."""
    above = weights.parent.parent
    return above if weights.name == DEEPSPEED and (above / LATEST).is_file() else weights.parent


def name_of(path: Path) -> str:
    """A name for the model: the file's, or that of its folder or the one above where the file's says nothing ("ckpt.pt")."""
    places = [place for place in (path.absolute(), *path.absolute().parents[:2]) if place != Path.home()]
    names = [place.name if place.is_dir() else place.stem for place in places]
    return next((name for name in names if set(re.findall(r"[^\W\d_]+", name.lower())) - set(SAYS_NOTHING.split())), names[0])


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises FileError."""
    data = map_file(path)[: MAX_JSON + 1]
    if len(data) > MAX_JSON:
        raise FileError(path, f"is longer than the {MAX_JSON} bytes that a configuration can be")
    return parse_json(data, path)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a simple YAML file: one per line, indented ones a dict of the one above, "- …" its list. FileError."""
    with refused(path):
        text = bytes(map_file(path)[:MAX_JSON]).decode()
    result: dict[str, Any] = {}
    above, inner, items = "", dict[str, Any](), list[Any]()
    for line in text.splitlines():
        if line.startswith("- ") and above:
            items.append(_scalar(line[2:].strip()))
            result[above] = items
            continue
        name, colon, value = line.partition(":")
        if not colon or line.lstrip()[:1] in ("#", "-", ""):
            continue
        if line[0].isspace():
            inner[name.strip()] = _scalar(value.strip())
        else:
            above, inner, items = name, {}, []
            result[name] = _scalar(value.strip()) if value.strip() else inner
    return result


def _scalar(text: str) -> Any:
    """A YAML value on one line: null, JSON, a number, or a text, whose single quotes are dropped."""
    if text in ("null", "~", "None"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            return float(text)  # 1e-05
        except ValueError:
            return text.strip("'")


# ── containers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _file_of_folder(folder: Path) -> Path:
    """The weights in a folder: by the file names of Hugging Face, DeepSpeed or our trainer, else the only checkpoint in it."""
    if (folder / "mp_rank_01_model_states.pt").is_file():
        raise FileError(folder, "holds a model in parts, one for each GPU", "save it whole")
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / LATEST).is_file():
        step = bytes(map_file(folder / LATEST)[:MAX_NAME]).decode(errors="replace").strip()
        if Path(step).name == step not in ("", "..") and (folder / step).is_dir():
            return _file_of_folder(folder / step)
    found = sorted(file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file())
    found = [file for file in found if not (_is_training_state(file.stem) or file.stem == "training_args")]
    if len(found) > 1:
        raise FileError(folder, f"holds {len(found)} checkpoints", "name the file itself")
    if not found:
        steps = [(int(match[1]), sub) for sub in folder.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", sub.name))]
        if not steps and (error := other_folder(folder)):
            raise error
        advice = f"one of those in it, as {max(steps)[1]}" if steps else "a folder with model.safetensors or a .pt in it"
        raise FileError(folder, "is a folder without a checkpoint in it", f"name {advice}")
    return found[0]


def _read_index(path: Path, mapped: list[Buffer]) -> tuple[dict[str, LazyTensor], tuple[Path, ...]]:
    """All tensors of a sharded checkpoint, from the index that says which file holds which."""
    index = read_json(path)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FileError(path, "has no weight_map that says which file holds which tensor", "download the index again")
    tensors: dict[str, LazyTensor] = {}
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file or file == "..":
            raise FileError(path, f"refers to {quoted(file)}, outside its folder", "do not trust this checkpoint")
        search = _Search(path.parent / file)
        for name, tensor in search.leaves(search.find_weights(_read_file(search.path, mapped))):
            if name in tensors:
                raise FileError(path, f"tensor {quoted(name)} is in two of the files", "download the checkpoint again")
            tensors[name] = tensor
    missing = [name for name in places if name not in tensors]
    if missing:
        raise FileError(
            path, f"{len(missing)} tensors are in none of the files, {quoted(missing[0])} first", "download all files again"
        )
    return tensors, tuple(path.parent / file for file in files)


def _read_file(path: Path, mapped: list[Buffer]) -> Any:
    """The object in a file; its tensors are `LazyTensor`s over the mapping, which is added to `mapped`."""
    buffer = map_file(path)
    mapped.append(buffer)
    if not len(buffer):
        raise FileError(path, "is empty", "copy or save it again")
    if buffer[:2] == b"PK" and (error := other_file(path)):  # zip archives as PyTorch's checkpoints are
        raise error
    for matches, read in READERS:
        if matches(buffer):
            return read(buffer, path)
    raise (
        other_bytes(path, buffer)
        or other_file(path)
        or FileError(
            path, "is no checkpoint that pocketlm reads", "give a .pt, .safetensors or .npz file, or a Hugging Face folder"
        )
    )


def _read_any_zip(buffer: Buffer, path: Path) -> Any:
    names = read_zip(buffer, path)
    is_npz = bool(names) and all(name.endswith(".npy") for name in names)
    return read_npz(buffer, path) if is_npz else read_torch_zip(buffer, path)


def _read_safetensors(buffer: Buffer, path: Path) -> dict[str, Any]:
    tensors, metadata = read_safetensors(buffer, path)
    return {"model": tensors, "metadata": metadata} if metadata else dict(tensors)


READERS: tuple[tuple[Callable[[Buffer], bool], Callable[[Buffer, Path], Any]], ...] = (
    (looks_like_safetensors, _read_safetensors),  # whose length may begin with the bytes of the next two
    (lambda buffer: buffer[:2] == b"PK", _read_any_zip),
    (lambda buffer: buffer[:1] == b"\x80" and buffer[257:262] != b"ustar", read_torch_legacy),
    (looks_like_llm_c, read_llm_c),
    (looks_like_llama2c, read_llama2c),
    (lambda buffer: OLD_PICKLE.match(buffer) is not None, read_torch_legacy),  # to say what it wants to call
)


# ── the object in it ─────────────────────────────────────────────────────────────────────────────────────────────────


def _fields(value: Any) -> dict[Any, Any]:
    """The entries of a dict or the fields of an object, {} for anything else. Of a whole module: parameters and submodules."""
    if isinstance(value, Record):
        parts = [value.fields.get(name) for name in ("_parameters", "_buffers", "_modules")]
        if isinstance(parts[2], dict):
            return {name: item for part in parts if isinstance(part, dict) for name, item in part.items() if item is not None}
        return value.fields
    return value if isinstance(value, dict) else {}


def _joined(name: str, key: Any) -> str:
    text = key[: MAX_NAME + 1] if isinstance(key, str) else str(key) if isinstance(key, int) else "?"
    return f"{name}.{text}" if name else text


def _is_training_state(key: Any) -> bool:
    text = _joined("", key).lower()
    return any(part in text for part in NOT_WEIGHTS)


class _Steps:
    """Counts steps through an object that a pickle may have made endless, or of few parts, each there a million times."""

    def __init__(self) -> None:
        self.left, self.visits = MAX_NODES, Counter[int]()

    def to(self, value: Any) -> bool:
        """Whether one more step, to `value`, is within the bounds."""
        self.left -= 1
        if value and isinstance(value, (dict, list, tuple, Record)):
            self.visits[id(value)] += 1
        return self.left >= 0 and self.visits[id(value)] <= MAX_VISITS


class _Search:
    """Walks through the object in a checkpoint. Raises FileError where that takes too many steps."""

    def __init__(self, path: Path):
        self.path, self.steps = path, _Steps()

    def leaves(self, tree: Any, keep: Callable[[Any], bool] = lambda name: True) -> Iterator[tuple[str, LazyTensor]]:
        """(name, tensor) of every tensor in `tree`, in order; names on the way are joined by dots."""
        pending: list[tuple[str, int, Any]] = [("", 0, tree)]
        while pending:
            name, depth, value = pending.pop()
            if not self.steps.to(value) or depth > MAX_DEPTH or len(name) > MAX_NAME:
                raise FileError(self.path, "holds an object too large or too deep to be a checkpoint", "save the weights alone")
            if isinstance(value, LazyTensor):
                yield name, value
            elif isinstance(value, (list, tuple)) and value and isinstance(value[0], (int, float, str)):
                continue  # numbers of a training run, perhaps millions
            else:
                inner = enumerate(value) if isinstance(value, (list, tuple)) else _fields(value).items()
                below = [(_joined(name, key), depth + 1, item) for key, item in inner if keep(key)]
                pending += reversed(below)

    def has_weights(self, tree: Any) -> bool:
        """Whether `tree` has a tensor that is no scalar and not part of the optimiser."""
        return any(tensor.shape for _, tensor in self.leaves(tree, lambda name: not _is_training_state(name)))

    def find_weights(self, tree: Any) -> Any:
        """The part of `tree` that is the state dict, or None."""
        for _ in range(MAX_DEPTH):
            fields = _fields(tree)
            if isinstance(tree, Record) and "_modules" in tree.fields:
                return tree
            inner = [
                name for name in WEIGHTS if isinstance(fields.get(name), (dict, Record)) and self.has_weights(fields[name])
            ]
            others = {} if inner else {name: value for name, value in fields.items() if not _is_training_state(name)}
            if others and not any(isinstance(value, LazyTensor) and value.shape for value in others.values()):
                inner = [name for name, value in others.items() if self.has_weights(value)]
                if len(inner) > 1:  # a nested tree of parameters
                    return tree
            if not inner:
                return tree if self.has_weights(tree) else None
            tree = fields[inner[0]]
        return None

    def sets(self, tree: Any, found: Any) -> list[str]:
        """The names of the entries of `tree` that could each be the weights, [] unless there are several: first the one that is
        `found`, then those with tensors of the same shapes, such as an average over the training (EMA).
        """
        entries = {name: value for name, value in _fields(tree).items() if isinstance(value, (dict, Record))}
        parts = {n: self.find_weights(v) for n, v in entries.items() if isinstance(n, str) and not _is_training_state(n)}
        shapes = {n: sorted(t.shape for _, t in self.leaves(part) if t.shape) for n, part in parts.items() if part is not None}
        first = next((name for name in shapes if found is tree or parts[name] is found), "")
        alike = [name for name in shapes if shapes[name] == shapes[first]]
        is_sets = len(alike) > 1 and (found is not tree or len(alike) == len(shapes))
        return sorted(alike, key=lambda name: name != first) if is_sets else []


def plain(value: Any, depth: int = 0, steps: _Steps | None = None) -> Any:
    """`value` as plain data: objects become dicts, tuples and sets lists; tensors and training state are left out."""
    steps = steps or _Steps()
    if not steps.to(value) or depth > MAX_DEPTH or isinstance(value, (LazyTensor, bytes)):
        return None
    if isinstance(value, Record):  # `_content` and `_val` are how OmegaConf keeps a tree and its leaves
        return plain(value.fields.get("_content", value.fields.get("_val", value.fields)), depth + 1, steps)
    if isinstance(value, Global):
        return value.name
    if isinstance(value, dict):
        return {
            str(name): plain(item, depth + 1, steps)
            for name, item in value.items()
            if isinstance(name, (str, int)) and not _is_training_state(name) and not isinstance(item, LazyTensor)
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item, depth + 1, steps) for item in value]
    return value if isinstance(value, (str, int, float, bool)) else None
