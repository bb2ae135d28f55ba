"""How many bits each weight gets: one line for each of the paper's settings (EAC-MoE, section 5.1).

The paper quantizes attention to 4 bits and every expert to 2 or 3, and leaves the router in full precision. Its
averages 2.06, 2.54 and 3.03 are `bits=2`, `bits=[3, 2]` (the first half of the blocks at 3 bits) and `bits=3`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.head import output_head
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.quantization.gptq import DAMPING
from eacmoe_lightning.quantization.grid import Grid, Quantized
from eacmoe_lightning.quantization.kquant import SIMPLE, TYPES, KQuant, type_of
from eacmoe_lightning.quantization.lattice import RATE_TOLERANCE
from eacmoe_lightning.quantization.quantizers import GPTQ, KQuantGPTQ, LatticeGPTQ, Quantizer, RoundToNearest
from eacmoe_lightning.weight_grids import WeightGrid, by_bits

HEAD_BITS = range(4, 9)
MAX_UNFIT = 0.05  # largest share of a block's weights that stays unquantized because no group fits
PARTS = ("attention", "shared", "experts")
STREAM_BITS = 64 + 32  # of a matrix on a lattice: where its stream ends, and up to a word of padding
QUANTIZERS: dict[str, Callable[[Recipe], Quantizer | None]] = {  # by the names of `--model.quantizer`
    "gptq": lambda recipe: GPTQ(recipe.damping, recipe.act_order, recipe.scale_search, recipe.refine),
    "rtn": lambda recipe: RoundToNearest(),
    "lattice": lambda recipe: LatticeGPTQ(recipe.damping, recipe.act_order),
    "kquant": lambda recipe: KQuantGPTQ(recipe.damping, recipe.act_order, recipe.scale_search, recipe.refine),
    "none": lambda recipe: None,
}
SOME_EXPERTS = re.compile(r"experts(?:\.(0|[1-9]\d*))?(?:\.(gate_up_proj|up_proj|down_proj))?")  # keys of overrides


@dataclass(frozen=True)
class Recipe:
    """Bits, groups and quantizer of every weight, and the statistics they are solved from: command-line options.

    Args:
        bits: Bits of the routed experts. A list splits the blocks into equal consecutive parts: [3, 2] is the paper's
            2.54-bit setting.
        attention_bits: Bits of the attention projections.
        shared_expert_bits: Bits of shared experts and dense feed-forwards; null uses the bits of the block's experts.
        head_bits: Bits of the output head, 4 to 8, and so of an embedding that is tied to it; null leaves it as it is.
            It is rounded to nearest on the grid before the first block, whatever quantizer the blocks have. With kquant
            it is rounded to llama.cpp's blocks, and an embedding that is not tied to it as well.
        overrides: By block index, other bits for attention, shared or experts, or another group_size. Keys may also
            name one routed expert (experts.3), one projection of all (experts.down_proj, experts.gate_up_proj, or
            experts.up_proj in experts without gates) or both (experts.3.down_proj); the most specific key wins.
        group_size: Number of inputs that share a scale and a zero point.
        symmetric: Fix the zero point to the middle code; null does so only where the target needs it.
        clip_search: Choose the range of each group that gives the least error instead of its minimum and maximum.
        quantizer: gptq; rtn (round-to-nearest, the baseline); lattice (one step per matrix, codes stored at their
            entropy; bits are stored bits and may be fractional, groups do not apply); kquant (llama.cpp's blocks:
            Q2_K to Q6_K by the bits, Q8_0, and Q4_0, Q5_0 or Q8_0 where rows are no multiple of 256; groups are the
            types' own); none (weights stay as they are, for pruning alone); or the class path of a `Quantizer`. null
            takes kquant for the target llama.cpp, otherwise gptq.
        damping: Added to the Hessian's diagonal, as a share of its mean.
        act_order: Let GPTQ visit the groups, and the inputs within each, in order of falling importance.
        scale_search: Choose each group's scale and zero point by the loss that GPTQ's column loop adds.
        refine: Number of sweeps after GPTQ that refit scales by least squares and codes by coordinate descent.
        affinity: Weight an expert's tokens by their router weight (MoEQuant).
        min_expert_tokens: An expert that fewer calibration tokens reach is starved: it borrows the block's other tokens
            with the highest router logits for it, up to this number.
        solver_gib: Memory in GiB that may be used to solve experts of a block together.
    """

    bits: int | float | list[int | float] = 3
    attention_bits: int | float = 4
    shared_expert_bits: int | float | None = None
    head_bits: int | None = None
    overrides: dict[int, dict[str, int | float]] = field(default_factory=dict)
    group_size: int = 128
    symmetric: bool | None = None
    clip_search: bool = True
    quantizer: Literal["gptq", "rtn", "lattice", "kquant", "none"] | Quantizer | None = None
    damping: float = DAMPING
    act_order: bool = True
    scale_search: bool = True
    refine: int = 1
    affinity: bool = False
    min_expert_tokens: int = 256
    solver_gib: float = 2.0

    def __post_init__(self) -> None:
        if self.quantizer is None:
            object.__setattr__(self, "quantizer", "gptq")
        if not self.parts:
            raise ValueError("bits=[] (--model.bits) is empty: pass one number, or one for each part of the blocks")
        if isinstance(self.quantizer, str) and self.quantizer not in QUANTIZERS:
            raise ValueError(
                f"quantizer={self.quantizer!r} (--model.quantizer) is neither one of {', '.join(QUANTIZERS)} nor the "
                "class path of a Quantizer"
            )
        for name, bits in [("bits", b) for b in self.parts] + [("attention_bits", self.attention_bits)]:
            self._check_bits(name, bits)
        if self.shared_expert_bits is not None:
            self._check_bits("shared_expert_bits", self.shared_expert_bits)
        self._check_head_bits()
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
                f"affinity (--model.affinity) weights tokens in Hessians, which {self.quantizer_name} "
                "(--model.quantizer) does not use: leave it out"
            )
        for block, parts in self.overrides.items():
            for part, bits in parts.items():
                if part == "group_size":
                    _check_group_size(f"overrides.{block}.group_size", bits)
                elif self.in_blocks and re.match(r"experts\.\d", part):
                    raise ValueError(
                        f"overrides.{block}.{part} (--model.overrides): llama.cpp has one type for all experts of a "
                        "projection. Pass experts.down_proj or experts.gate_up_proj, or --model.quantizer gptq"
                    )
                elif part in PARTS or SOME_EXPERTS.fullmatch(part):
                    self._check_bits(f"overrides.{block}.{part}", bits)
                else:
                    raise ValueError(
                        f"overrides.{block}.{part} (--model.overrides) is not a key that can be overridden: pass "
                        f"{', '.join(PARTS)} or group_size, or keys like experts.3, experts.down_proj, "
                        "experts.3.down_proj"
                    )

    @property
    def parts(self) -> tuple[int | float, ...]:
        """Bits of the routed experts in each of the consecutive parts that the blocks are split into."""
        return tuple(self.bits) if isinstance(self.bits, list | tuple) else (self.bits,)

    @property
    def quantizes(self) -> bool:
        return self.quantizer != "none"

    @property
    def has_groups(self) -> bool:
        """Whether weights are quantized on the group-wise grid."""
        return self.solver is not None and self.solver.result is Quantized

    @property
    def in_blocks(self) -> bool:
        """Whether weights are quantized in llama.cpp's blocks."""
        return self.solver is not None and self.solver.result is KQuant

    @cached_property
    def solver(self) -> Quantizer | None:
        """The quantizer object; None if nothing is quantized."""
        return QUANTIZERS[self.quantizer](self) if isinstance(self.quantizer, str) else self.quantizer

    @property
    def quantizer_name(self) -> str:
        return self.quantizer if isinstance(self.quantizer, str) else type(self.quantizer).__name__

    def record(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "solver_gib"}
        if self.head_bits is None:
            del options["head_bits"]  # as in runs of versions without it
        if not isinstance(self.quantizer, str):
            options["quantizer"] = self.quantizer.settings()
        return options | {"bits": list(self.parts)}

    def uniform(self, width: int | float) -> Recipe:
        """This recipe with one width for every weight; group sizes of blocks stay."""
        groups = {
            b: {"group_size": parts["group_size"]} for b, parts in self.overrides.items() if "group_size" in parts
        }
        return replace(self, bits=width, attention_bits=width, shared_expert_bits=width, overrides=groups)

    def _check_bits(self, option: str, bits: int | float) -> None:
        if self.solver is not None and self.solver.any_rate:
            if not 1 <= bits <= 8:
                raise ValueError(f"{option}={bits} (--model.{option}) is not from 1 to 8 stored bits per weight")
            return
        widths = self.solver.widths if self.solver is not None else Quantizer.widths
        if not isinstance(bits, int) or not 2 <= bits <= 8:
            raise ValueError(f"{option}={bits} (--model.{option}) is not a whole number from 2 to 8")
        if bits not in widths:
            raise ValueError(
                f"{option}={bits} (--model.{option}) is not among the bits of {self.quantizer_name} "
                f"(--model.quantizer): {', '.join(map(str, widths))}"
            )

    def _check_head_bits(self) -> None:
        if self.head_bits is None:
            return
        if not isinstance(self.head_bits, int) or self.head_bits not in HEAD_BITS:
            raise ValueError(
                f"head_bits={self.head_bits} (--model.head_bits) is not a whole number from {HEAD_BITS[0]} to "
                f"{HEAD_BITS[-1]}"
            )
        if self.in_blocks:
            self._check_bits("head_bits", self.head_bits)
        if not self.quantizes:
            raise ValueError(
                f"head_bits={self.head_bits} (--model.head_bits) quantizes the output head, but quantizer=none "
                "(--model.quantizer) leaves all weights as they are: leave one of them out"
            )

    @property
    def head_grid(self) -> Grid:
        """The grid of the output head, with `head_bits`."""
        return Grid(self.head_bits, self.group_size, bool(self.symmetric), self.clip_search)

    def outside(self, moe: MoEModel) -> list[WeightGrid]:
        """The grids of weights outside the blocks: of the output head, and in llama.cpp's blocks of the embedding.

        They count as a block after the last one. Empty: both stay as they are.

        Raises:
            ValueError: their rows do not divide into groups, or the model has no head that can be quantized.
        """
        if self.head_bits is None:
            return []
        head, index = output_head(moe.model), len(moe.blocks)
        multiple = SIMPLE if self.in_blocks else self.group_size
        if head.shape[-1] % multiple:
            option = "llama.cpp's smallest block" if self.in_blocks else "--model.group_size"
            remedy = "" if self.in_blocks else ", or pass a group size that fits"
            raise ValueError(
                f"{head.weight}: in_features={head.shape[-1]} is not a multiple of {multiple} ({option}): leave out "
                f"--model.head_bits{remedy}"
            )
        if not self.in_blocks:
            grid = self.head_grid
            return [WeightGrid(head.weight, index, "head", head.shape, grid.bits, grid.group_size, grid.symmetric)]
        names = sorted({head.weight, head.embedding} - {None})
        shapes = [tuple(moe.model.get_parameter(name).shape) for name in names]
        return [
            _in_blocks(name, index, "head", shape, self.head_bits) for name, shape in zip(names, shapes, strict=True)
        ]

    def grid(self, block: int, num_blocks: int, part: str) -> Grid:
        """The grid of one part (`attention`, `shared`, `experts`) of one block."""
        expert_bits = self.parts[block * len(self.parts) // num_blocks]
        bits = {
            "experts": expert_bits,
            "shared": expert_bits if self.shared_expert_bits is None else self.shared_expert_bits,
            "attention": self.attention_bits,
        }[part]
        overrides = self.overrides.get(block, {})
        group_size, symmetric = overrides.get("group_size", self.group_size), bool(self.symmetric)
        return Grid(overrides.get(part, bits), group_size, symmetric, self.clip_search)

    def expert_bits(self, block: int, num_blocks: int, projection: str, numbers: Iterable[int]) -> tuple[int, ...]:
        """Bits of one projection of a block's routed experts, given by their numbers in the original."""
        bits, overrides = self.grid(block, num_blocks, "experts").bits, self.overrides.get(block, {})
        bits = overrides.get(f"experts.{projection}", bits)
        return tuple(overrides.get(f"experts.{e}.{projection}", overrides.get(f"experts.{e}", bits)) for e in numbers)

    def grids(self, moe: MoEModel) -> list[WeightGrid]:
        """The grid of every weight of a model; one entry for each bit width among a block's experts."""
        grids = []
        for block in moe.blocks:
            for name, (part, weight) in block.weights().items():
                grid, shape = self.grid(block.index, len(moe.blocks), part), tuple(weight.shape)
                bits, group_size = grid.bits, grid.group_size if self.has_groups else shape[-1]
                if part == "experts":
                    bits = self.expert_bits(block.index, len(moe.blocks), name.rpartition(".")[2], block.expert_numbers)
                if self.in_blocks:
                    width = min(bits) if part == "experts" else bits
                    grids.append(_in_blocks(name, block.index, part, shape, width))
                    continue
                common = dict(group_size=group_size, symmetric=grid.symmetric, on_lattice=not self.has_groups)
                for width, experts in by_bits(bits):
                    rows = shape if experts is None else (len(experts), *shape[1:])
                    grids.append(WeightGrid(name, block.index, part, rows, width, experts=experts, **common))
        return grids

    def check(self, moe: MoEModel, processes: int = 1) -> None:
        """Raises ValueError if this recipe does not fit the model or the number of processes; computes nothing.

        Linears whose inputs are no multiple of the group size stay unquantized if they are a small part of their block.
        """
        if self.quantizes and self.solver.needs == "inputs" and processes > 1:
            raise ValueError(
                f"{self.quantizer_name} (--model.quantizer) needs the inputs of a weight, which are not shared between "
                f"the {processes} processes of this run: use one process (--trainer.devices 1)"
            )
        unknown = [block for block in self.overrides if not 0 <= block < len(moe.blocks)]
        if unknown:
            raise ValueError(
                f"overrides (--model.overrides) name block {unknown[0]}, but the model has blocks 0 to "
                f"{len(moe.blocks) - 1}"
            )
        if len(self.parts) > len(moe.blocks):
            raise ValueError(
                f"bits (--model.bits) lists {len(self.parts)} parts, more than the model's {len(moe.blocks)} blocks"
            )
        self._leave_unfit(moe)
        self.outside(moe)  # raises now
        for block in moe.blocks if self.quantizes else ():
            self._check_experts(block)
            for name, (part, weight) in block.weights().items():
                multiple, in_features = self._multiple(block, len(moe.blocks), part), weight.shape[-1]
                if in_features % multiple == 0:
                    continue
                if self.in_blocks:
                    raise ValueError(
                        f"{name}: in_features={in_features} is not a multiple of {SIMPLE}, llama.cpp's smallest block. "
                        "Use --model.quantizer gptq or lattice, and export with --format dense"
                    )
                fitting = max((g for g in (8, 16, 32, 64, 128, 256) if in_features % g == 0), default=None)
                remedy = "No group size fits: it has to be a multiple of 8, so use --model.quantizer lattice"
                if fitting is not None:
                    remedy = (
                        f"Pass {fitting} for all blocks, or for this one alone: "
                        f"--model.overrides '{{{block.index}: {{group_size: {fitting}}}}}'"
                    )
                raise ValueError(
                    f"{name}: in_features={in_features} is not a multiple of group_size={multiple} "
                    f"(--model.group_size). {remedy}"
                )

    def _multiple(self, block: Block, num_blocks: int, part: str) -> int:
        """A number of which the inputs of a weight must be a multiple."""
        if self.in_blocks:
            return SIMPLE
        return self.grid(block.index, num_blocks, part).group_size if self.has_groups else 1

    def _leave_unfit(self, moe: MoEModel) -> None:
        """Excludes the linears of small weight that no group of the recipe fits (`MAX_UNFIT`)."""
        for block in moe.blocks if self.quantizes else ():
            multiples = {name: self._multiple(block, len(moe.blocks), part) for name, part in block.linears.items()}
            unfit = [name for name, multiple in multiples.items() if block.linear(name).in_features % multiple]
            total = sum(weight.numel() for _, weight in block.weights().values())
            if sum(block.linear(name).weight.numel() for name in unfit) <= MAX_UNFIT * total:
                for name in unfit:
                    width = block.linear(name).in_features
                    block.leave(name, f"its {width} inputs are no multiple of the group size {multiples[name]}")

    def _check_experts(self, block: Block) -> None:
        """Raises ValueError if overrides name experts or projections that the block does not have."""
        for key in self.overrides.get(block.index, {}):
            if not (match := SOME_EXPERTS.fullmatch(key)):
                continue
            expert, projection = match.groups()
            option = f"overrides.{block.index}.{key} (--model.overrides)"
            if not block.is_moe:
                raise ValueError(f"{option}: block {block.index} has no routed experts")
            if expert is not None and int(expert) >= block.num_experts:
                raise ValueError(f"{option}: block {block.index} has experts 0 to {block.num_experts - 1}")
            if projection is not None and projection not in block.experts.projections:
                raise ValueError(f"{option}: the experts' projections are {' and '.join(block.experts.projections)}")


def _in_blocks(name: str, block: int, part: str, shape: tuple[int, ...], bits: int) -> WeightGrid:
    """The grid of a weight in llama.cpp's blocks."""
    kind = type_of(bits, shape[-1])
    symmetric = kind.grid.symmetric
    return WeightGrid(name, block, part, shape, kind.bits, kind.group, symmetric, kquant=kind.name)


def _check_group_size(option: str, group_size: int) -> None:
    if not isinstance(group_size, int) or group_size < 8 or group_size % 8:
        raise ValueError(f"{option}={group_size} (--model.{option}) is not a positive multiple of 8")


def stored_bits(grid: WeightGrid) -> float:
    """Bits that a weight takes in a compressed directory: its code, and its share of a float16 scale and a zero point.

    On a lattice they are the most: `bits` up to the tolerance of its rate, and what pads and ends each matrix's stream.
    """
    if grid.kquant:
        return TYPES[grid.kquant].true_bits
    if grid.on_lattice:
        return grid.bits + RATE_TOLERANCE + STREAM_BITS / prod(grid.shape[-2:])
    return grid.bits + 24 / grid.group_size


def num_quantized(moe: MoEModel) -> int:
    """Number of weights that are quantized: all but embeddings, routers, norms and biases."""
    return sum(weight.numel() for block in moe.blocks for _, weight in block.weights().values())


def nominal_bits(moe: MoEModel, recipe: Recipe) -> float:
    """Average bits over the quantized weights as the paper counts them, without scales and zero points."""
    if not recipe.quantizes:
        return 8.0 * moe.model.dtype.itemsize
    sizes = [(prod(grid.shape), grid.bits) for grid in recipe.grids(moe)]
    return sum(size * bits for size, bits in sizes) / sum(size for size, _ in sizes)
