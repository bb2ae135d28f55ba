"""Skipping in the decode phase, which the paper does not cover: a prompt's selection counts continue as demand."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Demand:
    """PESF-decode (ours).

    Each sequence has a demand d [E] in each block: how often its tokens *selected* each expert, whether or not the
    expert then ran. It starts as the prompt's counts and decays with a half-life of h tokens, so that it follows the
    text. Let m = sum(d) / K be the number of tokens that d remembers:

        start   d = counts * min(1, m_h / m),  m_h = 1 / (1 - 2^(-1/h)): a prompt counts at most like an endless past
        step    d = d * 2^(-1/h), plus 1 for each of the token's K choices
        rare    d_i < alpha * m * K / E, the paper's rule applied to demand
        drop    a rare choice is skipped, unless its weight is at least `rescue` times the token's largest

    A skipped expert returns in two ways: for one token, if the token weights it highly enough, and for the sequence,
    once it is selected often enough. A token's first choice always runs. As a token's choices are added first, a demand
    of up to E / (alpha K) tokens skips nothing. So begin Gemma 4's last blocks, which get a prompt's last token alone
    where `generate` asks for the last logits: their demand is that of the tokens that they ran.

    Args:
        half_life: h, in tokens.
        rescue: in [0, 1]; 1 protects only the first choice, 0 every choice.

    Raises:
        ValueError: an argument is out of its range.
    """

    half_life: float = 128.0
    rescue: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.half_life < float("inf"):
            raise ValueError(f"half_life={self.half_life} must be a positive number of tokens (decode)")
        check_rescue(self.rescue)

    @property
    def retention(self) -> float:
        """The factor by which a count decays with each token."""
        return 2 ** (-1 / self.half_life)

    def start(self, counts: Tensor, top_k: int) -> Tensor:
        """[B, E] counts of a prompt -> [B, E] float32 demand."""
        tokens = counts.sum(1, keepdim=True) / top_k
        most = 1 / (1 - self.retention)
        return counts.float() * (most / tokens.clamp(min=most))

    def step(self, demand: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """[B, E] demand after one more token with choices [B, K]; `real` [B] is False if that token is padding."""
        choices = real.to(demand.dtype).unsqueeze(1).expand(ids.shape)
        return (demand * self.retention).scatter_add_(1, ids, choices)


def frequent(demand: Tensor, alpha: float) -> Tensor:
    """[B, E] demand -> [B, E] bool, the experts that are not rare: d_i >= alpha * sum(d) / E."""
    return demand * demand.shape[1] >= demand.sum(1, keepdim=True) * alpha


def rescued(weights: Tensor, rescue: float) -> Tensor:
    """[N, K] weights -> [N, K] bool: at least `rescue` times the token's largest."""
    return weights >= rescue * weights.amax(-1, keepdim=True)


def check_rescue(rescue: float) -> None:
    """Raises ValueError unless it is in [0, 1]."""
    if isinstance(rescue, bool) or not isinstance(rescue, int | float) or not 0 <= rescue <= 1:
        raise ValueError(
            f"rescue={rescue!r} is not in [0, 1]: a rare expert runs for a token that gives it at least this share of "
            "its largest weight; 1 protects only the token's first choice"
        )
