"""Expert-shift, the share of selections that a compressed model changes (EAC-MoE, section 3), and expert loads."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

RATES = ("any", "half", "all")


def num_changed(original: Tensor, ids: Tensor) -> Tensor:
    """[N]: how many of each token's K original experts are no longer selected; the order of experts is ignored."""
    kept = (original.unsqueeze(-1) == ids.unsqueeze(-2)).any(-1).sum(-1)
    return original.shape[-1] - kept


def change_counts(original: Tensor, ids: Tensor) -> Tensor:
    """[4] int64: numbers of tokens with any, at least half and all selections changed; number of changed selections."""
    changed, top_k = num_changed(original, ids), original.shape[-1]
    return torch.stack([(changed > 0).sum(), (2 * changed >= top_k).sum(), (changed == top_k).sum(), changed.sum()])


def change_rates(counts: Tensor, num_tokens: float, top_k: int) -> dict[str, float]:
    """The paper's three change rates per token, and `selections`, the share of selections changed."""
    rates = {name: float(count) / max(num_tokens, 1) for name, count in zip(RATES, counts[:3].tolist(), strict=True)}
    return {**rates, "selections": float(counts[3]) / max(num_tokens * top_k, 1)}


def expert_load(ids: Tensor, num_experts: int) -> Tensor:
    """[E] int64: tokens routed to each expert."""
    return torch.bincount(ids.flatten(), minlength=num_experts)[:num_experts]


class ExpertShift(Metric):
    """Change rates of each block, accumulated over batches and processes.

    Args:
        top_k: by MoE block, the experts per token.
    """

    full_state_update = False

    def __init__(self, top_k: list[int]) -> None:
        super().__init__()
        self.top_k = top_k
        self.add_state("counts", torch.zeros(len(top_k), 4, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros(len(top_k), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, original: list[Tensor], ids: list[Tensor], first: int = 0) -> None:
        """Adds expert ids [N, K] of both models, one tensor for each block from `first` on."""
        for block, (a, b) in enumerate(zip(original, ids, strict=True), start=first):
            self.counts[block] += change_counts(a, b)
            self.tokens[block] += len(a)

    def compute(self) -> list[dict[str, float]]:
        """The rates of each block."""
        blocks = zip(self.counts, self.tokens.tolist(), self.top_k, strict=True)
        return [change_rates(counts, tokens, top_k) for counts, tokens, top_k in blocks]


def mean_rates(blocks: list[dict[str, float]]) -> dict[str, float]:
    """The mean over blocks of each rate."""
    return {name: sum(block[name] for block in blocks) / len(blocks) for name in blocks[0]} if blocks else {}
