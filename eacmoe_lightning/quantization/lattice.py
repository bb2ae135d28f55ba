"""GPTQ on whole multiples of a step, as many as it takes: weights that are to be entropy-coded.

A group-wise grid spends the same bits on every weight, so its steps follow the largest weight of a group. Where codes
are entropy-coded, rare large codes cost little, and one step can do for a whole matrix: at equal size its error on
Gaussian weights is about half. Columns may have steps of their own. Rounding column j with step d_j adds p_j d_j^2 / 12
to GPTQ's loss (`gptq.py`, also for F and p) and takes log2(1 / d_j) bits, so all columns trade bits for loss at the
same rate if d_j is in proportion to p_j^-1/2: `column_steps`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.quantization.gptq import damped_factor

CHUNK = 128  # columns whose errors are passed on together


@dataclass
class Lattice:
    """Codes without limits.

    Attributes:
        codes: int16 [..., O, I].
        step: float32 [..., I], weight units per code of each column; every entry a float16 number.
    """

    codes: Tensor
    step: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[..., O, I]; the product is formed in float32 and rounded to `dtype` once."""
        return (self.codes.float() * self.step.unsqueeze(-2)).to(dtype)


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
    step = step.half().float().clamp(min=2**-24)
    return Lattice((weight.float() / step.unsqueeze(-2)).round_().clamp_(-32768, 32767).to(torch.int16), step)


def gptq_on_lattice(weight: Tensor, factor: Tensor, step: Tensor) -> Lattice:
    """GPTQ's column loop with nearest multiples of a step (arXiv 2210.17323, algorithm 1, without a grid's limits).

    Args:
        weight: [S, O, I], any float dtype; not changed.
        factor: F [S, I, I] of `factored`.
        step: [S, I].
    """
    w, step = weight.detach().float(), step.half().float().clamp(min=2**-24)
    value, codes, columns = w.clone(), torch.empty_like(w), w.shape[-1]
    for start in range(0, columns, CHUNK):
        end = min(start + CHUNK, columns)
        chunk, own = value[:, :, start:end], factor[:, start:end, start:end]
        moved = torch.empty_like(chunk)
        for j in range(end - start):
            s = step[:, None, start + j]
            code = (chunk[:, :, j] / s).round_().clamp_(-32768, 32767)
            moved[:, :, j] = code * s - w[:, :, start + j]
            chunk[:, :, j + 1 :] -= moved[:, :, j, None] * own[:, None, j, j + 1 :]
            codes[:, :, start + j] = code
        value[:, :, end:] -= moved @ factor[:, start:end, end:]
    return Lattice(codes.to(torch.int16), step)


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
    size = weight.float().square().mean((-2, -1)).sqrt()[:, None]
    low, high = size.log2() - 12, size.log2() + 4  # exponents: more than 8 bits, and none
    if shared:
        low, high = low.amin(0, keepdim=True).expand_as(low), high.amax(0, keepdim=True).expand_as(high)
    while float((high - low).max()) > tolerance:
        middle = (low + high) / 2
        found = entropy(round_to_lattice(weight, shape * middle.exp2()).codes).to(size)[:, None]
        found = found.mean(0, keepdim=True).expand_as(found) if shared else found
        low, high = torch.where(found > bits, middle, low), torch.where(found > bits, high, middle)
    return ((low + high) / 2).exp2()
