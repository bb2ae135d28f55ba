"""PESF as pure functions (EAC-MoE, section 3.3): who is selected how often, who is skipped, what survivors weigh.

Letters as everywhere; B is sequences here, T tokens per sequence, so N = B*T tokens are the rows of a router's output.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Survivors = Literal["keep", "renormalize", "reroute"]
FINEST = 10**6  # alpha is read as a fraction with at most this denominator


def exact(alpha: float) -> Fraction:
    """Alpha as the fraction that its decimal digits say: 0.3 is 3/10, so that thresholds are compared in integers."""
    return Fraction(str(alpha)).limit_denominator(FINEST)


def skip_counts(ids: Tensor, real: Tensor, num_experts: int) -> Tensor:
    """How often each sequence's tokens selected each expert.

    Args:
        ids: [B, T, K] selected experts.
        real: [B, T] bool, False for padding, which never counts.
        num_experts: E.

    Returns:
        [B, E] int64.
    """
    ones = real.long().unsqueeze(-1).expand_as(ids)
    counts = ids.new_zeros(len(ids), num_experts, dtype=torch.int64)
    return counts.scatter_add_(1, ids.flatten(1), ones.flatten(1))


def kept_experts(counts: Tensor, lengths: Tensor, top_k: int, alpha: float) -> Tensor:
    """EAC-MoE: expert i is skipped for a sequence of l tokens when c_i < alpha * l * K / E; exact for every l.

    Counts are integers, so while alpha * l * K / E <= 1 (l <= E / (alpha * K): 34 tokens of a model with 20 experts,
    top-2, at 0.3) only experts that nobody selected are skipped: a short sequence loses nothing. A sequence without
    real tokens skips no expert.

    Args:
        counts: [B, E] int64.
        lengths: [B] int64, l of each sequence, without padding.
        top_k: K.
        alpha: between 0 and 1.

    Returns:
        [B, E] bool.
    """
    share = exact(alpha)
    num_experts = counts.shape[1]
    return counts * (num_experts * share.denominator) >= (lengths * (top_k * share.numerator)).unsqueeze(1)


def dropped_pairs(ids: Tensor, kept: Tensor) -> Tensor:
    """[B, T, K] selections and [B, E] kept experts -> [B, T, K] bool, the pairs that are not run."""
    return ~kept.gather(1, ids.flatten(1)).view(ids.shape)


def drop(
    ids: Tensor, weights: Tensor, dropped: Tensor, num_experts: int, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Marks pairs as not to be run: id E, weight 0.

    Args:
        ids, weights: [N, K].
        dropped: [N, K] bool.
        num_experts: E.
        renormalize: whether a token's surviving weights are scaled to what all its weights summed to; otherwise they
            stay, and the token's routed output shrinks.
    """
    survivors = weights.masked_fill(dropped, 0)
    if renormalize:
        total, left = weights.sum(-1, keepdim=True), survivors.sum(-1, keepdim=True)
        scaled = survivors * (total / left.where(left > 0, torch.ones_like(left)))
        survivors = torch.where(dropped.any(-1, keepdim=True), scaled, survivors)
    return ids.masked_fill(dropped, num_experts), survivors


def reroute(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    dropped: Tensor,
    kept: Tensor,
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Sends tokens with dropped pairs to their next-best kept experts, by logit; other tokens are left as they are.

    Where fewer than K experts are kept, what is missing stays dropped.

    Args:
        logits: [N, E] of the router.
        ids, weights: [N, K], its choice.
        dropped: [N, K] bool, the pairs that may not run.
        kept: [N, E] bool, the experts that each token may use.
        weigh: (logits [N, E], ids [N, K]) -> [N, K], the router's rule for weights.
    """
    num_experts, top_k = logits.shape[1], ids.shape[1]
    score = logits.float().masked_fill(~kept, -torch.inf)
    survivors = torch.zeros_like(kept).scatter(1, ids, ~dropped)  # own choices come first, whatever a bias made of them
    score = score.masked_fill(survivors, torch.inf)
    top, chosen = score.topk(top_k, -1)
    changed, missing = dropped.any(-1, keepdim=True), top == -torch.inf
    new_weights = weigh(logits, chosen).to(weights.dtype).masked_fill(missing, 0)
    new_ids = chosen.masked_fill(missing, num_experts)
    return torch.where(changed, new_ids, ids), torch.where(changed, new_weights, weights)
