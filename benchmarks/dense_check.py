"""Checks the dense weights that a tool returns: they lie on the requested grid, and nothing else has changed.

At 2 bits nearly every group lies on a symmetric grid with a scale of either sign, because its zero point is one of the
two codes in the middle. So bits are counted as a tool stores its grid, not from what is found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eacmoe_lightning.models.moe import MoEModel

SCALE_BITS = 16
TOLERANCE = 0.01  # steps of the grid that a value may lie beside it
ROWS = 1 << 16  # groups that are looked at in one piece


def inspect(
    moe: MoEModel,
    original: MoEModel,
    bits_of: Callable[[int, str], int],
    group_size: int,
    zero_point_bits: int | None,
    trains: bool,
) -> dict[str, float]:
    """The true bits per quantized weight, and what else differs.

    Args:
        moe, original: a tool's result and the model that it was made from.
        bits_of: bits by block and part (`attention`, `experts`).
        group_size: inputs that share a scale.
        zero_point_bits: bits in which a zero point is stored; None: as many as a code; 0: the grid is symmetric.
        trains: whether routers and norms may differ from the original's.

    Raises:
        RuntimeError: a weight is not on its grid, or something has changed that must not.
    """
    stored = total = zeroed = 0
    quantized = set()
    for block in moe.blocks:
        for name, (part, weight) in block.weights().items():
            bits = bits_of(block.index, part)
            on_grid, in_middle = look_at(weight, bits, group_size)
            if not on_grid or (zero_point_bits == 0 and not in_middle):
                kind = "symmetric grid" if on_grid else "grid"
                raise RuntimeError(f"{name} is not on a {kind} of {bits} bits in groups of {group_size}")
            quantized.add(name)
            total += weight.numel()
            stored += true_bits(weight.numel(), bits, group_size, bits if zero_point_bits is None else zero_point_bits)
            if part == "experts":
                zeroed += int((weight == 0).all(-1).all(-1).sum())
    figures = {"true_bits": stored / total, "zeroed_expert_matrices": zeroed}
    return figures | unlike(moe, original, quantized, trains)


def unlike(moe: MoEModel, original: MoEModel, quantized: set[str], trains: bool) -> dict[str, int]:
    """How many routers and norms differ from the original's; other tensors, such as embeddings, must not.

    Args:
        quantized: names of the weights that were quantized.
        trains: see `inspect`.
    """
    before = dict(original.model.named_parameters())
    routers = {id(parameter) for block in moe.moe_blocks for parameter in block.router.parameters()}
    norms = {id(parameter) for _, parameter in moe.norms()}
    changed: dict[str, list[str]] = {"routers": [], "norms": [], "others": []}
    for name, parameter in moe.model.named_parameters():
        if name not in quantized and not torch.equal(parameter, before[name]):
            kind = "routers" if id(parameter) in routers else "norms" if id(parameter) in norms else "others"
            changed[kind].append(name)
    forbidden = changed["others"] if trains else sum(changed.values(), [])
    if forbidden:
        raise RuntimeError(f"{len(forbidden)} tensors should be the original's and are not: {', '.join(forbidden[:3])}")
    return {f"changed_{kind}": len(names) for kind, names in changed.items()}


def true_bits(num_weights: int, bits: int, group_size: int, zero_point_bits: int) -> int:
    """Bits that weights take with a scale and a zero point for every group."""
    return num_weights * bits + num_weights // group_size * (SCALE_BITS + zero_point_bits)


def look_at(weight: Tensor, bits: int, group_size: int) -> tuple[bool, bool]:
    """Whether all groups of a weight [..., O, I] lie on a grid, and whether its zero point can be the middle code.

    A grid has 2^bits equal steps, and zero is one of its values.
    """
    groups = weight.detach().reshape(-1, group_size).float()
    both = [_look_at_groups(rows, 2**bits - 1) for rows in groups.split(ROWS)]
    return all(bool(on.all()) for on, _ in both), all(bool(middle.all()) for _, middle in both)


def _look_at_groups(groups: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """By group [R, g]: whether it is on a grid, and on one with the zero point in the middle (bool [R])."""
    gaps = groups.sort(-1).values.diff(dim=-1)
    largest = groups.abs().amax(-1, keepdim=True)
    smallest_gap = gaps.masked_fill(gaps <= largest * 1e-5, float("inf")).amin(-1, keepdim=True)
    smallest_gap = torch.where(smallest_gap.isinf(), largest, smallest_gap).clamp(min=1e-30)  # one value, or zeros
    on_grid, middle = torch.zeros(2, len(groups), dtype=torch.bool)
    for part in range(1, max_code + 1):  # the smallest gap may be several steps, where codes between are not in use
        left = (~on_grid).nonzero().flatten()
        codes = groups[left] * (part / smallest_gap[left])
        nearest = codes.round()
        lowest, highest = nearest.amin(-1).clamp(max=0), nearest.amax(-1).clamp(min=0)
        on_grid[left] = ((codes - nearest).abs().amax(-1) <= TOLERANCE) & (highest - lowest <= max_code)
        below, above = -(max_code + 1) // 2, max_code // 2
        in_middle = (lowest >= below) & (highest <= above)
        in_middle |= (lowest >= -above) & (highest <= -below)  # with a negative scale
        middle[left] = on_grid[left] & in_middle
    return on_grid, middle
