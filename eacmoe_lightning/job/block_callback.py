"""Callback hooks that Lightning lacks: a phase starts or ends, a block is finished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from eacmoe_lightning.run.block_file import BlockStats


class BlockCallback(Callback):
    """A callback with hooks for blocks and phases.

    `phase` is one of `calibration.blocks.PHASES` and comes with a block index, or it is `joint`, `write` or `evaluate`
    and the block is None.
    """

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None: ...

    def on_phase_end(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None: ...

    def on_block_end(self, trainer: Trainer, module: LightningModule, stats: BlockStats) -> None:
        """`stats` is what `Calibration.leave` returns."""


def tell(trainer: Trainer, hook: str, *args: Any) -> None:
    """Calls `hook` on every `BlockCallback` of the trainer."""
    for callback in trainer.callbacks:
        if isinstance(callback, BlockCallback):
            getattr(callback, hook)(trainer, trainer.lightning_module, *args)


@contextmanager
def phase(trainer: Trainer, block: int | None, name: str) -> Iterator[None]:
    """Calls `on_phase_start` before the body and `on_phase_end` after it."""
    tell(trainer, "on_phase_start", block, name)
    yield
    tell(trainer, "on_phase_end", block, name)
