"""Bounds by budget: one bound for each block and expert, so that all records fit a budget of bytes with least damage.

    minimise    sum over blocks b, experts e of  c_b f_be r_be(bound)^2
    subject to  sum of bytes_be(bound) <= budget

f is the selection frequency and r the relative root mean square error that the codec leaves at a bound; r and bytes are
measured on a ladder of bounds. c_b, nats per token for a relative error of 1 in all experts of block b, is fitted to a
sensitivity study. Only the budget couples the experts, so a Lagrangian solves the problem: every expert starts at the
smallest point of the lower convex hull of its (bytes, damage) points, and steps along the hulls are bought in the order
of damage saved per byte. As long as every step fits the budget, the choice is optimal for its bytes. After that,
cheaper steps of other experts fill the budget, until what is left is too little for any step.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

LADDER = tuple(0.05 * 1.34**i for i in range(16))  # bounds relative to mean |w|: 0.05 to 4, where most weights are 0


@dataclass(frozen=True)
class Point:
    """One bound of one expert, with its size and damage."""

    bound: float
    nbytes: int
    damage: float


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


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points on the lower convex hull of damage over bytes, in order of growing bytes and falling damage."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.damage)):
        if hull and point.damage >= hull[-1].damage:
            continue  # neither smaller nor less damaged than the last
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
            hull.pop()
        if hull and hull[-1].nbytes == point.nbytes:
            hull.pop()
        hull.append(point)
    return hull


def _gain(a: Point, b: Point) -> float:
    """Damage saved per byte from a to b."""
    return (a.damage - b.damage) / max(b.nbytes - a.nbytes, 1e-300)


def allocate(points: Mapping[Hashable, Sequence[Point]], budget: int) -> dict[Hashable, Point]:
    """Chooses one point for each expert: the least damage within the budget.

    Args:
        points: measured points by expert.
        budget: bytes for all experts.

    Raises:
        ValueError: even the smallest points do not fit.
    """
    hulls = {key: lower_hull(measured) for key, measured in points.items()}
    at = {key: 0 for key in hulls}
    spent = sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise ValueError(f"a budget of {budget} bytes is below {spent}, the bytes that the largest bounds take")
    order = {key: i for i, key in enumerate(hulls)}  # breaks ties by the order of `points`
    queue = [(-_gain(*hull[:2]), order[key], key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, _, key = heapq.heappop(queue)
        hull, i = hulls[key], at[key]
        price = hull[i + 1].nbytes - hull[i].nbytes
        if spent + price > budget:
            continue  # this expert stops here; a cheaper step of another may still fit
        spent, at[key] = spent + price, i + 1
        if i + 2 < len(hull):
            heapq.heappush(queue, (-_gain(hull[i + 1], hull[i + 2]), order[key], key))
    return {key: hull[at[key]] for key, hull in hulls.items()}
