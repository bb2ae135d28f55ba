"""Router losses: how far the router logits of the compressed stream are from the original's.

Each loss maps student and teacher router logits [n, E] to one loss per token [n], in float32. A config selects one
(`--model.router_loss.class_path`). `TopKMSE` is the paper's (EAC-MoE, equation 5).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from eacmoe_lightning.configurable import Configurable


class RouterLoss(Configurable, nn.Module):
    """Base class of all router losses."""

    def forward(self, student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
        """Router logits [n, E] of the compressed stream and of the original, and experts per token -> loss [n]."""
        raise NotImplementedError

    def num_targets(self, num_experts: int, top_k: int) -> int:
        """How many of the teacher's experts per token enter the loss; the closed form uses the same number."""
        return num_experts


class TopKMSE(RouterLoss):
    """Mean squared difference over the teacher's k largest logits (EAC-MoE, section 4.2).

    Args:
        k: Number of the teacher's largest logits, above the model's top_k: near top_k the router overfits, and with
            all experts the irrelevant ones dominate. The paper uses 8 of 16, 20 of 64, 20 of 60. Null: all of up to 8
            experts, half of up to 16, a third of more.
    """

    def __init__(self, k: int | None = None) -> None:
        super().__init__()
        self.k = k

    def num_targets(self, num_experts: int, top_k: int) -> int:
        if self.k is None:
            k = num_experts if num_experts <= 8 else num_experts // 2 if num_experts <= 16 else num_experts // 3
            return max(k, top_k)
        if not top_k <= self.k <= num_experts:
            raise ValueError(
                f"k={self.k} (--model.router_loss.init_args.k) is not between top_k={top_k} and "
                f"num_experts={num_experts}"
            )
        return self.k

    def forward(self, student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
        ids = teacher.topk(self.num_targets(teacher.shape[-1], top_k), dim=-1).indices
        return (student - teacher).gather(-1, ids).square().mean(-1)


class MSE(RouterLoss):
    """Mean squared difference over all experts: TopK-MSE with k = E."""

    def forward(self, student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
        return (student - teacher).square().mean(-1)


class SelectionHinge(RouterLoss):
    """How far the weakest of the teacher's selected experts falls short of the strongest other expert.

    A selection changes when experts near the K-th place swap ranks, so only this boundary enters the loss.

    Args:
        margin: Lead in logits that selected experts should have.
    """

    def __init__(self, margin: float = 0.1) -> None:
        super().__init__()
        if not 0 <= margin < math.inf:
            raise ValueError(f"margin={margin} (--model.router_loss.margin) is not a finite number from 0 on")
        self.margin = margin

    def forward(self, student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
        ids = teacher.topk(top_k, dim=-1).indices
        weakest = student.gather(-1, ids).amin(-1)
        strongest = student.scatter(-1, ids, -torch.inf).amax(-1)
        return (self.margin + strongest - weakest).clamp(min=0)


class SelectionKL(RouterLoss):
    """KL divergence of the routers' softmax distributions, teacher || student.

    Args:
        temperature: Divisor of both sets of logits.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"temperature={temperature} (--model.router_loss.temperature) is not a finite number above 0"
            )
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, top_k: int) -> Tensor:
        log_p = (teacher / self.temperature).log_softmax(-1)
        log_q = (student / self.temperature).log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
