"""Codes as they lie on disk and in memory: eight of them in `bits` bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.quantization.grid import Bits, Quantized


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """uint8 codes [..., n] -> uint8 [..., ceil(n / 8) * bits]: eight codes in `bits` bytes, little-endian.

    Experts [E, O, n] with bits of their own become one flat tensor, one expert after another.
    """
    if not isinstance(bits, int):
        return torch.cat([pack(expert, width).flatten() for expert, width in zip(codes, bits, strict=True)])
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8))
    place = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((codes.unsqueeze(-1) >> place) & 1).flatten(-2).unflatten(-1, (-1, 8))  # [..., bytes, 8 bits]
    return _join_bits(stream)


def unpack(packed: Tensor, bits: Bits, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., n]."""
    if not isinstance(bits, int):
        return torch.stack([unpack(expert_codes(packed, bits, e, n), bits[e], n) for e in range(len(bits))])
    place = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed.unsqueeze(-1) >> place) & 1).flatten(-2).unflatten(-1, (-1, bits))  # [..., codes, bits]
    return _join_bits(stream)[..., :n].contiguous()


def expert_codes(packed: Tensor, bits: Bits, expert: int, n: int) -> Tensor:
    """The packed codes [O, n / 8 * bits] of one expert of a stack, as a view."""
    if isinstance(bits, int):
        return packed[expert]
    row = n // 8  # bytes of a row for each bit
    rows = packed.numel() // (row * sum(bits))
    return packed.narrow(0, rows * row * sum(bits[:expert]), rows * row * bits[expert]).view(rows, -1)


def _join_bits(stream: Tensor) -> Tensor:
    place = torch.arange(stream.shape[-1], device=stream.device, dtype=torch.uint8)
    return (stream << place).sum(-1, dtype=torch.uint8)


def packed(quantized: dict[str, Quantized]) -> dict[str, Tensor]:
    """Codes, scales and zero points by name, as they lie on disk."""
    tensors = {}
    for name, q in quantized.items():
        tensors[f"{name}.codes"] = pack(q.codes, q.bits)
        tensors[f"{name}.scale"], tensors[f"{name}.zero_point"] = q.scale, q.zero_point
    return tensors


def take_quantized(tensors: dict[str, Tensor], name: str, bits: int | list[int], in_features: int) -> Quantized:
    """Takes one weight's tensors out of those of a file."""
    bits = bits if isinstance(bits, int) else tuple(bits)
    codes = unpack(tensors.pop(f"{name}.codes"), bits, in_features)
    return Quantized(codes, tensors.pop(f"{name}.scale"), tensors.pop(f"{name}.zero_point"), bits)
