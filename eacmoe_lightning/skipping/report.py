"""What was skipped: counted on the model's device while it runs, copied to the host only when the report is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eacmoe_lightning.skipping.tokens import Tokens

if TYPE_CHECKING:
    from eacmoe_lightning.skipping.rules import Decision

PREFILL, DECODE = "prefill", "decode"
MOST_STEPS = 4096  # decisions of decoding steps that are collected before they are counted


class SkipReport:
    """Sums over all forward passes since the rule was attached or `clear` was called, without padding."""

    FIELDS = ("pairs", "dropped", "sequence_experts", "sequence_skipped", "batch_experts", "batch_untouched")

    def __init__(self, num_experts: list[int]) -> None:
        self.num_experts = num_experts  # per MoE block
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}  # by phase: [blocks, fields] float64
        self.steps: list[tuple[int, Tensor, Tensor, Tensor | None]] = []  # decoding steps, not yet counted

    def add(self, block: int, tokens: Tokens, decision: Decision) -> None:
        """Counts one block's decision without a host sync. Decoding steps are collected and counted in batches."""
        ids = decision.ids.view(*tokens.shape, -1)
        if not tokens.is_step:
            kept = decision.kept if decision.kept is None else decision.kept[None]
            return self._count(PREFILL, block, ids[None], tokens.real[None], kept)
        self.steps.append((block, ids, tokens.real, decision.kept))
        if len(self.steps) >= MOST_STEPS:
            self._count_steps()

    def _count_steps(self) -> None:
        groups: dict[tuple, list[tuple[Tensor, Tensor, Tensor | None]]] = {}
        for block, ids, real, kept in self.steps:
            groups.setdefault((block, ids.shape, kept is None), []).append((ids, real, kept))
        self.steps = []
        for (block, _, is_full), decisions in groups.items():
            ids, real, kept = zip(*decisions, strict=True)
            self._count(DECODE, block, torch.stack(ids), torch.stack(real), None if is_full else torch.stack(kept))

    def _count(self, phase: str, block: int, ids: Tensor, real: Tensor, kept: Tensor | None) -> None:
        """Adds M decisions of one block: ids [M, B, T, K], real [M, B, T], kept [M, B, E], or a row for each text."""
        num_experts = self.num_experts[block]
        if phase not in self.sums:
            shape = len(self.num_experts), len(self.FIELDS)
            self.sums[phase] = torch.zeros(shape, device=ids.device, dtype=torch.float64)
        pairs = real.sum() * ids.shape[-1]
        counts = [pairs, ((ids == num_experts) & real.unsqueeze(-1)).sum()]
        if kept is not None:
            filled = real.any(2)  # [M, B]; a sequence of padding alone is not counted
            if kept.shape[1] != real.shape[1]:  # texts, which have no padding
                filled = kept.new_ones(kept.shape[:2])
            unused = ~kept | ~filled.unsqueeze(2)
            counts += [filled.sum() * num_experts, (unused & filled.unsqueeze(2)).sum()]
            counts += [filled.any(1).sum() * num_experts, (unused.all(1) & filled.any(1, keepdim=True)).sum()]
        self.sums[phase][block, : len(counts)] += torch.stack(counts).to(self.sums[phase].device)

    def summary(self, phase: str = PREFILL) -> dict[str, float]:
        """Shares over all blocks, and the counts that they are computed from.

        `pairs_dropped`: share of the selected (token, expert) pairs that did not run.
        `experts_skipped`: share of the (sequence, expert) pairs that were skipped.
        `experts_untouched`: share of the experts that no sequence of a batch used, so that their weights were not read.
        """
        self._count_steps()
        totals = dict.fromkeys(self.FIELDS, 0.0)
        if phase in self.sums:
            totals = dict(zip(self.FIELDS, self.sums[phase].sum(0).tolist(), strict=True))
        return _shares(totals)

    def blocks(self, phase: str = PREFILL) -> list[dict[str, float]]:
        """`summary` of each block."""
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
        return "\n".join(lines) or "nothing has run yet"


def _shares(totals: dict[str, float]) -> dict[str, float]:
    shares = {
        "pairs_dropped": totals["dropped"] / max(totals["pairs"], 1),
        "experts_skipped": totals["sequence_skipped"] / max(totals["sequence_experts"], 1),
        "experts_untouched": totals["batch_untouched"] / max(totals["batch_experts"], 1),
    }
    return shares | totals
