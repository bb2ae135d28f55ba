"""Two hooks that Lightning does not have: a phase of a block begins, a block is done."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class BlockCallback(Callback):
    """A callback that is told of blocks and phases by `LayerwiseQuantization`."""

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int, phase: str) -> None:
        """`phase` is one of `calibration.PHASES`."""

    def on_block_end(self, trainer: Trainer, module: LightningModule, stats: dict[str, Any]) -> None:
        """`stats` as `Calibration.leave` returns them."""


def tell(trainer: Trainer, hook: str, *args: Any) -> None:
    """Calls a hook of every BlockCallback of the trainer."""
    for callback in trainer.callbacks:
        if isinstance(callback, BlockCallback):
            getattr(callback, hook)(trainer, trainer.lightning_module, *args)
