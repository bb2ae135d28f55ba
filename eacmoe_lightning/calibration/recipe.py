"""Which weight gets how many bits: the paper's settings (EAC-MoE, section 5.1) as one line each.

The paper quantizes attention to 4 bits, every expert to 2 or 3, and leaves the router alone. Its averages 2.06,
2.54 and 3.03 are `bits=2`, `bits=[3, 2]` (first half of the blocks at 3) and `bits=3`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization.grid import Grid, Quantized
from eacmoe_lightning.quantization.quantizers import GPTQ, LatticeGPTQ, Quantizer, RoundToNearest
from eacmoe_lightning.targets import WeightGrid, by_bits

PARTS = ("attention", "shared", "experts")
QUANTIZERS: dict[str, Callable[[Recipe], Quantizer | None]] = {  # by the names of `--model.quantizer`
    "gptq": lambda recipe: GPTQ(recipe.damping, recipe.act_order, recipe.scale_search, recipe.refine),
    "rtn": lambda recipe: RoundToNearest(),
    "lattice": lambda recipe: LatticeGPTQ(recipe.damping, recipe.act_order),
    "none": lambda recipe: None,
}
SOME_EXPERTS = re.compile(r"experts(?:\.(0|[1-9]\d*))?(?:\.(gate_up_proj|up_proj|down_proj))?")  # keys of overrides


@dataclass(frozen=True)
class Recipe:
    """Bits, groups and quantizer of every weight, and how its inputs are counted: options of the command line.

    Args:
        bits: Bits of the routed experts; a list splits the blocks into equal consecutive parts, so that [3, 2] is the
            paper's 2.54-bit setting.
        attention_bits: Bits of the attention projections.
        shared_expert_bits: Bits of shared experts and dense feed-forwards; null: those of the block's experts.
        overrides: Per block index, other bits for any of attention, shared, experts, or another group_size; of the
            routed experts also for one (experts.3), for one projection of all (experts.down_proj; the others are
            gate_up_proj, or up_proj without gates) or for both (experts.3.down_proj). Whatever says more wins.
        group_size: Inputs that share a scale and a zero point.
        symmetric: Fix the zero point to the middle code; null: where the target needs it.
        clip_search: Fit the range of each group by least error instead of its minimum and maximum.
        quantizer: gptq; rtn (round-to-nearest, the baseline); lattice (one step per matrix, codes stored at their
            entropy; bits are stored bits, any number, and groups play no part); none (weights stay as they are, for
            pruning alone); or the class path of a `Quantizer`.
        damping: Added to the Hessian's diagonal, as a share of its mean.
        act_order: GPTQ visits the groups, and the inputs within each, by falling importance (no index needed).
        scale_search: Choose each group's scale and zero point by the loss that GPTQ's own column loop adds.
        refine: Sweeps of scales by least squares and coordinate descent over the codes, after GPTQ.
        affinity: Weigh an expert's tokens by their router weight (MoEQuant).
        min_expert_tokens: An expert that fewer calibration tokens reach is starved: it borrows the block's other tokens
            with the highest router logits for it, up to this number.
        solver_gib: Experts of a block are solved together as far as that fits in so much memory (GiB).
    """

    bits: int | float | list[int | float] = 3
    attention_bits: int | float = 4
    shared_expert_bits: int | float | None = None
    overrides: dict[int, dict[str, int | float]] = field(default_factory=dict)
    group_size: int = 128
    symmetric: bool | None = None
    clip_search: bool = True
    quantizer: Literal["gptq", "rtn", "lattice", "none"] | Quantizer = "gptq"
    damping: float = 0.05
    act_order: bool = True
    scale_search: bool = True
    refine: int = 1
    affinity: bool = False
    min_expert_tokens: int = 256
    solver_gib: float = 2.0

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("bits=[] (--model.bits) is empty: pass a number, or one for each part of the blocks")
        if isinstance(self.quantizer, str) and self.quantizer not in QUANTIZERS:
            raise ValueError(
                f"quantizer={self.quantizer!r} (--model.quantizer) is none of {', '.join(QUANTIZERS)}, nor the class "
                "path of a Quantizer"
            )
        for name, bits in [("bits", b) for b in self.parts] + [("attention_bits", self.attention_bits)]:
            self._check_bits(name, bits)
        if self.shared_expert_bits is not None:
            self._check_bits("shared_expert_bits", self.shared_expert_bits)
        _check_group_size("group_size", self.group_size)
        if not 0 < self.damping < 1:
            raise ValueError(f"damping={self.damping} (--model.damping) is not between 0 and 1")
        if self.refine < 0:
            raise ValueError(f"refine={self.refine} (--model.refine) is negative")
        if self.solver_gib <= 0:
            raise ValueError(f"solver_gib={self.solver_gib} (--model.solver_gib) is not positive")
        if self.min_expert_tokens < 1:
            raise ValueError(f"min_expert_tokens={self.min_expert_tokens} (--model.min_expert_tokens) is below 1")
        if self.affinity and self.solver is not None and self.solver.needs != "hessian":
            raise ValueError(
                f"affinity (--model.affinity) weighs tokens in Hessians, and {self.quantizer_name} (--model.quantizer) "
                "uses none: leave it out"
            )
        for block, parts in self.overrides.items():
            for part, bits in parts.items():
                if part == "group_size":
                    _check_group_size(f"overrides.{block}.group_size", bits)
                elif part in PARTS or SOME_EXPERTS.fullmatch(part):
                    self._check_bits(f"overrides.{block}.{part}", bits)
                else:
                    raise ValueError(
                        f"overrides.{block}.{part} (--model.overrides) is none of {PARTS}, experts.3, "
                        "experts.down_proj, experts.3.down_proj or group_size"
                    )

    @property
    def parts(self) -> tuple[int | float, ...]:
        """Bits of the routed experts, for each of the consecutive parts that the blocks are split into."""
        return tuple(self.bits) if isinstance(self.bits, list | tuple) else (self.bits,)

    @property
    def quantizes(self) -> bool:
        return self.quantizer != "none"

    @property
    def has_groups(self) -> bool:
        """Whether weights are quantized on the group-wise grid."""
        return self.solver is not None and self.solver.result is Quantized

    @cached_property
    def solver(self) -> Quantizer | None:
        """The quantizer itself; None where nothing is quantized."""
        made = QUANTIZERS[self.quantizer] if isinstance(self.quantizer, str) else lambda recipe: recipe.quantizer
        return made(self)

    @property
    def quantizer_name(self) -> str:
        return self.quantizer if isinstance(self.quantizer, str) else type(self.quantizer).__name__

    def record(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON holds it."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "solver_gib"}
        if not isinstance(self.quantizer, str):
            options["quantizer"] = self.quantizer.settings()
        return options | {"bits": list(self.parts)}

    def _check_bits(self, option: str, bits: int | float) -> None:
        if self.solver is not None and self.solver.any_rate:
            if not 1 <= bits <= 8:
                raise ValueError(f"{option}={bits} (--model.{option}): stored bits of a weight are from 1 to 8")
        elif not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ValueError(f"{option}={bits} (--model.{option}): bits are whole numbers from 2 to 8")

    def grid(self, block: int, num_blocks: int, part: str) -> Grid:
        """The grid of one part (`attention`, `shared`, `experts`) of one block."""
        expert_bits = self.parts[block * len(self.parts) // num_blocks]
        bits = {
            "experts": expert_bits,
            "shared": expert_bits if self.shared_expert_bits is None else self.shared_expert_bits,
            "attention": self.attention_bits,
        }[part]
        own = self.overrides.get(block, {})
        group_size, symmetric = own.get("group_size", self.group_size), bool(self.symmetric)
        return Grid(own.get(part, bits), group_size, symmetric, self.clip_search)

    def expert_bits(self, block: int, num_blocks: int, projection: str, numbers: Iterable[int]) -> tuple[int, ...]:
        """Bits of one projection of the routed experts of a block that have these numbers in the original."""
        bits, own = self.grid(block, num_blocks, "experts").bits, self.overrides.get(block, {})
        bits = own.get(f"experts.{projection}", bits)
        return tuple(own.get(f"experts.{e}.{projection}", own.get(f"experts.{e}", bits)) for e in numbers)

    def grids(self, moe: MoEModel) -> list[WeightGrid]:
        """How every weight of a model is going to be quantized, experts by their bits."""
        grids = []
        for block in moe.blocks:
            for name, (part, weight) in block.weights().items():
                grid, shape = self.grid(block.index, len(moe.blocks), part), tuple(weight.shape)
                bits, group_size = grid.bits, grid.group_size if self.has_groups else shape[-1]
                if part == "experts":
                    bits = self.expert_bits(block.index, len(moe.blocks), name.rpartition(".")[2], block.expert_numbers)
                common = dict(group_size=group_size, symmetric=grid.symmetric, on_lattice=not self.has_groups)
                for width, experts in by_bits(bits):
                    rows = shape if experts is None else (len(experts), *shape[1:])
                    grids.append(WeightGrid(name, block.index, part, rows, width, experts=experts, **common))
        return grids

    def check(self, moe: MoEModel, processes: int = 1) -> None:
        """Raises ValueError, before anything is computed, for a model or processes that this recipe does not fit."""
        if self.quantizes and self.solver.needs == "inputs" and processes > 1:
            raise ValueError(
                f"{self.quantizer_name} (--model.quantizer) needs the inputs of a weight, which {processes} processes "
                "do not share: use one (--trainer.devices 1)"
            )
        unknown = [block for block in self.overrides if not 0 <= block < len(moe.blocks)]
        if unknown:
            raise ValueError(f"overrides name block {unknown[0]}, the model has {len(moe.blocks)} (--model.overrides)")
        if len(self.parts) > len(moe.blocks):
            raise ValueError(f"bits lists {len(self.parts)} parts for {len(moe.blocks)} blocks (--model.bits)")
        for block in moe.blocks if self.quantizes else ():
            self._check_experts(block)
            for name, (part, weight) in block.weights().items():
                group_size, in_features = self.grid(block.index, len(moe.blocks), part).group_size, weight.shape[-1]
                if self.has_groups and in_features % group_size:
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


def _check_group_size(option: str, group_size: int) -> None:
    if not isinstance(group_size, int) or group_size < 8 or group_size % 8:
        raise ValueError(f"{option}={group_size} (--model.{option}) is not a positive multiple of 8")


def num_quantized(moe: MoEModel) -> int:
    """Weights that are quantized: all but embeddings, routers, norms and biases."""
    return sum(weight.numel() for block in moe.blocks for _, weight in block.weights().values())


def nominal_bits(moe: MoEModel, recipe: Recipe) -> float:
    """Average bits as the paper counts them: over the quantized weights, without scales and zero points."""
    if not recipe.quantizes:
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
