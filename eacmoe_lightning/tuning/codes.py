"""How the codes of quantized weights are trained: through positions, and only where a code can change.

Codes are integers. So a code is trained through its `position` on the axis of codes, a number within half a step of
the code at the start: the code is the rounded position, and gradients ignore the rounding (straight-through estimator,
Bengio et al., arXiv 1308.3432). A position starts at the original weight, or as near to it as the code allows. So the
codes closest to a rounding boundary change first, and a code that GPTQ moved away from its weight starts at the
boundary on the weight's side.

AdamW moves a position by about one learning rate a step. So most positions cannot reach a boundary, and only those that
can are kept (`movable`): a list of positions with their places in the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from eacmoe_lightning.quantization.quantizers import QuantizedWeight

MARGIN = 0.499  # largest distance in steps between a code and its position at the start
DECODED_TOGETHER = 1 << 25  # weights of a stack that are decoded at a time


class StraightThrough(torch.autograd.Function):
    """Returns `rounded` and passes its gradient to `value` unchanged."""

    @staticmethod
    def forward(ctx, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def start_positions(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Positions [..., O, I] of the original weights, clamped to within `MARGIN` of their codes; float32."""
    position, codes = quantized.positions(weight), quantized.codes.float()
    return torch.minimum(torch.maximum(position, codes - MARGIN), codes + MARGIN)


@dataclass
class Movable:
    """The codes of one weight that training may change.

    Attributes:
        position: float32 [n], their positions, as a trained parameter.
        place: int32 or int64 [n], their places in each part of the flattened weight, in ascending order.
        starts: where the places of each part begin (`parts_of`); the last entry is n.
    """

    position: Tensor
    place: Tensor
    starts: list[int]


def movable(weight: Tensor, quantized: QuantizedWeight, reach: float) -> Movable:
    """The codes whose positions are at most `reach` steps from a code beside theirs.

    Args:
        weight: [..., O, I], the original weight.
        quantized: its codes.
        reach: how far training can move a position: the sum of the learning rates of all its steps.
    """
    positions, places, starts = [], [], [0]
    for rows in parts_of(quantized):
        part = _part(quantized, rows)
        position = start_positions(weight[rows], part)
        beyond = part.nearest(position + torch.sign(position - part.codes) * reach)
        place = (beyond != part.codes).flatten().nonzero().squeeze(1)
        positions.append(position.flatten()[place])
        places.append(place.int() if part.codes.numel() < 2**31 else place)
        starts.append(starts[-1] + len(place))
    return Movable(torch.cat(positions), torch.cat(places), starts)


def parts_of(quantized: QuantizedWeight) -> list[slice]:
    """The parts in which a weight is decoded: one for a matrix, some experts at a time for a stack [E, O, I]."""
    shape = quantized.codes.shape
    if len(shape) < 3:
        return [slice(None)]
    together = max(1, DECODED_TOGETHER // shape[1:].numel())
    return [slice(start, start + together) for start in range(0, shape[0], together)]


def _part(quantized: QuantizedWeight, rows: slice) -> QuantizedWeight:
    return quantized if rows == slice(None) else quantized.of_experts(rows)


def decode(quantized: QuantizedWeight, scale: Tensor | None, moved: Movable | None, dtype: torch.dtype) -> Tensor:
    """The weights [..., O, I] decoded from trained scales [..., O, G] and positions, differentiable.

    None means the stored scales or codes. Nothing but the arguments is kept for the backward pass: it decodes again.
    """
    decoded = []
    for number, rows in enumerate(parts_of(quantized)):
        taken = None if moved is None else slice(moved.starts[number], moved.starts[number + 1])
        arguments = (
            _part(quantized, rows),
            None if scale is None else scale[rows],
            None if moved is None else moved.position[taken],
            None if moved is None else moved.place[taken],
            dtype,
        )
        decoded.append(checkpoint(_decode, *arguments, use_reentrant=False, preserve_rng_state=False))
    return decoded[0] if len(decoded) == 1 else torch.cat(decoded)


def _decode(
    quantized: QuantizedWeight, scale: Tensor | None, position: Tensor | None, place: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if scale is not None:
        scale = StraightThrough.apply(scale, scale.detach().half().float())  # float16, as stored
    codes = None if position is None else _codes(quantized, position, place)
    return quantized.dequantize(dtype, scale, codes)


def _codes(quantized: QuantizedWeight, position: Tensor, place: Tensor) -> Tensor:
    """The codes [..., O, I] as float32, with the rounded positions in their places, differentiable."""
    codes = quantized.codes.float()
    codes = codes.flatten().index_put((place,), position).view(codes.shape)
    return StraightThrough.apply(codes, quantized.nearest(codes.detach()))


def codes_of(quantized: QuantizedWeight, moved: Movable) -> Tensor:
    """The trained codes [..., O, I], in the dtype in which they are stored."""
    codes = [
        _codes(_part(quantized, rows), moved.position[start:end].detach(), moved.place[start:end])
        for rows, (start, end) in zip(parts_of(quantized), pairwise(moved.starts), strict=True)
    ]
    return torch.cat(codes).to(quantized.codes.dtype)
