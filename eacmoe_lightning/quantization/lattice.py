"""GPTQ on a lattice: whole multiples of a step, as many as it takes, for weights that are to be entropy-coded.

A group-wise grid spends the same bits on every weight, so its steps follow the largest weight of a group. Where codes
are entropy-coded, rare large codes cost little, and one step can do for a whole matrix: at equal size its error on
Gaussian weights is about half. Columns may have steps of their own. Rounding column j with step d_j adds p_j d_j^2 / 12
to GPTQ's loss (`gptq.py`, also for F and p) and takes log2(1 / d_j) bits, so all columns trade bits for loss at the
same rate if d_j is in proportion to p_j^-1/2: `column_steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eacmoe_lightning.quantization.entropy_coding import TABLE
from eacmoe_lightning.quantization.gptq import NOT_FINITE, damped_factor, in_order, output_error
from eacmoe_lightning.quantization.grid import Grid

CHUNK = 128  # columns whose errors are passed on together
LARGEST = 2047  # code: the entropy coder takes 4096 different ones
RATE_TOLERANCE, RATE_TRIES = 0.004, 5  # bits per weight between what is asked and what is stored; column loops for it


@dataclass
class Lattice:
    """Codes of which few are large: they are stored at their entropy (`packing.py`).

    Attributes:
        codes: int16 [..., O, I].
        scale: float16 [..., 1, G], weight units per code: G = 1 for a step of the whole matrix, I for one per column.
    """

    codes: Tensor
    scale: Tensor

    FIELDS: ClassVar[tuple[str, ...]] = ("codes", "scale")

    @classmethod
    def empty(cls, shape: Sequence[int], grid: Grid, device: torch.device) -> Lattice:
        """Codes and a step per matrix, to be filled in."""
        scale = torch.empty(*shape[:-2], 1, 1, dtype=torch.float16, device=device)
        return cls(torch.empty(shape, dtype=torch.int16, device=device), scale)

    @staticmethod
    def scale_shape(shape: Sequence[int], grid: Grid) -> tuple[int, ...]:
        return (*shape[:-2], 1, 1)

    @property
    def bits(self) -> float:
        """Stored bits per weight, with steps and tables: the mean over matrices."""
        return round(float(stored_bits(self).mean()), 4)

    @property
    def group_size(self) -> int:
        return self.codes.shape[-1] // self.scale.shape[-1]

    def of_experts(self, experts: list[int]) -> Lattice:
        """Some of a stack's experts [E, O, I]."""
        return Lattice(self.codes[experts], self.scale[experts])

    def dequantize(
        self, dtype: torch.dtype = torch.float32, scale: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """[..., O, I]; the product is formed in float32 and rounded to `dtype` once.

        `scale` and `codes` replace the stored ones (while they are trained).
        """
        scale, codes = self.scale if scale is None else scale, self.codes if codes is None else codes
        return (codes.float() * scale.float()).to(dtype)

    def positions(self, weight: Tensor) -> Tensor:
        """Where weights [..., O, I] lie on the axis of codes, float32."""
        return weight.float() / self.scale.float()

    def nearest(self, position: Tensor) -> Tensor:
        """The codes [..., O, I] of positions, float32."""
        return position.round().clamp(-LARGEST, LARGEST)


def factored(hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """F [S, I, I] and p [S, I] of Hessians [S, I, I]; inputs that are always zero count like the mean of others."""
    h = hessian.float().clone()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    diagonal.copy_(torch.where(diagonal > 0, diagonal, torch.where(mean > 0, mean, 1.0)))
    return damped_factor(h, damping)[:2]


def column_steps(pivot: Tensor) -> Tensor:
    """[S, I] steps in proportion to p^-1/2, of geometric mean 1: to be multiplied by a step."""
    root = pivot.rsqrt()
    return root / root.log().mean(-1, keepdim=True).exp()


def round_to_lattice(weight: Tensor, step: Tensor) -> Lattice:
    """The nearest codes of weights [S, O, I] with steps [S, I]."""
    step = _storable(step)
    return Lattice(_codes(weight.float() / step.unsqueeze(-2)), step.half().unsqueeze(-2))


def _storable(step: Tensor) -> Tensor:
    """Steps as float16 holds them, float32."""
    return step.half().float().clamp(min=2**-24)


def _codes(value: Tensor) -> Tensor:
    return value.round_().clamp_(-LARGEST, LARGEST).to(torch.int16)


def gptq_on_lattice(weight: Tensor, factor: Tensor, step: Tensor) -> Lattice:
    """GPTQ's column loop with nearest multiples of a step (arXiv 2210.17323, algorithm 1, without a grid's limits).

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
        chunk, own = value[:, :, start:end], factor[:, start:end, start:end]
        moved = torch.empty_like(chunk)
        for j in range(end - start):
            s = step[:, None, start + j]
            code = (chunk[:, :, j] / s).round_().clamp_(-LARGEST, LARGEST)
            moved[:, :, j] = code * s - w[:, :, start + j]
            chunk[:, :, j + 1 :] -= moved[:, :, j, None] * own[:, None, j, j + 1 :]
            codes[:, :, start + j] = code
        value[:, :, end:] -= moved @ factor[:, start:end, end:]
    return Lattice(codes.to(torch.int16), stored.half().unsqueeze(-2))


def solve(
    weight: Tensor, hessian: Tensor, bits: float, damping: float = 0.05, act_order: bool = True
) -> tuple[Lattice, Tensor]:
    """GPTQ on a lattice with one step per matrix, chosen such that the stored weight takes `bits`.

    Args:
        weight: [S, O, I], any float dtype; computed in float32 and not changed.
        hessian: [S, I, I] float32. Its scale does not matter.
        bits: per weight, with the step and the entropy coder's table.
        damping: added to the diagonal, as a share of its mean.
        act_order: visit inputs by falling diagonal of H.

    Returns:
        Codes, and their relative squared output error [S].

    Raises:
        ValueError: a weight or Hessian is not finite, or a Hessian cannot be factored.
    """
    weight, hessian = weight.detach().float(), hessian.float()
    if not (torch.isfinite(hessian).all() and torch.isfinite(weight).all()):
        raise ValueError(NOT_FINITE)
    order = hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)  # [S, I]
    w, h = weight, hessian
    if act_order:
        w, h = in_order(weight, order, 1), in_order(in_order(hessian, order, 0), order, 1)
    factor, _ = factored(h, damping)
    step = step_for_bits(w, w.new_ones(len(w), 1), bits, shared=False, tolerance=0.05)
    for _ in range(RATE_TRIES):  # error compensation makes codes a little larger than those rounded to nearest
        lattice = gptq_on_lattice(w, factor, step)
        excess = (stored_bits(lattice) - bits).to(step)[:, None]  # [S, 1]
        if float(excess.abs().max()) < RATE_TOLERANCE:
            break
        step = step * excess.exp2()  # a step twice as large takes one bit less
    if act_order:
        lattice.codes = in_order(lattice.codes, order.argsort(-1), 1)
    return lattice, output_error(weight, lattice, hessian)


def stored_bits(lattice: Lattice) -> Tensor:
    """Bits per weight of each matrix [..., O, I] on disk, float64 [S]: entropy of the codes, their table, the steps."""
    codes = lattice.codes.reshape(-1, *lattice.codes.shape[-2:])
    different = (codes.amax((-2, -1)) - codes.amin((-2, -1))).double() + 1
    coder = 16 * different + 8 * TABLE.size + 32  # its table, and the words that it rounds up to
    return entropy(codes) + (coder + 16 * lattice.scale.shape[-1]) / codes[0].numel()


def entropy(codes: Tensor) -> Tensor:
    """Bits per code of each matrix: integers [S, O, I] -> float64 [S], the order-0 entropy."""
    bits = []
    for matrix in codes.flatten(1).long():
        counts = torch.bincount(matrix - matrix.min()).double()
        share = counts[counts > 0] / counts.sum()
        bits.append(-(share * share.log2()).sum())
    return torch.stack(bits)


def step_for_bits(weight: Tensor, shape: Tensor, bits: float, shared: bool, tolerance: float = 0.002) -> Tensor:
    """[S, 1] factors of the steps `shape` [S, I] at which codes rounded to nearest have an entropy of `bits`.

    Args:
        shared: one factor for all S, such that the mean is `bits`; else each has `bits`.
    """
    size = weight.float().square().mean((-2, -1)).sqrt().clamp(min=2**-20)[:, None]  # of zeros: any step will do
    low, high = size.log2() - 12, size.log2() + 4  # exponents: more than 8 bits, and none
    if shared:
        low, high = low.amin(0, keepdim=True).expand_as(low), high.amax(0, keepdim=True).expand_as(high)
    while float((high - low).max()) > tolerance:
        middle = (low + high) / 2
        found = entropy(round_to_lattice(weight, shape * middle.exp2()).codes).to(size)[:, None]
        found = found.mean(0, keepdim=True).expand_as(found) if shared else found
        low, high = torch.where(found > bits, middle, low), torch.where(found > bits, high, middle)
    return ((low + high) / 2).exp2()
