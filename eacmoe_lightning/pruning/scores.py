"""The score of each expert of a block, measured while the block runs over the calibration text.

- `frequency`: c_i, the number of tokens that select expert i (EAC-MoE, section 4.3)
- `reap`: 1/|X_i| * sum over x in X_i of g_i(x) ||f_i(x)||_2 (REAP, arXiv 2510.13999, equation 9), where X_i are the
  tokens that select i, g_i is its router weight and f_i its output; 0 if no token selects it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
        load: [E] int64, the number of tokens that selected each expert.
        contribution: [E] float64, for each expert the sum of router weight times norm of the output.
    """

    def __init__(self, block: Block, criterion: str) -> None:
        self.block, self.criterion = block, criterion
        device = block.experts.weight("down_proj").device
        self.load = torch.zeros(block.num_experts, dtype=torch.int64, device=device)
        self.contribution = torch.zeros(block.num_experts, dtype=torch.float64, device=device)

    def add(self, x: Tensor, ids: Tensor, weights: Tensor) -> None:
        """Adds N tokens.

        Args:
            x: [N, D], the experts' input.
            ids: [N, K], the selected experts.
            weights: [N, K], their weights.
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
def measured(
    block: Block, criterion: str, counted: Sequence[Callable[[Tensor], Tensor]] = ()
) -> Iterator[ExpertScores]:
    """Scores the block's experts by their inputs while the block runs inside the `with` block.

    Args:
        counted: for each pass of the block, what takes from values [n, ...] those of tokens that count; empty: all do.
    """
    scores, passes = ExpertScores(block, criterion), iter(counted)

    def add(module, args) -> None:
        hidden, ids, weights = args
        tokens = hidden.reshape(-1, hidden.shape[-1]), ids, weights
        scores.add(*map(next(passes), tokens) if counted else tokens)

    handle = block.experts.module.register_forward_pre_hook(add)
    try:
        yield scores
    finally:
        handle.remove()
