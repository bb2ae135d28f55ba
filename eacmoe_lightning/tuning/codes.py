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
from itertools import pairwise

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


@dataclass
class Matrix:
    """A matrix in training.

    Attributes:
        quantized: its weights at the start of training, [O, I], of a stack [1, O, I].
        scale: its trained scales in their shape, float32; None if they are not trained.
        position, place: its entries of `Movable`; None if no codes are trained.
    """

    quantized: QuantizedWeight
    scale: Tensor | None = None
    position: Tensor | None = None
    place: Tensor | None = None

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I], differentiable with respect to scales and positions."""
        scale = self.scale
        if scale is not None:
            scale = StraightThrough.apply(scale, scale.detach().half().float())  # float16, as stored
        return self.quantized.dequantize(dtype, scale, self.codes()).squeeze(0)

    def codes(self) -> Tensor | None:
        """The codes as float32, with the rounded positions in their places, differentiable; None if not trained."""
        if self.position is None:
            return None
        codes = self.quantized.codes.float()
        codes = codes.flatten().index_put((self.place,), self.position).view(codes.shape)
        return StraightThrough.apply(codes, self.quantized.nearest(codes.detach()))


def in_training(quantized: QuantizedWeight, scale: Tensor | None, moved: Movable | None) -> list[Matrix]:
    """A weight's matrices, each with its share of the trained scales and positions, on the device of its codes.

    The weight is divided once for all matrices, so that the gradients are put together once.
    """
    rows, device = matrices(quantized), quantized.codes.device
    parts = [Matrix(_matrix(quantized, one)) for one in rows]
    if scale is not None:
        for part, own in zip(parts, scale.to(device).split(len(scale) if len(rows) == 1 else 1), strict=True):
            part.scale = own
    if moved is not None:
        sizes = [end - start for start, end in pairwise(moved.starts)]
        positions, places = moved.position.to(device).split(sizes), moved.place.to(device).split(sizes)
        for part, position, place in zip(parts, positions, places, strict=True):
            part.position, part.place = position, place
    return parts


@torch.no_grad()
def codes_of(quantized: QuantizedWeight, moved: Movable) -> Tensor:
    """The trained codes [..., O, I], in the dtype in which they are stored."""
    return torch.cat([part.codes() for part in in_training(quantized, None, moved)]).to(quantized.codes.dtype)
