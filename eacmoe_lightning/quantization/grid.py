"""The grid that weights are rounded to: group-wise integer codes with a scale and a zero point.

A weight [O, I] is split along its inputs into G = I / group_size groups. Each row of each group has a `scale` (weight
units per step) and a `zero_point` (the code that decodes to 0):

    w ~ (code - zero_point) * scale,    code in 0 .. 2^bits - 1

All functions take any leading dimensions (experts): [..., O, I]. The experts of a stack may differ in bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

NUM_SHRINKS, MIN_SHRINK = 24, 0.45
SHRINKS = [1 - (1 - MIN_SHRINK) * i / (NUM_SHRINKS - 1) for i in range(NUM_SHRINKS)]  # factors of the range
CACHED = 1 << 17  # weights whose ranges a CPU searches at once, so that they stay in its caches
SCALE_FACTORS = (0.8, 0.87, 0.93, 1.0, 1.07, 1.14, 1.2)  # factors of the scale that the search of `gptq` tries
ZERO_OFFSETS = (0, -1, 1)  # offsets of the zero point that it tries
Bits = int | tuple[int, ...]  # of a weight, or of each expert of a stack [E, O, I]


@dataclass(frozen=True)
class Grid:
    """How a weight is rounded.

    Attributes:
        bits: 2 to 8.
        group_size: inputs that share a scale; must divide in_features and be a multiple of 8.
        symmetric: the zero point is the middle code; otherwise it is fitted.
        clip_search: choose the range of each group that gives the least (Hessian-weighted) squared error, instead of
            its minimum and maximum.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    clip_search: bool = True

    @property
    def max_code(self) -> int:
        return 2**self.bits - 1


@dataclass
class Quantized:
    """Integer codes with the scales and zero points that decode them."""

    codes: Tensor  # [..., O, I] uint8
    scale: Tensor  # [..., O, G] float16
    zero_point: Tensor  # [..., O, G] uint8
    bits: Bits

    FIELDS: ClassVar[tuple[str, ...]] = ("codes", "scale", "zero_point")

    @classmethod
    def empty(cls, shape: Sequence[int], grid: Grid, device: torch.device) -> Quantized:
        """Uninitialised codes, scales and zero points for a weight of this shape."""
        codes = torch.empty(shape, dtype=torch.uint8, device=device)
        scale = torch.empty(cls.scale_shape(shape, grid), dtype=torch.float16, device=device)
        return cls(codes, scale, torch.empty(scale.shape, dtype=torch.uint8, device=device), grid.bits)

    @staticmethod
    def scale_shape(shape: Sequence[int], grid: Grid) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // grid.group_size)

    @property
    def group_size(self) -> int:
        return self.codes.shape[-1] // self.scale.shape[-1]

    def of_experts(self, experts: list[int] | slice) -> Quantized:
        """Some of a stack's experts [E, O, I]; those of a slice are not copied."""
        chosen = range(len(self.codes))[experts] if isinstance(experts, slice) else experts
        bits = self.bits if isinstance(self.bits, int) else one_or_each([self.bits[e] for e in chosen])
        return Quantized(self.codes[experts], self.scale[experts], self.zero_point[experts], bits)

    def dequantize(
        self, dtype: torch.dtype = torch.float32, scale: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """The weight [..., O, I]; computed in float32 and rounded to `dtype` once.

        `scale` [..., O, G] and `codes` [..., O, I] replace the stored ones (while they are trained).
        """
        scale, codes = self.scale if scale is None else scale, self.codes if codes is None else codes
        steps = codes.unflatten(-1, (-1, self.group_size)).float() - self.zero_point[..., None].float()
        return (steps * scale[..., None].float()).flatten(-2).to(dtype)

    def with_scale(self, scale: Tensor) -> Quantized:
        """The same codes with trained scales, float16."""
        return replace(self, scale=scale)

    def positions(self, weight: Tensor) -> Tensor:
        """The positions of weights [..., O, I] on the axis of codes, float32."""
        groups = weight.float().unflatten(-1, (-1, self.group_size))
        return (groups / self.scale.float().unsqueeze(-1) + self.zero_point.float().unsqueeze(-1)).flatten(-2)

    def nearest(self, position: Tensor) -> Tensor:
        """The codes [..., O, I] nearest to positions, float32, within the range that each expert's bits allow."""
        if isinstance(self.bits, int):
            return position.round().clamp(0, 2**self.bits - 1)
        last = position.new_tensor([2**width - 1 for width in self.bits])[:, None, None]
        return torch.minimum(position.round().clamp(min=0), last)


def fit_scale(groups: Tensor, grid: Grid, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of groups of weights [..., g].

    Args:
        groups: float32 [..., g].
        importance: [..., g], broadcastable; weights the squared errors of `clip_search`, the Hessian's diagonal in
            GPTQ.

    Returns:
        scale, zero_point: float32 [...], the scale already rounded to float16.
    """
    if groups.device.type == "cpu" and groups.numel() > CACHED and groups.ndim > 1:
        dim = max(range(groups.ndim - 1), key=lambda d: groups.shape[d])
        halves = groups.tensor_split(2, dim)
        shares = (None, None) if importance is None else importance.expand(groups.shape).tensor_split(2, dim)
        fits = [fit_scale(half, grid, share) for half, share in zip(halves, shares, strict=True)]
        return torch.cat([scale for scale, _ in fits], dim), torch.cat([zero for _, zero in fits], dim)
    low, high = _range(groups)
    if not grid.clip_search:
        return _range_to_scale(low, high, grid)
    best_scale, best_zero = _range_to_scale(low, high, grid)
    best_error = rounding_error(groups, best_scale, best_zero, grid, importance)
    for shrink in SHRINKS[1:]:
        scale, zero = _range_to_scale(low * shrink, high * shrink, grid)
        error = rounding_error(groups, scale, zero, grid, importance)
        better = error < best_error
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_error = torch.where(better, error, best_error)
    return best_scale, best_zero


def _range(groups: Tensor) -> tuple[Tensor, Tensor]:
    return groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)  # zero is always on the grid


def ranges(groups: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zero points of all ranges that `fit_scale` tries, in the same order: [..., g] -> [..., C]."""
    shrinks, (low, high) = groups.new_tensor(SHRINKS), _range(groups)
    return _range_to_scale(low.unsqueeze(-1) * shrinks, high.unsqueeze(-1) * shrinks, grid)


def neighbours(scale: Tensor, zero_point: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Candidate scales and zero points around fitted ones, [...] -> [..., C]; the first is the fitted pair."""
    offsets = (0,) if grid.symmetric else ZERO_OFFSETS
    pairs = [(1.0, 0), *((f, o) for o in offsets for f in SCALE_FACTORS if (f, o) != (1.0, 0))]
    factor, offset = scale.new_tensor(pairs).unbind(-1)
    scales = (scale.unsqueeze(-1) * factor).half().float()
    scales = torch.where((scales > 0) & scales.isfinite(), scales, scale.unsqueeze(-1))
    return scales, (zero_point.unsqueeze(-1) + offset).clamp(0, grid.max_code)


def _range_to_scale(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / grid.max_code).half().float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # all zeros, or below float16's range
    if grid.symmetric:
        return scale, torch.full_like(scale, 2 ** (grid.bits - 1))
    return scale, (-low / scale).round().clamp(0, grid.max_code)


def rounding_error(groups: Tensor, scale: Tensor, zero: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """The squared error [...] of rounding groups [..., g], weighted by their importance [..., g]."""
    code = encode(groups, scale[..., None], zero[..., None], grid)
    error = ((code - zero[..., None]) * scale[..., None] - groups).square_()
    return (error if importance is None else error * importance).sum(-1)


def encode(weight: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, as float32; arguments broadcast."""
    return (weight / scale + zero_point).round_().clamp_(0, grid.max_code)


def round_to_nearest(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Quantized:
    """Rounds to nearest: the baseline without error compensation.

    Args:
        weight: [..., O, I].
        importance: [..., I], see `fit_scale`.
    """
    groups = weight.float().unflatten(-1, (-1, grid.group_size))  # [..., O, G, g]
    if importance is not None:
        importance = importance.unflatten(-1, (-1, grid.group_size)).unsqueeze(-3)  # [..., 1, G, g]
    scale, zero = fit_scale(groups, grid, importance)
    codes = encode(groups, scale[..., None], zero[..., None], grid).flatten(-2)
    return Quantized(codes.to(torch.uint8), scale.half(), zero.to(torch.uint8), grid.bits)


def one_or_each(bits: Sequence[int]) -> Bits:
    """The bits of all experts as one number if they are equal, else as a tuple."""
    return bits[0] if len(set(bits)) == 1 else tuple(bits)
