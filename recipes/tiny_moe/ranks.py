"""Data parallelism over single-threaded processes: `torchrun --nproc-per-node 2 train.py ...`.

On a shared machine this beats one process with two threads: a thread that loses its core holds up
every parallel region of a step; a process holds up only the exchange of gradients at the step's end.
Without torchrun there is one rank, and nothing is exchanged.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start() -> tuple[int, int]:
    """Join torchrun's process group, if there is one; returns (rank, number of ranks)."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def average_gradients(model: nn.Module, values: list[float]) -> list[float]:
    """Average all gradients, and `values` with them, over the ranks; returns the averages."""
    if not dist.is_initialized():
        return values
    gradients = [p.grad for p in model.parameters()]
    flat = torch.cat([g.flatten() for g in gradients] + [torch.tensor(values)])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    *parts, averages = flat.split([g.numel() for g in gradients] + [len(values)])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
    return averages.tolist()


def share_out(work, batch: Tensor) -> Tensor:
    """Apply `work` to a batch of matrices, on each rank to its slice; returns all results."""
    if not dist.is_initialized() or len(batch) % dist.get_world_size():
        return work(batch)
    result = work(batch.chunk(dist.get_world_size())[dist.get_rank()]).contiguous()
    slices = [torch.empty_like(result) for _ in range(dist.get_world_size())]
    dist.all_gather([s.view(torch.uint8) for s in slices], result.view(torch.uint8))
    return torch.cat(slices)
