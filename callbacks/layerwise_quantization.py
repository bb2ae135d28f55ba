"""Drives `calibration.Calibration` through the run: before a block's epochs, its attention; after them, its experts."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

from eacmoe_lightning.callbacks.block_callback import tell
from eacmoe_lightning.qesc import QESC


class LayerwiseQuantization(Callback):
    """Quantizes each block around the epochs that calibrate its router, as the module's recipe says.

    A run that is resumed in the middle of an epoch enters through `on_train_batch_start`, one that was cut off behind
    an epoch's last batch through `on_train_epoch_end`: entering a block is idempotent.
    """

    def on_train_start(self, trainer: Trainer, module: QESC) -> None:
        module.calibration.on_phase = lambda block, phase: tell(trainer, "on_phase_start", block, phase)

    def on_train_epoch_start(self, trainer: Trainer, module: QESC) -> None:
        module.enter_block()
        if not module.is_joint and trainer.current_epoch % module.router_epochs == 0:
            with module.calibration.phase("router"):
                module.start_router()

    def on_train_batch_start(self, trainer: Trainer, module: QESC, batch, batch_idx: int) -> None:
        module.enter_block()

    def on_train_epoch_end(self, trainer: Trainer, module: QESC) -> None:
        if module.is_last_pass:
            module.enter_block()
            key = f"block_{module.block_index:03d}"
            stats = module.calibration.leave(module.routers[key].detach() if key in module.routers else None)
            tell(trainer, "on_block_end", stats)

    def on_train_end(self, trainer: Trainer, module: QESC) -> None:
        if trainer.current_epoch >= module.num_epochs:
            module.enter_block()  # a run resumed behind its last epoch has not loaded the blocks yet
            module.put_trained()
