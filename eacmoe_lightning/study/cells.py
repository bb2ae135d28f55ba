"""The cells that a study measures, one for each choice of blocks, experts, kind of error and bound.

The same choice always has the same key. So a killed study can go on, and a study with more bounds reuses what an
earlier one measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs import CODECS, Bound
from eacmoe_lightning.study.disturb import NOISES

# MoE-Compression (arXiv 2509.07727), section 4: blocks 1-10, 9-18 and 17-26 of 26
DEPTHS = {"shallow": (0, 10 / 26), "middle": (8 / 26, 18 / 26), "deep": (16 / 26, 1)}
CHOICES = "`all`, `most-N`, `least-N` or `random-N`"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        blocks: a name of `block_groups`.
        experts: which experts of each of these blocks, see `choose_experts`.
        kind: a codec with a bound (`sz3`, `uniform`) or a noise (`gaussian-noise`, `uniform-noise`).
        bound: the largest error of a weight; for a noise its nominal size.
        seed: for noise and random experts; 0 if nothing is random.
    """

    blocks: str
    experts: str
    kind: str
    bound: Bound
    seed: int

    @property
    def key(self) -> str:
        return f"blocks {self.blocks}, experts {self.experts}, {self.kind} {self.bound.mode} {self.bound.value:g}" + (
            f", seed {self.seed}" if self.is_random else ""
        )

    @property
    def is_random(self) -> bool:
        return self.kind in NOISES or self.experts.startswith("random")


def block_groups(selections: Iterable[str], moe_blocks: list[int]) -> dict[str, list[int]]:
    """Groups of blocks by name.

    Args:
        selections: `each` (every block alone), `depth` (shallow, middle and deep by relative depth, as the paper groups
            its 26 blocks), `all`, or blocks of the model by index: `3`, `0-2`, `0,5`.
        moe_blocks: indices of the blocks with experts.

    Raises:
        ValueError: a selection names no block with experts.
    """
    num, groups = len(moe_blocks), {}
    for selection in selections:
        if selection == "each":
            groups |= {str(block): [block] for block in moe_blocks}
        elif selection == "all":
            groups["all"] = list(moe_blocks)
        elif selection == "depth":
            for name, (start, end) in DEPTHS.items():
                inside = [block for i, block in enumerate(moe_blocks) if start < (i + 0.5) / num < end]
                if inside:
                    groups[name] = inside
        else:
            groups[selection] = _listed(selection, moe_blocks)
    return groups


def _listed(selection: str, moe_blocks: list[int]) -> list[int]:
    try:
        ends = [[int(end) for end in part.split("-")] for part in selection.split(",")]
        blocks = sorted({block for part in ends for block in range(part[0], part[-1] + 1)})
    except ValueError:
        blocks = []
    if not blocks or not set(blocks) <= set(moe_blocks):
        raise ValueError(
            f"{selection!r} (--blocks) is not `each`, `depth` or `all`, nor a list of blocks with experts such as "
            f"`0,2-3`; the blocks with experts are {moe_blocks}"
        )
    return blocks


def check_choice(choice: str) -> tuple[str, int]:
    """Splits a choice of experts into its rule and number.

    Raises:
        ValueError: there is no such choice.
    """
    rule, _, number = choice.partition("-")
    if choice == "all":
        return "all", 0
    if rule not in ("most", "least", "random") or not number.isdigit() or int(number) < 1:
        raise ValueError(f"{choice!r} (--experts) is not one of {CHOICES} with N at least 1")
    return rule, int(number)


def choose_experts(choice: str, load: Tensor, seed: int, block: int) -> list[int]:
    """The experts of one block: `all`, `most-N` and `least-N` selected, or `random-N`.

    Args:
        load: int64 [E], tokens routed to each expert; of experts with equal loads the first counts as more selected.
        seed, block: seed the random choice.
    """
    rule, number = check_choice(choice)
    num_experts = len(load)
    if number > num_experts:
        raise ValueError(f"{choice!r} (--experts) asks for {number} of {num_experts} experts")
    if rule == "all":
        return list(range(num_experts))
    if rule == "random":
        order = torch.randperm(num_experts, generator=torch.Generator().manual_seed(stable_seed(seed, block)))
    else:
        order = load.argsort(descending=True, stable=True)
        order = order.flip(0) if rule == "least" else order
    return sorted(order[:number].tolist())


def stable_seed(*parts: int | str) -> int:
    """A seed from numbers and names, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "little")


def plan(
    groups: dict[str, list[int]],
    experts: Iterable[str],
    kinds: Iterable[str],
    bounds: Iterable[Bound],
    seeds: Iterable[int],
) -> list[Cell]:
    """Every cell once, ordered by its first block, so that the blocks before it run only once.

    Raises:
        ValueError: there is no such kind or choice of experts.
    """
    cells: dict[str, Cell] = {}
    bounds, seeds, experts = list(bounds), list(seeds), list(experts)
    for kind in kinds:
        if kind not in NOISES and kind not in CODECS:
            raise ValueError(f"{kind!r} (--kinds) is not one of {', '.join((*NOISES, *CODECS))}")
    for choice in experts:
        check_choice(choice)
    for name in sorted(groups, key=lambda name: (groups[name][0], len(groups[name]))):
        for choice in experts:
            for kind in kinds:
                for bound in bounds:
                    for seed in seeds:
                        cell = Cell(name, choice, kind, bound, seed)
                        cells.setdefault(cell.key, cell)
    return list(cells.values())
