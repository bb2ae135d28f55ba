"""The processes of a run: the operations of torch.distributed that calibration needs; no-ops with a single process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run.

    Attributes:
        rank, world: the index of this process, and the number of processes.
        device: the device on which the backend needs its tensors (NCCL takes none from the CPU).
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self.world > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Copies the tensor of rank `source` to all processes, in place."""
        if self.world > 1:
            moved = tensor.to(self.device)
            dist.broadcast(moved, source)
            tensor.copy_(moved)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have the same shape, ordered by rank."""
        if self.world == 1:
            return [tensor]
        moved = tensor.to(self.device).contiguous()
        gathered = [torch.empty_like(moved) for _ in range(self.world)]
        dist.all_gather(gathered, moved)
        return [other.to(tensor.device) for other in gathered]

    def join(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, ordered by rank; their numbers may differ."""
        if self.world == 1:
            return rows
        counts = [int(count) for count in self.gather(torch.tensor([len(rows)]))]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        return torch.cat([part[:count] for part, count in zip(self.gather(padded), counts, strict=True)])

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
