"""Which weight gets how many bits: the paper's settings (EAC-MoE, section 5.1) as one line each.

The paper quantizes attention to 4 bits, every expert to 2 or 3, and leaves the router alone. Its averages 2.06,
2.54 and 3.03 are `bits=2`, `bits=[3, 2]` (first half of the blocks at 3) and `bits=3`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization.grid import Grid
from eacmoe_lightning.targets import WeightGrid, by_bits

PARTS = ("attention", "shared", "experts")
SOME_EXPERTS = re.compile(r"experts(?:\.(0|[1-9]\d*))?(?:\.(gate_up_proj|up_proj|down_proj))?")  # keys of overrides


@dataclass(frozen=True)
class Recipe:
    """Bits, groups and solver of every quantized weight.

    Attributes:
        bits: of the routed experts; a list splits the blocks into equal consecutive parts.
        attention_bits: of the attention projections.
        shared_bits: of shared experts and dense feed-forwards; None: the block's `bits`.
        overrides: per block index, bits for any of `attention`, `shared`, `experts`, or another `group_size`. Of the
            routed experts, `experts.3` is one expert, `experts.down_proj` one projection of all (the others:
            `gate_up_proj`, or `up_proj` without gates) and `experts.3.down_proj` both; whatever says more wins.
        group_size: inputs that share a scale.
        symmetric: middle code as zero point.
        clip_search: fit ranges by least error instead of minimum and maximum.
        quantizer: `gptq`, `rtn` (round-to-nearest, the baseline) or `none` (weights stay as they are).
        damping, act_order, scale_search, refine: see `gptq`.
        solver_gib: experts of a block are solved together as far as that fits in so much memory.
        affinity: weigh each token of an expert's Hessian by its router weight (MoEQuant).
        min_expert_tokens: an expert that fewer tokens reach is starved; it borrows the block's
            other tokens with the highest router logits for it, up to this number.
    """

    bits: tuple[int, ...] = (3,)
    attention_bits: int = 4
    shared_bits: int | None = None
    overrides: dict[int, dict[str, int]] = field(default_factory=dict)
    group_size: int = 128
    symmetric: bool = False
    clip_search: bool = True
    quantizer: str = "gptq"
    damping: float = 0.05
    act_order: bool = True
    scale_search: bool = True
    refine: int = 1
    affinity: bool = False
    min_expert_tokens: int = 256
    solver_gib: float = 2.0

    def __post_init__(self) -> None:
        if not self.bits:
            raise ValueError("bits=[] (--model.bits) is empty: pass a number, or one for each part of the blocks")
        for name, bits in [("bits", b) for b in self.bits] + [("attention_bits", self.attention_bits)]:
            _check_bits(name, bits)
        if self.shared_bits is not None:
            _check_bits("shared_expert_bits", self.shared_bits)
        if self.quantizer not in ("gptq", "rtn", "none"):
            raise ValueError(f"quantizer={self.quantizer!r} (--model.quantizer) is none of 'gptq', 'rtn', 'none'")
        _check_group_size("group_size", self.group_size)
        if not 0 < self.damping < 1:
            raise ValueError(f"damping={self.damping} (--model.damping) is not between 0 and 1")
        if self.refine < 0:
            raise ValueError(f"refine={self.refine} (--model.refine) is negative")
        if self.solver_gib <= 0:
            raise ValueError(f"solver_gib={self.solver_gib} (--model.solver_gib) is not positive")
        if self.min_expert_tokens < 1:
            raise ValueError(f"min_expert_tokens={self.min_expert_tokens} (--model.min_expert_tokens) is below 1")
        for block, parts in self.overrides.items():
            for part, bits in parts.items():
                if part == "group_size":
                    _check_group_size(f"overrides.{block}.group_size", bits)
                elif part in PARTS or SOME_EXPERTS.fullmatch(part):
                    _check_bits(f"overrides.{block}.{part}", bits)
                else:
                    raise ValueError(
                        f"overrides.{block}.{part} (--model.overrides) is none of {PARTS}, experts.3, "
                        "experts.down_proj, experts.3.down_proj or group_size"
                    )

    def grid(self, block: int, num_blocks: int, part: str) -> Grid:
        """The grid of one part (`attention`, `shared`, `experts`) of one block."""
        expert_bits = self.bits[block * len(self.bits) // num_blocks]
        bits = {
            "experts": expert_bits,
            "shared": expert_bits if self.shared_bits is None else self.shared_bits,
            "attention": self.attention_bits,
        }[part]
        own = self.overrides.get(block, {})
        return Grid(own.get(part, bits), own.get("group_size", self.group_size), self.symmetric, self.clip_search)

    def expert_bits(self, block: int, num_blocks: int, projection: str, numbers: Iterable[int]) -> tuple[int, ...]:
        """Bits of one projection of the routed experts of a block that have these numbers in the original."""
        bits, own = self.grid(block, num_blocks, "experts").bits, self.overrides.get(block, {})
        bits = own.get(f"experts.{projection}", bits)
        return tuple(own.get(f"experts.{e}.{projection}", own.get(f"experts.{e}", bits)) for e in numbers)

    def grids(self, moe: MoEModel) -> list[WeightGrid]:
        """How every weight of a model is going to be quantized, experts by their bits."""
        found = []
        for block in moe.blocks:
            for name, (part, weight) in block.weights().items():
                grid, shape = self.grid(block.index, len(moe.blocks), part), tuple(weight.shape)
                bits = grid.bits
                if part == "experts":
                    bits = self.expert_bits(block.index, len(moe.blocks), name.rpartition(".")[2], block.expert_numbers)
                for width, experts in by_bits(bits):
                    own = shape if experts is None else (len(experts), *shape[1:])
                    found.append(
                        WeightGrid(name, block.index, part, own, width, grid.group_size, self.symmetric, experts)
                    )
        return found

    def check(self, moe: MoEModel) -> None:
        """Raises ValueError, before anything is computed, for a model that this recipe does not fit."""
        unknown = [block for block in self.overrides if not 0 <= block < len(moe.blocks)]
        if unknown:
            raise ValueError(f"overrides name block {unknown[0]}, the model has {len(moe.blocks)} (--model.overrides)")
        if len(self.bits) > len(moe.blocks):
            raise ValueError(f"bits lists {len(self.bits)} parts for {len(moe.blocks)} blocks (--model.bits)")
        for block in moe.blocks if self.quantizer != "none" else ():
            self._check_experts(block)
            for name, (part, weight) in block.weights().items():
                group_size, in_features = self.grid(block.index, len(moe.blocks), part).group_size, weight.shape[-1]
                if in_features % group_size:
                    fitting = max((g for g in (8, 16, 32, 64, 128, 256) if in_features % g == 0), default=None)
                    raise ValueError(
                        f"{name}: in_features={in_features} is not a multiple of group_size={group_size} "
                        f"(--model.group_size); {fitting} would fit it, for all blocks or for this one: "
                        f"--model.overrides '{{{block.index}: {{group_size: {fitting}}}}}'"
                    )

    def _check_experts(self, block: Block) -> None:
        """Raises ValueError where overrides name experts or projections that the block has not."""
        for key in self.overrides.get(block.index, {}):
            if not (match := SOME_EXPERTS.fullmatch(key)):
                continue
            expert, projection = match.groups()
            said = f"overrides.{block.index}.{key} (--model.overrides)"
            if not block.is_moe:
                raise ValueError(f"{said}: block {block.index} has no routed experts")
            if expert is not None and int(expert) >= block.num_experts:
                raise ValueError(f"{said}: block {block.index} has {block.num_experts} experts, the first is 0")
            if projection is not None and projection not in block.experts.projections:
                raise ValueError(f"{said}: the experts' projections are {' and '.join(block.experts.projections)}")


def _check_bits(option: str, bits: int) -> None:
    if not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"{option}={bits} (--model.{option}): bits are whole numbers from 2 to 8")


def _check_group_size(option: str, group_size: int) -> None:
    if not isinstance(group_size, int) or group_size < 8 or group_size % 8:
        raise ValueError(f"{option}={group_size} (--model.{option}) is not a positive multiple of 8")


def num_quantized(moe: MoEModel) -> int:
    """Weights that are quantized: all but embeddings, routers, norms and biases."""
    return sum(weight.numel() for block in moe.blocks for _, weight in block.weights().values())


def nominal_bits(moe: MoEModel, recipe: Recipe) -> float:
    """Average bits as the paper counts them: over the quantized weights, without scales and zero points."""
    if recipe.quantizer == "none":
        return 8.0 * moe.model.dtype.itemsize
    total = weighted = 0
    for block in moe.blocks:
        for name, (part, weight) in block.weights().items():
            total += weight.numel()
            bits = [recipe.grid(block.index, len(moe.blocks), part).bits]
            if part == "experts":
                bits = recipe.expert_bits(block.index, len(moe.blocks), name.rpartition(".")[2], block.expert_numbers)
            weighted += weight.numel() * sum(bits) / len(bits)
    return weighted / total
