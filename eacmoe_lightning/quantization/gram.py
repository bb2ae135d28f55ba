"""Sums of outer products over tokens, for Hessians of linears and normal equations of routers."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 256  # columns of a tile; smaller products are less efficient


def add_gram(total: Tensor, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Adds sum_n weight_n x_n x_n^T to the tiles of `total` [I, I] on and above the diagonal, which halves the work.

    Args:
        x: [n, I].
        weight: [n], not negative; None: 1.
    """
    x = x if weight is None else x * weight.sqrt().unsqueeze(1)
    for start in range(0, x.shape[1], TILE):
        total[start : start + TILE, start:].addmm_(x[:, start : start + TILE].T, x[:, start:])
    return total


def mirror(total: Tensor) -> Tensor:
    """Copies the upper triangle of a matrix [I, I] to the lower one, in place."""
    for start in range(0, len(total), TILE):
        end = start + TILE
        total[end:, start:end] = total[start:end, end:].T
        tile = total[start:end, start:end]
        tile.copy_(tile.triu() + tile.triu(1).T)
    return total


def tokens_by_expert(ids: Tensor, num_experts: int) -> list[Tensor]:
    """The tokens that select each expert, ascending: ids [N, K] -> E tensors [n_e]; sorts all selections once.

    Ids outside 0 .. num_experts - 1 are ignored.
    """
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    edges = torch.searchsorted(flat[order], torch.arange(num_experts + 1, device=flat.device)).tolist()
    token = order // ids.shape[1]
    return [token[start:end].unique() for start, end in zip(edges, edges[1:], strict=False)]
