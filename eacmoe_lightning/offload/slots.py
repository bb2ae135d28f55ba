"""Memory for decoded experts of the same shapes: a stack with one slot for each expert that fits.

A slot's tensors are slices of stacks [S, ...], the form that kernels for all experts of a block take; only the ids have
to name slots instead of experts. On CPU the stacks lie in the arena, and experts are decoded straight into them. On
another device the stacks lie there; an expert is decoded into a staging buffer of the arena (page-locked on CUDA) and
then copied, on CUDA in a separate stream.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.offload.fetch import Decode
from eacmoe_lightning.offload.jobs import Job, Part, tensor_at
from eacmoe_lightning.offload.memory import Arena

ALIGNMENT = 64  # of every tensor in the arena

Layout = tuple[tuple[str, tuple[Part, ...]], ...]  # name and tensors of each projection of an expert


def nbytes_of(layout: Layout) -> int:
    """Size of one expert."""
    return sum(part.nbytes for _, parts in layout for part in parts)


def _aligned(nbytes: int) -> int:
    return nbytes + -nbytes % ALIGNMENT


@dataclass
class Plan:
    """The part of the arena that a pool of slots takes."""

    layout: Layout
    capacity: int  # slots
    in_arena: int  # slots that lie in the arena: all on CPU, elsewhere as many as are staged at once
    start: int = 0  # offset of the pool in the arena

    @property
    def nbytes(self) -> int:
        return sum(_aligned(self.in_arena * part.nbytes) for _, parts in self.layout for part in parts)


class Slots:
    """The stacks of one layout.

    Args:
        plan: their part of the arena.
        device: where the model runs.
    """

    def __init__(self, plan: Plan, arena: Arena, device: torch.device) -> None:
        self.layout, self.capacity, self.device = plan.layout, plan.capacity, device
        self.parts = tuple(parts for _, parts in plan.layout)
        self.bases: list[int] = []  # offset of each part's stack in the arena
        self.host: list[Tensor] = []  # [in_arena, ...] for each part
        position = plan.start
        for part in (part for parts in self.parts for part in parts):
            self.bases.append(position)
            self.host.append(
                tensor_at(arena.bytes, position, Part(part.name, (plan.in_arena, *part.shape), part.dtype))
            )
            position += _aligned(plan.in_arena * part.nbytes)
        self.is_staged = device.type != "cpu"
        self.stacks = [
            torch.empty(plan.capacity, *host.shape[1:], dtype=host.dtype, device=device) if self.is_staged else host
            for host in self.host
        ]
        self.staging = list(range(plan.in_arena)) if self.is_staged else []
        self.lock = threading.Lock()

    def stack(self, projection: str) -> tuple[Tensor, ...]:
        """The stacks [S, ...] of a projection's tensors."""
        start = 0
        for name, parts in self.layout:
            if name == projection:
                return tuple(self.stacks[start : start + len(parts)])
            start += len(parts)
        raise KeyError(projection)

    def loader(self, slot: int, records: tuple[tuple[int, int, str], ...], parts: tuple[tuple[Part, ...], ...]):
        """The task for a fetcher that fills a slot from these records, which decode to these tensors."""
        if not self.is_staged:
            return lambda decode: decode(self._job(slot, records, parts))
        is_cuda = self.device.type == "cuda"
        computed = torch.cuda.current_stream(self.device).record_event() if is_cuda else None

        def load(decode: Decode) -> float:
            with self.lock:
                staged = self.staging.pop()
            try:
                seconds = decode(self._job(staged, records, parts))
                self._copy(staged, slot, computed)
            finally:
                with self.lock:
                    self.staging.append(staged)
            return seconds

        return load

    def _job(self, index: int, records, parts) -> Job:
        flat = [part for parts in self.parts for part in parts]
        offsets = (base + index * part.nbytes for base, part in zip(self.bases, flat, strict=True))
        return Job(records, parts, tuple(offsets))

    def _copy(self, staged: int, slot: int, computed) -> None:
        """Copies to the device once the computation with the slot's previous expert is done; waits for the copy."""
        if computed is None:
            for host, stack in zip(self.host, self.stacks, strict=True):
                stack[slot].copy_(host[staged])
            return
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            for host, stack in zip(self.host, self.stacks, strict=True):
                stack[slot].copy_(host[staged], non_blocking=True)
        stream.synchronize()


def pin(arena: Arena) -> None:
    """Page-locks the arena, so that copies to CUDA devices overlap with the computation."""
    status = torch.cuda.cudart().cudaHostRegister(arena.bytes.data_ptr(), arena.nbytes, 0)
    if int(status):
        raise RuntimeError(f"cudaHostRegister failed with {status}")
