"""Sums of outer products of tokens: Hessians of linears, normal equations of routers."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 256  # columns of a tile; smaller products run below the machine's rate


def gram(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """sum_n weight_n x_n x_n^T, [n, I] -> [I, I] in x's dtype; `weight` [n], none of them negative.

    It is symmetric, so only the tiles on and above the diagonal are multiplied.
    """
    x = x if weight is None else x * weight.sqrt().unsqueeze(1)
    size = x.shape[1]
    total = x.new_empty(size, size)
    for start in range(0, size, TILE):
        end = min(start + TILE, size)
        torch.mm(x[:, start:end].T, x[:, start:], out=(strip := x.new_empty(end - start, size - start)))
        total[start:end, start:] = strip
        total[end:, start:end] = strip[:, end - start :].T
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
