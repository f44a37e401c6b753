"""Arranges recognised tensors as an architecture wants them: fuses, splits, permutes, fills in, and checks that all fit.

In: tensors by role (dialects.py), the configuration, what the dialect's code fixes. Out: a `CanonicalModel` without a
tokenizer. A tensor is read only if its values decide something, such as whether the output matrix is the token table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from pocketlm.errors import FileError, quoted
from pocketlm.export.arrays import LazyTensor
from pocketlm.export.canonical import CanonicalModel, CanonicalTensor
from pocketlm.export.dialect import Dialect, Draft
from pocketlm.export.model_config import ModelConfig
from pocketlm.export.tensor_parts import (
    Tensors,
    constant,
    fuse_qkv,
    in_layers,
    interleave,
    layered,
    rows,
    rows_of_experts,
    scale_queries,
    split_qkv,
    stacked,
    transposed,
)
from pocketlm.runtime.architectures.table import ARCHITECTURES
from pocketlm.runtime.hyper import read_hyper
from pocketlm.runtime.model_summary import ROPE_FACTORS
from pocketlm.runtime.plan import make_plan
from pocketlm.runtime.positions import alibi_slopes

# a role → how many dimensions it may have; those of experts that are tensors of their own have one less
DIMENSIONS = {
    r"ffn_\w+_exps_blocks\.weight": (4,),
    r"ffn_\w+_exps(_scales)?\.weight": (3,),
    r"ffn_\w+_exps(\.bias|_bias\.weight)": (2,),
    r"(position_embd|shortconv\.conv)\.weight": (2, 3),
    r"(output|attn_(q|k|v|qkv|output)|ffn_(gate_inp|[123]|(gate|up|gate_up|down)(_shexps?)?)|shortconv\.\w+)\.weight": (2,),
    ".*": (1, 2, 3),
}
LECTURE = (
    "scores were taken to be divided by the root of a head's width; code that multiplies them by C**-0.5, as the first version "
    "of the lecture that has a module for each head, wants --set attention_scale=n_embd"
)
NEED_BIASES = ("gpt2", "gptneox", "starcoder2", "bloom", "phi2")  # architectures whose biases llama.cpp wants to find


def arrange(
    path: Path, found: Mapping[str, LazyTensor], buffers: Mapping[str, LazyTensor], config: ModelConfig, dialect: Dialect
) -> CanonicalModel:
    """The model with the tensors `found`, by role. `buffers`: tensors that are no parameters, by their names in the checkpoint.

    Raises FileError that lists every missing or misshapen tensor, or asks for the settings that nothing tells.
    """
    notes: list[str] = []
    tensors = {role: CanonicalTensor(tensor.shape, tensor.read) for role, tensor in found.items()}
    fixed = dialect.fixed
    if dialect.transposed:
        tensors = {role: transposed(t) if role.startswith("blk.") and len(t.shape) == 2 else t for role, t in tensors.items()}
    wanted = ("token_embd.weight", "output_norm.weight", "blk.0.attn_norm.weight")
    for name in wanted[:1] if dialect.architecture else wanted:  # the plan says what else is missing
        if name not in tensors:
            raise FileError(path, f"no tensor has the role of {name}", "name the tensors in a file for --map")
    if len(tensors["token_embd.weight"].shape) != 2:
        raise FileError(path, "the token table is no matrix", "name the right one in a file for --map")
    _check_dimensions(found, path)
    n_layer = 1 + max((int(role.split(".")[1]) for role in tensors if role.startswith("blk.")), default=0)
    said = config.raw("num_hidden_layers", "n_layer", "n_layers", "num_layers") if config.model_type else None
    if isinstance(said, int) and said != n_layer:
        raise FileError(path, f"has {n_layer} layers where its configuration says {said}", "the checkpoint is not complete")
    n_vocab, n_embd = tensors["token_embd.weight"].shape
    _drop_leading_ones(tensors)
    n_heads_found = _join_heads(tensors, path)
    _name_feed_forward(tensors, n_embd)
    _tie(tensors, found, config, fixed, notes)
    gated = any(f"blk.0.ffn_gate{end}.weight" in tensors for end in ("", "_exps")) or _both_of_experts(tensors) is not None
    n_head, head_dim, n_kv_head = _heads(tensors, config, n_embd, n_heads_found, path)
    divisor = config.get("attention_scale")
    if n_heads_found and divisor is None:
        notes.append(LECTURE)
    position = _position(tensors, buffers, config, fixed)
    options: dict[str, Any] = {
        "norm": _norm(tensors, config, fixed, gated),
        "position": position,
        "activation": config.need("activation", fixed.get("activation", "silu" if gated else None)),
        "gated": gated,
    }
    n_ctx = _context(tensors, buffers, config, position, fixed)
    eps = config.need("norm_eps", fixed.get("norm_eps"))
    keys: dict[str, Any] = {
        "context_length": n_ctx, "embedding_length": n_embd, "block_count": n_layer, "attention.head_count": n_head,
        "attention.head_count_kv": n_kv_head, "attention.key_length": head_dim,
        "feed_forward_length": _n_ff(tensors, path),
        f"attention.layer_norm_{'rms_' if options['norm'] == 'rms' else ''}epsilon": eps,
    }  # fmt: skip
    draft = Draft(dialect.architecture, tensors, keys, options, config)
    if position == "rope":
        _rotate(draft, buffers, dialect)
    if position == "alibi":
        keys["attention.max_alibi_bias"] = _max_bias(buffers, config, n_head, path)
    config.ask()
    config.check_supported(n_ctx, dialect.computes)
    dialect.finish(draft)
    if divisor == "n_embd":
        scale_queries(draft.tensors, n_head * head_dim, math.sqrt(head_dim / n_embd))
    architecture = draft.architecture or _architecture(options, keys, tensors)
    added = frozenset(ROPE_FACTORS & tensors.keys()) | _lay_out(draft, architecture, (n_head, n_kv_head, head_dim))
    metadata = {f"pocketlm.{name}": value for name, value in options.items()} | {
        f"{architecture}.{k}": v for k, v in keys.items()
    }
    n_vocab = tensors["token_embd.weight"].shape[0]
    hyper = read_hyper({"general.architecture": architecture, **metadata}, n_vocab, path)
    make_plan(hyper, {name: tensor.shape for name, tensor in tensors.items()}, path)
    return CanonicalModel(hyper, _in_order(tensors), {}, dialect.name, notes, added=added)


def _check_dimensions(found: Mapping[str, LazyTensor], path: Path) -> None:
    """Raises FileError for an empty tensor, or one of other dimensions than its role has: shapes are computed with, here."""
    for role, tensor in found.items():
        name, _, number = re.sub(r"^blk\.\d+\.", "", role).partition("#")
        n = len(tensor.shape) + (number != "" and "_exps." in name)
        wanted = next(wanted for expression, wanted in DIMENSIONS.items() if re.fullmatch(expression, name))
        if n not in wanted or 0 in tensor.shape:
            problem = f"tensor {quoted(tensor.name)} is {'x'.join(map(str, tensor.shape)) or 'a number'}: {role} cannot be that"
            raise FileError(path, problem, "name the right one in a file for --map")


def _rotate(draft: Draft, buffers: Mapping[str, LazyTensor], dialect: Dialect) -> None:
    """Add the keys, options and tensors of rotary positions."""
    config, keys, fixed = draft.config, draft.keys, dialect.fixed
    heeded = not config.model_type or "rope_part" in fixed or "rope_part" in config.given  # other families turn whole heads
    part = config.get("rope_part", fixed.get("rope_part", 1.0)) if heeded else 1.0
    n_dims = int(keys["attention.key_length"] * min(part, 2.0))  # more than all are refused by their number
    if "rotary_dim" in config.given or not (config.model_type or "rope_part" in config.given):
        n_dims = config.get("rotary_dim", n_dims)
    draft.options["rope_pairs"] = config.need("rope_pairs", fixed.get("rope_pairs"))
    theta = config.need(
        "rope_theta", fixed.get("rope_theta") or _theta(buffers, n_dims) or (10000.0 if config.model_type else None)
    )
    scaling, factors = config.rope_scaling(theta, n_dims, keys["context_length"], dialect.computes)
    keys |= {"rope.dimension_count": n_dims, "rope.freq_base": theta, **{f"rope.scaling.{k}": v for k, v in scaling.items()}}
    draft.tensors |= {name: constant(values) for name, values in factors.items()}


def _lay_out(draft: Draft, architecture: str, heads: tuple[int, int, int]) -> frozenset[str]:
    """Give the tensors the shapes and the order of rows that the architecture's files have; returns the roles of added biases.

    `heads`: n_head, n_kv_head, head_dim (of layers with attention, where others have none).
    """
    (n_head, n_kv_head, head_dim), tensors, n_layer = heads, draft.tensors, draft.keys["block_count"]
    if architecture == "gpt2":
        fuse_qkv(tensors, n_layer, n_head * head_dim, n_kv_head * head_dim)
    elif not draft.architecture:
        split_qkv(tensors, n_head * head_dim, n_kv_head * head_dim)
    if ARCHITECTURES[architecture].USUAL.get("rope_pairs") == "interleaved" and draft.options.get("rope_pairs") == "half":
        interleave(tensors, heads, draft.keys["rope.dimension_count"])
        draft.options["rope_pairs"] = "interleaved"
    return _fill_biases(tensors, n_layer) if architecture in NEED_BIASES else frozenset()


def _drop_leading_ones(tensors: Tensors) -> None:
    """Make a position table [1, n_ctx, n_embd] a matrix."""
    table = tensors.get("position_embd.weight")
    if table is not None and len(table.shape) == 3 and table.shape[0] == 1:
        tensors["position_embd.weight"] = table.changed(lambda values: values[0], *table.shape[1:])


def _join_heads(tensors: Tensors, path: Path) -> int | None:
    """Join heads or experts that are separate tensors ("role#0", "role#1", …); the number of query heads if those were."""
    groups: dict[str, dict[int, CanonicalTensor]] = {}
    for role in [role for role in tensors if "#" in role]:
        name, _, head = role.partition("#")
        groups.setdefault(name, {})[int(head)] = tensors.pop(role)
    for name, parts in groups.items():
        if sorted(parts) != list(range(len(parts))) or len({part.shape for part in parts.values()}) != 1 or name in tensors:
            raise FileError(path, f"the parts of {name} do not fit together", "the checkpoint is not complete")
        tensors[name] = (layered if "exps." in name else stacked)([parts[i] for i in range(len(parts))])
    return len(groups["blk.0.attn_q.weight"]) if "blk.0.attn_q.weight" in groups else None


def _name_feed_forward(tensors: Tensors, n_embd: int) -> None:
    """Split fused gates and ups, and name numbered matrices: of two, the first is up and the second down; of three, the first
    is the gate and the one with n_embd rows down.
    """
    for role in in_layers(tensors, "ffn_gate_up(_exps|_shexp)?.(weight|bias)"):
        part, axis = (rows_of_experts, 1) if "_exps" in role else (rows, 0)
        both = tensors.pop(role)
        n = both.shape[axis]
        tensors[role.replace("gate_up", "gate")] = part(both, 0, n // 2)
        tensors[role.replace("gate_up", "up")] = part(both, n // 2, n)
    if not (numbered := in_layers(tensors, r"ffn_[123]\.(weight|bias)")):
        return
    second = tensors.get("blk.0.ffn_2.weight")
    names = {"1": "up", "2": "down"}
    if "blk.0.ffn_3.weight" in tensors:
        second_is_down = second is not None and second.shape[0] == n_embd
        names = {"1": "gate", "2": "down", "3": "up"} if second_is_down else {"1": "gate", "2": "up", "3": "down"}
    for role in numbered:
        tensors[re.sub(r"ffn_([123])", lambda match: f"ffn_{names.get(match[1], match[1])}", role)] = tensors.pop(role)


def _digest(tensor: LazyTensor) -> bytes:
    """A hash of the values. Reads the tensor."""
    return blake2b(tensor.read()).digest()


def is_tied(head: LazyTensor, table: LazyTensor) -> bool:
    """Whether the output matrix equals the token table: the same view of the file, or a copy."""
    return head.shape == table.shape and (head.source == table.source or _digest(head) == _digest(table))


def has_own_head(tensors: Mapping[str, LazyTensor]) -> bool:
    """Tells minGPT from nanoGPT before flash attention, which saves masks, too, but ties its head; and nanochat from the
    modded-nanogpt of October 2024, whose names it took over.
    """
    ends = ("lm_head.weight", "wte.weight")
    head, table = (next((tensor for name, tensor in tensors.items() if name.endswith(end)), None) for end in ends)
    return head is not None and table is not None and not is_tied(head, table)


def _tie(
    tensors: Tensors, found: Mapping[str, LazyTensor], config: ModelConfig, fixed: Mapping[str, Any], notes: list[str]
) -> None:  # fmt: skip
    """Remove the output matrix if it equals the token table."""
    if "output.weight" not in found:
        if config.get("tied") is False:
            problem = "its configuration says that the output matrix is not tied, but there is none"
            raise FileError(config.path, problem, "add --set tied=true if it is")
        return
    head, table = found["output.weight"], found["token_embd.weight"]
    same = is_tied(head, table)
    if not same and config.model_type and config.get("tied", fixed.get("tied")):
        said = "the configuration ties the output matrix to the token table, but the file holds two"
        same = config.given.get("tied", False)
        notes.append(f"{said}: it was left out" if same else f"{said}: both are kept; --set tied=true leaves it out")
    if same:
        del tensors["output.weight"]
        if "output.bias" in tensors:
            tensors["token_embd.bias"] = tensors.pop("output.bias")


def _heads(tensors: Tensors, config: ModelConfig, n_embd: int, n_heads_found: int | None, path: Path) -> tuple[int, int, int]:
    """n_head, head_dim, n_kv_head, from the configuration and the shapes. Raises FileError if these contradict each other."""
    layer = next((role.partition(".attn_")[0] for role in in_layers(tensors, r"attn_(qkv|q)\.weight")), "")  # with attention
    fused, q, k = (tensors.get(f"{layer}.attn_{part}.weight") for part in ("qkv", "q", "k"))
    n_rows = fused.shape[0] if fused else q.shape[0] if q else n_embd
    head_dim = config.get("head_dim")
    n_head = n_heads_found or config.get("n_head")
    if not n_head and head_dim and q:
        n_head = q.shape[0] // head_dim
    if not n_head:
        n_head = config.need("n_head")
        return n_head, max(n_embd // n_head, 1), n_head
    if q and head_dim and config.model_type and n_head * head_dim != q.shape[0]:
        problem = f"its configuration says {n_head} heads of {head_dim}, the queries have {q.shape[0]} rows"
        raise FileError(path, problem, "name the configuration of these weights")
    width = q.shape[0] if q else n_head * (head_dim or max(n_embd // n_head, 1))
    if width % n_head:
        raise FileError(path, f"{n_head} heads do not divide the {width} rows of the queries", "correct it with --set n_head=N")
    kv_width = k.shape[0] if k else (n_rows - width) // 2
    head_dim = width // n_head
    if kv_width < head_dim or kv_width % head_dim:
        raise FileError(path, f"{kv_width} rows of keys do not fit heads {head_dim} wide", "correct it with --set n_head=N")
    return n_head, head_dim, kv_width // head_dim


def _norm(tensors: Tensors, config: ModelConfig, fixed: Mapping[str, Any], gated: bool) -> str:
    has_bias = "blk.0.attn_norm.bias" in tensors
    return config.need("norm", fixed.get("norm", "layer" if has_bias else "rms" if gated else None))


def _position(tensors: Tensors, buffers: Mapping[str, Any], config: ModelConfig, fixed: Mapping[str, Any]) -> str:
    """The kind of positions: by a table among the tensors, else the configuration, else tables among the buffers."""
    if "position_embd.weight" in tensors:
        return "learned"
    found = None
    if any(re.search(r"inv_freq|freqs|cos|sin|rope", name) for name in buffers):
        found = "rope"
    elif any(re.search(r"alibi|slopes", name) for name in buffers):
        found = "alibi"
    elif config.model_type == "llama" or config.raw("rope_theta", "rope_scaling", "rope_base") is not None:
        found = "rope"
    found = fixed.get("position", found)
    return config.need("position", None if found and config.denies("position", found) else found)


def _context(
    tensors: Tensors, buffers: Mapping[str, LazyTensor], config: ModelConfig, position: str, fixed: Mapping[str, Any]
) -> int:  # fmt: skip
    """The context length: rows of a learned position table, else the configuration's, else the size of a saved causal mask."""
    if position == "learned" and "position_embd.weight" in tensors:
        return tensors["position_embd.weight"].shape[0]
    masks = [
        t.shape[-1] for name, t in buffers.items() if len(t.shape) >= 2 and t.shape[-1] == t.shape[-2] and "alibi" not in name
    ]
    return config.need("n_ctx", masks[0] if masks else fixed.get("n_ctx"))


def _both_of_experts(tensors: Tensors) -> int | None:
    """Number of columns in experts that interleave gate and up, as gpt-oss does; None where these are apart."""
    if both := tensors.get("blk.0.ffn_both_exps.weight"):  # (experts, n_embd, 2 n_ff)
        return both.shape[-1]
    packed = tensors.get("blk.0.ffn_both_exps_blocks.weight")  # (experts, 2 n_ff, n_embd / 32, 16)
    return packed.shape[1] if packed else None


def _n_ff(tensors: Tensors, path: Path) -> int:
    if both := _both_of_experts(tensors):
        return both // 2
    up = tensors.get("blk.0.ffn_up.weight") or tensors.get("blk.0.ffn_up_exps.weight")
    if up is None:
        raise FileError(path, "no tensor has the role of blk.0.ffn_up.weight", "name the tensors in a file for --map")
    return up.shape[-2]


def _theta(buffers: Mapping[str, LazyTensor], n_dims: int) -> float | None:
    """The rotary base, from saved frequencies: frequency 1 is base^(-2/n)."""
    for name, tensor in buffers.items():
        if name.endswith("inv_freq") and tensor.shape == (n_dims // 2,) and n_dims >= 4:
            return float(round(float(tensor.read()[1]) ** (-n_dims / 2), 1))
    return None


def _max_bias(buffers: Mapping[str, LazyTensor], config: ModelConfig, n_head: int, path: Path) -> float:
    """ALiBi's largest slope. Raises FileError if saved slopes are not those of the paper."""
    largest = config.get("alibi_max_bias", 8.0)
    for name, tensor in buffers.items():
        if "slopes" in name and math.prod(tensor.shape) == n_head:
            slopes = np.abs(tensor.read().ravel())
            if not np.allclose(slopes, alibi_slopes(n_head, largest), rtol=1e-2):
                raise FileError(
                    path, f"the ALiBi slopes in {quoted(name)} are not the paper's", "pocketlm does not run other ones"
                )
    return largest


def _architecture(options: Mapping[str, Any], keys: Mapping[str, Any], tensors: Tensors) -> str:
    """The published architecture that computes this model; "pocketlm" if none does."""
    narrow = keys["attention.head_count"] * keys["attention.key_length"] == keys["embedding_length"]
    norm_bias = any(role.endswith("norm.bias") for role in tensors)
    head_bias = any(role in tensors for role in ("output.bias", "token_embd.bias"))
    bias = any(role.endswith(".bias") for role in tensors)
    conditions: dict[str, Callable[[], bool]] = {
        "gpt2": lambda: narrow and not head_bias,
        "llama": lambda: not norm_bias and not head_bias and keys["rope.dimension_count"] == keys["attention.key_length"],
        "refact": lambda: narrow and not bias and keys["attention.max_alibi_bias"] == 8.0,
    }
    for name, possible in conditions.items():
        usual = ARCHITECTURES[name].USUAL
        same = all(options[option] == usual[option] for option in ("norm", "position", "gated"))
        either_gelu = name == "gpt2" and options["activation"] == "gelu_erf"  # the file says which form it is
        if same and (either_gelu or options["activation"] == usual["activation"]) and possible():
            return name
    return "pocketlm"


def _fill_biases(tensors: Tensors, n_layer: int) -> frozenset[str]:
    """Add zeros for every missing bias; returns their names."""
    parts = ("attn_norm", "attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    names = ["output_norm", *(f"blk.{i}.{part}" for i in range(n_layer) for part in parts)]
    missing = [name for name in names if f"{name}.bias" not in tensors and f"{name}.weight" in tensors]
    zeros = {f"{name}.bias": constant(np.zeros(tensors[f"{name}.weight"].shape[0], np.float32)) for name in missing}
    tensors |= zeros
    return frozenset(zeros)


def _in_order(tensors: Tensors) -> Tensors:
    """The tensors in the order of the file: tables, then layer by layer, then the end."""

    def key(role: str) -> tuple[int, int, str]:
        if role.startswith("blk."):
            return 1, int(role.split(".")[1]), role
        return (0 if "embd" in role else 2), 0, role

    return {role: tensors[role] for role in sorted(tensors, key=key)}
