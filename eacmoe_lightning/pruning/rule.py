"""Chooses the experts of a block that stay, given their scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from eacmoe_lightning.models.block import Block
from eacmoe_lightning.models.experts import Groups
from eacmoe_lightning.models.moe import MoEModel
from eacmoe_lightning.models.shrink import has_table
from eacmoe_lightning.pruning.scores import CRITERIA


def keeps_all(block: Block) -> str | None:
    """Why no expert of a block can be removed; None if some can."""
    if not block.calibrates:
        return "its router has no matrix with one row per expert"
    return "its router looks experts up by token id" if has_table(block) else None


@dataclass(frozen=True)
class PruningRule:
    """Keeps the best experts of every block: a fixed number, or all with a high enough score.

    Attributes:
        criterion: `frequency` or `reap`; see `scores`.
        alpha: experts with a score below alpha times the block's mean are removed. For `frequency` this is the paper's
            rule c_i < alpha * l * K / E (EAC-MoE, section 4.3) over the whole calibration text. A block keeps at least
            its top_k best experts, because each token selects that many; `below_alpha` names the ones that only stay
            for this reason.
        keep: number of experts that stay in each block, instead of alpha; `auto`: as the size of the run says
            (`budget.target`).
        kept: by block, the experts that stay, if they are known already; `keep` is their number.

    Raises:
        ValueError: the criterion is unknown, alpha is outside (0, 1], not exactly one of alpha and keep is given, or
            kept does not name `keep` different experts for each of its blocks.
    """

    criterion: str = "frequency"
    alpha: float | None = None
    keep: int | Literal["auto"] | None = None
    kept: dict[int, list[int]] | None = None

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r} (--pruning.criterion) is not one of {', '.join(CRITERIA)}")
        if (self.alpha is None) == (self.keep is None):
            raise ValueError(
                f"alpha={self.alpha} (--pruning.alpha) and keep={self.keep} (--pruning.keep): pass one of them"
            )
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} (--pruning.alpha) is not in (0, 1]")
        for block, kept in (self.kept or {}).items():
            if len(set(kept)) != len(kept) or len(kept) != self.keep:
                raise ValueError(
                    f"kept[{block}]={kept} (--pruning.kept) does not name keep={self.keep} (--pruning.keep) different "
                    "experts"
                )

    def record(self) -> dict[str, Any]:
        """The options."""
        return {name: value for name, value in vars(self).items() if name != "kept"}

    def check(self, moe: MoEModel) -> None:
        """Raises ValueError if this rule does not fit the model; called before anything is computed."""
        for block in moe.moe_blocks:
            if (reason := keeps_all(block)) is not None:
                raise ValueError(f"{block.name}: {reason}, so no expert can be removed")
            if self.alpha is not None and (number := Groups.of(block).number) > 1:
                raise ValueError(
                    f"{block.name} routes by {number} groups of experts, which must stay equal in size: pass "
                    "--pruning.keep instead of --pruning.alpha"
                )
            if isinstance(self.keep, int):
                self._check_keep(block, self.keep)
        if self.kept is not None:
            self._check_kept(moe.moe_blocks, self.kept)

    @staticmethod
    def _check_keep(block: Block, keep: int) -> None:
        groups = Groups.of(block)
        if not block.top_k <= keep <= block.num_experts:
            raise ValueError(
                f"keep={keep} (--pruning.keep) is not between top_k={block.top_k}, which every token selects, and "
                f"num_experts={block.num_experts}"
            )
        if keep % groups.number:
            raise ValueError(
                f"keep={keep} (--pruning.keep) is not a multiple of the {groups.number} groups by which {block.name} "
                "routes"
            )
        if (least := groups.least(block.top_k)) > keep // groups.number:
            raise ValueError(
                f"keep={keep} (--pruning.keep) leaves {keep // groups.number} experts in each of the {groups.number} "
                f"groups by which {block.name} routes, but {least} are needed"
            )

    @staticmethod
    def _check_kept(blocks: list[Block], kept: dict[int, list[int]]) -> None:
        if sorted(kept) != (indices := [block.index for block in blocks]):
            raise ValueError(
                f"kept (--pruning.kept) names experts of the blocks {sorted(kept)}: name those of {indices}, the "
                "blocks with experts"
            )
        for block in blocks:
            experts, number = kept[block.index], block.num_experts
            if unknown := sorted(set(experts) - set(range(number))):
                raise ValueError(
                    f"kept[{block.index}] (--pruning.kept): there is no expert {unknown[0]}, only 0 to {number - 1}"
                )
            groups = Groups.of(block).number
            in_group = Counter(e * groups // number for e in experts)
            if set(in_group.values()) != {len(experts) // groups}:
                raise ValueError(
                    f"kept[{block.index}] (--pruning.kept) does not name equally many experts of each of the {groups} "
                    f"groups by which {block.name} routes"
                )

    def choose(self, scores: Tensor, top_k: int, num_groups: int = 1) -> list[int]:
        """The experts that stay, in ascending order. Among equal scores, the first ones stay.

        Args:
            scores: [E].
            top_k: number of experts that a token selects.
            num_groups: number of groups of consecutive experts; each group keeps the same number.
        """
        if self.alpha is not None:
            best = scores.argsort(descending=True, stable=True)[:top_k]
            is_kept = scores >= self.alpha * scores.mean()
            is_kept[best] = True
            return is_kept.nonzero().flatten().tolist()
        order = scores.view(num_groups, -1).argsort(dim=-1, descending=True, stable=True)
        best = order[:, : self.keep // num_groups]
        first = torch.arange(num_groups, device=scores.device)[:, None] * (len(scores) // num_groups)
        return (best + first).flatten().sort().values.tolist()

    def below_alpha(self, scores: Tensor, kept: list[int]) -> list[int]:
        """The experts in `kept` that alpha would remove, and that stay because a token selects top_k."""
        return [] if self.alpha is None else [e for e in kept if scores[e] < self.alpha * scores.mean()]
