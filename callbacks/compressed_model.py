"""Writes the compressed model at the end of a run, and believes it only once it is read back."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer

from eacmoe_lightning import compressed
from eacmoe_lightning.callbacks.block_callback import phase
from eacmoe_lightning.qesc import QESC
from eacmoe_lightning.store import StoreError


class CompressedModel(Callback):
    """`compressed/` in the run directory: reloaded, and its logits compared with the model in memory.

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
        moe, run = module.moe, module.run
        blocks = module.quantized_blocks()
        for block, quantized in zip(moe.blocks, blocks, strict=True):
            if missing := block.weights().keys() - quantized.keys():
                raise StoreError(f"{sorted(missing)[0]} was not quantized, so no model is written")
        description = {
            "method": "qesc" if module.router_method != "none" else module.recipe.quantizer,
            "router_method": module.router_method,
            **{name: value for name, value in vars(module.recipe).items() if name != "bits"},
        }
        compressed.save(run.compressed, moe, module.name_or_path, blocks, description)

        tokens = trainer.datamodule.calibration_windows[:1, :128].to(moe.device)
        reloaded = compressed.load(run.compressed, packed=False).to(moe.device)
        here, there = moe.model(tokens, use_cache=False).logits, reloaded(tokens, use_cache=False).logits
        if not torch.equal(here, there):
            raise StoreError(
                f"{run.compressed} does not give the logits of the model that was written: they differ by up to "
                f"{(here - there).abs().max():.3g}. This is a defect of eacmoe-lightning; the run's blocks are kept"
            )
