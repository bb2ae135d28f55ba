"""The size that a user asks for, in bits a weight or in gigabytes, and the allocation that has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from eacmoe_lightning import targets
from eacmoe_lightning.budget.allocation import Allocation, Allocator, possible_widths
from eacmoe_lightning.budget.measure import DROPS, keep_of, kept_of
from eacmoe_lightning.budget.rest import Rest
from eacmoe_lightning.budget.sensitivity import Sensitivity
from eacmoe_lightning.calibration.recipe import PARTS, Recipe, num_quantized
from eacmoe_lightning.exports.linears import original_of
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.target_rules import Target

AROUND = (0.9, 1.1)  # sizes beside the one that was asked for
CLOSE = 0.99  # of the size that was asked for: what comes out has at least this share
REUSED = "; what was measured serves all sizes: pass it as --model.sensitivity RUN/sensitivity"


@dataclass(frozen=True)
class SizeTarget:
    """A size: options of the command line.

    Attributes:
        bits: bits of a quantized weight, with its share of scales and zero points (--model.target_bits).
        gb: gigabytes (10^9 bytes) of the compressed directory, with everything in it (--model.target_gb).

    Raises:
        ValueError: both are given, or one is not positive.
    """

    bits: float | None = None
    gb: float | None = None

    def __post_init__(self) -> None:
        if self.bits is not None and self.gb is not None:
            raise ValueError("target_bits (--model.target_bits) and target_gb (--model.target_gb): pass one of them")
        for option, value in (("target_bits", self.bits), ("target_gb", self.gb)):
            if value is not None and not value > 0:
                raise ValueError(f"{option}={value} (--model.{option}) is not positive")

    def __bool__(self) -> bool:
        return self.bits is not None or self.gb is not None

    def nbytes(self, moe: MoEModel, rest: int) -> float:
        """Bytes for all quantized weights, if everything else in the directory takes `rest`."""
        return self.bits * num_quantized(moe) / 8 if self.gb is None else self.gb * 1e9 - rest

    def described(self, nbytes: float, moe: MoEModel, rest: int) -> str:
        """As an option, the size at which the quantized weights take this many bytes."""
        if self.gb is None:
            return f"--model.target_bits {8 * nbytes / num_quantized(moe):.4g}"
        return f"--model.target_gb {(nbytes + rest) / 1e9:.6g}"

    def check(self, allocator: Allocator, rest: int, largest: Allocator | None = None, is_bare: bool = True) -> float:
        """The bytes for the quantized weights; needs no sensitivities.

        Args:
            allocator: whose smallest choices count.
            largest: whose largest choices count, if others do.
            is_bare: whether no target says what it loads.

        Raises:
            ValueError: no allocation has this size; the message names the nearest size that can be had.
        """
        moe, wanted = allocator.moe, self.nbytes(allocator.moe, rest)
        asked = f"target_bits={self.bits}" if self.gb is None else f"target_gb={self.gb}"
        option = "--model.target_bits" if self.gb is None else "--model.target_gb"
        if wanted < allocator.smallest:
            least = self.described(allocator.smallest * 1.0005, moe, rest)  # rounded, it can be had
            ways = [f"{least} or more"]
            if not allocator.recipe.in_blocks:
                ways.append("a larger --model.group_size")
                if is_bare and not allocator.recipe.solver.any_rate:
                    ways.append("--model.quantizer lattice, which has rates down to 1.5 bits")
            if largest is None:  # experts are not dropped yet
                ways.append("--pruning.keep auto, which drops experts too")
            raise ValueError(f"{asked} ({option}) is below what the smallest widths take: pass {', or '.join(ways)}")
        largest = (largest or allocator).largest
        if wanted * CLOSE > largest:
            most = self.described(largest, moe, rest)
            raise ValueError(f"{asked} ({option}) is above what the largest widths take: pass {most} or less")
        return wanted


def allocator_of(
    recipe: Recipe,
    moe: MoEModel,
    rows: Sequence[Target],
    sensitivity: Sensitivity | None = None,
    kept: dict[int, list[int]] | None = None,
) -> Allocator:
    """An allocator for the widths and units that a target loads.

    Args:
        rows: of the target's formats, those that load it (`loading`); the first one counts. Empty: no target.
        kept: by block, the experts that stay; None: all.
    """
    widths = possible_widths(recipe)
    if not rows:
        granularity = "projection" if recipe.in_blocks else "expert"
        return Allocator(recipe, moe, sensitivity, granularity, widths, kept)
    if not recipe.in_blocks:
        loaded = {part: rows[0].widths(part, bool(recipe.symmetric)) for part in PARTS}
        widths = {part: [w for w in possible if w in loaded[part]] for part, possible in widths.items()}
    return Allocator(recipe, moe, sensitivity, rows[0].granularity, widths, kept)


def loading(recipe: Recipe, moe: MoEModel, rows: Sequence[Target], tensor_parallel: int = 1) -> list[Target]:
    """The rows of a target that load the smallest or the largest choices, with the overrides as they are.

    Args:
        rows: of the target's formats; empty: no target.
        tensor_parallel: number of devices that it splits each linear over.

    Raises:
        ValueError: there are rows and none does, so no width is the reason; the message gives the first row's.
    """
    refusals = [_refusal(recipe, moe, row, tensor_parallel) for row in rows]
    loaded = [row for row, refusal in zip(rows, refusals, strict=True) if refusal is None]
    if rows and not loaded:
        raise refusals[0]
    return loaded


def _refusal(recipe: Recipe, moe: MoEModel, row: Target, tensor_parallel: int) -> ValueError | None:
    """Why this row loads neither the smallest nor the largest choices; None: it loads one of them."""
    try:
        allocator = allocator_of(recipe, moe, [row])
    except ValueError as error:
        return error
    refusals = []
    for extreme in (min, max):
        widths = {key: extreme(point.choice for point in unit.points) for key, unit in allocator.units.items()}
        try:
            _choose([row], recipe, allocator.of(widths.__getitem__), moe, tensor_parallel)
        except ValueError as error:
            refusals.append(error)
    return refusals[0] if len(refusals) == 2 else None


def _choose(
    rows: Sequence[Target], recipe: Recipe, allocation: Allocation, moe: MoEModel, tensor_parallel: int
) -> None:
    """Raises ValueError if the target does not load this allocation."""
    grids = replace(recipe, overrides=allocation.overrides).grids(moe)
    targets.choose(list(rows), grids, original_of(moe), tensor_parallel)


@dataclass(frozen=True)
class BySize:
    """A choice of widths, and of experts, for a size.

    Args:
        target: the size.
        recipe, moe: see `Allocator`.
        rows: of the target's formats, those that load it (`loading`); empty: no target.
        rest: everything but the quantized weights.
        sensitivity: see `Allocator`; None: not measured yet, which is enough for `check`.
        tensor_parallel: number of devices that the target splits each linear over.
        pruning: whether experts are dropped too: a number of them, the same in every block, or with `keep=auto` the
            number among those measured with which pruning and the bits of what stays lose least together.
    """

    target: SizeTarget
    recipe: Recipe
    moe: MoEModel
    rows: Sequence[Target]
    rest: Rest
    sensitivity: Sensitivity | None = None
    tensor_parallel: int = 1
    pruning: PruningRule | None = None

    @property
    def rest_bytes(self) -> int:
        """Bytes of everything but the blocks' quantized weights; see `Rest.nbytes`."""
        return self.rest.nbytes(self.moe, self.recipe.outside(self.moe))

    def check(self) -> None:
        """Raises ValueError if no allocation has this size; needs no sensitivities."""
        smallest, largest = self._extremes()
        is_known = smallest.kept == largest.kept
        wanted = self.target.check(smallest, self.rest_bytes, None if is_known else largest, is_bare=not self.rows)
        if is_known:  # otherwise it depends on the experts that stay
            self._check_close(smallest.most_within(wanted))

    def _check_close(self, nbytes: float, more: str = "") -> None:
        """Raises ValueError, with `more` at its end, if these bytes are more than 1 % below the size."""
        rest = self.rest_bytes
        fixed = rest if self.target.gb else 0
        if nbytes + fixed < CLOSE * (self.target.nbytes(self.moe, rest) + fixed):
            nearest = self.target.described(nbytes * 1.0005, self.moe, rest)
            raise ValueError(
                "no choice of widths comes within 1 % of the size that was asked for: the nearest below it is "
                f"{nearest}{more}"
            )

    def _extremes(self) -> tuple[Allocator, Allocator]:
        """Of those experts that may stay, the ones with the fewest bytes, and the ones with the most.

        Without sensitivities any may, and overrides of single experts make some larger than others.
        """
        every = allocator_of(self.recipe, self.moe, self.rows)
        if self.pruning is None:
            return every, every
        is_free = self.pruning.keep == "auto"
        if self.sensitivity is not None:
            fewest = self.allocator(self._experts()[-1])
            return fewest, every if is_free else fewest
        lightest, heaviest = {}, {}
        for block in self.moe.moe_blocks:
            number = keep_of(block, max(DROPS)) if is_free else self.pruning.keep
            least, most = every.bytes_of_experts(block)
            lightest[block.index] = kept_of(block, [-nbytes for nbytes in least], number, self.pruning.criterion)
            heaviest[block.index] = kept_of(block, most, number, self.pruning.criterion)
        return self.allocator(lightest), every if is_free else self.allocator(heaviest)

    def allocator(self, kept: dict[int, list[int]] | None) -> Allocator:
        """The allocator for a choice of experts."""
        return allocator_of(self.recipe, self.moe, self.rows, self.sensitivity, kept)

    def allocate(self) -> Allocation:
        """The widths that have the size with the least damage.

        Raises:
            ValueError: no allocation has this size within 1 %, or the target does not load the one that does.
        """
        rest, choices, errors = self.rest_bytes, [], []
        for kept in self._experts():
            allocator = self.allocator(kept)
            try:
                allocation = allocator.allocate(self.target.check(allocator, rest, is_bare=not self.rows))
            except ValueError as error:
                errors.append(error)
                continue
            if kept:
                allocation = replace(allocation, kept=kept)
                lost = self.sensitivity.dropped(1 - allocation.keep / self.moe.num_experts)
                by_part = allocation.by_part | {"pruning": lost}
                allocation = replace(allocation, damage=allocation.damage + lost, by_part=by_part)
            choices.append(allocation)
        if not choices:
            raise errors[-1]
        allocation = min(choices, key=lambda choice: choice.damage)
        self._check_close(allocation.nbytes, REUSED)
        if self.rows:
            _choose(self.rows, self.recipe, allocation, self.moe, self.tensor_parallel)
        return allocation

    def around(self) -> str:
        """What somewhat smaller and larger models would lose, as a line for people."""
        lines = []
        for factor in AROUND:
            size = SizeTarget(*(value and value * factor for value in (self.target.bits, self.target.gb)))
            try:
                lines.append(f"{factor:.0%} of the size would lose {replace(self, target=size).allocate().damage:.4f}")
            except ValueError:
                lines.append(f"{factor:.0%} of the size cannot be had")
        return "; ".join(lines)

    def _experts(self) -> list[dict[int, list[int]] | None]:
        """What may stay, by block; None: all experts."""
        if self.pruning is None:
            return [None]
        blocks, is_free = self.moe.moe_blocks, self.pruning.keep == "auto"
        numbers = {keep_of(blocks[0], share) for share in self.sensitivity.drops} if is_free else {self.pruning.keep}
        scores = {block.index: self.sensitivity.blocks[block.index]["score"] for block in blocks}
        chosen = [
            {block.index: kept_of(block, scores[block.index], number, self.pruning.criterion) for block in blocks}
            for number in sorted(numbers, reverse=True)
        ]
        return [None, *chosen] if is_free else chosen
