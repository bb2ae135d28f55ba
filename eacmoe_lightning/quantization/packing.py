"""How weights are stored: eight codes in `bits` bytes, a lattice's codes at their entropy, or llama.cpp's blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from eacmoe_lightning.quantization.entropy_coding import decode_codes, encode_codes
from eacmoe_lightning.quantization.grid import Bits, Quantized
from eacmoe_lightning.quantization.kquant import KQuant, type_of
from eacmoe_lightning.quantization.kquant_bytes import from_bytes, to_bytes
from eacmoe_lightning.quantization.lattice import Lattice
from eacmoe_lightning.quantization.quantizers import QuantizedWeight


def pack(codes: Tensor, bits: Bits) -> Tensor:
    """uint8 codes [..., n] -> uint8 [..., ceil(n / 8) * bits]: eight codes in `bits` bytes, little-endian.

    Experts [E, O, n] that differ in bits become one flat tensor, one expert after another.
    """
    if not isinstance(bits, int):
        return torch.cat([pack(expert, width).flatten() for expert, width in zip(codes, bits, strict=True)])
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    words = torch.zeros(codes.shape[:-1], dtype=torch.int64, device=codes.device)  # of eight codes each
    for i in range(8):
        words |= codes[..., i].long() << i * bits
    return words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2).contiguous()  # a view for rows of eight codes


def unpack(packed: Tensor, bits: Bits, n: int) -> Tensor:
    """The inverse of `pack`: uint8 [..., n]."""
    if not isinstance(bits, int):
        return torch.stack([unpack(expert_codes(packed, bits, e, n), bits[e], n) for e in range(len(bits))])
    if bits == 8:  # each byte is a code
        return packed[..., :n].clone()
    padded = torch.nn.functional.pad(packed.unflatten(-1, (-1, bits)), (0, 8 - bits))
    words = padded.view(torch.int64)  # [..., n / 8, 1], of eight codes each
    codes = torch.empty((*words.shape[:-1], 8), dtype=torch.uint8, device=packed.device)
    for i in range(8):
        codes[..., i] = (words[..., 0] >> i * bits).to(torch.uint8) & (1 << bits) - 1
    return codes.flatten(-2)[..., :n].contiguous()


def expert_codes(packed: Tensor, bits: Bits, expert: int, n: int) -> Tensor:
    """The packed codes [O, n / 8 * bits] of one expert of a stack, as a view."""
    if isinstance(bits, int):
        return packed[expert]
    row = n // 8  # bytes per row and bit
    rows = packed.numel() // (row * sum(bits))
    return packed.narrow(0, rows * row * sum(bits[:expert]), rows * row * bits[expert]).view(rows, -1)


def packed(quantized: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """The tensors that are stored for quantized weights, by `<weight's name>.<kind>`.

    On the group-wise grid the kinds are `.codes`, `.scale` and `.zero_point`. On a lattice they are `.stream` (the
    entropy-coded matrices, one after another), `.ends` [S] (where each ends in the stream), `.shape` of the codes, and
    `.scale`. In llama.cpp's blocks there is one, `.blocks` uint8 [..., O, bytes of a row].
    """
    tensors = {}
    for name, weight in quantized.items():
        if isinstance(weight, KQuant):
            tensors[f"{name}.blocks"] = to_bytes(weight)
            continue
        tensors[f"{name}.scale"] = weight.scale
        if isinstance(weight, Lattice):
            codes = weight.codes.cpu().flatten(0, -3) if weight.codes.ndim > 2 else weight.codes.cpu()[None]
            streams = [encode_codes(matrix.flatten().numpy()) for matrix in codes]
            tensors[f"{name}.stream"] = torch.frombuffer(bytearray(b"".join(streams)), dtype=torch.uint8)
            tensors[f"{name}.ends"] = torch.tensor([len(stream) for stream in streams]).cumsum(0)
            tensors[f"{name}.shape"] = torch.tensor(weight.codes.shape)
        else:
            tensors[f"{name}.codes"], tensors[f"{name}.zero_point"] = pack(weight.codes, weight.bits), weight.zero_point
    return tensors


STORED = (".codes", ".scale", ".zero_point", ".stream", ".ends", ".shape", ".blocks")  # of a quantized weight


def quantized_names(tensors: Iterable[str]) -> set[str]:
    """The names of the weights that are stored quantized among the tensors of a file."""
    return {name.rpartition(".")[0] for name in tensors if name.endswith((".codes", ".stream", ".blocks"))}


def take_quantized(tensors: dict[str, Tensor], name: str, bits: Bits | list[int], in_features: int) -> QuantizedWeight:
    """Removes one weight's tensors from those of a file and decodes them; a lattice ignores bits and in_features."""
    if f"{name}.blocks" in tensors:
        return from_bytes(tensors.pop(f"{name}.blocks"), type_of(bits, in_features).name)
    scale = tensors.pop(f"{name}.scale")
    if f"{name}.stream" in tensors:
        stream, ends, shape = (tensors.pop(f"{name}.{what}") for what in ("stream", "ends", "shape"))
        *_, rows, columns = shape = shape.tolist()
        starts = [0, *ends.tolist()]
        parts = [stream[a:b].numpy() for a, b in pairwise(starts)]
        codes = np.stack([decode_codes(part, rows * columns) for part in parts]).astype(np.int16)
        return Lattice(torch.from_numpy(codes).view(shape), scale)
    bits = bits if isinstance(bits, int) else tuple(bits)
    codes = unpack(tensors.pop(f"{name}.codes"), bits, in_features)
    return Quantized(codes, scale, tensors.pop(f"{name}.zero_point"), bits)
