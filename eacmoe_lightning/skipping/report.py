"""What was skipped: counted on the model's device while it runs, read when somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eacmoe_lightning.skipping.tokens import Tokens

if TYPE_CHECKING:
    from eacmoe_lightning.skipping.rules import Decision

PREFILL, DECODE = "prefill", "decode"


class SkipReport:
    """Sums over the forward passes since the rule was attached or `clear` was called; padding does not count."""

    FIELDS = ("pairs", "dropped", "sequence_experts", "sequence_skipped", "batch_experts", "batch_untouched")

    def __init__(self, num_experts: list[int]) -> None:
        self.num_experts = num_experts  # of each MoE block
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # by phase: [blocks, fields] float64

    def add(self, block: int, tokens: Tokens, decision: Decision) -> None:
        """Counts one block's decision: no host sync."""
        num_experts = self.num_experts[block]
        phase = DECODE if tokens.is_step else PREFILL
        ids = decision.ids.view(*tokens.shape, -1)
        if phase not in self.sums:
            self.sums[phase] = torch.zeros(
                len(self.num_experts), len(self.FIELDS), device=ids.device, dtype=torch.float64
            )
        pairs = tokens.real.sum() * ids.shape[-1]
        dropped = ((ids == num_experts) & tokens.real.unsqueeze(-1)).sum()
        kept = decision.kept
        nothing = torch.zeros_like(pairs)
        if kept is None:
            sequences, skipped, batch, untouched = nothing, nothing, nothing, nothing
        else:
            filled = tokens.real.any(1)  # a sequence of padding alone skips nothing and says nothing
            sequences, batch = filled.sum() * num_experts, filled.any() * num_experts
            skipped = (~kept & filled.unsqueeze(1)).sum()
            untouched = (~kept | ~filled.unsqueeze(1)).all(0).sum() * filled.any()
        self.sums[phase][block] += torch.stack([pairs, dropped, sequences, skipped, batch, untouched])

    def summary(self, phase: str = PREFILL) -> dict[str, float]:
        """Shares over all blocks.

        `pairs_dropped`: of the selected (token, expert) pairs, those not run. `experts_skipped`: of the (sequence,
        expert) pairs, those skipped: in a batch only these are saved. `experts_untouched`: of the experts, those that
        no sequence of the batch uses, whose weights are not even read. Plus the absolute numbers behind them.
        """
        totals = dict.fromkeys(self.FIELDS, 0.0)
        if phase in self.sums:
            totals = dict(zip(self.FIELDS, self.sums[phase].sum(0).tolist(), strict=True))
        return _shares(totals)

    def blocks(self, phase: str = PREFILL) -> list[dict[str, float]]:
        """`summary` for each block by itself."""
        if phase not in self.sums:
            return []
        return [_shares(dict(zip(self.FIELDS, row, strict=True))) for row in self.sums[phase].tolist()]

    def __str__(self) -> str:
        lines = []
        for phase in self.sums:
            s = self.summary(phase)
            lines.append(
                f"{phase}: {s['pairs_dropped']:.1%} of {s['pairs']:.0f} (token, expert) pairs were not run; "
                f"{s['experts_skipped']:.1%} of (sequence, expert) pairs were skipped, and "
                f"{s['experts_untouched']:.1%} of the experts by every sequence of their batch"
            )
        return "\n".join(lines) or "nothing has run"


def _shares(totals: dict[str, float]) -> dict[str, float]:
    shares = {
        "pairs_dropped": totals["dropped"] / max(totals["pairs"], 1),
        "experts_skipped": totals["sequence_skipped"] / max(totals["sequence_experts"], 1),
        "experts_untouched": totals["batch_untouched"] / max(totals["batch_experts"], 1),
    }
    return shares | totals
