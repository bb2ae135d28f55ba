"""Bounds by budget: one bound for each block and expert, so that all records fit a budget of bytes with least damage.

    minimise    sum over blocks b, experts e of  c_b f_be r_be(bound)^2
    subject to  sum of bytes_be(bound) <= budget

f is the selection frequency and r the relative root mean square error that the codec leaves at a bound; r and bytes are
measured on a ladder of bounds. c_b, nats per token for a relative error of 1 in all experts of block b, is fitted to a
sensitivity study. `budget.optimizer` solves the problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LADDER = tuple(0.05 * 1.34**i for i in range(16))  # bounds relative to mean |w|: 0.05 to 4, where most weights are 0


def frequencies(load: Tensor) -> Tensor:
    """[E] tokens routed to each expert -> float64 [E] selection frequencies, with a token added to each to avoid 0."""
    smoothed = load.double() + 1
    return smoothed / smoothed.sum()


@dataclass(frozen=True)
class Sensitivity:
    """How sensitive a study's blocks are to errors.

    Attributes:
        nats: c_b by block index.
        explained: share of the variance of the losses that c_b f r^2 explains, over the fitted cells.
    """

    nats: dict[int, float]
    explained: float


def fit_sensitivity(cells: Sequence[tuple[int, float, float]]) -> Sensitivity:
    """Least squares through the origin in each block.

    Args:
        cells: of single blocks: block index, sum of f r^2 over the disturbed experts, nats lost.

    Returns:
        c_b for each block; one that is not positive is replaced by the smallest positive one.

    Raises:
        ValueError: no block lost anything, so there is nothing to fit.
    """
    fitted: dict[int, float] = {}
    for block in dict.fromkeys(block for block, _, _ in cells):
        points = [(x, y) for b, x, y in cells if b == block]
        fitted[block] = sum(x * y for x, y in points) / max(sum(x * x for x, _ in points), 1e-300)
    positive = [c for c in fitted.values() if c > 0]
    if not positive:
        raise ValueError("no block of the study lost anything: raise --bounds or --num_windows")
    nats = {block: c if c > 0 else min(positive) for block, c in fitted.items()}
    mean = sum(y for _, _, y in cells) / len(cells)
    residual = sum((y - nats[block] * x) ** 2 for block, x, y in cells)
    total = sum((y - mean) ** 2 for _, _, y in cells)
    return Sensitivity(nats, 1 - residual / total if total else 0.0)
