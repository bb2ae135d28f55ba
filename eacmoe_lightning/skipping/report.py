"""What was skipped: counted on the model's device while it runs, read when somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eacmoe_lightning.skipping.tokens import Tokens

if TYPE_CHECKING:
    from eacmoe_lightning.skipping.rules import Decision

PREFILL, DECODE = "prefill", "decode"
MOST_STEPS = 4096  # decisions of single tokens that wait to be counted


class SkipReport:
    """Sums over the forward passes since the rule was attached or `clear` was called; padding does not count."""

    FIELDS = ("pairs", "dropped", "sequence_experts", "sequence_skipped", "batch_experts", "batch_untouched")

    def __init__(self, num_experts: list[int]) -> None:
        self.num_experts = num_experts  # of each MoE block
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # by phase: [blocks, fields] float64
        self.steps: list[tuple[int, Tensor, Tensor, Tensor | None]] = []  # of decoding, not yet counted

    def add(self, block: int, tokens: Tokens, decision: Decision) -> None:
        """Counts one block's decision: no host sync. Steps of decoding are put aside and counted many at a time."""
        ids = decision.ids.view(*tokens.shape, -1)
        if not tokens.is_step:
            kept = decision.kept if decision.kept is None else decision.kept[None]
            return self._count(PREFILL, block, ids[None], tokens.real[None], kept)
        self.steps.append((block, ids, tokens.real, decision.kept))
        if len(self.steps) >= MOST_STEPS:
            self._count_steps()

    def _count_steps(self) -> None:
        alike: dict[tuple, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        for block, ids, real, kept in self.steps:
            alike.setdefault((block, ids.shape, kept is None), []).append((ids, real, kept))
        self.steps = []
        for (block, _, is_full), decisions in alike.items():
            ids, real, kept = zip(*decisions, strict=True)
            self._count(DECODE, block, torch.stack(ids), torch.stack(real), None if is_full else torch.stack(kept))

    def _count(self, phase: str, block: int, ids: Tensor, real: Tensor, kept: Tensor | None) -> None:
        """Adds M decisions: ids [M, B, T, K], real [M, B, T], kept [M, B, E]."""
        num_experts = self.num_experts[block]
        if phase not in self.sums:
            shape = len(self.num_experts), len(self.FIELDS)
            self.sums[phase] = torch.zeros(shape, device=ids.device, dtype=torch.float64)
        pairs = real.sum() * ids.shape[-1]
        found = [pairs, ((ids == num_experts) & real.unsqueeze(-1)).sum()]
        if kept is not None:
            filled = real.any(2)  # [M, B]; a sequence of padding alone skips nothing and says nothing
            unused = ~kept | ~filled.unsqueeze(2)
            found += [filled.sum() * num_experts, (unused & filled.unsqueeze(2)).sum()]
            found += [filled.any(1).sum() * num_experts, (unused.all(1) & filled.any(1, keepdim=True)).sum()]
        self.sums[phase][block, : len(found)] += torch.stack(found).to(self.sums[phase].device)

    def summary(self, phase: str = PREFILL) -> dict[str, float]:
        """Shares over all blocks.

        `pairs_dropped`: of the selected (token, expert) pairs, those not run. `experts_skipped`: of the (sequence,
        expert) pairs, those skipped: in a batch only these are saved. `experts_untouched`: of the experts, those that
        no sequence of the batch uses, whose weights are not even read. Plus the absolute numbers behind them.
        """
        self._count_steps()
        totals = dict.fromkeys(self.FIELDS, 0.0)
        if phase in self.sums:
            totals = dict(zip(self.FIELDS, self.sums[phase].sum(0).tolist(), strict=True))
        return _shares(totals)

    def blocks(self, phase: str = PREFILL) -> list[dict[str, float]]:
        """`summary` for each block by itself."""
        self._count_steps()
        if phase not in self.sums:
            return []
        return [_shares(dict(zip(self.FIELDS, row, strict=True))) for row in self.sums[phase].tolist()]

    def __str__(self) -> str:
        self._count_steps()
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
