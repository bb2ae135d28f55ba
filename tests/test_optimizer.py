"""The least damage within a budget of bytes, against brute force on small problems and the Lagrangian bound."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eacmoe_lightning.budget.optimizer import Point, allocate, lower_hull

PROBLEM = st.lists(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40)), min_size=1, max_size=4), min_size=1, max_size=4
)


def points_of(numbers) -> dict[int, list[Point]]:
    return {
        expert: [Point(float(i), nbytes, float(damage)) for i, (nbytes, damage) in enumerate(pairs)]
        for expert, pairs in enumerate(numbers)
    }


@settings(max_examples=200, deadline=None)
@given(PROBLEM, st.integers(0, 60))
def test_no_choice_of_fewer_bytes_does_less_damage(numbers, more):
    """The choice fits the budget. No choice (brute force) that is smaller by the largest step does less damage."""
    points = points_of(numbers)
    hulls = [lower_hull(measured) for measured in points.values()]
    least = sum(hull[0].nbytes for hull in hulls)
    chosen = allocate(points, least + more)
    nbytes, damage = sum(p.nbytes for p in chosen.values()), sum(p.damage for p in chosen.values())
    assert nbytes <= least + more
    costs = [(sum(p.nbytes for p in c), sum(p.damage for p in c)) for c in product(*points.values())]
    # the Lagrangian bound: no choice lies below a line that supports all hulls
    for slope in {(a.damage - b.damage) / (b.nbytes - a.nbytes) for h in hulls for a, b in zip(h, h[1:], strict=False)}:
        floor = sum(min(p.damage + slope * p.nbytes for p in hull) for hull in hulls)
        assert min(d + slope * b for b, d in costs) == pytest.approx(floor)
    largest_step = max((b.nbytes - a.nbytes for h in hulls for a, b in zip(h, h[1:], strict=False)), default=0)
    best_of_fewer = min(d for b, d in costs if b <= max(nbytes - largest_step, least))
    assert damage <= best_of_fewer + 1e-9


def test_a_hand_made_budget():
    points = {
        "often": [Point(1.0, 10, 8.0), Point(0.5, 20, 2.0), Point(0.25, 30, 0.5)],
        "rare": [Point(1.0, 10, 1.0), Point(0.5, 20, 0.25), Point(0.25, 30, 0.06)],
    }
    bounds = {budget: [p.choice for p in allocate(points, budget).values()] for budget in (20, 29, 30, 40, 50, 60, 999)}
    assert bounds == {
        20: [1, 1],
        29: [1, 1],
        30: [0.5, 1],
        40: [0.25, 1],
        50: [0.25, 0.5],
        60: [0.25] * 2,
        999: [0.25] * 2,
    }
    with pytest.raises(ValueError, match="budget of 19 bytes is below 20"):
        allocate(points, 19)


def test_points_above_the_hull_are_never_chosen():
    points = [
        Point(4, 1, 9.0),
        Point(3, 2, 8.9),
        Point(2, 3, 3.0),
        Point(1, 3, 5.0),
        Point(0.5, 5, 3.0),
        Point(0.1, 6, 0),
    ]
    assert [p.choice for p in lower_hull(points)] == [4, 2, 0.1]


def test_on_the_log_law_every_expert_ends_at_the_same_damage():
    """With bytes = -n log2(bound) the Lagrangian's solution is c f bound^2 equal for all (reverse water-filling)."""
    weights = {"a": 1.0, "b": 4.0, "c": 64.0}
    ladder = [2 ** (-i / 8) for i in range(80)]
    points = {k: [Point(d, round(-1000 * torch.tensor(d).log2().item()), w * d * d) for d in ladder]
              for k, w in weights.items()}  # fmt: skip
    chosen = allocate(points, 12_000)
    damages = [p.damage for p in chosen.values()]
    assert max(damages) / min(damages) < 2 ** (2 / 8) * 1.01  # within one step of the ladder


@settings(max_examples=200, deadline=None)
@given(PROBLEM, st.integers(0, 60))
def test_few_units_get_the_best_choice(numbers, more):
    """Also where it lies above the hulls, which steps along them never reach."""
    points = points_of(numbers)
    least = sum(min(p.nbytes for p in choices) for choices in points.values())
    damage = sum(p.damage for p in allocate(points, least + more).values())
    best = min(sum(p.damage for p in c) for c in product(*points.values()) if sum(p.nbytes for p in c) <= least + more)
    assert damage == pytest.approx(best)


def test_many_units_are_close_to_the_best_choice():
    """48 blocks of 128 experts with two projections, beside the Lagrangian bound."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(12_288, generator=generator).mul(6).exp().tolist()
    points = {u: [Point(b, b * 100, w / 4**b) for b in range(2, 9)] for u, w in enumerate(weight)}
    budget = 12_288 * 250
    chosen = allocate(points, budget)
    nbytes, damage = sum(p.nbytes for p in chosen.values()), sum(p.damage for p in chosen.values())
    assert budget - 100 < nbytes <= budget
    bounds = []
    for slope in (10 ** (i / 20) for i in range(-120, 60)):
        bounds.append(sum(min(p.damage + slope * p.nbytes for p in ps) for ps in points.values()) - slope * budget)
    assert max(bounds) <= damage * 1.0001 and damage <= max(bounds) * 1.01
