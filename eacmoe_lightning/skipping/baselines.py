"""Rules of others, to measure PESF against: uniform truncation, EES and ODP. They look at one token at a time.

All three treat prompt and generated tokens alike, and scale what is left of a token's weights to their sum, as their
authors' programs do; `survivors="keep"` leaves the weights as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eacmoe_lightning.models.block import Routing
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.skipping.rules import Decision, Place, Rule
from eacmoe_lightning.skipping.selection import drop
from eacmoe_lightning.skipping.tokens import Tokens

Weights = Literal["keep", "renormalize"]


@dataclass(frozen=True)
class Truncation(Rule):
    """Every token runs its `top_k` experts of largest weight.

    Args:
        top_k: how many; None: ceil(2K / 3), the baseline that any rule has to beat.
        survivors: `renormalize` or `keep`.
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
        left = self.top_k or math.ceil(2 * routing.ids.shape[1] / 3)
        return _decide(routing, _rank(routing.weights) >= left, self.survivors)


@dataclass(frozen=True)
class EES(Rule):
    """Efficient expert skipping (Lu et al. 2024, "Not All Experts are Equal", section 3.3).

    A token's last expert does not run when its weight is under a block's ratio to the first.

    Args:
        ratios: of each MoE block; `calibrate` measures them.
        survivors: `renormalize` or `keep`.
    """

    name: ClassVar[str] = "ees"
    ratios: tuple[float, ...] = ()
    survivors: Weights = "renormalize"

    def __post_init__(self) -> None:
        _check_survivors(self.survivors)
        object.__setattr__(self, "ratios", tuple(self.ratios))  # a list, where it comes from JSON

    @classmethod
    def calibrate(cls, model: PreTrainedModel, windows: Tensor, batch_size: int = 8, **options):
        """The rule with the paper's ratios: per block the median of last weight / first weight over all tokens.

        Args:
            model: the model that will skip.
            windows: [S, T] token ids of calibration text.
            batch_size: windows at a time.
            options: the rule's other arguments.
        """
        return cls(median_ratios(model, windows, batch_size), **options)

    def check(self, num_blocks: int, top_k: int) -> None:
        if len(self.ratios) != num_blocks:
            raise ValueError(
                f"{self.name} has {len(self.ratios)} ratios and the model {num_blocks} MoE blocks: calibrate it on "
                f"this model ({type(self).__name__}.calibrate)"
            )

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        return _decide(routing, self._weak(place, routing), self.survivors)

    def _weak(self, place: Place, routing: Routing) -> Tensor:
        """[N, K] bool, a token's last choice where its weight is under the ratio to the first."""
        weights = routing.weights
        is_last = _rank(weights) == weights.shape[1] - 1
        return is_last & (weights < self.ratios[place.index] * weights.amax(-1, keepdim=True))


@dataclass(frozen=True)
class ODP(EES):
    """Online dynamic pruning (Huang et al. 2024, "MC-MoE", section 3.3): EES that protects a prompt's critical tokens.

    A token's importance is the L1 norm of the MoE block's input times the mean attention that it receives from itself
    and the tokens after it. It needs attention weights, so the model runs with eager attention meanwhile.

    Args:
        ratios, survivors: as of `EES`.
        protected: the share of a prompt's most important tokens that run in full; the paper's is 2 %.
    """

    name: ClassVar[str] = "odp"
    needs_attention: ClassVar[bool] = True
    protected: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.protected <= 1:
            raise ValueError(f"protected={self.protected} is not in [0, 1]: it is a share of tokens")

    def decide(self, place: Place, routing: Routing, tokens: Tokens) -> Decision:
        dropped = self._weak(place, routing)
        if not tokens.is_step:
            importance = place.inputs.float().abs().sum(-1).view(tokens.shape)
            importance = importance * mean_attention_received(place.attention, tokens.real)
            dropped &= ~most_important(importance, tokens.real, self.protected).view(-1, 1)
        return _decide(routing, dropped, self.survivors)


def mean_attention_received(attention: Tensor, real: Tensor) -> Tensor:
    """Attention [B, heads, T, past + T], real tokens [B, T] -> [B, T]: from real tokens, a mean over all that may."""
    received = (attention.float().mean(1)[..., -real.shape[1] :] * real.unsqueeze(-1)).sum(1)
    behind = real.flip(1).cumsum(1).flip(1)  # itself and real tokens after it
    return received / behind.clamp(min=1)


def most_important(importance: Tensor, real: Tensor, share: float) -> Tensor:
    """[B, T] bool: in each sequence the given share of its real tokens, rounded down."""
    order = importance.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True).argsort(dim=1)
    return order < (real.sum(1, keepdim=True) * share).floor()


@torch.no_grad()
def median_ratios(model: PreTrainedModel, windows: Tensor, batch_size: int = 8) -> tuple[float, ...]:
    """Per MoE block the median over all tokens of [S, T] windows of smallest weight / largest weight."""
    if not len(windows):
        raise ValueError("no calibration window: the ratios are medians over its tokens")
    blocks = MoEModel(model).moe_blocks
    ratios: list[list[Tensor]] = [[] for _ in blocks]
    handles = [
        block.router.register_forward_hook(lambda m, a, out, own=own: own.append(out[1].amin(-1) / out[1].amax(-1)))
        for block, own in zip(blocks, ratios, strict=True)
    ]
    try:
        for batch in windows.split(batch_size):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(float(torch.cat(own).float().median()) for own in ratios)


def _rank(weights: Tensor) -> Tensor:
    """[N, K] -> each choice's place in the order of weights, 0 the largest."""
    return weights.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def _decide(routing: Routing, dropped: Tensor, survivors: Weights) -> Decision:
    chosen = drop(routing.ids, routing.weights, dropped, routing.logits.shape[1], survivors == "renormalize")
    return Decision(*chosen)


def _check_survivors(survivors: str) -> None:
    if survivors not in get_args(Weights):
        raise ValueError(f"survivors={survivors!r} is none of {', '.join(get_args(Weights))}")
