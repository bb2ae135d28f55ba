"""Writes the compressed model at the end of a run, and believes it only once it is read back."""

from __future__ import annotations

import shutil

import torch
from lightning.pytorch import Callback, Trainer

from eacmoe_lightning import compressed
from eacmoe_lightning.callbacks.block_callback import phase
from eacmoe_lightning.exports import export
from eacmoe_lightning.qesc import QESC
from eacmoe_lightning.store import StoreError
from eacmoe_lightning.streaming import StreamedModel


class CompressedModel(Callback):
    """`compressed/` in the run directory: read back, and its logits compared with those of the run's own blocks.

    A model that is not quantized and has the same number of experts in every block is an ordinary one: `dense/` holds
    it as every program loads it.

    Raises:
        StoreError: a weight is not quantized, or the reloaded logits differ at all.
    """

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch >= module.num_epochs and trainer.is_global_zero:
            with phase(trainer, None, "write"):
                self.write(trainer, module)
        trainer.strategy.barrier()

    @torch.no_grad()
    def write(self, trainer: Trainer, module: QESC) -> None:
        run, finished = module.run, module.finished()
        moe = StreamedModel(finished, module.device)
        description = {
            "method": "qesc" if module.router_method != "none" else module.recipe.quantizer,
            "router_method": module.router_method,
            **{name: value for name, value in vars(module.recipe).items() if name != "bits"},
            **({"pruning": vars(module.pruning)} if module.pruning else {}),
        }
        blocks = (finished.quantized(block.index) for block in moe.blocks)
        compressed.save(run.compressed, moe, module.name_or_path, blocks, description)

        tokens = trainer.datamodule.calibration_windows[:1, :128].to(moe.device)
        here = moe.logits(tokens)
        there = StreamedModel(compressed.CompressedWeights(run.compressed), moe.device).logits(tokens)
        if not torch.equal(here, there):
            raise StoreError(
                f"{run.compressed} does not give the logits of the model that was written: they differ by up to "
                f"{(here - there).abs().max():.3g}. This is a defect of eacmoe-lightning; the run's blocks are kept"
            )
        if module.recipe.quantizer == "none" and len({block.num_experts for block in moe.moe_blocks}) == 1:
            shutil.rmtree(run.dense, ignore_errors=True)
            export(str(run.path), str(run.dense), "dense")
