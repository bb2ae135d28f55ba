"""The least damage within a budget of bytes: one choice for each unit (an expert's bits, an expert's error bound).

    minimise    sum over units u of  damage_u(choice_u)
    subject to  sum of bytes_u(choice_u) <= budget

Only the budget couples the units, so a Lagrangian solves the problem: every unit starts at the smallest point of the
lower convex hull of its (bytes, damage) points, and steps along the hulls are bought in the order of damage saved per
byte. As long as every step fits the budget, the choice is optimal for its bytes. After that, cheaper steps of other
units fill the budget, until what is left is too little for any step.

With few units a step is a large part of the budget, and the steps that are left out cost more than the best choice
would. Then the problem is solved as a knapsack too: the best damage for each number of quanta of the budget, unit by
unit. A quantum is 1 / `QUANTA` of what lies between the smallest and the largest choice; bytes are rounded up to whole
quanta, so the budget holds.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

FEW = 1024  # units; with more of them a step is small beside the budget
QUANTA = 1 << 14


@dataclass(frozen=True)
class Point:
    """One choice of a unit, with its size and damage."""

    choice: Any
    nbytes: float
    damage: float


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


def allocate(points: Mapping[Hashable, Sequence[Point]], budget: float) -> dict[Hashable, Point]:
    """Chooses one point for each unit: the least damage within the budget.

    Args:
        points: possible choices by unit.
        budget: bytes for all units.

    Raises:
        ValueError: even the smallest points do not fit.
    """
    smallest = sum(min(point.nbytes for point in choices) for choices in points.values())
    if smallest > budget:
        raise ValueError(f"a budget of {budget:.0f} bytes is below {smallest:.0f}, the bytes of the smallest choices")
    chosen = _by_steps(points, budget)
    if len(points) > FEW:
        return chosen
    packed = _knapsack(points, budget)
    return min(chosen, packed, key=lambda choice: sum(point.damage for point in choice.values()))


def _by_steps(points: Mapping[Hashable, Sequence[Point]], budget: float) -> dict[Hashable, Point]:
    hulls = {key: lower_hull(choices) for key, choices in points.items()}
    at = {key: 0 for key in hulls}
    spent = sum(hull[0].nbytes for hull in hulls.values())
    order = {key: i for i, key in enumerate(hulls)}  # breaks ties by the order of `points`
    queue = [(-_gain(*hull[:2]), order[key], key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, _, key = heapq.heappop(queue)
        hull, i = hulls[key], at[key]
        price = hull[i + 1].nbytes - hull[i].nbytes
        if spent + price > budget:
            continue  # this unit stops here; a cheaper step of another may still fit
        spent, at[key] = spent + price, i + 1
        if i + 2 < len(hull):
            heapq.heappush(queue, (-_gain(hull[i + 1], hull[i + 2]), order[key], key))
    return {key: hull[at[key]] for key, hull in hulls.items()}


def _knapsack(points: Mapping[Hashable, Sequence[Point]], budget: float) -> dict[Hashable, Point]:
    """The best choice in whole quanta above the smallest sizes."""
    smallest = {key: min(choices, key=lambda p: (p.nbytes, p.damage)) for key, choices in points.items()}
    room = budget - sum(point.nbytes for point in smallest.values())
    most = sum(max(point.nbytes for point in choices) - smallest[key].nbytes for key, choices in points.items())
    quantum = max(min(room, most) / QUANTA, 1e-300)
    best = torch.zeros(QUANTA + 1, dtype=torch.float64)  # least damage of the units so far by quanta that may be used
    taken: dict[Hashable, torch.Tensor] = {}
    prices = {
        key: [math.ceil((point.nbytes - smallest[key].nbytes) / quantum - 1e-9) for point in choices]
        for key, choices in points.items()
    }
    for key, choices in points.items():
        options = torch.full((len(choices), QUANTA + 1), torch.inf, dtype=torch.float64)
        for row, (point, price) in enumerate(zip(choices, prices[key], strict=True)):
            if price <= QUANTA:
                options[row, price:] = best[: QUANTA + 1 - price] + point.damage
        best, taken[key] = options.min(dim=0)
    left, chosen = QUANTA, {}
    for key in reversed(points):
        row = int(taken[key][left])
        chosen[key] = points[key][row]
        left -= prices[key][row]
    return {key: chosen[key] for key in points}
