"""A progress bar for the whole run, with block, phase and remaining time."""

from __future__ import annotations

import time

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from eacmoe_lightning.calibration.blocks import PHASES
from eacmoe_lightning.job.block_callback import BlockCallback
from eacmoe_lightning.job.qesc import QESC


class BlockProgress(TQDMProgressBar, BlockCallback):
    """In `fit`, one bar over all epochs that names the block and the phase and estimates the remaining time.

    In all other commands it is Lightning's bar.
    """

    def on_train_start(self, trainer: Trainer, module: QESC) -> None:
        self.started, self.first_block = time.monotonic(), module.block_index
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.reset(module.num_epochs)
        self._show(trainer.current_epoch, "starting")

    def on_phase_start(self, trainer: Trainer, module: QESC, block: int | None, phase: str) -> None:
        if block is None:
            self._show(trainer.current_epoch, "all routers together" if phase == "joint" else phase)
            self.train_progress_bar.set_postfix_str("")
            return
        num_blocks = len(module.moe.blocks)
        self._show(trainer.current_epoch, f"block {block + 1}/{num_blocks} {phase}")
        done = block + PHASES.index(phase) / len(PHASES) - self.first_block
        if done > 0:
            seconds = (time.monotonic() - self.started) / done * (num_blocks - self.first_block - done)
            self.train_progress_bar.set_postfix_str(f"blocks {self.train_progress_bar.format_interval(seconds)} left")

    def on_train_epoch_start(self, trainer: Trainer, *_) -> None:
        """The bar is updated by phase, not by epoch."""

    def on_train_batch_end(self, trainer: Trainer, *_) -> None:
        """A batch is too small a step for this bar."""

    def on_train_epoch_end(self, trainer: Trainer, module: QESC) -> None:
        self._show(trainer.current_epoch + 1, self.train_progress_bar.desc.rstrip(": "))

    def _show(self, epochs: int, description: str) -> None:
        self.train_progress_bar.n = epochs
        self.train_progress_bar.set_description(description)
