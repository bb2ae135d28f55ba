"""Bits by budget: a width for every unit of a model, so that all weights fit a number of bytes with least damage.

A unit is what may have a width of its own: attention and shared experts of a block, and of its routed experts what the
target reads (`Target.granularity`): each projection of each expert, each projection, or all of a block together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial, reduce
from math import prod
from operator import or_
from typing import Any

from eacmoe_lightning.budget.optimizer import FEW, Point, allocate
from eacmoe_lightning.budget.sensitivity import Sensitivity
from eacmoe_lightning.calibration.recipe import PARTS, Recipe, num_quantized, stored_bits
from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.target_rules import Granularity

RATES = (1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 5, 6, 7, 8)  # of quantizers that take any number of bits
TOGETHER: dict[Granularity, str] = {  # what has one width
    "projection": "the experts of a projection",
    "block": "the experts of a block",
    "model": "the experts of all blocks",
}
FINE = 1 << 20  # quanta of `Allocator.most_within`
Key = tuple[int | None, str]  # block (None: all), key of `Recipe.overrides`


@dataclass(frozen=True)
class Unit:
    """Weights that have the same width.

    Attributes:
        points: its choices; `choice` is the width.
        keys: the keys of `Recipe.overrides` by which its weights get it, each with its block.
    """

    points: list[Point]
    keys: list[tuple[int, str]]


@dataclass(frozen=True)
class Allocation:
    """A width for every weight.

    Attributes:
        overrides: for `Recipe.overrides`.
        nbytes: of all quantized weights with their scales and zero points.
        bits: the same per quantized weight of the original.
        damage: predicted nats of KL divergence per token.
        by_part: the predicted damage of attention, shared and routed experts, and that of `pruning`.
        kept: by block, the experts that stay; None: all.
    """

    overrides: dict[int, dict[str, int | float]]
    nbytes: float
    bits: float
    damage: float
    by_part: dict[str, float]
    kept: dict[int, list[int]] | None = None

    @property
    def keep(self) -> int | None:
        """The number of experts that every block keeps; None: all."""
        return len(next(iter(self.kept.values()))) if self.kept else None

    def described(self) -> str:
        """A line for the terminal."""
        parts = ", ".join(f"{part} {nats:.4f}" for part, nats in self.by_part.items() if nats)
        experts = f", {self.keep} experts in each block" if self.kept else ""
        return f"by size: {self.bits:.4f} bits a weight{experts}; predicted KL divergence {self.damage:.4f} ({parts})"

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "overrides": {str(block): keys for block, keys in self.overrides.items()}}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Allocation:
        """The allocation whose `record` was written to JSON."""
        numbered = {
            name: record[name] and {int(block): value for block, value in record[name].items()}
            for name in ("overrides", "kept")
        }
        return cls(**{field.name: record[field.name] for field in fields(cls)} | numbered)

    def applied(self, recipe: Recipe, pruning: PruningRule | None) -> tuple[Recipe, PruningRule | None]:
        """The recipe with these widths, and the rule with these experts; None if all stay."""
        recipe = replace(recipe, overrides=self.overrides)
        return recipe, replace(pruning, keep=self.keep, kept=self.kept) if self.kept else None


class Allocator:
    """Chooses widths for a model.

    Args:
        recipe: quantizer, groups, and overrides, which stay as they are.
        moe: the original.
        sensitivity: of this model; None: only sizes are known, and every damage is 0.
        granularity: see `target_rules.Granularity`.
        widths: possible bits by part.
        kept: by block, the experts that stay; the others take no bytes. None: all.

    Raises:
        ValueError: a part has no possible width, or an override splits what has one width.
    """

    def __init__(
        self,
        recipe: Recipe,
        moe: MoEModel,
        sensitivity: Sensitivity | None,
        granularity: Granularity = "expert",
        widths: dict[str, Sequence[int | float]] | None = None,
        kept: dict[int, list[int]] | None = None,
    ) -> None:
        self.recipe, self.moe, self.sensitivity, self.granularity = recipe, moe, sensitivity, granularity
        self.kept = kept or {}
        self.widths = widths or possible_widths(recipe)
        if none := [part for part, possible in self.widths.items() if not possible]:
            raise ValueError(f"the target (--model.target) loads no width that the quantizer has for {none[0]} weights")
        self.num_weights = num_quantized(moe)
        self._bits: dict[float, dict[str, float]] = {}
        self.units = self._units()

    @property
    def smallest(self) -> float:
        """Bytes of the smallest choices."""
        return sum(min(point.nbytes for point in unit.points) for unit in self.units.values())

    @property
    def largest(self) -> float:
        return sum(max(point.nbytes for point in unit.points) for unit in self.units.values())

    def bytes_of_experts(self, block: Block) -> tuple[list[float], list[float]]:
        """The least and the most bytes of each routed expert of a block; 0 where experts have no width of their own."""
        units = [
            [unit for p in block.experts.projections if (unit := self.units.get((block.index, f"experts.{e}.{p}")))]
            for e in range(block.num_experts)
        ]
        least, most = (
            [sum(extreme(point.nbytes for point in unit.points) for unit in of_expert) for of_expert in units]
            for extreme in (min, max)
        )
        return least, most

    def most_within(self, nbytes: float) -> float:
        """The most bytes within this number that a choice of widths takes, at most 0.1 % too high.

        Sums are reached in quanta, each a bit of a number. With many units a step is small, and all sizes can be had.
        """
        if len(self.units) > FEW:
            return nbytes
        quantum, reached = nbytes / FINE, 1
        for unit in self.units.values():
            prices = {int(point.nbytes // quantum) for point in unit.points}
            reached = reduce(or_, (reached << price for price in prices if price <= FINE)) & ((2 << FINE) - 1)
        return min((reached.bit_length() - 1 + len(self.units)) * quantum, nbytes)

    def allocate(self, nbytes: float) -> Allocation:
        """The least damage within this number of bytes for all quantized weights.

        Raises:
            ValueError: even the smallest choices take more.
        """
        return self._chosen(allocate({key: unit.points for key, unit in self.units.items()}, nbytes))

    def of(self, width_of: Callable[[Key], int | float]) -> Allocation:
        """The allocation that gives each unit, by its key, a width; fixed ones keep theirs."""
        chosen = {}
        for key, unit in self.units.items():
            width = width_of(key)
            chosen[key] = next((point for point in unit.points if point.choice == width), unit.points[0])
        return self._chosen(chosen)

    def _chosen(self, points: dict[Key, Point]) -> Allocation:
        overrides, by_part = defaultdict(dict), dict.fromkeys(PARTS, 0.0)
        for key, point in points.items():
            for block, name in self.units[key].keys:
                overrides[block][name] = point.choice
            by_part[key[1].partition(".")[0]] += point.damage
        for block, given in self.recipe.overrides.items():
            overrides[block] |= given
        nbytes = sum(point.nbytes for point in points.values())
        return Allocation(
            {
                block.index: _shortened(overrides[block.index], block, self._experts(block))
                for block in self.moe.blocks
                if block.index in overrides
            },
            nbytes, 8 * nbytes / self.num_weights, sum(by_part.values()), by_part,
        )  # fmt: skip

    # --- units ----------------------------------------------------------------------------------------------

    def _units(self) -> dict[Key, Unit]:
        single = self._single_units()
        if self.granularity == "expert":
            return single
        merged: dict[Key, list[tuple[Key, Unit]]] = defaultdict(list)
        for (block, name), unit in single.items():
            merged[self._group(block, name)].append(((block, name), unit))
        return {key: self._merged(units) for key, units in merged.items()}

    def _merged(self, units: list[tuple[Key, Unit]]) -> Unit:
        """One unit of several, whose points are the sums at each width.

        Raises:
            ValueError: an override gives some of them a width of their own.
        """
        by_width = [{point.choice: point for point in unit.points} for _, unit in units]
        if any(points.keys() != by_width[0].keys() for points in by_width):
            (block, key), width = next((k, width) for k, _ in units if (width := self._fixed(*k)) is not None)
            raise ValueError(
                f"--model.overrides: {key} of block {block} has {width} bits of its own, but "
                f"{TOGETHER[self.granularity]} get one width here (--model.target, --model.quantizer): give it to all "
                "of them, or leave it out"
            )
        points = [
            Point(w, sum(points[w].nbytes for points in by_width), sum(points[w].damage for points in by_width))
            for w in sorted(by_width[0])
        ]
        return Unit(points, [key for _, unit in units for key in unit.keys])

    def _group(self, block: int, name: str) -> Key:
        """The unit that a projection of an expert belongs to, or the other weights of a block."""
        part, *rest = name.split(".")
        if part != "experts":
            return block, name
        return (None if self.granularity == "model" else block), (
            f"experts.{rest[-1]}" if self.granularity == "projection" else "experts"
        )

    def _single_units(self) -> dict[Key, Unit]:
        """Units of the finest granularity."""
        units: dict[Key, Unit] = {}
        for block in self.moe.blocks:
            sizes: dict[str, dict[str, int]] = defaultdict(dict)  # by part and name, of each expert's matrix
            for name, (part, weight) in block.weights().items():
                sizes[part][name] = prod(weight.shape[-2:])
            for part in ("attention", "shared"):
                if part in sizes:
                    damage = partial(self._damage_of_part, block.index, part)
                    units[block.index, part] = self._unit(block.index, part, part, sizes[part], damage)
            of_experts = cache(partial(self._damage_of_experts, block.index))
            for name, numel in sizes["experts"].items():
                projection = name.rpartition(".")[2]
                for e in self._experts(block):

                    def damage(width: float, damages=of_experts, projection=projection, e=e) -> float:
                        return damages(width)[projection][e] if self.sensitivity else 0.0

                    key = f"experts.{e}.{projection}"
                    units[block.index, key] = self._unit(block.index, key, "experts", {name: numel}, damage)
        return units

    def _experts(self, block: Block) -> Sequence[int]:
        return self.kept.get(block.index, range(block.num_experts))

    def _damage_of_part(self, block: int, part: str, width: float) -> float:
        return self.sensitivity.part(block, part, width) if self.sensitivity else 0.0

    def _damage_of_experts(self, block: int, width: float) -> dict[str, list[float]]:
        return self.sensitivity.experts(block, width)

    def _unit(self, block: int, key: str, part: str, sizes: dict[str, int], damage: Callable[[float], float]) -> Unit:
        """A unit of the weights in `sizes`: by parameter name, their number."""
        fixed = self._fixed(block, key)
        widths = self.widths[part] if fixed is None else [fixed]
        nbytes = {w: sum(number * self._stored_bits(w)[name] / 8 for name, number in sizes.items()) for w in widths}
        return Unit([Point(w, nbytes[w], damage(w)) for w in widths], [(block, key)])

    def _fixed(self, block: int, key: str) -> int | float | None:
        """The width that the recipe's overrides give to a unit, as `Recipe.expert_bits` reads them."""
        given, parts = self.recipe.overrides.get(block, {}), key.split(".")
        names = [key, ".".join(parts[:2]), f"experts.{parts[2]}", "experts"] if len(parts) == 3 else [key]
        return next((given[name] for name in names if name in given), None)

    def _stored_bits(self, width: int | float) -> dict[str, float]:
        """By parameter name, the bits that a weight of this width takes with scales and zero points."""
        if width not in self._bits:
            self._bits[width] = {grid.name: stored_bits(grid) for grid in self.recipe.uniform(width).grids(self.moe)}
        return self._bits[width]


def possible_widths(recipe: Recipe) -> dict[str, Sequence[int | float]]:
    """The widths of a recipe's quantizer, for every part."""
    widths = RATES if recipe.solver.any_rate else recipe.solver.widths
    return dict.fromkeys(PARTS, widths)


def _shortened(keys: dict[str, int | float], block: Block, numbers: Sequence[int]) -> dict[str, int | float]:
    """The overrides of a block with one key where all routed experts, or all of a projection, have the same width."""
    if not block.is_moe:
        return keys
    experts = {
        projection: [keys.get(f"experts.{e}.{projection}") for e in numbers] for projection in block.experts.projections
    }
    if any(None in widths for widths in experts.values()):
        return keys
    short = {key: width for key, width in keys.items() if not key.startswith("experts")}
    if len({w for widths in experts.values() for w in widths}) == 1:
        return short | {"experts": experts[block.experts.up_name][0]}
    for projection, widths in experts.items():
        if len(set(widths)) == 1:
            short[f"experts.{projection}"] = widths[0]
        else:
            short |= {f"experts.{e}.{projection}": width for e, width in zip(numbers, widths, strict=True)}
    return short
