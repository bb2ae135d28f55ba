"""Drives `calibration.blocks.Calibration`: quantizes a block's attention before its epochs, its experts after them."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from eacmoe_lightning.job.block_callback import tell
from eacmoe_lightning.job.qesc import QESC


class LayerwiseQuantization(Callback):
    """Quantizes each block by the module's recipe, before and after the epochs that calibrate its router.

    Lightning skips `on_train_epoch_start` when a run resumes in the middle of an epoch or after its last batch. So the
    work of an epoch starts with its first batch, and entering a block twice changes nothing.
    """

    def on_train_batch_start(self, trainer: Trainer, module: QESC, batch, batch_idx: int) -> None:
        module.walk.enter_block()
        if batch_idx == 0:
            tell(trainer, "on_phase_start", *self._training_phase(module))
            module.walk.start_stage()

    def on_train_epoch_end(self, trainer: Trainer, module: QESC) -> None:
        module.refuse_divergence()
        done, all_batches = trainer.fit_loop.epoch_loop.batch_progress.current.processed, trainer.num_training_batches
        if done < all_batches:
            raise ValueError(
                f"a callback or signal has stopped the epoch after {done} of {all_batches} batches (should_stop), and "
                "half an epoch would leave another model. Nothing is lost: --ckpt_path auto goes on"
            )
        module.walk.end_pass()
        tell(trainer, "on_phase_end", *self._training_phase(module))
        if module.epochs.leaves_block(module.current_epoch):
            tell(trainer, "on_block_end", module.walk.leave_block())

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch >= module.num_epochs:
            module.walk.enter_end()

    @staticmethod
    def _training_phase(module: QESC) -> tuple[int | None, str]:
        return (None, "joint") if module.epoch.stage == "joint" else (module.block_index, module.epoch.stage)
