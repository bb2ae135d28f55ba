"""The end-of-run hook for removing experts for good."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from eacmoe_lightning.analysis.selection import selection_frequency
from eacmoe_lightning.qesc import QESC


class ExpertPruning(Callback):
    """Names the experts that the paper's frequency rule would remove (EAC-MoE, section 4.3, over a whole text).

    Expert i of a block with E experts and top_k K falls under the rule when its load is below
    alpha * tokens * K / E. The report lists them (`pruning`); weights are left as they are for now.

    Args:
        alpha: 0 to 1; null: the callback does nothing.
    """

    def __init__(self, alpha: float | None = None) -> None:
        if alpha is not None and not 0 < alpha <= 1:
            raise ValueError(f"alpha={alpha} (--pruning.alpha) is not in (0, 1]")
        self.alpha = alpha
        self.candidates: dict[int, list[int]] = {}

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if self.alpha is None or trainer.current_epoch < module.num_epochs:
            return
        for stats in module.block_stats():
            if "expert_load" in stats:
                frequency = selection_frequency(stats["expert_load"]["original"])
                rare = frequency < self.alpha / len(frequency)
                self.candidates[stats["block"]] = rare.nonzero().flatten().tolist()
