"""Decodes one expert from the store's bytes into the arena; threads and worker processes share this code."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from eacmoe_lightning.offload.codecs import decode, decode_packed
from eacmoe_lightning.offload.codecs.packed import empty_packed
from eacmoe_lightning.offload.codecs.record import Header

PACKED_NAMES = ("codes", "scale", "zero_point")


class Part(NamedTuple):
    """One tensor of a decoded expert: a dense weight, or its codes, scale or zero point."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Job:
    """One expert to decode.

    Attributes:
        records: for each weight: offset and length in the store, and its name in errors.
        parts: for each weight: its tensors.
        offsets: where the tensors begin in the arena, in the order of `parts`.
    """

    records: tuple[tuple[int, int, str], ...]
    parts: tuple[tuple[Part, ...], ...]
    offsets: tuple[int, ...]


def parts_of(header: Header, packed: bool) -> tuple[Part, ...]:
    """The tensors that a record decodes to: the dense weight, or its packed tensors."""
    if not packed:
        return (Part("weight", header.shape, header.torch_dtype),)
    with torch.device("meta"):
        tensors = empty_packed(header)
    return tuple(Part(name, tuple(t.shape), t.dtype) for name, t in zip(PACKED_NAMES, tensors, strict=True))


def widest(experts: list[tuple[Part, ...]]) -> tuple[Part, ...]:
    """Parts with room for any expert of a block: the experts' parts, or flat bytes where those differ (in bits)."""
    return tuple(
        same[0] if len(set(same)) == 1 else Part(same[0].name, (max(part.nbytes for part in same),), torch.uint8)
        for same in zip(*experts, strict=True)
    )


def tensor_at(arena: Tensor, offset: int, part: Part) -> Tensor:
    """A part's tensor in the arena."""
    return arena[offset : offset + part.nbytes].view(part.dtype).view(part.shape)


def run(job: Job, store: memoryview, arena: Tensor) -> float:
    """Decodes an expert; returns the seconds it took.

    Raises:
        RecordError: a record is damaged.
    """
    start = time.perf_counter()
    offsets = iter(job.offsets)
    for (offset, length, name), parts in zip(job.records, job.parts, strict=True):
        record = store[offset : offset + length]
        tensors = tuple(tensor_at(arena, next(offsets), part) for part in parts)
        if len(tensors) == 1:
            decode(record, tensors[0], name)
        else:
            decode_packed(record, tensors, name)
    return time.perf_counter() - start
