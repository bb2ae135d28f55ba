"""Hooks that Lightning does not have: a phase begins or ends, a block is done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from eacmoe_lightning.run.block_file import BlockStats


class BlockCallback(Callback):
    """A callback that is told of blocks and phases.

    `phase` is one of `calibration.PHASES` with the index of a block, or `joint`, `write` or `evaluate` with None.
    """

    def on_phase_start(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None: ...

    def on_phase_end(self, trainer: Trainer, module: LightningModule, block: int | None, phase: str) -> None: ...

    def on_block_end(self, trainer: Trainer, module: LightningModule, stats: BlockStats) -> None:
        """`stats` as `Calibration.leave` returns them."""


def tell(trainer: Trainer, hook: str, *args: Any) -> None:
    """Calls a hook of every BlockCallback of the trainer."""
    for callback in trainer.callbacks:
        if isinstance(callback, BlockCallback):
            getattr(callback, hook)(trainer, trainer.lightning_module, *args)


@contextmanager
def phase(trainer: Trainer, block: int | None, name: str) -> Iterator[None]:
    """Tells of a phase around what is done inside."""
    tell(trainer, "on_phase_start", block, name)
    yield
    tell(trainer, "on_phase_end", block, name)
