"""Removes experts for good: the rule goes to the run, which applies it block by block; the report tells what went.

A block is pruned inside the run, as soon as the full-precision block has run over the calibration text, and not after
the last block: so pruned experts are never quantized, the experts that stay are quantized on the tokens that now reach
them, the router is calibrated towards the original's logits of the experts that stay, and all later blocks, as well as
the joint stage, are calibrated on what the pruned prefix really produces. With `--model.quantizer none` it is the same
run without quantization.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Trainer

from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC
from eacmoe_lightning.pruning.rule import PruningRule
from eacmoe_lightning.run.block_file import BlockStats


class ExpertPruning(BlockCallback):
    """Removes the experts that matter least to the calibration text; without alpha and keep it does nothing.

    Router rows, correction biases and experts go together. With `keep`, or wherever blocks end up with the same number,
    the model has an ordinary config; where the numbers differ, this package loads it.

    Args:
        criterion: frequency (how many tokens select an expert: EAC-MoE, section 4.3) or reap (the mean of router
            weight times norm of the output over these tokens: REAP).
        alpha: Experts below this share of their block's mean go; top_k of a block stay at least.
        keep: Instead, how many experts stay in each block.
    """

    def __init__(
        self,
        criterion: Literal["frequency", "reap"] = "frequency",
        alpha: float | None = None,
        keep: int | None = None,
    ) -> None:
        is_off = alpha is None and keep is None
        self.rule = None if is_off else PruningRule(criterion, alpha, keep)

    def on_block_end(self, trainer: Trainer, module: QESC, stats: BlockStats) -> None:
        if stats.pruning is not None:
            scalars = {
                "pruning/experts": len(stats.pruning.kept),
                "pruning/removed_selections": stats.pruning.removed_selections,
            }
            for logger in trainer.loggers:
                logger.log_metrics(scalars, step=stats.block)
