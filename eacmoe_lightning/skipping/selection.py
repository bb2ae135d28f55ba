"""PESF as pure functions (EAC-MoE, section 3.3): selection counts, skipped experts, weights of the survivors.

B is the number of sequences and T the tokens per sequence; the N = B*T tokens are the rows of a router's output.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

Survivors = Literal["keep", "renormalize", "reroute"]
FINEST = 10**6  # largest denominator of alpha as a fraction


def exact(alpha: float) -> Fraction:
    """Alpha as the fraction of its decimal digits: 0.3 is 3/10, so that thresholds are compared in integers."""
    return Fraction(str(alpha)).limit_denominator(FINEST)


def skip_counts(ids: Tensor, real: Tensor, num_experts: int) -> Tensor:
    """How often the tokens of each sequence selected each expert.

    Args:
        ids: [B, T, K] selected experts.
        real: [B, T] bool, False for padding, which is not counted.
        num_experts: E.

    Returns:
        [B, E] int64.
    """
    ones = real.long().unsqueeze(-1).expand_as(ids)
    counts = ids.new_zeros(len(ids), num_experts, dtype=torch.int64)
    return counts.scatter_add_(1, ids.flatten(1), ones.flatten(1))


def kept_experts(counts: Tensor, lengths: Tensor, top_k: int, alpha: float) -> Tensor:
    """EAC-MoE: a sequence of l tokens skips expert i if c_i < alpha * l * K / E. The comparison is exact.

    Counts are integers. While alpha * l * K / E <= 1, only experts that no token selected are skipped, so a short
    sequence loses nothing: up to l = E / (alpha * K), which is 33 tokens for 20 experts, top-2 and alpha = 0.3. A
    sequence without real tokens skips no expert.

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
    """[B, T, K] selections and [B, E] kept experts -> [B, T, K] bool, the pairs that do not run."""
    return ~kept.gather(1, ids.flatten(1)).view(ids.shape)


def drop(
    ids: Tensor, weights: Tensor, dropped: Tensor, num_experts: int, renormalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Marks dropped pairs with id E and weight 0.

    Args:
        ids, weights: [N, K].
        dropped: [N, K] bool.
        num_experts: E.
        renormalize: whether a token's surviving weights are scaled to the sum of all its weights. If not, they stay
            unchanged and the token's routed output shrinks.
    """
    survivors = weights.masked_fill(dropped, 0)
    if renormalize:
        total, surviving = weights.sum(-1, keepdim=True), survivors.sum(-1, keepdim=True)
        scaled = survivors * (total / surviving.where(surviving > 0, torch.ones_like(surviving)))
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
    """Sends tokens with dropped pairs to their next-best kept experts, by logit. Other tokens stay unchanged.

    If fewer than K experts are kept, the missing pairs stay dropped.

    Args:
        logits: [N, E] router logits.
        ids, weights: [N, K], the router's choice.
        dropped: [N, K] bool, the pairs that may not run.
        kept: [N, E] bool, the experts that each token may use.
        weigh: (logits [N, E], ids [N, K]) -> [N, K], the router's computation of weights.
    """
    num_experts, top_k = logits.shape[1], ids.shape[1]
    score = logits.float().masked_fill(~kept, -torch.inf)
    # The router may have chosen the survivors by a bias and not by logits alone: they come first in any case.
    survivors = torch.zeros_like(kept).scatter(1, ids, ~dropped)
    score = score.masked_fill(survivors, torch.inf)
    top, chosen = score.topk(top_k, -1)
    changed, missing = dropped.any(-1, keepdim=True), top == -torch.inf
    new_weights = weigh(logits, chosen).to(weights.dtype).masked_fill(missing, 0)
    new_ids = chosen.masked_fill(missing, num_experts)
    return torch.where(changed, new_ids, ids), torch.where(changed, new_weights, weights)
