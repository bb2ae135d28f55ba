"""The processes of a run: what the calibration needs of torch.distributed, and nothing where there is one process."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds a tensor up over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """Copies the source's tensor into everybody's, in place."""
        if self.world > 1:
            dist.broadcast(tensor, source)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Everybody's tensor (of one shape), in the order of the ranks."""
        if self.world == 1:
            return [tensor]
        gathered = [tensor.new_empty(tensor.shape) for _ in range(self.world)]
        dist.all_gather(gathered, tensor.contiguous())
        return gathered

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()
