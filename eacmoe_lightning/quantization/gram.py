"""Sums of outer products of tokens: Hessians of linears, normal equations of routers."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 256  # columns of a tile; smaller products run below the machine's rate


def gram(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_n weight_n x_n x_n^T, [n, I] -> [I, I] in x's dtype; `weight` [n], none of them negative."""
    return mirror(add_gram(x.new_zeros(x.shape[1], x.shape[1]), x, weight))


def add_gram(total: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Adds `gram(x, weight)` to `total` [I, I], only in the tiles on and above the diagonal: half the work."""
    x = x if weight is None else x * weight.sqrt().unsqueeze(1)
    for start in range(0, x.shape[1], TILE):
        total[start : start + TILE, start:].addmm_(x[:, start : start + TILE].T, x[:, start:])
    return total


def mirror(total: Tensor) -> Tensor:
    """Copies what lies above the diagonal of a matrix [I, I] below it, in place."""
    for start in range(0, len(total), TILE):
        end = start + TILE
        total[end:, start:end] = total[start:end, end:].T
        own = total[start:end, start:end]
        own.copy_(own.triu() + own.triu(1).T)
    return total


def tokens_by_expert(ids: Tensor, num_experts: int) -> list[Tensor]:
    """Which tokens select each expert, ascending: ids [N, K] -> E tensors [n_e], from one sort of all selections.

    Ids outside 0 .. num_experts - 1 are skipped.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    edges = torch.searchsorted(flat[order], torch.arange(num_experts + 1, device=flat.device)).tolist()
    token = order // ids.shape[1]
    return [token[start:end].unique() for start, end in zip(edges, edges[1:], strict=False)]
