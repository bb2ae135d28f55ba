"""The router's closed form: TopK-MSE separates by expert, so each expert's row is a ridge regression.

For the tokens M_i whose teacher top-k holds expert i, the minimiser of the paper's loss (EAC-MoE, equation 5) with
a penalty on drift is

    w_i' = w_i + (X^T M_i X + lambda I)^-1 X^T M_i (t_i - X w_i)

with X [N, D] the compressed stream's router inputs and t_i [N] the original router's logits. It needs no learning
rate and no epochs. If all experts are targets (k = E), they share one matrix and the cost is negligible.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eacmoe_lightning.quantization.gram import add_gram, tokens_by_expert

SOLVED_BYTES = 1 << 30  # memory limit for float64 matrices and their factors while experts are solved


class NormalEquations:
    """Sums over tokens that `solve` needs for some of a block's experts.

    Attributes:
        experts: the slice of the block's experts.
        gram: [e, D, D] = X^T M_i X, float32, upper triangle only; [1, D, D] if `shared`, when every token counts for
            every expert.
        cross: [e, D] = X^T M_i residual_i, float32.
        squares: k times the sum of all tokens' squared inputs, float64. This is the trace of the grams of all experts
            of the block, including those outside `experts`.
    """

    def __init__(self, experts: slice, width: int, device: torch.device, shared: bool = False) -> None:
        self.experts, self.shared = experts, shared
        num = experts.stop - experts.start
        self.gram = torch.zeros(1 if shared else num, width, width, device=device)
        self.cross = torch.zeros(num, width, device=device)
        self.squares = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, residual: Tensor, target_ids: Tensor) -> NormalEquations:
        """Adds tokens.

        Args:
            x: [n, D] router inputs of the compressed stream.
            residual: [n, E] teacher logits minus the current router's logits on x.
            target_ids: [n, k] the teacher's k largest experts; k = E if `shared`.
        """
        mask = torch.zeros_like(residual, dtype=torch.bool).scatter_(1, target_ids, True)
        if self.shared:
            add_gram(self.gram[0], x)
        else:
            chosen = tokens_by_expert(target_ids - self.experts.start, len(self.gram))
            for gram, tokens in zip(self.gram, chosen, strict=True):
                add_gram(gram, x[tokens])
        self.cross += (residual * mask)[:, self.experts].T @ x
        self.squares += target_ids.shape[1] * x.square().sum(1).double().sum()
        return self


def solve(weight: Tensor, sums: NormalEquations, ridge: float) -> Tensor:
    """The calibrated router weight [e, D] of the experts in `sums`.

    Args:
        weight: [E, D] of the original router.
        ridge: lambda, as a multiple of the mean diagonal of all experts' grams; larger values stay closer to `weight`.
    """
    num_experts, width = weight.shape
    strength = ridge * (sums.squares / (num_experts * width)).clamp(min=torch.finfo(torch.float32).tiny)
    together, update = _solved_together(width), []
    sides = sums.cross.T[None] if sums.shared else sums.cross[..., None]  # [1, D, e] or [e, D, 1]
    for gram, right in zip(sums.gram.split(together), sides.split(together), strict=True):
        matrix = gram.double()
        matrix.diagonal(dim1=-2, dim2=-1).add_(strength)
        factor = torch.linalg.cholesky(matrix, upper=True)  # reads only the upper triangle
        update.append(torch.cholesky_solve(right.double(), factor, upper=True).mT.flatten(0, 1))
    return (weight[sums.experts].double() + torch.cat(update)).to(weight.dtype)


def working_bytes(num_matrices: int, width: int) -> int:
    """Memory of the sums of `num_matrices` experts and of solving them."""
    return (4 * num_matrices + 16 * min(num_matrices, _solved_together(width))) * width**2


def _solved_together(width: int) -> int:
    return max(1, SOLVED_BYTES // (16 * width**2))


def experts_together(num_experts: int, width: int, gib: float, shared: bool = False) -> int:
    """How many experts can be summed and solved at a time in `gib`; at least one, and all if they share a matrix."""
    if shared:
        return num_experts
    return next((n for n in range(num_experts, 1, -1) if working_bytes(n, width) <= gib * 2**30), 1)
