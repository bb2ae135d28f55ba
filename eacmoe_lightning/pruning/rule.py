"""Which experts of a block stay, given their scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.shrink import Groups
from eacmoe_lightning.pruning.scores import CRITERIA


@dataclass(frozen=True)
class PruningRule:
    """Keeps the best experts of every block: a fixed number, or all that are good enough.

    Attributes:
        criterion: `frequency` or `reap`; see `scores`.
        alpha: experts below alpha times the block's mean score go. For `frequency` that is the paper's rule
            c_i < alpha * l * K / E (EAC-MoE, section 4.3) over the whole calibration text. A block keeps its top_k best
            at least, since a token selects as many: `below_alpha` says which ones only for that.
        keep: instead, experts that stay in each block.

    Raises:
        ValueError: an unknown criterion, alpha outside (0, 1], or not exactly one of alpha and keep.
    """

    criterion: str = "frequency"
    alpha: float | None = None
    keep: int | None = None

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r} (--pruning.criterion) is none of {', '.join(CRITERIA)}")
        if (self.alpha is None) == (self.keep is None):
            raise ValueError(
                f"alpha={self.alpha} (--pruning.alpha) and keep={self.keep} (--pruning.keep): pass one of them"
            )
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} (--pruning.alpha) is not in (0, 1]")

    def check(self, moe: MoEModel) -> None:
        """Raises ValueError, before anything is computed, for a model that this rule does not fit."""
        for block in moe.moe_blocks:
            groups = Groups.of(block)
            if self.alpha is not None:
                if groups.number > 1:
                    raise ValueError(
                        f"{block.name} routes by {groups.number} groups of experts, which must stay equally large: "
                        "pass --pruning.keep instead of --pruning.alpha"
                    )
                continue
            if not moe.top_k <= self.keep <= block.num_experts:
                raise ValueError(
                    f"keep={self.keep} (--pruning.keep) is not between top_k={moe.top_k}, which every token selects, "
                    f"and num_experts={block.num_experts}"
                )
            if self.keep % groups.number:
                raise ValueError(
                    f"keep={self.keep} (--pruning.keep) is not a multiple of the {groups.number} groups by which "
                    f"{block.name} routes"
                )
            if (least := groups.least(moe.top_k)) > self.keep // groups.number:
                raise ValueError(
                    f"keep={self.keep} (--pruning.keep) leaves {self.keep // groups.number} experts in each of the "
                    f"{groups.number} groups by which {block.name} routes; {least} are needed"
                )

    def choose(self, scores: Tensor, top_k: int, num_groups: int = 1) -> list[int]:
        """The experts that stay, in their order. Of equal scores the first stays.

        Args:
            scores: [E].
            top_k: experts that a token selects.
            num_groups: consecutive groups of experts that keep equally many.
        """
        if self.alpha is not None:
            best = scores.argsort(descending=True, stable=True)[:top_k]
            stays = scores >= self.alpha * scores.mean()
            stays[best] = True
            return stays.nonzero().flatten().tolist()
        order = scores.view(num_groups, -1).argsort(dim=-1, descending=True, stable=True)
        best = order[:, : self.keep // num_groups]
        first = torch.arange(num_groups, device=scores.device)[:, None] * (len(scores) // num_groups)
        return (best + first).flatten().sort().values.tolist()

    def below_alpha(self, scores: Tensor, kept: list[int]) -> list[int]:
        """Those of `choose` that alpha would remove, and that stay because a token selects top_k."""
        return [] if self.alpha is None else [e for e in kept if scores[e] < self.alpha * scores.mean()]
