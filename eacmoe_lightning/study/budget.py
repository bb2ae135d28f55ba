"""Bounds by budget: one bound for each block and expert, so that all records fit into given bytes at the least damage.

    minimise    sum over blocks b, experts e of  c_b f_be r_be(bound)^2
    subject to  sum of bytes_be(bound) <= budget

f is the selection frequency and r the relative root mean square error that the codec leaves at a bound; r and bytes are
measured on a ladder of bounds. c_b, nats per token for a relative error of 1 in all experts of block b, is fitted to a
sensitivity study. The problem separates by expert but for the budget, so a Lagrangian solves it: every expert stands
on the lower convex hull of its (bytes, damage) points, and steps down the hulls are bought by damage per byte. What is
bought is optimal for its bytes among all choices of hull points; less than one step of the budget is left over.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

LADDER = tuple(0.05 * 1.34**i for i in range(16))  # bounds relative to mean |w|: 0.05 to 4, where nothing is left


@dataclass(frozen=True)
class Point:
    """One bound of one expert."""

    bound: float
    nbytes: int
    damage: float


def frequencies(load: Tensor) -> Tensor:
    """[E] tokens routed to each expert -> float64 [E] selection frequencies; one more token each, so none is 0."""
    smoothed = load.double() + 1
    return smoothed / smoothed.sum()


@dataclass(frozen=True)
class Sensitivity:
    """What a study says of its blocks.

    Attributes:
        nats: c by block index.
        explained: the share of the variance of what was lost that c_b f r^2 explains, over the cells fitted.
    """

    nats: dict[int, float]
    explained: float


def fit_sensitivity(cells: Sequence[tuple[int, float, float]]) -> Sensitivity:
    """Least squares through the origin in each block.

    Args:
        cells: of single blocks: block index, the disturbed experts' frequencies times r^2 summed, nats lost.

    Returns:
        c_b; one that would not be positive is replaced by the smallest positive one.

    Raises:
        ValueError: no block lost anything, so there is nothing to go by.
    """
    fitted: dict[int, float] = {}
    for block in dict.fromkeys(block for block, _, _ in cells):
        own = [(x, y) for b, x, y in cells if b == block]
        fitted[block] = sum(x * y for x, y in own) / max(sum(x * x for x, _ in own), 1e-300)
    positive = [c for c in fitted.values() if c > 0]
    if not positive:
        raise ValueError("no block of the study lost anything (--bounds are too small, or --num_windows too few)")
    nats = {block: c if c > 0 else min(positive) for block, c in fitted.items()}
    mean = sum(y for _, _, y in cells) / len(cells)
    left = sum((y - nats[block] * x) ** 2 for block, x, y in cells)
    total = sum((y - mean) ** 2 for _, _, y in cells)
    return Sensitivity(nats, 1 - left / total if total else 0.0)


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The points on the lower convex hull of damage over bytes, by growing bytes and falling damage."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda p: (p.nbytes, p.damage)):
        if hull and point.damage >= hull[-1].damage:
            continue  # no fewer bytes, no less damage
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
            hull.pop()
        if hull and hull[-1].nbytes == point.nbytes:
            hull.pop()
        hull.append(point)
    return hull


def _gain(a: Point, b: Point) -> float:
    """Damage saved for each byte from a to b."""
    return (a.damage - b.damage) / max(b.nbytes - a.nbytes, 1e-300)


def allocate(points: Mapping[Hashable, Sequence[Point]], budget: int) -> dict[Hashable, Point]:
    """One point for each expert within the budget, at the least damage.

    Args:
        points: measured, by expert.
        budget: bytes for all.

    Raises:
        ValueError: even the smallest points do not fit.
    """
    hulls = {key: lower_hull(own) for key, own in points.items()}
    at = {key: 0 for key in hulls}
    spent = sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise ValueError(f"a budget of {budget} bytes is below {spent}, what the largest bounds of the ladder take")
    order = {key: i for i, key in enumerate(hulls)}  # ties in the order given
    queue = [(-_gain(*hull[:2]), order[key], key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, _, key = heapq.heappop(queue)
        hull, i = hulls[key], at[key]
        price = hull[i + 1].nbytes - hull[i].nbytes
        if spent + price > budget:
            continue  # this expert ends here; a cheaper step of another may still fit
        spent, at[key] = spent + price, i + 1
        if i + 2 < len(hull):
            heapq.heappush(queue, (-_gain(hull[i + 1], hull[i + 2]), order[key], key))
    return {key: hull[at[key]] for key, hull in hulls.items()}
