"""How much each expert of a block is worth, measured while the full-precision block runs over the calibration text.

- `frequency`: c_i, the tokens that select expert i (EAC-MoE, section 4.3)
- `reap`: 1/|X_i| * sum over x in X_i of g_i(x) ||f_i(x)||_2 (REAP, arXiv 2510.13999, equation 9): X_i the tokens
  that select i, g_i the weight that the router gives it, f_i what it returns; 0 where nothing selects it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.routers.expert_shift import expert_load
from eacmoe_lightning.run.ranks import Ranks

CRITERIA = ("frequency", "reap")


class ExpertScores:
    """Sums over the tokens of any number of batches and processes.

    Attributes:
        load: [E] int64, tokens that selected each expert.
        contribution: [E] float64, sums of weight times norm of the output.
    """

    def __init__(self, block: Block, criterion: str) -> None:
        self.block, self.criterion = block, criterion
        device = block.router_weight.device
        self.load = torch.zeros(block.num_experts, dtype=torch.int64, device=device)
        self.contribution = torch.zeros(block.num_experts, dtype=torch.float64, device=device)

    def add(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Counts N tokens.

        Args:
            x: [N, D] what the experts read.
            ids: [N, K] the experts selected.
            weights: [N, K] their weights.
        """
        self.load += expert_load(ids, self.block.num_experts)
        if self.criterion == "reap":
            for expert in range(self.block.num_experts):
                tokens, slots = (ids == expert).nonzero(as_tuple=True)
                norms = self.block.experts.output(x[tokens], expert).float().norm(dim=-1)
                self.contribution[expert] += (weights[tokens, slots].double() * norms.double()).sum()

    def finish(self, ranks: Ranks) -> Tensor:
        """[E] float64 scores over all processes."""
        load = ranks.sum(self.load)
        if self.criterion == "frequency":
            return load.double()
        return ranks.sum(self.contribution) / load.clamp(min=1)


@contextmanager
def measured(block: Block, criterion: str) -> Iterator[ExpertScores]:
    """While the block runs inside, its experts are scored by what reaches them."""
    scores = ExpertScores(block, criterion)

    def add(module, args) -> None:
        hidden, ids, weights = args
        scores.add(hidden.reshape(-1, hidden.shape[-1]), ids, weights)

    handle = block.experts.module.register_forward_pre_hook(add)
    try:
        yield scores
    finally:
        handle.remove()
