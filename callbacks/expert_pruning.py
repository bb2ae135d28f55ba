"""Removes experts permanently: the calibration applies the rule block by block, and the report lists what it removed.

A block is pruned as soon as the full-precision block has run on the calibration text, not after the last block. So
pruned experts are never quantized. The experts that stay are quantized on the tokens that now reach them, and the
router is calibrated towards the original's logits of these experts. All later blocks and the joint stage are calibrated
on the hidden states of the pruned prefix. `--model.quantizer none` prunes without quantizing.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch import Callback

from eacmoe_lightning.pruning.rule import PruningRule


class ExpertPruning(Callback):
    """Removes the experts that matter least on the calibration text; without alpha and keep it does nothing.

    An expert is removed with its router row and its correction bias. If all blocks keep the same number of experts, as
    with `keep`, the model has an ordinary config. Otherwise only this package can load it.

    Args:
        criterion: Score of an expert: frequency (number of tokens that select it; EAC-MoE, section 4.3) or reap (mean
            of router weight times output norm over these tokens; REAP).
        alpha: Removes the experts that score below this share of their block's mean; a block keeps at least top_k.
        keep: Number of experts that each block keeps; used instead of alpha. auto, with --model.target_bits or
            target_gb: the number with which the model of this size loses least.

    Raises:
        ValueError: `PruningRule` refuses the arguments, or a criterion is given without alpha and keep.
    """

    def __init__(
        self,
        criterion: Literal["frequency", "reap"] = "frequency",
        alpha: float | None = None,
        keep: int | Literal["auto"] | None = None,
    ) -> None:
        is_off = alpha is None and keep is None
        if is_off and criterion != "frequency":
            raise ValueError(
                f"criterion={criterion} (--pruning.criterion) removes nothing by itself: pass --pruning.keep or "
                "--pruning.alpha as well"
            )
        self.rule = None if is_off else PruningRule(criterion, alpha, keep)
