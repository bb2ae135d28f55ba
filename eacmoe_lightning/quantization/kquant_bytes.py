"""The bytes of llama.cpp's blocks (ggml-common.h, ggml-quants.c): what a GGUF file and our own files hold.

All functions take rows [..., I] and give rows of bytes [..., I / block * block_bytes], and back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.quantization.kquant import TYPES, BlockType, KQuant

SCALE_BITS = {"Q2_K": 4, "Q3_K": 6, "Q4_K": 6, "Q5_K": 6, "Q6_K": 8}  # of a stored sub-scale


def to_bytes(weight: KQuant) -> Tensor:
    """A weight's blocks, uint8 [..., O, bytes of a row]."""
    kind = weight.type
    codes = weight.codes.unflatten(-1, (-1, kind.block))  # [..., O, blocks, block]
    scale, minimum = (_halves(t.unsqueeze(-1)) for t in (weight.scale, weight.minimum))
    groups = kind.block // kind.group
    sub_scale, sub_minimum = (t.unflatten(-1, (-1, groups)) for t in (weight.sub_scale, weight.sub_minimum))
    match kind.name:
        case "Q2_K":
            parts = [(sub_scale | sub_minimum << 4).to(torch.uint8), _crumbs(codes), scale, minimum]
        case "Q3_K":
            parts = [_planes(codes >> 2, 8), _crumbs(codes & 3), _six_bits(sub_scale + 32), scale]
        case "Q4_K":
            parts = [scale, minimum, _scales_and_minimums(sub_scale, sub_minimum), _nibbles(codes, 64)]
        case "Q5_K":
            high = _planes(codes >> 4, 8)
            parts = [scale, minimum, _scales_and_minimums(sub_scale, sub_minimum), high, _nibbles(codes & 15, 64)]
        case "Q6_K":
            signed = sub_scale.to(torch.int8).view(torch.uint8)
            parts = [_nibbles(codes & 15, 128), _crumbs(codes >> 4), signed, scale]
        case "Q4_0":
            parts = [scale, _nibbles(codes, 32)]
        case "Q5_0":
            fifth = (codes >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8, device=codes.device)
            parts = [scale, fifth.sum(-1, dtype=torch.uint8), _nibbles(codes & 15, 32)]
        case "Q8_0":
            parts = [scale, codes ^ 128]  # the code less 128 as a signed byte
    return torch.cat(parts, dim=-1).flatten(-2)


def from_bytes(rows: Tensor, name: str) -> KQuant:
    """The weight of blocks uint8 [..., O, bytes of a row]."""
    kind = TYPES[name]
    blocks = rows.unflatten(-1, (-1, kind.block_bytes))  # [..., O, blocks, bytes]
    sizes = {
        "Q2_K": (16, 64, 2, 2),
        "Q3_K": (32, 64, 12, 2),
        "Q4_K": (2, 2, 12, 128),
        "Q5_K": (2, 2, 12, 32, 128),
        "Q6_K": (128, 64, 16, 2),
        "Q4_0": (2, 16),
        "Q5_0": (2, 4, 16),
        "Q8_0": (2, 32),
    }[name]
    parts = blocks.split(sizes, dim=-1)
    scale = minimum = sub_scale = sub_minimum = None
    match name:
        case "Q2_K":
            both, low, scale, minimum = parts
            codes, sub_scale, sub_minimum = _from_crumbs(low), both & 15, both >> 4
        case "Q3_K":
            high, low, sub, scale = parts
            codes, sub_scale = _from_crumbs(low) | _from_planes(high, 8) << 2, _from_six_bits(sub) - 32
        case "Q4_K":
            scale, minimum, sub, low = parts
            codes, (sub_scale, sub_minimum) = _from_nibbles(low, 64), _from_scales_and_minimums(sub)
        case "Q5_K":
            scale, minimum, sub, high, low = parts
            codes = _from_nibbles(low, 64) | _from_planes(high, 8) << 4
            sub_scale, sub_minimum = _from_scales_and_minimums(sub)
        case "Q6_K":
            low, high, sub, scale = parts
            codes, sub_scale = _from_nibbles(low, 128) | _from_crumbs(high) << 4, sub.contiguous().view(torch.int8)
        case "Q4_0":
            scale, low = parts
            codes = _from_nibbles(low, 32)
        case "Q5_0":
            scale, high, low = parts
            fifth = high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1
            codes = _from_nibbles(low, 32) | fifth.flatten(-2) << 4
        case "Q8_0":
            scale, low = parts
            codes = low ^ 128
    return _assembled(kind, codes, scale, minimum, sub_scale, sub_minimum)


def _assembled(
    kind: BlockType, codes: Tensor, scale: Tensor, minimum: Tensor | None, sub_scale: Tensor | None, sub_minimum
) -> KQuant:
    """The fields from blocks [..., blocks, *]; what a type does not have is 0, and a sub-scale 1."""
    scale = scale.contiguous().view(torch.float16)
    minimum = torch.zeros_like(scale) if minimum is None else minimum.contiguous().view(torch.float16)
    groups = scale.expand(*scale.shape[:-1], kind.block // kind.group)
    sub_scale = torch.ones_like(groups) if sub_scale is None else sub_scale
    sub_minimum = torch.zeros_like(groups) if sub_minimum is None else sub_minimum
    fields = (codes, scale, minimum, sub_scale.to(torch.int16), sub_minimum.to(torch.int16))
    return KQuant(*(field.flatten(-2).contiguous() for field in fields), kind.name)


def _halves(numbers: Tensor) -> Tensor:
    """float16 [..., n] as bytes [..., 2 n]."""
    return numbers.contiguous().view(torch.uint8)


def _nibbles(codes: Tensor, run: int) -> Tensor:
    """4-bit codes: a byte holds code i of each half of a run of `run` codes, the first half in its low bits."""
    low, high = codes.unflatten(-1, (-1, 2, run // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def _from_nibbles(packed: Tensor, run: int) -> Tensor:
    parts = packed.unflatten(-1, (-1, run // 2))
    return torch.stack([parts & 15, parts >> 4], dim=-2).flatten(-3)


def _crumbs(codes: Tensor) -> Tensor:
    """2-bit codes: a byte holds code i of each quarter of 128 codes, the first quarter in its lowest bits."""
    a, b, c, d = codes.unflatten(-1, (-1, 4, 32)).unbind(-2)
    return (a | b << 2 | c << 4 | d << 6).flatten(-2)


def _from_crumbs(packed: Tensor) -> Tensor:
    parts = packed.unflatten(-1, (-1, 32))
    return torch.stack([parts >> shift & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-3)


def _planes(bits: Tensor, planes: int) -> Tensor:
    """Single bits: bit p of byte i is bit i of the p-th of `planes` equal parts."""
    shift = torch.arange(planes, dtype=torch.uint8, device=bits.device)[:, None]
    return (bits.unflatten(-1, (planes, -1)) << shift).sum(-2, dtype=torch.uint8)


def _from_planes(packed: Tensor, planes: int) -> Tensor:
    shift = torch.arange(planes, dtype=torch.uint8, device=packed.device)[:, None]
    return (packed.unsqueeze(-2) >> shift & 1).flatten(-2)


def _six_bits(numbers: Tensor) -> Tensor:
    """16 numbers of 6 bits (Q3_K): 8 bytes with the low 4 bits of two halves, 4 bytes with the high 2 of quarters."""
    numbers = numbers.to(torch.uint8)
    low, high = numbers & 15, (numbers >> 4).unflatten(-1, (4, 4))
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=numbers.device)[:, None]
    return torch.cat([low[..., :8] | low[..., 8:] << 4, (high << shift).sum(-2, dtype=torch.uint8)], dim=-1)


def _from_six_bits(packed: Tensor) -> Tensor:
    low, high = packed.split((8, 4), dim=-1)
    low = torch.cat([low & 15, low >> 4], dim=-1)
    shift = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)[:, None]
    high = (high.unsqueeze(-2) >> shift & 3).flatten(-2)
    return (low | high << 4).to(torch.int16)


def _scales_and_minimums(scales: Tensor, minimums: Tensor) -> Tensor:
    """8 scales and 8 minimums of 6 bits (Q4_K and Q5_K) in 12 bytes.

    The first four of each in the low 6 bits of bytes 0 to 7; of the others the low 4 bits share bytes 8 to 11, and the
    high 2 are the high bits of bytes 0 to 7.
    """
    scales, minimums = scales.to(torch.uint8), minimums.to(torch.uint8)
    first = [numbers[..., :4] | numbers[..., 4:] >> 4 << 6 for numbers in (scales, minimums)]
    return torch.cat([*first, scales[..., 4:] & 15 | (minimums[..., 4:] & 15) << 4], dim=-1)


def _from_scales_and_minimums(packed: Tensor) -> tuple[Tensor, Tensor]:
    scales, minimums, low = packed.split(4, dim=-1)
    return (
        torch.cat([scales & 63, low & 15 | scales >> 6 << 4], dim=-1),
        torch.cat([minimums & 63, low >> 4 | minimums >> 6 << 4], dim=-1),
    )
