"""Our codes in ggml's blocks of 32 weights, without rounding anything again.

ggml's simple types decode a weight as `scale * step`, with integer steps from a fixed range and a float16 scale for
each block. Our code minus its zero point is such a step, of either sign, and our groups are multiples of a block.
If the steps of a weight fit into the range, its values stay the same to the last bit.

    type   range         bits a weight   holds our
    Q4_0   -8 .. 7       4.5             2 and 3 bit, symmetric 4 bit
    Q5_0   -16 .. 15     5.5             asymmetric 4 bit, symmetric 5 bit
    Q8_0   -128 .. 127   8.5             5, 6 and 7 bit, symmetric 8 bit
    F16                  16              asymmetric 8 bit; groups that are not a multiple of 32 (rounded to float16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.quantization.grid import Quantized
from eacmoe_lightning.quantization.kquant import SIMPLE, TYPES, KQuant
from eacmoe_lightning.quantization.kquant_bytes import to_bytes
from eacmoe_lightning.weight_grids import WeightGrid

SMALLEST_FIRST = [TYPES[name] for name in ("Q4_0", "Q5_0", "Q8_0")]


def exact_type(grids: list[WeightGrid]) -> str:
    """The smallest ggml type that holds every value of a weight exactly, or F16.

    Args:
        grids: the grids of one weight: one, or several if its experts have different bits.
    """
    if grids[0].kquant:
        return grids[0].kquant
    ranges = [_steps(grid) for grid in grids]
    if all(grid.group_size % SIMPLE == 0 for grid in grids):
        for kind in SMALLEST_FIRST:
            if all(-kind.offset <= lowest and highest < kind.offset for lowest, highest in ranges):
                return kind.name
    return "F16"


def _steps(grid: WeightGrid) -> tuple[int, int]:
    """The lowest and the highest value of code minus zero point."""
    middle, highest = 2 ** (grid.bits - 1), 2**grid.bits - 1
    return (-middle, middle - 1) if grid.symmetric else (-highest, highest)


def to_blocks(quantized: Quantized, name: str) -> Tensor:
    """A weight as ggml stores it.

    Args:
        quantized: codes [..., O, I].
        name: a type from `exact_type`.

    Returns:
        uint8 [..., O, bytes of a row]; float16 [..., O, I] for F16.
    """
    if name == "F16":
        return quantized.dequantize(torch.float16)
    if quantized.codes.ndim == 3:  # one expert at a time: the steps take twice the memory of the codes
        parts = (quantized.codes, quantized.scale, quantized.zero_point)
        experts = zip(*parts, strict=True)
        return torch.stack([to_blocks(Quantized(*expert, quantized.bits), name) for expert in experts])
    groups = quantized.codes.unflatten(-1, (-1, quantized.group_size)).to(torch.int16)
    steps = (groups - quantized.zero_point[..., None]).flatten(-2)  # [O, I]
    scale = quantized.scale.repeat_interleave(quantized.group_size // SIMPLE, dim=-1)  # [O, blocks]
    return to_bytes(KQuant.simple((steps + TYPES[name].offset).to(torch.uint8), scale, name))
