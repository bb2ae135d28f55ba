"""Baselines for PESF from other work: uniform truncation, EES and ODP. Each decides token by token.

All three treat prompt and generated tokens alike. They scale a token's surviving weights to the sum of all its weights,
as their authors' programs do; `survivors="keep"` leaves the weights unchanged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.routing import Routing
from eacmoe_lightning.skipping.apply import current_rule
from eacmoe_lightning.skipping.rules import Decision, Place, Rule
from eacmoe_lightning.skipping.selection import drop
from eacmoe_lightning.skipping.session import check_attention
from eacmoe_lightning.skipping.tokens import Tokens

Weights = Literal["keep", "renormalize"]


@dataclass(frozen=True)
class Truncation(Rule):
    """Every token runs its `top_k` experts of largest weight.

    Args:
        top_k: number of experts per token; None: ceil(2K / 3), the baseline that any rule has to beat.
        survivors: what happens to the weights of the remaining experts, `renormalize` or `keep`.
    """

    name: ClassVar[str] = "truncation"
    top_k: int | None = None
    survivors: Weights = "renormalize"

    def __post_init__(self) -> None:
        _check_survivors(self.survivors)

    def check(self, num_blocks: int, top_k: int) -> None:
        if self.top_k is not None and not 1 <= self.top_k <= top_k:
            raise ValueError(f"top_k={self.top_k} is not between 1 and the {top_k} experts that a token selects")

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        num_kept = self.top_k or math.ceil(2 * routing.ids.shape[1] / 3)
        return _decide(routing, _rank(routing.weights) >= num_kept, self.survivors)


@dataclass(frozen=True)
class EES(Rule):
    """Efficient expert skipping (Lu et al. 2024, "Not All Experts are Equal", section 3.3).

    A token's last expert is skipped if its weight, divided by the first expert's, is below the block's ratio.

    Args:
        ratios: one ratio per MoE block; `calibrate` measures them.
        survivors: what happens to the weights of the remaining experts, `renormalize` or `keep`.
    """

    name: ClassVar[str] = "ees"
    ratios: tuple[float, ...] = ()
    survivors: Weights = "renormalize"

    def __post_init__(self) -> None:
        _check_survivors(self.survivors)
        object.__setattr__(self, "ratios", tuple(self.ratios))  # JSON gives a list

    @classmethod
    def calibrate(cls, model: PreTrainedModel, windows: Tensor, batch_size: int = 8, **options):
        """The rule with the paper's ratios: for each block, the median of last weight / first weight over all tokens.

        Args:
            model: the model that will skip experts.
            windows: [S, T] token ids of calibration text.
            batch_size: number of windows in a batch.
            options: the rule's other arguments.

        Raises:
            ValueError: the rule does not fit the model, or there is no window.
        """
        if cls.needs_attention:
            check_attention(MoEModel(model).moe_blocks, cls.name)
        return cls(median_ratios(model, windows, batch_size), **options)

    def check(self, num_blocks: int, top_k: int) -> None:
        if len(self.ratios) != num_blocks:
            raise ValueError(
                f"{self.name} has {len(self.ratios)} ratios and the model {num_blocks} MoE blocks: calibrate the rule "
                f"on this model ({type(self).__name__}.calibrate)"
            )

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        return _decide(routing, self._weak(place, routing), self.survivors)

    def _weak(self, place: Place, routing: Routing) -> Tensor:
        """[N, K] bool: a token's last choice, if its weight is below the block's ratio times the largest weight."""
        weights = routing.weights
        is_last = _rank(weights) == weights.shape[1] - 1
        return is_last & (weights < self.ratios[place.index] * weights.amax(-1, keepdim=True))


@dataclass(frozen=True)
class ODP(EES):
    """Online dynamic pruning (Huang et al. 2024, "MC-MoE", section 3.3): EES that protects a prompt's critical tokens.

    A token's importance is the L1 norm of its input to the MoE block, times the mean attention that it receives from
    itself and the tokens after it. This needs attention weights, so the model uses eager attention while the rule is
    attached.

    Args:
        ratios, survivors: see `EES`.
        protected: share of a prompt's tokens, the most important ones, that run all their experts; 2 % in the paper.
    """

    name: ClassVar[str] = "odp"
    needs_attention: ClassVar[bool] = True
    protected: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.protected <= 1:
            raise ValueError(f"protected={self.protected} is not in [0, 1]: pass the share of a prompt's tokens")

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        dropped = self._weak(place, routing)
        if not tokens.is_step:
            importance = place.inputs.float().abs().sum(-1).view(tokens.shape)
            importance = importance * mean_attention_received(place.attention, tokens.real, tokens.past)
            dropped &= ~most_important(importance, tokens.real, self.protected).view(-1, 1)
        return _decide(routing, dropped, self.survivors)


def mean_attention_received(attention: Tensor, real: Tensor, past: int = 0) -> Tensor:
    """Mean attention [B, T] that each token receives from itself and the real tokens after it.

    Args:
        attention: [B, heads, T, keys]; keys may end with empty places, as those of a static cache do.
        real: [B, T] bool, False for padding.
        past: the place of the first token's key; where a window has fewer keys, these tokens' are the last.
    """
    length, keys = real.shape[1], attention.shape[-1]
    start = past if past + length <= keys else keys - length
    received = (attention.float().mean(1)[..., start : start + length] * real.unsqueeze(-1)).sum(1)
    num_attending = real.flip(1).cumsum(1).flip(1)  # the token itself and the real tokens after it
    return received / num_attending.clamp(min=1)


def most_important(importance: Tensor, real: Tensor, share: float) -> Tensor:
    """[B, T] bool: the most important real tokens of each sequence, the given share of them, rounded down."""
    order = importance.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    return order < (real.sum(1, keepdim=True) * share).floor()


@torch.no_grad()
def median_ratios(model: PreTrainedModel, windows: Tensor, batch_size: int = 8) -> tuple[float, ...]:
    """For each MoE block, the median of smallest weight / largest weight over all tokens of windows [S, T].

    Raises:
        ValueError: there is no window, or the model skips experts, so that these weights are not its router's.
    """
    if windows.ndim != 2:
        raise ValueError(f"windows has the shape {tuple(windows.shape)}: pass token ids [windows, tokens]")
    if current_rule(model) is not None:
        raise ValueError(
            "the model skips experts by a rule, and the ratios are those of all experts: calibrate outside of the "
            "`with` block, or after set_skipping(model, None)"
        )
    if not len(windows):
        raise ValueError("no calibration window: the ratios are medians over tokens, so pass at least one window")
    blocks = MoEModel(model).moe_blocks
    ratios: list[list[Tensor]] = [[] for _ in blocks]
    handles = [
        block.watch_router(
            lambda routing, _, collected=block_ratios: collected.append(
                routing.weights.amin(-1) / routing.weights.amax(-1)
            )
        )
        for block, block_ratios in zip(blocks, ratios, strict=True)
    ]
    try:
        for batch in windows.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(float(torch.cat(block_ratios).float().median()) for block_ratios in ratios)


def _rank(weights: Tensor) -> Tensor:
    """[N, K] weights -> [N, K] rank of each choice by weight, 0 for the largest."""
    return weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _decide(routing: Routing, dropped: Tensor, survivors: Weights) -> Decision:
    chosen = drop(routing.ids, routing.weights, dropped, routing.logits.shape[1], survivors == "renormalize")
    return Decision(*chosen)


def _check_survivors(survivors: str) -> None:
    if survivors not in get_args(Weights):
        raise ValueError(f"survivors={survivors!r} is not one of {', '.join(get_args(Weights))}")
