"""Codecs that restore every bit: `plain`, and `lossless`, which is zstd over byte planes.

A bfloat16 has a sign, 8 bits of exponent and 7 of mantissa. Trained weights use few exponents, so the upper bytes of a
tensor, put side by side, compress well; the lower bytes hardly compress at all.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
import zstandard
from torch import Tensor

from eacmoe_lightning.offload.codecs.base import Codec
from eacmoe_lightning.offload.codecs.record import Header

LEVEL = 1  # of zstd: on weights, higher levels cost time and gain less than 1 %


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory as flat uint8 on CPU; a view if the tensor is contiguous and on CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def byte_planes(tensor: Tensor) -> Tensor:
    """uint8 [itemsize, n]: the lowest byte of every element, then the next."""
    columns = as_bytes(tensor).view(-1, tensor.dtype.itemsize).numpy()
    return torch.from_numpy(np.ascontiguousarray(columns.T))  # ten times as fast as in torch


def fill_from_planes(out: Tensor, planes: Tensor) -> None:
    """The inverse of `byte_planes`: fills a contiguous tensor on the planes' device."""
    columns = out.view(-1).view(torch.uint8).view(-1, out.dtype.itemsize)
    if out.device.type != "cpu":
        columns.copy_(planes.t())
        return
    for byte, plane in enumerate(planes.numpy()):
        columns.numpy()[:, byte] = plane


def fill(out: Tensor, data: memoryview) -> None:
    """Copies bytes into a contiguous tensor on CPU of exactly their size."""
    np.copyto(out.view(-1).view(torch.uint8).numpy(), np.frombuffer(data, np.uint8))


def zstd(data: Tensor) -> bytes:
    """Compresses a contiguous uint8 tensor on CPU to one zstd frame."""
    return zstandard.ZstdCompressor(level=LEVEL).compress(data.numpy())


def unzstd(payload: memoryview, out: Tensor) -> None:
    """Fills `out`, contiguous uint8 on CPU, from a zstd frame of exactly its size."""
    target = memoryview(out.reshape(-1).numpy())
    reader = zstandard.ZstdDecompressor().stream_reader(payload)
    filled = 0
    while filled < len(target):
        count = reader.readinto(target[filled:])
        assert count, f"the frame ends after {filled} of {len(target)} bytes"
        filled += count


class Plain(Codec):
    """The bytes as they are."""

    name, is_lossless = "plain", True

    @classmethod
    def parse(cls) -> Self:
        return cls()

    @property
    def specification(self) -> str:
        return self.name

    def encode(self, weight: Tensor) -> bytes:
        return self.record(weight, memoryview(as_bytes(weight).numpy()))

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        fill(out, payload)


class Lossless(Plain):
    """Byte planes through zstd."""

    name = "lossless"

    def encode(self, weight: Tensor) -> bytes:
        return self.record(weight, zstd(byte_planes(weight)))

    @classmethod
    def decode_into(cls, header: Header, payload: memoryview, out: Tensor) -> None:
        planes = torch.empty(out.dtype.itemsize, out.numel(), dtype=torch.uint8)
        unzstd(payload, planes)
        fill_from_planes(out, planes)
