"""llama.cpp's blocks of weights: K-quants, and the simple types for rows that are no multiple of 256.

A row is divided into blocks. A block of a K-quant holds 256 weights in groups of 16 or 32. Each group has a scale and,
in some types, a minimum, which are small integers themselves: multiples of the block's `scale` and `minimum`.

    w = (scale * sub_scale) * (code - offset) - minimum * sub_minimum

    type   bits a weight   code   group   sub_scale   sub_minimum   offset
    Q2_K   2.625           2 bit  16      0 .. 15     0 .. 15
    Q3_K   3.4375          3      16      -32 .. 31                 4
    Q4_K   4.5             4      32      0 .. 63     0 .. 63
    Q5_K   5.5             5      32      0 .. 63     0 .. 63
    Q6_K   6.5625          6      16      -128 .. 127               32
    Q4_0   4.5             4      32      1                         8
    Q5_0   5.5             5      32      1                         16
    Q8_0   8.5             8      32      1                         128

In the last three a block is a group. `kquant_bytes.py` has their layouts, `kquant_gptq.py` solves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eacmoe_lightning.quantization.grid import Grid

SUPER, SIMPLE = 256, 32  # weights of a block of a K-quant, and of a simple type


@dataclass(frozen=True)
class BlockType:
    """One of llama.cpp's types.

    Attributes:
        name: llama.cpp's name.
        bits: of a code.
        block, group: weights of a block, and of a group in it.
        sub_scales: the lowest and the highest sub-scale.
        most_minimum: the highest sub-minimum; 0: the type has no minimums.
        offset: the code that decodes to 0, in types without minimums.
        block_bytes: bytes of a block.
    """

    name: str
    bits: int
    block: int
    group: int
    sub_scales: tuple[int, int]
    most_minimum: int
    offset: int
    block_bytes: int

    @property
    def true_bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.block_bytes / self.block

    @property
    def is_super(self) -> bool:
        """Whether a block has several groups, with sub-scales."""
        return self.block > self.group

    @property
    def grid(self) -> Grid:
        """The codes and groups, as the column loop takes them."""
        return Grid(self.bits, self.group, symmetric=not self.most_minimum)


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q2_K", 2, SUPER, 16, (0, 15), 15, 0, 84),
        BlockType("Q3_K", 3, SUPER, 16, (-32, 31), 0, 4, 110),
        BlockType("Q4_K", 4, SUPER, 32, (0, 63), 63, 0, 144),
        BlockType("Q5_K", 5, SUPER, 32, (0, 63), 63, 0, 176),
        BlockType("Q6_K", 6, SUPER, 16, (-128, 127), 0, 32, 210),
        BlockType("Q4_0", 4, SIMPLE, SIMPLE, (1, 1), 0, 8, 18),
        BlockType("Q5_0", 5, SIMPLE, SIMPLE, (1, 1), 0, 16, 22),
        BlockType("Q8_0", 8, SIMPLE, SIMPLE, (1, 1), 0, 128, 34),
    )
}
BITS = (2, 3, 4, 5, 6, 8)  # that can be asked for
K_QUANTS = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}
FALLBACKS = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 5: "Q5_0", 6: "Q8_0", 8: "Q8_0"}  # for rows that are no multiple of 256


def type_of(bits: int, in_features: int) -> BlockType:
    """The type of a weight: that of its bits, or the smallest simple one with as many where no K-quant fits its rows.

    Raises:
        ValueError: no type has these bits, or blocks of 32 do not fit the rows either.
    """
    if bits not in BITS:
        raise ValueError(f"{bits} bits: llama.cpp's blocks have {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}")
    if in_features % SIMPLE:
        raise ValueError(f"in_features={in_features} is not a multiple of {SIMPLE}, llama.cpp's smallest block")
    return TYPES[(FALLBACKS if in_features % SUPER else K_QUANTS)[bits]]


@dataclass
class KQuant:
    """A weight in llama.cpp's blocks.

    Attributes:
        codes: uint8 [..., O, I].
        scale, minimum: float16 [..., O, I / block].
        sub_scale, sub_minimum: int16 [..., O, I / group].
        kind: name of its type. A stack of experts has one type.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor
    sub_scale: Tensor
    sub_minimum: Tensor
    kind: str

    FIELDS: ClassVar[tuple[str, ...]] = ("codes", "scale", "minimum", "sub_scale", "sub_minimum")

    @classmethod
    def empty(cls, shape: Sequence[int], grid: Grid, device: torch.device) -> KQuant:
        """Uninitialised fields for a weight of this shape."""
        kind = type_of(grid.bits, shape[-1])
        sizes = [(shape[-1], torch.uint8)]
        sizes += 2 * [(shape[-1] // kind.block, torch.float16)] + 2 * [(shape[-1] // kind.group, torch.int16)]
        return cls(*(torch.empty(*shape[:-1], size, dtype=dtype, device=device) for size, dtype in sizes), kind.name)

    @classmethod
    def simple(cls, codes: Tensor, scale: Tensor, kind: str) -> KQuant:
        """A weight of a type whose blocks are groups, from codes [..., O, I] and scales [..., O, I / block]."""
        zeros = torch.zeros_like(scale)
        return cls(codes, scale, zeros, torch.ones_like(scale, dtype=torch.int16), zeros.to(torch.int16), kind)

    @property
    def type(self) -> BlockType:
        return TYPES[self.kind]

    @property
    def bits(self) -> int:
        return self.type.bits

    @property
    def group_size(self) -> int:
        return self.type.group

    def of_experts(self, experts: list[int] | slice) -> KQuant:
        """Some of a stack's experts [E, O, I]; those of a slice are not copied."""
        return KQuant(*(getattr(self, field)[experts] for field in self.FIELDS), self.kind)

    def group_scales(self, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weight units per code, and the minimum, of each group: float32 [..., O, I / group].

        `scale` replaces the stored ones while they are trained. The minimums of a block change by the same factor, so
        that training stretches a block and leaves the code that decodes to 0.
        """
        own, minimum = self.scale.float(), self.minimum.float()
        if scale is not None:
            minimum = _scaled(self, scale).to(torch.float16).float()
            own = scale.float()
        groups = self.type.block // self.type.group
        sub_scale, sub_minimum = (t.float().unflatten(-1, (-1, groups)) for t in (self.sub_scale, self.sub_minimum))
        return (own.unsqueeze(-1) * sub_scale).flatten(-2), (minimum.unsqueeze(-1) * sub_minimum).flatten(-2)

    def dequantize(
        self, dtype: torch.dtype = torch.float32, scale: Tensor | None = None, codes: Tensor | None = None
    ) -> Tensor:
        """The weight [..., O, I]; computed in float32 as llama.cpp does, and rounded to `dtype` once.

        `scale` and `codes` replace the stored ones (while they are trained).
        """
        step, minimum = (t.unsqueeze(-1) for t in self.group_scales(scale))
        groups = (self.codes if codes is None else codes).unflatten(-1, (-1, self.group_size)).float()
        return (step * (groups - self.type.offset) - minimum).flatten(-2).to(dtype)

    def positions(self, weight: Tensor) -> Tensor:
        """The positions of weights [..., O, I] on the axis of codes, float32; the code itself in a group of zeros."""
        step, minimum = (t.unsqueeze(-1) for t in self.group_scales())
        groups = weight.float().unflatten(-1, (-1, self.group_size))
        position = (groups + minimum) / step + self.type.offset
        codes = self.codes.unflatten(-1, (-1, self.group_size)).float()
        return torch.where(step == 0, codes, position).flatten(-2)

    def nearest(self, position: Tensor) -> Tensor:
        """The codes [..., O, I] nearest to positions, float32."""
        return position.round().clamp(0, 2**self.bits - 1)

    def with_scale(self, scale: Tensor) -> KQuant:
        """The same codes with trained scales, float16, and the minimums that belong to them."""
        minimum = _scaled(self, scale).to(torch.float16)
        return KQuant(self.codes, scale, minimum, self.sub_scale, self.sub_minimum, self.kind)


def _scaled(weight: KQuant, scale: Tensor) -> Tensor:
    """The minimums [..., O, I / block] of blocks whose scales are replaced, float32."""
    own = weight.scale.float()
    return weight.minimum.float() * torch.where(own == 0, 1.0, scale.float() / torch.where(own == 0, 1.0, own))
