"""The router's closed form: TopK-MSE separates by expert, and each expert's row is a ridge regression.

For the tokens M_i whose teacher top-k holds expert i, the minimiser of the paper's loss (EAC-MoE, equation 5) with
a penalty on drift is

    w_i' = w_i + (X^T M_i X + lambda I)^-1 X^T M_i (t_i - X w_i)

with X [N, D] the compressed stream's router inputs and t_i [N] the original router's logits. It needs no learning
rate and no epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.gram import gram, tokens_by_expert

SOLVED_BYTES = 1 << 30  # experts are solved together as far as their matrices fit in this


def normal_equations(x: Tensor, residual: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens that `solve` needs; sums of several calls add up.

    Args:
        x: [n, D] router inputs of the compressed stream.
        residual: [n, E] teacher logits minus the current router's logits on x.
        target_ids: [n, k] the teacher's k largest experts.

    Returns:
        gram [E, D, D] = X^T M_i X and cross [E, D] = X^T M_i residual_i, float32.
    """
    num_experts = residual.shape[1]
    mask = torch.zeros_like(residual, dtype=torch.bool).scatter_(1, target_ids, True)
    if target_ids.shape[1] == num_experts:  # every token counts for every expert
        grams = gram(x).expand(num_experts, -1, -1).clone()
    else:
        grams = torch.stack([gram(x[tokens]) for tokens in tokens_by_expert(target_ids, num_experts)])
    return grams, (residual * mask).T @ x


def solve(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The calibrated router weight [E, D].

    Args:
        weight: [E, D] the original router's.
        ridge: lambda as a multiple of the mean diagonal of all tokens' gram; larger keeps closer to `weight`.
    """
    mean = gram.diagonal(dim1=-2, dim2=-1).double().mean()
    strength = ridge * mean.clamp(min=torch.finfo(torch.float32).tiny)
    together = max(1, SOLVED_BYTES // (16 * gram.shape[-1] ** 2))  # a matrix and its factor in float64
    update = []
    for own, right in zip(gram.split(together), cross.split(together), strict=True):
        matrix = own.double()
        matrix.diagonal(dim1=-2, dim2=-1).add_(strength)
        update.append(torch.linalg.solve(matrix, right.double().unsqueeze(-1)).squeeze(-1))
    return (weight.double() + torch.cat(update)).to(weight.dtype)
