"""The codes of QESC as a record: packed as on disk (`quantization/packing.py`), or entropy-coded.

GPTQ's codes have less entropy than their nominal bits, because most weights lie in the middle of their group's range.
zstd exploits that with Huffman codes over bytes, so the bit stream is regrouped first: each byte holds as many whole
codes as fit (four of 2 bits, two of 3 or 4, one of more).

A record decodes to the dense weight like any other, or with `decode_packed` to the tensors that the kernels take.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs.base import Codec, codec_of
from eacmoe_lightning.offload.codecs.bound import check_finite
from eacmoe_lightning.offload.codecs.lossless import as_bytes, byte_planes, fill, fill_from_planes, unzstd, zstd
from eacmoe_lightning.offload.codecs.record import Buffer, Header, RecordError, read_record
from eacmoe_lightning.quantization.grid import Grid, Quantized, round_to_nearest
from eacmoe_lightning.quantization.packing import pack, unpack

Packed = tuple[Tensor, Tensor, Tensor]  # codes [..., O, I / 8 * bits] uint8, scale [..., O, G], zero_point [..., O, G]


class PackedCodes(Codec):
    """Group-wise codes, packed as on disk.

    Args:
        bits: 2 to 8.
        group_size: inputs that share a scale; a multiple of 8.

    `encode` rounds a weight to nearest; `encode_packed` takes the codes of a calibrated model.
    """

    name = "packed"

    def __init__(self, bits: int, group_size: int) -> None:
        if not 2 <= bits <= 8 or group_size < 8 or group_size % 8:
            raise ValueError(f"bits={bits} must be 2 to 8, group_size={group_size} a multiple of 8")
        self.bits, self.group_size = bits, group_size

    @classmethod
    def parse(cls, bits: str, group_size: str) -> Self:
        return cls(int(bits), int(group_size))

    @property
    def specification(self) -> str:
        return f"{self.name}:{self.bits}:{self.group_size}"

    def encode(self, weight: Tensor) -> bytes:
        if weight.ndim < 2 or weight.shape[-1] % self.group_size:
            raise ValueError(
                f"weights of shape {tuple(weight.shape)} have no groups of {self.group_size} along their last dimension"
            )
        check_finite(weight)
        q = round_to_nearest(weight.cpu(), Grid(self.bits, self.group_size))
        return self.encode_packed((pack(q.codes, self.bits), q.scale, q.zero_point), weight.dtype)

    def encode_packed(self, tensors: Packed, dtype: torch.dtype = torch.float32) -> bytes:
        """A record of packed codes, scales and zero points; `dtype` is that of the weight that `decode` returns."""
        codes, scale, zero_point = tensors
        parts = self.parts(*(t.detach().cpu().contiguous() for t in tensors))
        weight = torch.empty(*codes.shape[:-1], codes.shape[-1] // self.bits * 8, dtype=dtype, device="meta")
        options = {"bits": self.bits, "groups": scale.shape[-1], "parts": [len(part) for part in parts]}
        return self.record(weight, b"".join(parts), options)

    def parts(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> list[Buffer]:
        return [memoryview(as_bytes(t).numpy()) for t in (codes, scale, zero_point)]

    @classmethod
    def fill_parts(cls, bits: int, parts: list[memoryview], out: Packed) -> None:
        """The inverse of `parts`."""
        for part, tensor in zip(parts, out, strict=True):
            fill(tensor, part)

    @classmethod
    def unpack_into(cls, header: Header, payload: memoryview, out: Packed) -> None:
        """Fills packed codes, scales and zero points on CPU."""
        parts, start = [], 0
        for length in header.options["parts"]:
            parts.append(payload[start : start + length])
            start += length
        cls.fill_parts(header.options["bits"], parts, out)

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        tensors = empty_packed(header)
        cls.unpack_into(header, payload, tensors)
        codes, scale, zero_point = tensors
        bits = header.options["bits"]
        out.copy_(Quantized(unpack(codes, bits, header.shape[-1]), scale, zero_point, bits).dequantize(out.dtype))


class PackedZstd(PackedCodes):
    """The same, compressed by zstd."""

    name = "packed-zstd"

    def parts(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> list[Buffer]:
        return [zstd(whole_codes(codes, self.bits)), zstd(byte_planes(scale)), zstd(zero_point)]

    @classmethod
    def fill_parts(cls, bits: int, parts: list[memoryview], out: Packed) -> None:
        codes, scale, zero_point = out
        symbols = torch.empty(codes.numel() // bits * symbols_of_eight(bits), dtype=torch.uint8)
        unzstd(parts[0], symbols)
        codes.view(-1).copy_(bit_stream(symbols, bits))
        planes = torch.empty(2, scale.numel(), dtype=torch.uint8)
        unzstd(parts[1], planes)
        fill_from_planes(scale, planes)
        unzstd(parts[2], zero_point.view(-1))


def empty_packed(header: Header) -> Packed:
    """Unfilled tensors for `decode_packed`."""
    *rows, columns = header.shape
    bits, groups = header.options["bits"], header.options["groups"]
    return (
        torch.empty(*rows, columns // 8 * bits, dtype=torch.uint8),
        torch.empty(*rows, groups, dtype=torch.float16),
        torch.empty(*rows, groups, dtype=torch.uint8),
    )


def decode_packed(record: Buffer, out: Packed | None = None, name: str = "record") -> Packed:
    """Checks a record's checksums and decodes its codes, scales and zero points.

    Args:
        out: the tensors to fill, contiguous, on CPU, shaped like those of `empty_packed`; None: new ones.

    Raises:
        RecordError: the record is truncated, altered or not of packed codes.
    """
    header, payload = read_record(record, name)
    kind = codec_of(header, name)
    if not issubclass(kind, PackedCodes):
        raise RecordError(f"{name} holds {header.codec}, not packed codes")
    out = empty_packed(header) if out is None else out
    kind.unpack_into(header, payload, out)
    return out


# --- a bit stream as bytes of whole codes --------------------------------------------------------------------------


def symbols_of_eight(bits: int) -> int:
    """The number of bytes for eight codes, each byte holding as many whole codes as fit."""
    return 8 // (8 // bits)


def whole_codes(packed: Tensor, bits: int) -> Tensor:
    """uint8 [..., n * bits] (`packing.pack`) -> uint8 [m]: the codes in their order, 8 // bits to a byte."""
    count = symbols_of_eight(bits)
    if count == bits:  # 2, 4 and 8 bits: the stream has this form already
        return packed.reshape(-1)
    words = np.zeros((packed.numel() // bits, 8), np.uint8)
    words[:, :bits] = packed.reshape(-1, bits).numpy()
    words = words.view("<u8")
    width = 8 // bits * bits
    shifts = np.arange(count, dtype=np.uint64) * np.uint64(width)
    return torch.from_numpy((words >> shifts & np.uint64(2**width - 1)).astype(np.uint8).reshape(-1))


def bit_stream(symbols: Tensor, bits: int) -> Tensor:
    """The inverse of `whole_codes`: uint8 [n * bits]."""
    count = symbols_of_eight(bits)
    if count == bits:
        return symbols
    width = 8 // bits * bits
    columns = symbols.view(-1, count).numpy()
    words = np.zeros(len(columns), np.uint64)
    for i in range(count):
        words |= columns[:, i].astype(np.uint64) << np.uint64(i * width)
    return torch.from_numpy(words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1).copy())
