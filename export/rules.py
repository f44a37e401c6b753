"""Which weight format a tensor gets: one table of what `--quant` may ask for, and the rules that llama.cpp follows.

In: a tensor's name and shape. Out: its format, and why it is not the one that was asked for. Knows no values.
"""

from __future__ import annotations

from typing import NamedTuple

from pocketlm.runtime.formats import FORMATS, Format


class Quant(NamedTuple):
    """A row of the table: the format of the matrices, that of the output head, and ggml's number for such a file."""

    matrices: str
    head: str
    file_type: int


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
}
# a format whose block does not divide the width -> the next to try: as many bits or more, smaller blocks
NARROWER = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q4_0": "F16", "Q4_1": "F16", "Q5_0": "F16", "Q5_1": "F16",
            "Q8_0": "F16"}  # fmt: skip
KEPT = ("position_embd.weight",)  # added to every token: as sensitive as a norm, and small
LARGEST = {"F32": float("inf"), "BF16": 3.3895e38, "F16": 65504.0}  # above it a weight becomes infinite; 65504 for the rest
SMALLEST = 2.0**-10  # a matrix whose largest weight is below it would get half-precision scales with few bits left


def head_name(names: object) -> str:
    """The tensor that is the output head: the token table where the head is tied."""
    return "output.weight" if "output.weight" in names else "token_embd.weight"  # type: ignore[operator]


def by_shape(name: str, shape: tuple[int, ...], quant: Quant, head: str, pure: bool) -> tuple[Format, str]:
    """The format for a tensor of this name and shape, and why it is not `quant.matrices` ("" where that is the rule).

    `pure`: the head gets the format of the other matrices.
    """
    if len(shape) < 2 or name in KEPT:
        return FORMATS["F32"], ""
    wanted = chosen = quant.head if name == head and not pure else quant.matrices
    while shape[-1] % FORMATS[chosen].block_size:
        chosen = NARROWER[chosen]
    if chosen == wanted:
        return FORMATS[chosen], ""
    return FORMATS[chosen], f"{wanted} needs rows of a multiple of {FORMATS[wanted].block_size} weights, these have {shape[-1]}"


def by_values(format: Format, largest: float) -> tuple[Format, str]:
    """The format where the weights' magnitudes go up to `largest`, and why it is not the one that came in."""
    if largest > LARGEST.get(format.name, 65504.0):
        return FORMATS["F32"], f"weights up to {largest:.3g} do not fit into {format.name}"
    if 0 < largest < SMALLEST and format.name not in ("F32", "BF16"):
        return FORMATS["F32"], f"weights of at most {largest:.3g} are too small for the scales of {format.name}"
    return format, ""
