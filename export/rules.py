"""Which weight format a tensor gets: one table of what `--quant` may ask for, and the rules that llama.cpp follows.

In: a tensor's name and shape. Out: its format, and why it is not the one that was asked for. Knows no values.
The formats that files of mixed formats (q4_k_m, …) give to each tensor: llama.cpp, src/llama-quant.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from pocketlm.runtime.formats import FORMATS, Format
from pocketlm.runtime.hyper import Hyper

Rule = Callable[[int, Hyper], str | None]  # a layer's number -> the format there, None for that of the other matrices


def _in_half(format: str) -> Rule:
    """The format in the first and last eighth of the layers, and in every third between them."""

    def rule(layer: int, hyper: Hyper) -> str | None:
        n, eighth = hyper.n_layer, hyper.n_layer // 8
        return format if layer < eighth or layer >= 7 * n // 8 or (layer - eighth) % 3 == 2 else None

    return rule


class Quant(NamedTuple):
    """A row of the table: the format of the matrices, that of the output head, and ggml's number for such a file.

    `more`: a matrix's name within its layer -> the rule for its format. A fused attn_qkv follows attn_v's rule; experts without
    a rule of their own follow that of the plain matrix.
    """

    matrices: str
    head: str
    file_type: int
    more: Mapping[str, Rule] = {}


EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
QUANTS = {
    "f32": Quant("F32", "F32", 0),
    "f16": Quant("F16", "F16", 1),
    "bf16": Quant("BF16", "BF16", 32),
    "q8_0": Quant("Q8_0", "Q8_0", 7),
    "q4_0": Quant("Q4_0", "Q6_K", 2),
    "q4_1": Quant("Q4_1", "Q6_K", 3),
    "q5_0": Quant("Q5_0", "Q6_K", 8),
    "q5_1": Quant("Q5_1", "Q6_K", 9),
    "q4_k": Quant("Q4_K", "Q6_K", 14),
    "q5_k": Quant("Q5_K", "Q6_K", 16),
    "q6_k": Quant("Q6_K", "Q6_K", 18),
    "q5_k_m": Quant("Q5_K", "Q6_K", 17, {"attn_v": _in_half("Q6_K"), "ffn_down": _in_half("Q6_K")}),
    "q4_k_m": Quant("Q4_K", "Q6_K", 15, {"attn_v": _in_half("Q6_K"), "ffn_down": _in_half("Q6_K")}),
    "iq4_nl": Quant("IQ4_NL", "Q6_K", 25, {
        "attn_v": lambda layer, hyper: "Q5_K" if hyper.n_head >= 4 * hyper.n_kv_head else None,
        "ffn_down": lambda layer, hyper: "Q5_K" if layer < hyper.n_layer // 8 else None,
    }),
    "mxfp4": Quant("Q8_0", "Q8_0", 38, dict.fromkeys(EXPERTS, lambda layer, hyper: "MXFP4")),
    "q3_k_m": Quant("Q3_K", "Q6_K", 12, {
        "attn_v": lambda layer, hyper: "Q5_K" if layer < 2 else "Q4_K",
        "ffn_down": lambda layer, hyper: "Q5_K" if layer < hyper.n_layer // 16 else "Q4_K",
        "attn_output": lambda layer, hyper: "Q4_K",
    }),
}  # fmt: skip
# a format whose blocks do not divide the rows -> the next to try, with smaller blocks and as many bits or more
NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q4_0": "F16", "Q4_1": "F16", "Q5_0": "F16", "Q5_1": "F16",
            "Q8_0": "F16", "Q3_K": "IQ4_NL", "IQ4_NL": "F16", "MXFP4": "F16"}  # fmt: skip
# what mixes give to attention beside eight experts, as Mixtral has them: there it is a small part of the model
BESIDE_EIGHT = {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K"}
KEPT = ("position_embd.weight",)  # added to every token: as sensitive as a norm, and small
# F32 as well, though some are matrices: norms of heads, what chooses experts, biases of experts, and convolutions, which are
# small
F32_ENDS = ("_norm.weight", "ffn_gate_inp.weight", "shortconv.conv.weight", ".bias")
LARGEST = {"F32": float("inf"), "BF16": 3.3895e38, "F16": 65504.0}  # above it a weight becomes infinite; 65504 for the rest
SMALLEST = 2.0**-10  # a matrix whose largest weight is below it would get half-precision scales with few bits left


def head_name(names: object) -> str:
    """The tensor that is the output head: the token table if the head is tied."""
    return "output.weight" if "output.weight" in names else "token_embd.weight"  # type: ignore[operator]


def by_shape(name: str, shape: tuple[int, ...], quant: Quant, head: str, pure: bool, hyper: Hyper) -> tuple[Format, str]:
    """The format for a tensor of this name and shape, and, if it is not the table's, the reason (else "").

    `pure`: every matrix, the head too, gets `quant.matrices`.
    """
    if len(shape) < 2 or name in KEPT or name.endswith(F32_ENDS):
        return FORMATS["F32"], ""
    wanted = quant.matrices
    if not pure:
        wanted = quant.head if name == head else _more(name, quant, hyper) or wanted
    chosen = wanted
    while shape[-1] % FORMATS[chosen].block_size:
        chosen = NARROWER[chosen]
    if chosen == wanted:
        return FORMATS[chosen], ""
    return FORMATS[chosen], f"{wanted} needs rows of a multiple of {FORMATS[wanted].block_size} weights, these have {shape[-1]}"


def _more(name: str, quant: Quant, hyper: Hyper) -> str | None:
    parts = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if not parts or not quant.more:
        return None
    part = parts[2].replace("attn_qkv", "attn_v").removesuffix("_exps").removesuffix("_shexp")
    if part in BESIDE_EIGHT and hyper.settings.get("expert_count") == 8 and quant.matrices != "Q8_0":
        return BESIDE_EIGHT[part]
    rule = quant.more.get(parts[2]) or quant.more.get(part)
    return rule(int(parts[1]), hyper) if rule else None


def by_values(format: Format, largest: float) -> tuple[Format, str]:
    """The format for weights with magnitudes up to `largest`: `format`, or F32 and the reason."""
    if largest > LARGEST.get(format.name, 65504.0):
        return FORMATS["F32"], f"weights up to {largest:.3g} do not fit into {format.name}"
    if 0 < largest < SMALLEST and format.name not in ("F32", "BF16"):
        return FORMATS["F32"], f"weights of at most {largest:.3g} are too small for the scales of {format.name}"
    return format, ""
