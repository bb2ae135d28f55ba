"""GPTQ on a lattice: weights become unbounded integer multiples of a step, and these codes are entropy-coded.

A group-wise grid spends the same bits on every weight, so the largest weight of a group determines its step. With
entropy coding rare large codes cost little, and one step can serve a whole matrix: at equal size the error on Gaussian
weights is about half. Each column may also have its own step. Rounding column j with step d_j adds p_j d_j^2 / 12 to
GPTQ's loss (see `gptq.py`, also for F and p) and takes log2(1 / d_j) bits. So all columns trade bits for loss at the
same rate if d_j is proportional to p_j^-1/2: `column_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from eacmoe_lightning.quantization.entropy_coding import TABLE
from eacmoe_lightning.quantization.gptq import DAMPING, NotFinite, damped_factor, in_order, output_error
from eacmoe_lightning.quantization.grid import Grid

CHUNK = 128  # columns whose errors are passed on together
LARGEST = 2047  # largest absolute code: the entropy coder takes at most 4096 different codes
RATE_TOLERANCE = 0.004  # bits per weight by which the stored size may differ from the requested one
RATE_TRIES = 5  # largest number of column loops to get there


@dataclass
class Lattice:
    """Codes on a lattice, most of them small; they are stored at their entropy (`packing.py`).

    Attributes:
        codes: int16 [..., O, I].
        scale: float16 [..., 1, G], weight units per code; G = 1 for one step per matrix, G = I for one per column.
    """

    codes: Tensor
    scale: Tensor

    FIELDS: ClassVar[tuple[str, ...]] = ("codes", "scale")

    @classmethod
    def empty(cls, shape: Sequence[int], grid: Grid, device: torch.device) -> Lattice:
        """Uninitialised codes and one step per matrix."""
        scale = torch.empty(*shape[:-2], 1, 1, dtype=torch.float16, device=device)
        return cls(torch.empty(shape, dtype=torch.int16, device=device), scale)

    @staticmethod
    def scale_shape(shape: Sequence[int], grid: Grid) -> tuple[int, ...]:
        return (*shape[:-2], 1, 1)

    @property
    def bits(self) -> float:
        """Stored bits per weight including steps and tables, the mean over matrices."""
        return round(float(stored_bits(self).mean()), 4)

    @property
    def group_size(self) -> int:
        return self.codes.shape[-1] // self.scale.shape[-1]

    def of_experts(self, experts: list[int] | slice) -> Lattice:
        """Some of a stack's experts [E, O, I]; those of a slice are not copied."""
        return Lattice(self.codes[experts], self.scale[experts])

    def dequantize(
        self, dtype: torch.dtype = torch.float32, scale: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """The weight [..., O, I]; computed in float32 and rounded to `dtype` once.

        `scale` and `codes` replace the stored ones (while they are trained).
        """
        scale, codes = self.scale if scale is None else scale, self.codes if codes is None else codes
        return (codes.float() * scale.float()).to(dtype)

    def with_scale(self, scale: Tensor) -> Lattice:
        """The same codes with trained scales, float16."""
        return replace(self, scale=scale)

    def positions(self, weight: Tensor) -> Tensor:
        """The positions of weights [..., O, I] on the axis of codes, float32."""
        return weight.float() / self.scale.float()

    def nearest(self, position: Tensor) -> Tensor:
        """The codes [..., O, I] nearest to positions, float32."""
        return position.round().clamp(-LARGEST, LARGEST)


def factored(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """F [S, I, I] and p [S, I] of Hessians [S, I, I]; inputs that are always zero get the mean of the diagonal."""
    h = hessian.float().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, torch.where(mean > 0, mean, 1.0)))
    return damped_factor(h, damping)[:2]


def column_steps(pivot: Tensor) -> Tensor:
    """Relative steps [S, I] of the columns: proportional to p^-1/2, with geometric mean 1."""
    root = pivot.rsqrt()
    return root / root.log().mean(-1, keepdim=True).exp()


def round_to_lattice(weight: Tensor, step: Tensor) -> Lattice:
    """The nearest codes of weights [S, O, I] with steps [S, I]."""
    step = _storable(step)
    return Lattice(_codes(weight.float() / step.unsqueeze(-2)), step.half().unsqueeze(-2))


def _storable(step: Tensor) -> Tensor:
    """Steps rounded to float16, which is how they are stored; float32."""
    return step.half().float().clamp(min=2**-24)


def _codes(value: Tensor) -> Tensor:
    return value.round_().clamp_(-LARGEST, LARGEST).to(torch.int16)


def gptq_on_lattice(weight: Tensor, factor: Tensor, step: Tensor) -> Lattice:
    """GPTQ's column loop, rounding to the nearest multiple of a step (arXiv 2210.17323, algorithm 1; no code limits).

    Args:
        weight: [S, O, I], any float dtype; not changed.
        factor: F [S, I, I] of `factored`.
        step: [S, I], or [S, 1] for the whole matrix.
    """
    w, stored = weight.detach().float(), _storable(step)
    value, codes, columns = w.clone(), torch.empty_like(w), w.shape[-1]
    step = stored.expand(len(w), columns)
    for start in range(0, columns, CHUNK):
        end = min(start + CHUNK, columns)
        chunk, inner = value[:, :, start:end], factor[:, start:end, start:end]
        moved = torch.empty_like(chunk)
        for j in range(end - start):
            s = step[:, None, start + j]
            code = (chunk[:, :, j] / s).round_().clamp_(-LARGEST, LARGEST)
            moved[:, :, j] = code * s - w[:, :, start + j]
            chunk[:, :, j + 1 :] -= moved[:, :, j, None] * inner[:, None, j, j + 1 :]
            codes[:, :, start + j] = code
        value[:, :, end:] -= moved @ factor[:, start:end, end:]
    return Lattice(codes.to(torch.int16), stored.half().unsqueeze(-2))


def solve(
    weight: Tensor, hessian: Tensor, bits: float, damping: float = DAMPING, act_order: bool = True
) -> tuple[Lattice, Tensor]:
    """GPTQ on a lattice with one step per matrix, chosen so that the stored weight takes `bits`.

    Args:
        weight: [S, O, I], any float dtype; not changed. The arithmetic is float32.
        hessian: [S, I, I] float32. Its scale does not matter.
        bits: stored bits per weight, including the step and the entropy coder's table.
        damping: added to the diagonal, as a share of its mean.
        act_order: visit inputs by falling diagonal of H.

    Returns:
        The quantized weights, and their relative squared output error [S].

    Raises:
        NotFinite: a weight or Hessian is not finite.
        ValueError: a Hessian cannot be factored.
    """
    weight, hessian = weight.detach().float(), hessian.float()
    if not (torch.isfinite(hessian).all() and torch.isfinite(weight).all()):
        raise NotFinite
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)  # [S, I]
    w, h = weight, hessian
    if act_order:
        w, h = in_order(weight, order, 1), in_order(in_order(hessian, order, 0), order, 1)
    factor, _ = factored(h, damping)
    step = step_for_bits(w, w.new_ones(len(w), 1), bits, shared=False, tolerance=0.05)
    for _ in range(RATE_TRIES):  # error compensation makes codes a little larger than plain rounding does
        lattice = gptq_on_lattice(w, factor, step)
        excess = (stored_bits(lattice) - bits).to(step)[:, None]  # [S, 1]
        if float(excess.abs().max()) < RATE_TOLERANCE:
            break
        step = step * excess.exp2()  # doubling the step saves one bit
    if act_order:
        lattice.codes = in_order(lattice.codes, order.argsort(-1), 1)
    return lattice, output_error(weight, lattice, hessian)


def stored_bits(lattice: Lattice) -> Tensor:
    """Stored bits per weight of each matrix [..., O, I], float64 [S]: entropy of the codes, their table, the steps."""
    codes = lattice.codes.reshape(-1, *lattice.codes.shape[-2:])
    different = (codes.amax((-2, -1)) - codes.amin((-2, -1))).double() + 1
    coder = 16 * different + 8 * TABLE.size + 32  # bits of the table, and of rounding up to whole words
    return entropy(codes) + (coder + 16 * lattice.scale.shape[-1]) / codes[0].numel()


def entropy(codes: Tensor) -> Tensor:
    """The order-0 entropy of each matrix in bits per code: integers [S, O, I] -> float64 [S]."""
    bits = []
    for matrix in codes.flatten(1).long():
        counts = torch.bincount(matrix - matrix.min()).double()
        share = counts[counts > 0] / counts.sum()
        bits.append(-(share * share.log2()).sum())
    return torch.stack(bits)


def step_for_bits(weight: Tensor, shape: Tensor, bits: float, shared: bool, tolerance: float = 0.002) -> Tensor:
    """Factors [S, 1] of the steps `shape` [S, I] at which codes rounded to nearest have an entropy of `bits`.

    Args:
        shared: use one factor for all S matrices, so that their mean entropy is `bits`; otherwise each has `bits`.
    """
    size = weight.float().square().mean((-2, -1)).sqrt().clamp(min=2**-20)[:, None]  # for zeros any step will do
    low, high = size.log2() - 12, size.log2() + 4  # exponents of the step: above 8 bits, and 0 bits
    if shared:
        low, high = low.amin(0, keepdim=True).expand_as(low), high.amax(0, keepdim=True).expand_as(high)
    while float((high - low).max()) > tolerance:
        middle = (low + high) / 2
        rate = entropy(round_to_lattice(weight, shape * middle.exp2()).codes).to(size)[:, None]
        rate = rate.mean(0, keepdim=True).expand_as(rate) if shared else rate
        low, high = torch.where(rate > bits, middle, low), torch.where(rate > bits, high, middle)
    return ((low + high) / 2).exp2()
