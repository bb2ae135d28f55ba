"""The arithmetic of the formats: scales spread over weights, FP4 values, exponents, codes in words."""

from __future__ import annotations

import torch
from torch import Tensor

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # e2m1
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def scaled(key: str, weight: Tensor, scale: Tensor, block: tuple[int, int] | None) -> Tensor:
    """A weight [..., O, I] in float8 (or int8: two FP4 values a byte) times its scales -> float32."""
    values = unpack_fp4(weight) if weight.dtype == torch.int8 else weight.float()
    scale = exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    return values * spread(key, scale, values.shape, block)


def exponents(stored: Tensor) -> Tensor:
    """Powers of two, stored as exponents with a bias of 127 (E8M0) -> float32."""
    return torch.exp2(stored.float() - 127)


def spread(
    key: str, grid: Tensor, shape: torch.Size, block: tuple[int, int] | None, group: Tensor | None = None
) -> Tensor:
    """Scales or zero points as a tensor that broadcasts over a weight.

    Args:
        key: of the weight, for the error.
        grid: one value, one a row [O], one for each weight of a stack [E], or [..., rows of blocks, columns of blocks].
        shape: [..., O, I], of the weight.
        block: rows and columns of a block, the last ones of which may be cut off; None: the grid divides the weight.
            A grid with a row for each of the weight's, or with one row, is not of blocks.
        group: [I] the column of the grid of each input; None: neighbours.

    Raises:
        ValueError: the grid does not fit the weight.
    """
    if grid.numel() == 1:
        return grid.reshape(())
    if grid.ndim == 1:  # a value a row, or one for each weight of a stack
        grid = grid[:, None] if len(shape) == 2 else grid[:, None, None]
    if group is not None:
        return grid[..., group.long()]
    if block and grid.ndim > 1 and grid.shape[-2] not in (1, shape[-2]):
        blocks = tuple(-(-size // width) for size, width in zip(shape[-2:], block, strict=True))
        if tuple(grid.shape[-2:]) != blocks:
            raise ValueError(
                f"{key}: scales {tuple(grid.shape)} do not fit a weight {tuple(shape)}, which has {blocks} blocks of "
                f"{block[0]} x {block[1]} (`quantization_config` in its config.json)"
            )
    for dim in (-2, -1):
        parts, size = grid.shape[dim] if grid.ndim >= -dim else 1, shape[dim]
        if parts == 1:
            continue
        if parts > size:
            raise ValueError(f"{key}: scales {tuple(grid.shape)} do not fit a weight {tuple(shape)}")
        width = block[dim] if block and -(-size // block[dim]) == parts else size // parts
        if -(-size // width) != parts:
            raise ValueError(f"{key}: scales {tuple(grid.shape)} do not fit a weight {tuple(shape)}")
        grid = grid.repeat_interleave(width, dim).narrow(dim, 0, size)
    return grid


def unpack_fp4(packed: Tensor) -> Tensor:
    """Two FP4 values a byte, the first in the low bits: [..., n] -> float32 [..., 2 n]."""
    table = torch.tensor(FP4, dtype=torch.float32)
    nibbles = packed.contiguous().view(torch.uint8).int()
    return torch.stack([table[nibbles & 15], table[nibbles >> 4]], -1).flatten(-2)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 [..., n] -> codes [..., n * 32 // bits], int32, a little-endian stream of bits."""
    if 32 % bits == 0:
        shift = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[..., None] >> shift) & (2**bits - 1)).flatten(-2)
    stream = ((words[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten(-2)
    codes = stream[..., : stream.shape[-1] // bits * bits].unflatten(-1, (-1, bits))
    return (codes << torch.arange(bits, dtype=torch.int32)).sum(-1, dtype=torch.int32)
