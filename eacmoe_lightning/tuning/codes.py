"""How the codes of quantized weights are trained: through positions, and only where a code can change.

Codes are integers. So a code is trained through its `position` on the axis of codes, a number within half a step of
the code at the start: the code is the rounded position, and gradients ignore the rounding (straight-through estimator,
Bengio et al., arXiv 1308.3432). A position starts at the original weight, or as near to it as the code allows. So the
codes closest to a rounding boundary change first, and a code that GPTQ moved away from its weight starts at the
boundary on the weight's side.

AdamW moves a position by about one learning rate a step. So most positions cannot reach a boundary, and only those that
can are kept (`movable`): a list of positions with their places in the weight.

A stack of experts [E, O, I] is handled one expert at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.quantization.quantizers import QuantizedWeight

MARGIN = 0.499  # largest distance in steps between a code and its position at the start


def trains_weights(kinds: Collection[str]) -> bool:
    """Whether quantized weights change if these are trained: of router, norm, scale and code."""
    return "scale" in kinds or "code" in kinds


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
        place: int32 [n], their places in the flattened matrix, in ascending order; those of a stack expert by expert.
        starts: where the positions of each matrix begin; the last entry is n.
    """

    position: Tensor
    place: Tensor
    starts: list[int]

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Positions and places of one matrix; `expert` is 0 unless the weight is a stack."""
        chosen = slice(self.starts[expert], self.starts[expert + 1])
        return self.position[chosen], self.place[chosen]


def matrices(quantized: QuantizedWeight) -> list[slice]:
    """The indices of a weight's matrices: everything, or one expert of a stack at a time."""
    shape = quantized.codes.shape
    return [slice(e, e + 1) for e in range(shape[0])] if len(shape) == 3 else [slice(None)]


def _matrix(quantized: QuantizedWeight, rows: slice) -> QuantizedWeight:
    return quantized if rows == slice(None) else quantized.of_experts(rows)


def movable(weight: Tensor, quantized: QuantizedWeight, reach: float) -> Movable:
    """The codes whose positions are at most `reach` steps from a code beside theirs.

    Args:
        weight: [..., O, I], the original weight.
        quantized: its codes.
        reach: how far training can move a position: the sum of the learning rates of all its steps.
    """
    positions, places, starts = [], [], [0]
    for rows in matrices(quantized):
        part = _matrix(quantized, rows)
        position = start_positions(weight[rows], part)
        beyond = part.nearest(position + torch.sign(position - part.codes) * reach)
        place = (beyond != part.codes).flatten().nonzero().squeeze(1)
        positions.append(position.flatten()[place])
        places.append(place.int())
        starts.append(starts[-1] + len(place))
    return Movable(torch.cat(positions), torch.cat(places), starts)


def decode(
    quantized: QuantizedWeight, scale: Tensor | None, moved: Movable | None, dtype: torch.dtype, expert: int = 0
) -> Tensor:
    """A matrix [O, I] decoded from trained scales [..., O, G] and positions, differentiable.

    None means the stored scales or codes. `expert` is the matrix of a stack.
    """
    rows = matrices(quantized)[expert]
    matrix = _matrix(quantized, rows)
    if scale is not None:
        scale = scale[rows]
        scale = StraightThrough.apply(scale, scale.detach().half().float())  # float16, as stored
    codes = None if moved is None else _codes(matrix, *moved.of(expert))
    return matrix.dequantize(dtype, scale, codes).squeeze(0)


def _codes(quantized: QuantizedWeight, position: Tensor, place: Tensor) -> Tensor:
    """The codes of a matrix as float32, with the rounded positions in their places, differentiable."""
    codes = quantized.codes.float()
    codes = codes.flatten().index_put((place,), position).view(codes.shape)
    return StraightThrough.apply(codes, quantized.nearest(codes.detach()))


@torch.no_grad()
def codes_of(quantized: QuantizedWeight, moved: Movable) -> Tensor:
    """The trained codes [..., O, I], in the dtype in which they are stored."""
    codes = [_codes(_matrix(quantized, rows), *moved.of(e)) for e, rows in enumerate(matrices(quantized))]
    return torch.cat(codes).to(quantized.codes.dtype)
